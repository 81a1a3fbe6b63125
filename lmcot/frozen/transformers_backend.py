"""The frozen LM on transformers: causal and encoder-decoder models, in this process."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Literal, Self

from lmcot.config import PromptSettings, TransformersFrozen
from lmcot.frozen.local import LocalLM, digest_of
from lmcot.frozen.needs import Found, Needs
from lmcot.models.generation.engine import GenerationEngine
from lmcot.models.generation.shared import SharedEngine
from lmcot.models.sources import count_parameters, eos_ids, load_model, load_tokenizer
from lmcot.records import Usage

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


class TransformersLM(LocalLM):
    """A `FrozenLM` that runs a model and tokenizer that are already loaded.

    At most ``max_batch_tokens`` tokens go through the model at once, the keys and values of at most
    ``max_cached_tokens`` are held, and a prefix that prompts of one call share is read once. The
    result of a prompt does not depend on the other prompts of its call, up to rounding; the same
    calls give the same results.

    Args:
        identity: names the model and its arithmetic.
        chat: ``auto`` renders prompts with the tokenizer's chat template where it has one.
        together: requests of all calling threads are batched as they arrive, and results repeat
            up to rounding; otherwise only one thread at a time may call it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        identity: str,
        chat: Literal["auto", "never"],
        max_batch_tokens: int,
        max_cached_tokens: int = 32768,
        together: bool = False,
    ) -> None:
        engine = GenerationEngine(
            model.eval(),
            pad_id=tokenizer.pad_token_id or 0,
            max_batch_tokens=max_batch_tokens,
            max_cached_tokens=max_cached_tokens,
        )
        super().__init__(
            SharedEngine(engine) if together else engine,
            tokenizer,
            identity=identity,
            chat=chat,
            eos_ids=eos_ids(model, tokenizer),
            parameters=count_parameters(model),
            encoder_decoder=bool(model.config.is_encoder_decoder),
        )

    @classmethod
    def open(cls, settings: TransformersFrozen, prompts: PromptSettings) -> Self:
        """Loads the weights.

        Raises:
            UserError: if there is no model at the source.
        """
        model, tokenizer = load_model(settings.source, settings.dtype)
        chat = settings.chat_of(prompts)
        return cls(
            model,
            tokenizer,
            identity=_identity(settings.source, model, tokenizer, chat),
            chat=chat,
            max_batch_tokens=settings.max_batch_tokens,
            max_cached_tokens=settings.max_cached_tokens,
            together=not settings.isolates_calls,
        )

    @classmethod
    def check(
        cls, settings: TransformersFrozen, needs: Needs, spend: Callable[[Usage], None]
    ) -> Found:
        """Reads the tokenizer; nothing is asked.

        Raises:
            UserError: if there is no model at the source.
        """
        load_tokenizer(settings.source)
        return Found(settings)


def _identity(
    source: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, chat: str
) -> str:
    """Names the source and the arithmetic, with a digest of the content."""
    arithmetic = f"{str(model.dtype).removeprefix('torch.')} on {model.device.type}"
    digest = digest_of(model.named_parameters(), tokenizer, chat)
    return f"transformers:{source}:{arithmetic}:{digest}"
