"""Which prompts the frozen LM answers best with, on the selection questions.

Rationales come from one small LM, greedily; each variant of each kind of prompt is asked about the
same questions and rationales. Replies are cached: the same command goes on where it was stopped.

    LMCOT_DATA=... python -m experiments.templates --policy DIR --rationales FILE --frozen SOURCE
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import yaml

from lmcot.config import (
    CacheSettings,
    ContextSettings,
    FileData,
    PromptSettings,
    TransformersFrozen,
)
from lmcot.data.context import apply_context
from lmcot.data.loaders import load_examples
from lmcot.data.prompts import PromptTemplates, TemplateFile, load_templates, reply_sampling
from lmcot.data.render import encode
from lmcot.frozen.cached import CachedLM
from lmcot.frozen.open import open_frozen_lm
from lmcot.models.generation.engine import GenerationEngine
from lmcot.models.generation.requests import SampleRequest
from lmcot.models.sources import eos_ids, load_model, load_tokenizer
from lmcot.records import Completion, Example, Failure, Prompt, Sampling
from lmcot.text.answers import exact_match, f1
from lmcot.text.reading import read_answer

_VARIANTS = Path(__file__).parent / "template_variants"
# The first lines of these files are for choices like this one; reports use the others.
_SELECTION = {"hotpotqa-validation": 200, "2wikimultihopqa-validation": 100}
_BATCH = 16


def main() -> None:
    """Prints a Markdown table: a line for each variant and number of demonstrations."""
    options = _options()
    examples = _questions(options.share, options.policy)
    frozen = open_frozen_lm(
        TransformersFrozen(
            backend="transformers",
            source=options.frozen,
            dtype="float32",
            batching="dynamic",
            cache=CacheSettings(folder=options.cache),
        ),
        PromptSettings(chat=options.chat),
    )
    rationales = _kept_rationales(examples, options.policy, options.rationales)
    print(f"{len(examples)} questions, frozen LM {options.frozen}, chat {options.chat}", flush=True)
    print("| kind | variant | demonstrations | EM | F1 | tokens in |\n|---|---|---|---|---|---|")
    for path in sorted(_VARIANTS.glob(f"{options.variants}.yaml")):
        kind, _, name = path.stem.partition("-")
        templates = _variant(kind, path)
        for shown in options.demonstrations:
            prompts = [
                _prompt(templates, kind, example, rationale, shown)
                for example, rationale in zip(examples, rationales, strict=True)
            ]
            length = 96 if kind == "cot" else 16
            replies = _ask(frozen, prompts, reply_sampling(getattr(templates.file, kind), length))
            line = _line(replies, examples, kind)
            print(f"| {kind} | {name} | {shown} | {line} |", flush=True)


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", required=True, help="a folder or other source of the small LM")
    parser.add_argument("--rationales", required=True, type=Path, help="a JSON file to keep them")
    parser.add_argument("--frozen", required=True, help="source of the frozen LM")
    parser.add_argument("--chat", default="auto", choices=("auto", "never"))
    parser.add_argument("--variants", default="*", help="which of the variants, as a pattern")
    parser.add_argument("--demonstrations", type=int, nargs="+", default=[0, 2, 4])
    parser.add_argument("--share", type=float, default=1.0, help="of the selection questions")
    parser.add_argument("--cache", default=None, help="folder of the cache")
    return parser.parse_args()


def _questions(share: float, policy: str) -> list[Example]:
    """Selection questions with their gold paragraphs, at most 256 tokens of them."""
    folder = Path(os.environ["LMCOT_DATA"])
    examples: list[Example] = []
    for name, number in _SELECTION.items():
        source = FileData(kind="file", path=str(folder / f"{name}.jsonl.gz"))
        limit = round(number * share)
        examples.extend(load_examples(source, limit=limit, on_bad="refuse").examples)
    tokenizer = load_tokenizer(policy)
    return apply_context(
        examples,
        ContextSettings(distractors=0, max_tokens=256),
        lambda text: len(tokenizer.encode(text, add_special_tokens=False)),
    )


def _kept_rationales(examples: Sequence[Example], policy: str, path: Path) -> list[str]:
    """The rationales in a file; what is not there yet is written, and put there."""
    kept: dict[str, str] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    missing = [example for example in examples if example.id not in kept]
    if missing:
        texts = _rationales(missing, policy)
        kept |= {example.id: text for example, text in zip(missing, texts, strict=True)}
        path.write_text(json.dumps(kept, indent=1), encoding="utf-8")
    return [kept[example.id] for example in examples]


def _rationales(examples: Sequence[Example], policy: str) -> list[str]:
    """Greedy rationales of the small LM, with the prompts that it was trained on."""
    model, tokenizer = load_model(policy, "float32")
    engine = GenerationEngine(model, pad_id=tokenizer.pad_token_id)
    templates, ends = load_templates("default"), eos_ids(model, tokenizer)
    requests = [
        SampleRequest(encode(templates.rationale(e), tokenizer), [0], 80, 0.0, ends)
        for e in examples
    ]
    texts: list[str] = []
    for start in range(0, len(requests), _BATCH):
        for found in engine.sample(requests[start : start + _BATCH]):
            assert not isinstance(found, Failure), found.reason
            texts.append(tokenizer.decode(found[0].response_ids, skip_special_tokens=True).strip())
    return texts


def _variant(kind: str, path: Path) -> PromptTemplates:
    """The templates that come with lmcot, with one kind replaced (and demonstrations, if given)."""
    file = load_templates("default").file.model_dump()
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    file["demonstrations"] = values.pop("demonstrations", file["demonstrations"])
    file[kind] = {**file[kind], **values}
    return PromptTemplates(path.stem, TemplateFile.model_validate(file))


def _prompt(
    templates: PromptTemplates, kind: str, example: Example, rationale: str, shown: int
) -> Prompt:
    showing = templates.showing(shown)
    if kind == "guided":
        return showing.guided(example, rationale)
    return showing.cot(example) if kind == "cot" else showing.standard(example)


def _ask(frozen: CachedLM, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion]:
    replies: list[Completion] = []
    for start in range(0, len(prompts), _BATCH):
        for reply in frozen.generate(prompts[start : start + _BATCH], sampling):
            assert isinstance(reply, Completion), reply
            replies.append(reply)
    return replies


def _line(replies: Sequence[Completion], examples: Sequence[Example], kind: str) -> str:
    answers = [read_answer(reply).extracted for reply in replies]
    pairs = [(answer, example.answer) for answer, example in zip(answers, examples, strict=True)]
    em, overlap = fmean(exact_match(*pair) for pair in pairs), fmean(f1(*pair) for pair in pairs)
    tokens = fmean(reply.tokens_in for reply in replies)
    return f"{100 * em:.1f} | {100 * overlap:.1f} | {tokens:.0f}"


if __name__ == "__main__":
    main()
