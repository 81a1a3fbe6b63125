"""The frozen LM on vLLM, in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Self

from lmcot.config import PromptSettings, VllmFrozen
from lmcot.frozen.local import LocalLM, digest_of
from lmcot.frozen.needs import Found, Needs
from lmcot.models.generation.shared import SharedEngine
from lmcot.models.generation.vllm_engine import VllmEngine
from lmcot.models.generation.vllm_start import check_vllm
from lmcot.models.sources import (
    device,
    eos_ids_of,
    load_tokenizer,
    parameters_of,
    resolve_dtype,
    saved_tensors,
)
from lmcot.records import Usage


class VllmLM(LocalLM):
    """A `FrozenLM` on vLLM; requests of all calling threads are batched as they arrive."""

    @classmethod
    def open(cls, settings: VllmFrozen, prompts: PromptSettings) -> Self:
        """Loads the weights.

        Raises:
            UserError: if there is no model at the source, or vLLM does not run it.
        """
        tokenizer = load_tokenizer(settings.source)
        chat = settings.chat_of(prompts)
        engine = VllmEngine(settings.source, settings.dtype, settings)
        dtype = str(resolve_dtype(settings.dtype)).removeprefix("torch.")
        digest = digest_of(saved_tensors(settings.source), tokenizer, chat)
        return cls(
            SharedEngine(engine),
            tokenizer,
            identity=f"vllm:{settings.source}:{dtype} on {device().type}:{digest}",
            chat=chat,
            eos_ids=eos_ids_of(settings.source, tokenizer),
            parameters=parameters_of(settings.source),
        )

    @classmethod
    def check(cls, settings: VllmFrozen, needs: Needs, spend: Callable[[Usage], None]) -> Found:
        """Reads the model's config and tokenizer; nothing is asked.

        Raises:
            UserError: if there is no model at the source, or it is an encoder-decoder.
        """
        load_tokenizer(settings.source)
        check_vllm(
            "frozen.backend is 'vllm'",
            "set it to 'transformers'",
            "frozen.source",
            settings.source,
        )
        return Found(settings)
