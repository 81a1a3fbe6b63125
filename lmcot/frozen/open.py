"""From settings to a frozen LM."""

from __future__ import annotations

import importlib.util

from lmcot.config import OpenAIFrozen, PromptSettings, TransformersFrozen
from lmcot.errors import UserError
from lmcot.frozen.protocol import FrozenLM


def open_frozen_lm(
    settings: TransformersFrozen | OpenAIFrozen, prompts: PromptSettings
) -> FrozenLM:
    """The frozen LM that the settings name, loaded and ready.

    Raises:
        UserError: if its weights do not load, or its package or API key is missing.
    """
    # Imported here: torch, transformers and openai are heavy, and one of them is enough.
    if settings.backend == "openai":
        return _open_endpoint(settings)

    from lmcot.frozen.transformers_backend import TransformersLM
    from lmcot.models.sources import load_model

    model, tokenizer = load_model(settings.source, settings.dtype)
    return TransformersLM(
        model,
        tokenizer,
        identity=f"transformers:{settings.source}:{str(model.dtype).removeprefix('torch.')}",
        chat=prompts.chat,
        max_batch_tokens=settings.max_batch_tokens,
        max_cached_tokens=settings.max_cached_tokens,
    )


def check_frozen_lm(settings: TransformersFrozen | OpenAIFrozen) -> None:
    """Checks what can be told without loading weights or asking the endpoint.

    Raises:
        UserError: if there is no model at the source, or the package or API key is missing.
    """
    if settings.backend == "openai":
        _open_endpoint(settings)
    else:
        from lmcot.models.sources import load_tokenizer

        load_tokenizer(settings.source)


def _open_endpoint(settings: OpenAIFrozen) -> FrozenLM:
    if importlib.util.find_spec("openai") is None:
        raise UserError(
            "frozen.backend is 'openai', but the package openai is not installed: "
            "run pip install 'lmcot[openai]'"
        )
    from lmcot.frozen.openai_backend import OpenAILM

    return OpenAILM(settings)
