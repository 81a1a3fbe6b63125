"""What a run will take: units of work, times what a unit took in an earlier run.

The model is linear and has one rate for each stage. It knows no start of actors, no lost work and
no change of lengths while a policy learns; the report says how far it was off.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from lmcot import run_files
from lmcot.actors.resources.plan import Roles
from lmcot.config import Config, FrozenTeacher, parse_config, read_yaml_mapping
from lmcot.config.rows import default_rows
from lmcot.errors import UserError
from lmcot.files import read_lines, read_object, write_atomically
from lmcot.run.roles import (
    annotate_roles,
    distill_roles,
    evaluate_roles,
    judging_roles,
    refine_roles,
)
from lmcot.storage import is_remote, place, reaching

_READ = (
    run_files.CONFIG, run_files.METRICS, run_files.RATIONALES, run_files.SPENDING,
    run_files.REPORT_JSON,
)  # fmt: skip
"""The files that say what a run took."""
_MADE_AGAIN = "delete it, and it is made again"
_REMEDY = "set estimate.like to another run, or give estimate.rates"


@dataclass(frozen=True, slots=True)
class Taken:
    """What a stage takes, or took."""

    units: float
    seconds: float | None
    """None if nothing tells."""
    frozen_tokens: float = 0.0


@dataclass(frozen=True, slots=True)
class StageEstimate:
    """What a stage is expected to take."""

    units: float
    seconds: float | None
    frozen_tokens: float
    gpu_hours: float | None
    cost: float | None


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run is expected to take, by stage."""

    stages: dict[str, StageEstimate]
    currency: str
    notices: tuple[str, ...]
    """Sentences about what the figures leave out."""

    def describe(self) -> str:
        """A table of the stages, with sums, and the notices."""
        rows = [("estimate", "units", "hours", "GPU hours", "frozen LM's tokens", self.currency)]
        rows += [_row(name, one) for name, one in self.stages.items()]
        rows.append(_row("all", _summed(self.stages.values())))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])])
            for row in rows
        ]
        return "\n".join([*lines, *self.notices])


def units_of(config: Config, questions: int, validation: int) -> dict[str, float]:
    """The units of each stage of a run.

    Args:
        questions: to train on.
        validation: questions of an evaluation.
    """
    found: dict[str, float] = {}
    if isinstance(config.teacher, FrozenTeacher):
        found["annotate"] = questions * config.teacher.samples
    if config.teacher is not None:
        found["distill"] = questions * config.distill.epochs
    if config.reject is not None:
        found["reject"] = questions * config.reject.samples * config.reject.rounds
    refine = config.refine
    found["refine"] = refine.steps * refine.prompts_per_step * refine.samples_per_prompt
    if config.frozen is not None:
        found["evaluate"] = validation * len(_rows(config))
    return found


def _rows(config: Config) -> list[str]:
    rows = config.evaluate.rows
    return default_rows() if rows is None else list(rows)


def taken_by(run: Path, config: Config) -> dict[str, Taken]:
    """What the stages of a run took, as its files say; stages that they say nothing of are left
    out.

    Raises:
        UserError: if a file is damaged.
    """
    lines = read_lines(run / run_files.METRICS, _REMEDY, needed=("step", "stage"))
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        by_stage.setdefault(line["stage"], []).append(line)
    refined, distilled = by_stage.get("refine", []), by_stage.get("distill", [])
    found: dict[str, Taken] = {}
    if refined:
        each = config.refine.prompts_per_step * config.refine.samples_per_prompt
        found["refine"] = Taken(
            len(refined) * each, _sum(refined, "seconds/step"), _sum(refined, "frozen/tokens")
        )
    annotations = read_lines(run / run_files.RATIONALES, _REMEDY)
    questions = len({one.get("example_id") for one in annotations})
    if distilled and questions:
        seconds = _sum(distilled, "seconds/learn") + _sum(distilled, "seconds/validate")
        found["distill"] = Taken(questions * config.distill.epochs, seconds)
    spent = read_object(run / run_files.SPENDING, _REMEDY).get("annotate")
    if spent is not None and isinstance(config.teacher, FrozenTeacher) and questions:
        speeds = [line["speed/frozen"] for line in refined if line.get("speed/frozen")]
        rate = fmean(speeds) * config.actors.frozen.count if speeds else None
        found["annotate"] = Taken(
            questions * config.teacher.samples,
            spent["tokens"] / rate if rate else None,
            spent["tokens"],
        )
    rows = read_object(run / run_files.REPORT_JSON, _REMEDY).get("rows", {})
    if rows:
        found["evaluate"] = _evaluated(rows)
    return found


def _evaluated(rows: Mapping[str, Mapping[str, Any]]) -> Taken:
    asked = [row["large_lm_tokens_in"] + row["large_lm_tokens_out"] for row in rows.values()]
    return Taken(
        sum(row["n"] for row in rows.values()),
        sum(row["seconds"] for row in rows.values()),
        sum(asked),
    )


def estimate(config: Config, questions: int, validation: int) -> Estimate | None:
    """What a run will take; None if the settings have no ``estimate`` section.

    Raises:
        UserError: if the earlier run cannot be read.
    """
    settings = config.estimate
    if settings is None:
        return None
    before, measured = _earlier(settings.like)
    stages: dict[str, StageEstimate] = {}
    notices: list[str] = []
    for stage, units in units_of(config, questions, validation).items():
        given, took = settings.rates.get(stage), measured.get(stage)  # type: ignore[call-overload]
        if given is not None:
            seconds, tokens = units * given.seconds, units * given.frozen_tokens
        elif took is not None and took.units:
            ratio = units / took.units
            seconds, tokens = took.seconds, took.frozen_tokens * ratio
            if seconds is not None and before is not None:
                slower, told = _by_actors(stage, before, config)
                seconds *= ratio * slower
                notices += told
            if stage == "evaluate" and before is not None and _rows(before) != _rows(config):
                notices.append(
                    "evaluate: the earlier run has other rows; a question of each is taken to cost "
                    "the same"
                )
        else:
            notices.append(f"{stage}: no rate is known, so that the sums leave it out: {_REMEDY}")
            continue
        if seconds is None:
            notices.append(f"{stage}: how long it takes is not known: give estimate.rates.{stage}")
        stages[stage] = _priced(config, stage, units, seconds, tokens)
    if not stages:
        raise UserError(f"estimate has no rate of any stage: {_REMEDY}")
    return Estimate(stages, settings.currency, tuple(notices))


def record(run: Path, config: Config, questions: int, validation: int) -> None:
    """Keeps the estimate in a run's directory, from before its work until its amount changes."""
    units = units_of(config, questions, validation)
    kept = read_object(run / run_files.ESTIMATE, _MADE_AGAIN)
    if config.estimate is None or kept.get("units") == units:
        return
    made = estimate(config, questions, validation)
    assert made is not None
    content = {"units": units, **asdict(made)}
    write_atomically(run / run_files.ESTIMATE, json.dumps(content, indent=1) + "\n")


def compared(run: Path, config: Config, evaluated: Taken) -> dict[str, Any]:
    """The kept estimate of a run beside what it took, for its report; empty without one.

    Args:
        evaluated: what the evaluation took, which no file says yet.
    """
    kept = read_object(run / run_files.ESTIMATE, _MADE_AGAIN)
    if not kept or config.estimate is None:
        return {}
    taken = {**taken_by(run, config), "evaluate": evaluated}
    stages = {}
    for name, told in kept["stages"].items():
        took = taken.get(name)
        if took is None or took.seconds is None:
            continue
        real = _priced(config, name, took.units, took.seconds, took.frozen_tokens)
        stages[name] = {"estimated": told, "taken": asdict(real)}
    return {"currency": kept["currency"], "stages": stages}


def _earlier(like: str | None) -> tuple[Config | None, dict[str, Taken]]:
    """The settings of an earlier run, and what its stages took."""
    if like is None:
        return None, {}
    home = place(like)
    config_file = home / run_files.CONFIG
    if not config_file.exists():
        raise UserError(f"estimate.like is '{like}', which is not a run directory: {_REMEDY}")
    with tempfile.TemporaryDirectory() as copies:
        folder = Path(copies)
        if not is_remote(home):
            folder = home
        else:
            with reaching(home):
                for name in _READ:
                    if (home / name).exists():
                        (folder / name).write_bytes((home / name).read_bytes())
        config = parse_config(read_yaml_mapping(folder / run_files.CONFIG))
        return config, taken_by(folder, config)


def _by_actors(stage: str, before: Config, config: Config) -> tuple[float, list[str]]:
    """The factor by which other numbers of actors lengthen a stage, and what to say of it."""
    then, now = _roles(stage, before), _roles(stage, config)
    shares = {name: then[name].count / role.count for name, role in now.items() if name in then}
    factor = max(shares.values(), default=1.0)
    if all(share == 1 for share in shares.values()):
        return factor, []
    return factor, [
        f"{stage}: the numbers of actors differ from the earlier run's; its time is taken to "
        f"change by {factor:.2f}, as the least of them did"
    ]


def _roles(stage: str, config: Config) -> Roles:
    if stage == "annotate":
        return annotate_roles(config)
    if stage == "distill":
        return distill_roles(config)
    if stage == "reject":
        return judging_roles(config)
    if stage == "refine":
        return refine_roles(config)
    return evaluate_roles(config, config.evaluate.rows)


def _priced(
    config: Config, stage: str, units: float, seconds: float | None, tokens: float
) -> StageEstimate:
    settings = config.estimate
    assert settings is not None
    roles = _roles(stage, config)
    asked = tokens * settings.per_million_tokens / 1e6
    if seconds is None:
        return StageEstimate(units, None, tokens, None, None)
    hours = seconds / 3600
    gpus = sum(role.count * role.gpus for role in roles.values())
    prices: Mapping[str, float] = {str(name): price for name, price in settings.per_hour.items()}
    hourly = sum(role.count * prices.get(name, 0.0) for name, role in roles.items())
    return StageEstimate(units, seconds, tokens, hours * gpus, hours * hourly + asked)


def _sum(lines: Iterable[Mapping[str, Any]], name: str) -> float:
    return sum(line.get(name) or 0.0 for line in lines)


def _summed(stages: Iterable[StageEstimate]) -> StageEstimate:
    all_of_them = list(stages)

    def total(name: str) -> float | None:
        values = [getattr(one, name) for one in all_of_them]
        return None if None in values else sum(values)

    return StageEstimate(
        total("units") or 0.0, total("seconds"), total("frozen_tokens") or 0.0,
        total("gpu_hours"), total("cost"),
    )  # fmt: skip


def _row(name: str, one: StageEstimate) -> tuple[str, str, str, str, str, str]:
    def shown(value: float | None) -> str:
        return "unknown" if value is None else f"{value:,.2f}"

    hours = None if one.seconds is None else one.seconds / 3600
    units = "" if name == "all" else f"{one.units:,.0f}"
    tokens = f"{one.frozen_tokens:,.0f}"
    return name, units, shown(hours), shown(one.gpu_hours), tokens, shown(one.cost)
