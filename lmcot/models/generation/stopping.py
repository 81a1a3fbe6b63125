"""Stop rules on text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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

    Args:
        ends: whether a sample really ends where one of the strings was found; it is asked for all
            of the sample's tokens. Unset: it does.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        strings: Sequence[str],
        ends: Callable[[Sequence[int]], bool] | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._strings = tuple(strings)
        self._ends = ends
        longest = max(len(string) for string in strings)
        self._tokens = _TOKENS_PER_CHARACTER * longest + _SLACK

    def __call__(self, tokens: Sequence[int]) -> bool:
        """Whether the text ends here."""
        text = self._tokenizer.decode(tokens[-self._tokens :], skip_special_tokens=True)
        if not any(string in text for string in self._strings):
            return False
        return self._ends is None or self._ends(tokens)
