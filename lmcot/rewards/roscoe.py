"""The ROSCOE scores (Golovneva et al. 2022), which compare sentences by their embeddings.

They are features for `lmcot.rewards.learned` and a baseline for `lmcot.rewards.metrics`.
"""

from __future__ import annotations

from collections.abc import Sequence

from lmcot.models.embeddings import SentenceEmbedder, Vectors
from lmcot.records import Example
from lmcot.text.sentences import split_sentences


def roscoe_scores(
    examples: Sequence[Example], rationales: Sequence[str], embedder: SentenceEmbedder
) -> list[dict[str, float]]:
    """ROSCOE's scores of each rationale, in [0, 1], 1 best; 0 for one without sentences.

    With steps h_i (the rationale's sentences), source s (the context's sentences, without the
    question, which states nothing) and ``align(a -> B) = (1 + max_b cos(a, b)) / 2``:

    - ``faithfulness_step = mean_i align(h_i -> s)``
    - ``informativeness_step = (mean_t align(s_t -> h) + mean_i align(h_i -> s)) / 2``
    - ``repetition_step = (1 - max_{i>=2} max_{j<i} cos(h_i, h_j)) / 2``; 1 for a single step

    As in Golovneva et al. 2022, section 4, but for the embeddings: all-MiniLM-L6-v2 unless the
    settings name another model, where ROSCOE fine-tuned its own.
    """
    steps = [split_sentences(rationale) for rationale in rationales]
    sources = [_source(example) for example in examples]
    embedder.embed(sorted({s for group in (*steps, *sources) for s in group}))  # in few batches
    return [
        _scores(embedder.embed(step), embedder.embed(source))
        for step, source in zip(steps, sources, strict=True)
    ]


ROSCOE_SCORES = ("faithfulness_step", "informativeness_step", "repetition_step")


def _source(example: Example) -> list[str]:
    stripped = (s.strip() for paragraph in example.context for s in paragraph.sentences)
    return [sentence for sentence in stripped if sentence]


def _scores(steps: Vectors, source: Vectors) -> dict[str, float]:
    if not len(steps) or not len(source):
        return dict.fromkeys(ROSCOE_SCORES, 0.0)
    aligned = (1 + steps @ source.T) / 2
    faithfulness = float(aligned.max(axis=1).mean())
    informativeness = (float(aligned.max(axis=0).mean()) + faithfulness) / 2
    repeated = max((float((steps[:i] @ steps[i]).max()) for i in range(1, len(steps))), default=-1)
    values = (faithfulness, informativeness, (1 - repeated) / 2)
    # Rounding may carry a cosine past 1.
    return {n: min(1.0, max(0.0, v)) for n, v in zip(ROSCOE_SCORES, values, strict=True)}
