"""Rationales for people to read: a step's, and a validation's beside the teacher's."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from lmcot.monitor.metrics import Monitor
from lmcot.records import Columns, Example
from lmcot.rollout_log import decode_rows
from lmcot.text.characters import printable

_SPECIAL = re.compile(r"([\\`*_{}\[\]()#+.!|~-])")


def show(
    monitor: Monitor,
    step: int,
    stage: str,
    columns: Columns,
    records: bytes,
) -> None:
    """Shows a step if it is due: the first one, and then every few steps.

    Args:
        columns: the numbers of the step's rationales.
        records: a line of JSON for each rationale; only those that are shown are parsed.
    """
    settings = monitor.settings
    if _due(step, settings.histograms_every):
        monitor.histograms(step, stage, spreads(columns))
    rows = picked(columns["reward"], settings.samples)
    if rows and _due(step, settings.samples_every):
        text = "\n\n---\n\n".join(map(describe_sample, decode_rows(records, rows)))
        monitor.text(step, stage, "samples", text)


def spreads(columns: Columns) -> dict[str, list[float]]:
    """Numbers of the judged rationales that are shown as histograms, by name."""
    judged = columns["judged"] == 1
    components = [name for name in columns.names if name.startswith("component/")]
    return {
        "reward": columns["reward"][judged].tolist(),
        "response/length": columns["response_length"][judged].tolist(),
        **{name: columns[name][judged & ~np.isnan(columns[name])].tolist() for name in components},
    }


def picked(rewards: npt.NDArray[np.float64], count: int) -> list[int]:
    """Rows of the best, the worst, and evenly spaced rationales between them; best first.

    Args:
        rewards: [rationales]; NaN where a rationale was not judged, which is never picked.
    """
    ordered = [
        int(row) for row in np.argsort(-rewards, kind="stable") if not np.isnan(rewards[row])
    ]
    if count >= len(ordered):
        return ordered
    if count == 1:
        return [ordered[len(ordered) // 2]]
    last = len(ordered) - 1
    return [ordered[round(number * last / (count - 1))] for number in range(count)]


def describe_sample(record: Mapping[str, Any]) -> str:
    """A rationale with its question, the frozen LM's answer and its reward, as Markdown.

    Args:
        record: a line of ``rollouts/``.
    """
    judgement = record["judgement"]
    cut = ", cut at the length limit" if record["finish_reason"] == "length" else ""
    answer = []
    if judgement["answer"] is not None:
        answer.append(f"**Frozen LM:** {_plain(judgement['answer']['extracted']) or '(nothing)'}")
    if record["gold"]:
        answer.append(f"**Gold answer:** {_plain(record['gold'])}")
    parts = {
        **judgement["components"],
        **{name: -value for name, value in record["penalties"].items()},
    }
    names = " | ".join(_plain(name) for name in parts)
    values = " | ".join(f"{value:.3g}" for value in parts.values())
    return "\n\n".join(
        [
            f"#### Reward {record['reward']:.3g}: question {_plain(record['example_id'])}, "
            f"{len(record['response_ids'])} tokens{cut}",
            f"**Question:** {_plain(record['question'])}",
            _quoted(record["text"], _plain),
            *(["  \n".join(answer)] if answer else []),
            *([f"| {names} |\n|{'---|' * len(parts)}\n| {values} |"] if parts else []),
        ]
    )


def compared(
    examples: Sequence[Example],
    teacher: Sequence[str],
    student: Sequence[str],
    *,
    escaped: bool,
) -> str:
    """The student's rationales beside the teacher's, as Markdown.

    Args:
        escaped: whether what the data and the models wrote is escaped, for TensorBoard; a file
            that is read as text is not.
    """
    plain = _plain if escaped else printable
    parts = [
        "\n\n".join(
            [
                f"#### Question {plain(example.id)}: {plain(example.question)}",
                f"**Right answer:** {plain(example.answer)}",
                f"**Teacher:**\n\n{_quoted(taught, plain)}",
                f"**Small LM:**\n\n{_quoted(written, plain)}",
            ]
        )
        for example, taught, written in zip(examples, teacher, student, strict=True)
    ]
    return "\n\n---\n\n".join(parts)


def _quoted(text: str, plain: Callable[[str], str]) -> str:
    return "\n".join(f"> {plain(line)}" for line in (text or "(empty)").splitlines())


def _due(step: int, every: int) -> bool:
    return bool(every) and (step == 1 or step % every == 0)


def _plain(text: str) -> str:
    """The text, escaped so that Markdown shows it literally."""
    shown = printable(text).replace("&", "&amp;").replace("<", "&lt;")
    return _SPECIAL.sub(r"\\\1", shown).strip()
