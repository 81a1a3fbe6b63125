"""Stop rules on text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENS_PER_CHARACTER = 4
"""A character may take so many tokens, of a byte each."""
_SLACK = 8
"""Tokens more, for some stand for no text at all."""


class StopStrings:
    """Ends a sample whose text holds one of some strings.

    Only the end of the text is looked at, since a sample is told token by token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, strings: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._strings = tuple(strings)
        longest = max(len(string) for string in strings)
        self._tokens = _TOKENS_PER_CHARACTER * longest + _SLACK

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether the text ends here."""
        text = self._tokenizer.decode(tokens[-self._tokens :], skip_special_tokens=True)
        return any(string in text for string in self._strings)
