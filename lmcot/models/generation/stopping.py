"""Stop rules on text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TOKENS_PER_CHARACTER = 4
"""Maximum tokens per character, at one byte each."""
_SLACK = 8
"""Additional tokens, since some decode to no text."""


class StopStrings:
    """Ends a sample whose text contains one of the strings.

    Only the end of the text is searched, since the rule is called after each token.

    Args:
        ends: confirms, given all tokens of the sample, that it ends at the string that was found.
            If unset, it always ends there.
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
        """Whether the sample ends after these tokens."""
        text = self._tokenizer.decode(tokens[-self._tokens :], skip_special_tokens=True)
        if not any(string in text for string in self._strings):
            return False
        return self._ends is None or self._ends(tokens)
