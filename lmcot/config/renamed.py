"""Keys that were moved or removed since earlier versions: old settings and runs are still read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

RENAMED: Final[Mapping[str, tuple[str, Any]]] = {
    "refine.missing_end_penalty": ("rewards.penalties.missing_end", 0.0),
    "refine.length_penalty": ("rewards.penalties.length", 0.0),
    "refine.length_free": ("rewards.penalties.length_free", 0.5),
    "refine.clip": ("refine.loss.clip", 0.2),
    "refine.dual_clip": ("refine.loss.dual_clip", None),
    "evaluate.distilled": ("evaluate.policies.distilled", None),
    "evaluate.refined": ("evaluate.policies.refined", None),
}
"""For each old key the new one, and the default that earlier versions wrote into each run."""

REMOVED: Final[Mapping[str, Any]] = {
    "monitor.alarms.window": 5,
    "monitor.alarms.clears_after": 20,
    "serve.limits.json_depth": 16,
    "evaluate.bootstrap_samples": 2000,
    "evaluate.confidence": 0.95,
}
"""Keys that have become constants, with their values: what settings say of them is ignored."""


_COLUMNS: Final = (
    "question", "id", "answer", "choices", "context", "supporting_facts", "title", "type", "level"
)  # fmt: skip
ADDED: Final[Mapping[str, Any]] = {
    "data.require_context": None,
    "task.kind": "extractive_qa",
    "frozen.chat": None,
    "learner.attention": "model",
    "learner.compile": False,
    "prompts.conclusion": "shown",
    "prompts.guidance": "rationale",
    "prompts.first_answer": "standard",
    "prompts.demonstrations.source.part": "all",
    "prompts.demonstrations.source.held_out": 0.1,
    "rewards.choice_probability_weight": None,
    "rollout.engine": "transformers",
    "rollout.tensor_parallel": 1,
    "frozen.tensor_parallel": 1,
    **{f"prompts.demonstrations.source.columns.{name}": None for name in _COLUMNS},
    "teacher.template": "{facts} So the answer is {answer}.",
    "teacher.titles": False,
    "teacher.shorten": False,
    "teacher.right_by": "f1",
    "teacher.best_by": "factuality",
    "teacher.demonstrations": True,
    "teacher.samples": 1,
    "teacher.temperature": 0.0,
    "teacher.rationalise": False,
    "teacher.hint": "(The right answer is {answer}.)",
    "teacher.filters.min_words": 3,
    "teacher.filters.repeats_question": True,
    "teacher.filters.prompt_words": 6,
    "teacher.filters.near_duplicates": 0.9,
}
"""Keys that came later, with the values at which what an earlier version made stays as it is.

At these values, digests of settings leave them out, so that it is not made again. The settings of a
run that lack such a key are compared without it where its default is another.
"""


def with_new_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with each old key in its new place; where the new key is set, it holds.

    Keys that have become constants are left out.

    Raises:
        ValueError: if both keys are set and the old one is not at its default.
    """
    renamed = dict(values)
    for old, (new, default) in RENAMED.items():
        value = _value(values, old)
        if value is _ABSENT:
            continue
        renamed = _without(renamed, old)
        if _value(renamed, new) is _ABSENT:
            renamed = _with(renamed, new, value)
        elif value != default:
            raise ValueError(f"{old} is now {new}, but both are set: remove {old}")
    for old in REMOVED:
        if _value(values, old) is not _ABSENT:
            renamed = _without(renamed, old)
    return renamed


def renamed_keys(values: Mapping[str, Any]) -> list[str]:
    """A sentence for each old key that the settings use, unless it has become a constant and they
    give that value."""
    used = [(old, new) for old, (new, _) in RENAMED.items() if _value(values, old) is not _ABSENT]
    ignored = [
        f"{old} is no longer a setting and is ignored (it is always {constant}): remove it"
        for old, constant in REMOVED.items()
        if _value(values, old) not in (_ABSENT, constant)
    ]
    return [*(f"{old} is now {new}: rename it in the settings" for old, new in used), *ignored]


def added_since(values: Mapping[str, Any]) -> frozenset[str]:
    """The keys that came later than settings in which each key is written out."""
    return frozenset(key for key in ADDED if _value(values, key) is _ABSENT)


_ABSENT: Final = object()


def _value(values: Any, key: str) -> Any:
    for part in key.split("."):
        if not isinstance(values, Mapping) or part not in values:
            return _ABSENT
        values = values[part]
    return values


def _with(values: Any, key: str, value: Any) -> Any:
    """A copy with this value at the key. What is not a mapping on the way is left to be refused."""
    part, _, rest = key.partition(".")
    values = {} if values is None else values
    if not isinstance(values, Mapping):
        return values
    return {**values, part: _with(values.get(part), rest, value) if rest else value}


def _without(values: Any, key: str) -> Any:
    """A copy that lacks the key."""
    part, _, rest = key.partition(".")
    if rest:
        return {**values, part: _without(values[part], rest)}
    return {name: value for name, value in values.items() if name != part}
