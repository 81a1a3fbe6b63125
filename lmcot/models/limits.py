"""A model's limits (positions and token ids), read from its config without loading weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lmcot.errors import UserError
from lmcot.models.sources import load_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_STRETCHED_ALREADY = ("default", "llama3", "longrope")
"""Kinds of rotary scaling whose configs already give the scaled window."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of one model."""

    source: str
    window: int | None
    """Number of positions; None if they have no end."""
    encoder_decoder: bool
    """Whether prompt and reply have separate windows."""

    def fit(self, prompt: int, reply: int) -> bool:
        """Whether a prompt and a reply of these lengths fit in the window."""
        if self.window is None:
            return True
        needed = max(prompt, reply) if self.encoder_decoder else prompt + reply
        return needed <= self.window


def read_limits(source: str, tokenizer: PreTrainedTokenizerBase) -> Limits:
    """Reads the limits of a source's model and checks that the tokenizer fits it.

    Raises:
        UserError: if there is no model at the source, or it lacks an embedding for a token.
    """
    config = load_config(source)
    _check_tokens(source, config, tokenizer)
    return Limits(source, window_of(config), bool(config.is_encoder_decoder))


def window_of(config: Any) -> int | None:
    """The number of positions of a model; None if unlimited, as with T5 and ALiBi.

    Beyond its window, a model with learned positions raises an error. Rotary positions can be
    computed there, but the model was not trained on them.
    """
    text = config.get_text_config(decoder=True)
    window = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    if not isinstance(window, int) or window <= 0:
        return None
    # With scaling per kind of layer (Gemma 3), the config also gives the scaled window.
    scaling = getattr(text, "rope_parameters", None) or {}
    kind = scaling.get("rope_type", "default")
    if kind in _STRETCHED_ALREADY:
        return window
    original = scaling.get("original_max_position_embeddings") or window
    return max(window, int(original * float(scaling.get("factor") or 1.0)))


def _check_tokens(source: str, config: Any, tokenizer: PreTrainedTokenizerBase) -> None:
    """Checks that the model has an embedding for every token that can occur.

    Unused special tokens may lack one: text never contains them, and Gemma 3's tokenizer has
    one for images that its text models lack.
    """
    rows = int(config.get_text_config(decoder=True).vocab_size)
    used = {tokenizer.pad_token_id, tokenizer.eos_token_id, tokenizer.bos_token_id}
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special} - used
    beyond = sorted(
        (number, token)
        for token, number in tokenizer.get_vocab().items()
        if number >= rows and number not in special
    )
    if beyond:
        number, token = beyond[0]
        raise UserError(
            f"the tokenizer of '{source}' has {len(beyond)} tokens for which the model has no "
            f"embedding, among them {token!r} ({number}; the model knows {rows}): resize its "
            "embeddings (model.resize_token_embeddings(len(tokenizer))) and save both again"
        )
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        raise UserError(
            f"the config of '{source}' has no decoder_start_token_id: add the token that its "
            "decoder starts with to config.json"
        )
