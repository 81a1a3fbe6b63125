"""Texts that are nearly the same."""

from __future__ import annotations

import random

from lmcot.text.duplicates import NearDuplicates


def test_the_threshold_is_that_of_the_jaccard_index() -> None:
    """Ten words have eight sequences of three; another last word changes one: 7 of 9."""
    text = "one two three four five six seven eight nine ten"
    other = text.replace("ten", "eleven")
    assert not _both(7 / 9, text, other)
    assert _both(7 / 9 + 1e-9, text, other)


def test_letters_and_signs_do_not_count() -> None:
    assert not _both(1.0, "Velm is old. It lies there.", "velm is old it lies THERE")
    assert not _both(1.0, "Velm", "velm.")
    assert _both(1.0, "Velm", "Ott")
    assert not _both(0.9, "", "")


def test_it_finds_what_a_comparison_of_all_pairs_finds() -> None:
    random.seed(3)
    words = ["a", "b", "c", "d"]
    texts = [" ".join(random.choices(words, k=random.randint(1, 12))) for _ in range(300)]
    for threshold in (0.5, 0.8, 1.0):
        found, kept = NearDuplicates(threshold), list[set[str]]()
        for text in texts:
            split = text.split()
            grams = {" ".join(split[at : at + 3]) for at in range(len(split) - 2)} or {text}
            new = all(len(grams & one) < threshold * len(grams | one) for one in kept)
            assert found.add(text) == new
            if new:
                kept.append(grams)


def _both(threshold: float, *texts: str) -> bool:
    found = NearDuplicates(threshold)
    return [found.add(text) for text in texts][-1]
