"""The words of a text that carry content."""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from functools import lru_cache

_WORD = re.compile(r"\w+(?:['\u2019]\w+)*")
# Words about the rationale itself ("so the answer is") are not content either.
_FUNCTION_WORD_LIST = """
a an the this that these those some any each every all both either neither such other another
i you he she it we they me him her us them my your his hers its our their theirs who whom whose
which what when where why how there here one ones himself herself itself themselves
am is are was were be been being do does did doing done have has had having will would shall
should can could may might must of in on at by for from to with without into onto over under
about after before between among through during as than then and or but nor not no yes if
because since so also too very only just more most less least same up out off own s t
answer question therefore thus hence first second finally step context according
"""
_FUNCTION_WORDS = frozenset(_FUNCTION_WORD_LIST.split())


@lru_cache(maxsize=1024)  # the samples of a question share its passages
def content_words(text: str) -> Counter[str]:
    """The words and numbers of a text that carry content, lower-cased and counted."""
    return Counter(word for word in words_of(text) if word not in _FUNCTION_WORDS)


def words_of(text: str) -> list[str]:
    """The words and numbers of a text in their order, lower-cased, without a possessive s."""
    words = _WORD.findall(unicodedata.normalize("NFC", text).lower())
    return [re.sub(r"['\u2019]s$", "", word) for word in words]
