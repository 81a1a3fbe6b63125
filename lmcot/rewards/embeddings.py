"""Sentence embeddings, and the ROSCOE scores (Golovneva et al. 2022) that use them.

The scores are features for `lmcot.rewards.learned` and a baseline for `lmcot.rewards.metrics`.
Torch is imported only when a model is loaded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmcot.errors import UserError
from lmcot.records import Example
from lmcot.text.sentences import split_sentences

Vectors = NDArray[np.float32]
_BATCH = 32
_REMEMBERED = 16384
"""Number of sentences whose embeddings are kept: 25 MB for all-MiniLM-L6-v2."""


class SentenceEmbedder:
    """A sentence-embedding model: the mean of the last hidden states, of unit length.

    That is how all-MiniLM-L6-v2 was trained (Reimers and Gurevych 2019, "Sentence-BERT"). The
    same sentence has the same embedding in any batch, up to rounding.
    """

    def __init__(self, source: str, max_tokens: int = 256) -> None:
        """Loads the model.

        Args:
            source: a hub id, a folder, or ``package:NAME/FOLDER``.
            max_tokens: longer sentences are cut; all-MiniLM-L6-v2 was trained with 256.

        Raises:
            UserError: if there is no such model, or it does not load.
        """
        from transformers import AutoModel, AutoTokenizer

        from lmcot.models.sources import device, resolve_source

        resolved = resolve_source(source)
        refuse: dict[str, Any] = {"trust_remote_code": False}
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(resolved, **refuse)
            model = AutoModel.from_pretrained(resolved, use_safetensors=True, **refuse)
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            reason = " ".join(str(error).split())[:300]
            raise UserError(
                f"rewards.embeddings '{source}' is not a sentence-embedding model: {reason}"
            ) from error
        if model.config.is_encoder_decoder:
            raise UserError(
                f"rewards.embeddings '{source}' has a decoder, and sentences are embedded by an "
                "encoder alone: name another model, such as all-MiniLM-L6-v2"
            )
        self._model = model.float().eval().to(device())
        self._max_tokens = max_tokens
        self._known: OrderedDict[str, Vectors] = OrderedDict()

    def embed(self, sentences: Sequence[str]) -> Vectors:
        """One row of unit length for each sentence: shape (sentences, width)."""
        width = int(self._model.config.hidden_size)
        if not sentences:
            return np.zeros((0, width), np.float32)
        # Like lengths go together: little padding.
        new = sorted({s for s in sentences if s not in self._known}, key=lambda s: (len(s), s))
        found: dict[str, Vectors] = {}
        for start in range(0, len(new), _BATCH):
            batch = new[start : start + _BATCH]
            found.update(zip(batch, self._embed(batch), strict=True))
        found.update({s: self._known[s] for s in sentences if s in self._known})
        self._remember(found)
        return np.stack([found[sentence] for sentence in sentences])

    def _embed(self, batch: list[str]) -> Vectors:
        import torch

        inputs = self._tokenizer(
            batch, padding=True, truncation=True, max_length=self._max_tokens, return_tensors="pt"
        ).to(self._model.device)
        with torch.inference_mode():
            states = self._model(**inputs).last_hidden_state
        mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
        mean = (states * mask).sum(1) / mask.sum(1)
        vectors: Vectors = torch.nn.functional.normalize(mean, dim=-1).cpu().numpy()
        return vectors

    def _remember(self, found: dict[str, Vectors]) -> None:
        """Keeps embeddings; the least recently used are dropped first."""
        for sentence, vector in found.items():
            self._known[sentence] = vector
            self._known.move_to_end(sentence)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)


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
