"""From settings to a frozen LM."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from typing import TYPE_CHECKING

from lmcot.config import OpenAIFrozen, PromptSettings, TransformersFrozen
from lmcot.errors import UserError
from lmcot.frozen.cache import ReplyCache, cache_path
from lmcot.frozen.cached import CachedLM
from lmcot.frozen.needs import Found, Needs
from lmcot.records import Usage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lmcot.frozen.openai.backend import OpenAILM
    from lmcot.frozen.transformers_backend import TransformersLM

_CALLS_AT_ONCE = 32


def open_frozen_lm(
    settings: TransformersFrozen | OpenAIFrozen, prompts: PromptSettings
) -> CachedLM:
    """The frozen LM that the settings name, loaded and ready, behind its cache.

    Raises:
        UserError: if its weights do not load, its package or API key is missing, or the cache
            cannot be opened.
    """
    cache = None
    if settings.cache.enabled:
        path, size = cache_path(settings.cache.folder), int(settings.cache.max_gib * 2**30)
        cache = ReplyCache(path, size)
    if settings.backend == "openai":
        endpoint = _open_endpoint(settings)
        return CachedLM(endpoint, cache, whole_calls=False, repeats=endpoint.repeats)
    local = _open_local(settings, prompts)
    alone = calls_at_once(settings) == 1
    return CachedLM(local, cache, whole_calls=alone, notice=local.notice)


def calls_at_once(settings: TransformersFrozen | OpenAIFrozen) -> int:
    """How many calls of different clients one frozen LM takes at the same time.

    One, where the arithmetic of a call must not depend on the others.
    """
    alone = settings.backend == "transformers" and settings.batching == "unit"
    return 1 if alone else _CALLS_AT_ONCE


def _open_local(settings: TransformersFrozen, prompts: PromptSettings) -> TransformersLM:
    # Imported here: torch and transformers are heavy, and an endpoint's client needs none of them.
    from lmcot.frozen.transformers_backend import TransformersLM
    from lmcot.models.sources import load_model

    model, tokenizer = load_model(settings.source, settings.dtype)
    return TransformersLM(
        model,
        tokenizer,
        identity=_identity(settings.source, model, tokenizer, prompts.chat),
        chat=prompts.chat,
        max_batch_tokens=settings.max_batch_tokens,
        max_cached_tokens=settings.max_cached_tokens,
        together=settings.batching == "dynamic",
    )


def _identity(
    source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: str
) -> str:
    """Names the source, with a digest of what it held: a folder may be written again.

    Of each weight some thousand elements are looked at: training leaves none as it was, and
    reading all of a large model would take longer than loading it.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        some = flat[:: max(1, flat.numel() // 1024)].float().cpu().numpy()
        digest.update(f"{name}:{tuple(parameter.shape)}".encode() + some.tobytes())
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest.update(f"{vocabulary}:{tokenizer.chat_template}:{chat}".encode())
    arithmetic = f"{str(model.dtype).removeprefix('torch.')} on {model.device.type}"
    return f"transformers:{source}:{arithmetic}:{digest.hexdigest()[:16]}"


def check_frozen_lm(
    settings: TransformersFrozen | OpenAIFrozen,
    needs: Needs,
    spend: Callable[[Usage], None] = lambda usage: None,
) -> Found:
    """Checks what can be told without loading weights; an endpoint is asked what the run will ask.

    Args:
        spend: takes each request to an endpoint into account; what it raises ends the check.

    Raises:
        UserError: if there is no model at the source, or the package or API key is missing, or
            the endpoint does not answer.
    """
    if settings.backend == "openai":
        _require_openai()
        from lmcot.frozen.openai.check import check_endpoint

        return check_endpoint(settings, needs, spend)
    from lmcot.models.sources import load_tokenizer

    load_tokenizer(settings.source)
    return Found(settings)


def _open_endpoint(settings: OpenAIFrozen) -> OpenAILM:
    _require_openai()
    from lmcot.frozen.openai.backend import OpenAILM

    return OpenAILM(settings)


def _require_openai() -> None:
    if importlib.util.find_spec("openai") is None:
        raise UserError(
            "frozen.backend is 'openai', but the package openai is not installed: "
            "run pip install 'lmcot[openai]'"
        )
