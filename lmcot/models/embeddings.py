"""Sentence embeddings. Torch is imported only when a model is loaded."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lmcot.errors import UserError

Vectors = NDArray[np.float32]
_BATCH = 32
_REMEMBERED = 16384
"""Number of sentences whose embeddings are kept: 25 MB for all-MiniLM-L6-v2."""


class SentenceEmbedder:
    """A sentence-embedding model: the mean of the last hidden states, of unit length.

    That is how all-MiniLM-L6-v2 was trained (Reimers and Gurevych 2019, "Sentence-BERT"). The
    same sentence has the same embedding in any batch, up to rounding.
    """

    def __init__(
        self, source: str, max_tokens: int = 256, *, setting: str = "rewards.embeddings"
    ) -> None:
        """Loads the model.

        Args:
            source: a hub id, a folder, or ``package:NAME/FOLDER``.
            max_tokens: longer sentences are cut; all-MiniLM-L6-v2 was trained with 256.
            setting: the setting that names the source.

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
                f"{setting} '{source}' is not a sentence-embedding model: {reason}"
            ) from error
        if model.config.is_encoder_decoder:
            raise UserError(
                f"{setting} '{source}' has a decoder, and sentences are embedded by an "
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
