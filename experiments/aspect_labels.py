"""How well each measure of rationale quality agrees with people: ROC-AUC on human labels.

The labels are those of Ye and Durrett 2022 ("The Unreliability of Explanations in Few-Shot
Prompting for Textual Reasoning"): 101 questions of adversarial HotpotQA, two rationales each,
labelled as factual, as consistent, and by whether their answer is correct. Run it as

    python experiments/aspect_labels.py [--frozen SOURCE --cache FILE] > table.md

with ``LMCOT_DATA`` naming the folder of ``rationale-quality-labels.jsonl.gz``. Judgements are
kept in the cache file as they come; the same command goes on from there.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from lmcot.config import GuidanceRewards, PromptSettings, TransformersFrozen
from lmcot.data.prompts import load_templates
from lmcot.files import write_atomically
from lmcot.frozen.open import open_frozen_lm
from lmcot.rewards.aspect_fit import auc, auc_interval, out_of_fold
from lmcot.rewards.aspects import JUDGE_MEASURES, ROSCOE_MEASURES, TEXT_MEASURES
from lmcot.text.content import content_words
from lmcot.tools.fit_aspects import FEATURES, Judge, Rationale, measure, read_rationales

LABELS = {"factual1": "factuality", "consist1": "consistency", "correct1": "correct"}
_AT_ONCE = 20


def main() -> None:
    """Prints the table, in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--frozen", metavar="SOURCE", help="a frozen LM to judge with, in float32")
    parser.add_argument("--cache", type=Path, metavar="FILE", help="where judgements are kept")
    parser.add_argument("--resamples", type=int, default=2000)
    options = parser.parse_args()
    folder = os.environ.get("LMCOT_DATA")
    if folder is None:
        sys.exit("LMCOT_DATA is not set: name the folder of rationale-quality-labels.jsonl.gz")
    rationales = read_rationales(Path(folder) / "rationale-quality-labels.jsonl.gz")
    columns = _baselines(rationales)
    columns |= measure((*TEXT_MEASURES, *ROSCOE_MEASURES), rationales, GuidanceRewards())
    if options.frozen is not None:
        columns |= _judged(rationales, options.frozen, options.cache)
    print("\n".join(_table(rationales, columns, options.resamples)))


def _baselines(rationales: Sequence[Rationale]) -> dict[str, list[float]]:
    """What anything worth its name must beat."""
    overlap = []
    for one in rationales:
        words = set(content_words(one.text))
        passages = (p for paragraph in one.example.context for p in paragraph.sentences)
        overlap.append(len(words & set(content_words(" ".join(passages)))) / max(1, len(words)))
    lengths = [float(len(one.text.split())) for one in rationales]
    return {"length": lengths, "bag-of-words overlap with the context": overlap}


def _judged(
    rationales: Sequence[Rationale], source: str, cache: Path | None
) -> dict[str, list[float]]:
    """The frozen LM's judgements of all aspects, some rationales at a time."""
    rows: list[list[float]] = []
    if cache is not None and cache.is_file():
        kept = json.loads(cache.read_text(encoding="utf-8"))
        if kept["source"] != source:
            sys.exit(f"{cache} holds the judgements of {kept['source']}: name another file")
        rows = kept["rows"]
    if len(rows) < len(rationales):
        # The cache of replies is left out: what is measured here is kept in one file.
        settings = TransformersFrozen.model_validate(
            {
                "backend": "transformers",
                "source": source,
                "dtype": "float32",
                "cache": {"enabled": False},
            }
        )
        judge = Judge(open_frozen_lm(settings, PromptSettings()), load_templates("default"))
        while len(rows) < len(rationales):
            some = rationales[len(rows) : len(rows) + _AT_ONCE]
            found = measure(JUDGE_MEASURES, some, GuidanceRewards(), judge)
            rows += [list(row) for row in zip(*found.values(), strict=True)]
            if cache is not None:
                write_atomically(cache, json.dumps({"source": source, "rows": rows}))
            print(f"judged {len(rows)} of {len(rationales)}", file=sys.stderr, flush=True)
    return {name: [row[n] for row in rows] for n, name in enumerate(JUDGE_MEASURES)}


def _table(
    rationales: Sequence[Rationale], columns: Mapping[str, Sequence[float]], resamples: int
) -> Iterator[str]:
    """A row for each measure, a column for each label."""
    questions = [one.example.id for one in rationales]
    labels = {name: [bool(one.columns[name]) for one in rationales] for name in LABELS}
    yield "| measure | " + " | ".join(f"{LABELS[n]} (`{n}`)" for n in labels) + " |"
    yield "|---|" + "---|" * len(labels)
    shares = (f"{sum(y)} of {len(y)} true" for y in labels.values())
    yield "| *labels* | " + " | ".join(shares) + " |"
    models = {
        f"learned, {name} (out of fold)": np.array([columns[f] for f in features], dtype=float).T
        for name, features in FEATURES.items()
        if set(features) <= set(columns)
    }
    for name in [*columns, *models]:
        cells = []
        for y in labels.values():
            scores = out_of_fold(models[name], y, questions) if name in models else columns[name]
            low, high = auc_interval(scores, y, questions, resamples=resamples)
            cells.append(f"{auc(scores, y):.3f} [{low:.3f}, {high:.3f}]")
        yield f"| {name} | " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
