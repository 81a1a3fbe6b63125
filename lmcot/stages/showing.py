"""What a step's rationales look like, for TensorBoard: how numbers are spread, and some texts."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from lmcot.monitor.metrics import Monitor
from lmcot.records import Example, ScoredRollout

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f]")
_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+.!|~-])")


def show(
    monitor: Monitor,
    step: int,
    stage: str,
    examples: Mapping[str, Example],
    scored: Sequence[ScoredRollout],
) -> None:
    """Shows a step where that is due: the first one, and then every so many.

    Args:
        examples: the step's questions by their ids.
        scored: the rationales that were judged.
    """
    settings = monitor.settings
    if _due(step, settings.histograms_every):
        monitor.histograms(step, stage, spreads(scored))
    if _due(step, settings.samples_every):
        text = "\n\n---\n\n".join(
            describe_sample(examples[one.rollout.example_id], one)
            for one in picked(scored, settings.samples)
        )
        monitor.text(step, stage, "samples", text)


def spreads(scored: Sequence[ScoredRollout]) -> dict[str, list[float]]:
    """What is drawn as histograms, by name."""
    components: dict[str, list[float]] = {}
    for one in scored:
        for name, value in one.judgement.components.items():
            components.setdefault(f"component/{name}", []).append(value)
    return {
        "reward": [one.reward for one in scored],
        "response/length": [float(len(one.rollout.response_ids)) for one in scored],
        **components,
    }


def picked(scored: Sequence[ScoredRollout], count: int) -> list[ScoredRollout]:
    """The best, the worst, and what lies evenly between them; best first."""
    ordered = sorted(scored, key=lambda one: one.reward, reverse=True)
    if count >= len(ordered):
        return ordered
    if count == 1:
        return [ordered[len(ordered) // 2]]
    last = len(ordered) - 1
    return [ordered[round(number * last / (count - 1))] for number in range(count)]


def describe_sample(example: Example, scored: ScoredRollout) -> str:
    """A rationale with its question, what the frozen LM made of it, and its reward, as Markdown."""
    rollout, judgement = scored.rollout, scored.judgement
    cut = ", cut at the length limit" if rollout.finish_reason == "length" else ""
    answer = []
    if judgement.answer is not None:
        answer.append(f"**Frozen LM:** {_plain(judgement.answer.extracted) or '(nothing)'}")
    if example.answer:
        answer.append(f"**Gold answer:** {_plain(example.answer)}")
    parts = {
        **judgement.components,
        **{name: -value for name, value in scored.penalties.items()},
    }
    names = " | ".join(_plain(name) for name in parts)
    values = " | ".join(f"{value:.3g}" for value in parts.values())
    rationale = "\n".join(f"> {_plain(line)}" for line in (rollout.text or "(empty)").splitlines())
    return "\n\n".join(
        [
            f"#### Reward {scored.reward:.3g}: question {_plain(rollout.example_id)}, "
            f"{len(rollout.response_ids)} tokens{cut}",
            f"**Question:** {_plain(example.question)}",
            rationale,
            *(["  \n".join(answer)] if answer else []),
            *([f"| {names} |\n|{'---|' * len(parts)}\n| {values} |"] if parts else []),
        ]
    )


def _due(step: int, every: int) -> bool:
    return bool(every) and (step == 1 or step % every == 0)


def _plain(text: str) -> str:
    """Text that Markdown leaves as it is."""
    shown = _CONTROL.sub("\ufffd", text).replace("&", "&amp;").replace("<", "&lt;")
    return _SPECIAL.sub(r"\\\1", shown).strip()
