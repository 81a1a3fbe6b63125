"""Checks before anything starts that the frozen LM answers, and can do what the settings ask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Literal

from lmcot.config import ASPECTS, Config, FrozenTeacher, GuidanceRewards
from lmcot.config.rows import default_rows, find_row, policy_row_name
from lmcot.config.stages import BASE
from lmcot.data.prompts import PromptTemplates
from lmcot.data.row_requests import row_prompt, row_sampling, teacher_prompt, teacher_sampling
from lmcot.errors import UserError
from lmcot.frozen.needs import Measure, Needs
from lmcot.frozen.open import check_frozen_lm
from lmcot.records import Example, Paragraph, Prompt, Sampling, Usage
from lmcot.rewards.component import Component
from lmcot.rewards.components import measured_components

Asker = Literal["run", "serve", "fit"]
"""Who asks: a run with all its stages, a service, or ``lmcot aspects``, which only judges."""
_EXAMPLE = Example(
    "first-check",
    "On which river does the town of Velm lie?",
    "the Brann",
    (Paragraph("Velm", ("Velm is a small town.", "It lies on the river Brann.")),),
    first_answer="the Brann",
)
_RATIONALE = "Velm lies on the river Brann. So the answer is the Brann."
_JUDGEMENTS = 3
"""Most questions of the judge that an endpoint is asked, until it says yes or no to one."""
_LACKS: dict[Measure, str] = {
    "choose": "the judge's yes or no",
    "score": "log-likelihoods of given texts",
}


@dataclass(frozen=True, slots=True)
class Checked:
    """The result of a first check of the frozen LM."""

    config: Config
    """The settings to use: with what was learned of an endpoint, and without the components of
    weight 0 that it cannot measure."""
    notices: list[str]
    """Lines that the user should read."""
    usage: Usage
    """The requests that the check sent to an endpoint."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A component that makes calls to the frozen LM beside its answers."""

    component: Component
    setting: str
    weight: float
    calls: frozenset[Measure]
    remedy: str


def _asked(rewards: GuidanceRewards) -> list[_Asked]:
    return [
        _Asked(
            one,
            setting=f"rewards.{one.setting}",
            weight=one.weight(rewards) or 0.0,
            calls=calls,
            remedy=one.remedy(rewards),
        )
        for one in measured_components(rewards)
        if (calls := one.calls(rewards))
    ]


def _without(rewards: GuidanceRewards, unmeasured: Sequence[_Asked]) -> GuidanceRewards:
    for one in unmeasured:
        rewards = one.component.without(rewards)
    return rewards


def check_frozen(
    config: Config,
    templates: PromptTemplates,
    asker: Asker = "run",
    spend: Callable[[Usage], None] = lambda usage: None,
) -> Checked:
    """Asks the frozen LM what a run, a service or a fit of aspects will ask, before that does.

    Args:
        spend: takes each request to an endpoint into account; what it raises ends the check.

    Raises:
        UserError: if it does not answer, or cannot measure a component that has a weight.
    """
    config = config.resolved()
    if config.frozen is None:
        return Checked(config, [], Usage())
    rewards = config.rewards
    judged = rewards if asker != "serve" and isinstance(rewards, GuidanceRewards) else None
    asked = [] if judged is None else _asked(judged)
    calls = {call for one in asked for call in one.calls}
    choosing = asker == "run" and config.evaluate.choices == "probability"
    if choosing:
        calls.add("choose")
    teacher = config.teacher if isinstance(config.teacher, FrozenTeacher) else None
    needs = Needs(
        tuple(
            _completions(
                config, templates, _rows(config, asker), teacher if asker == "run" else None
            )
        ),
        tuple(_judgements(templates)) if "choose" in calls else (),
        "score" in calls,
    )
    found = check_frozen_lm(config.frozen, needs, spend)
    if choosing and "choose" in found.lacks:
        raise UserError(
            "evaluate.choices is 'probability', but the frozen LM gives none: "
            f"{found.lacks['choose']}; set it to 'reply', or use an endpoint that does"
        )
    notices = list(found.notices)
    unmeasured = [one for one in asked if one.calls & found.lacks.keys()]
    left_out: dict[str, list[str]] = {}
    for one in unmeasured:
        reason = _reason(one, found.lacks)
        left_out.setdefault(reason, []).append(one.setting)
        if one.weight > 0:
            raise UserError(
                f"{one.setting} has the weight {one.weight:g}, but it cannot be measured: {reason};"
                f" {one.remedy}, or use an endpoint that gives {_wanted(one, found.lacks)}"
            )
    for reason, settings in left_out.items():
        notices.append(f"not measured (weight 0): {', '.join(settings)}; {reason}")
    measured = rewards if judged is None else _without(judged, unmeasured)
    learned = config.model_copy(update={"frozen": found.settings, "rewards": measured})
    return Checked(learned, notices, found.usage)


def _rows(config: Config, asker: Asker) -> list[str]:
    """The rows of an evaluation whose requests have the forms that will be sent."""
    guided = policy_row_name(BASE, config.prompts.guided_kind)
    first = [config.prompts.first_answer] if config.prompts.advises else []
    if asker == "fit":
        return [guided]  # the parameters that an endpoint takes are learned from it
    if asker == "serve":
        return [guided, "standard", *first]
    return [guided, *first, *(config.evaluate.rows or default_rows())]


def _completions(
    config: Config,
    templates: PromptTemplates,
    rows: Sequence[str],
    teacher: FrozenTeacher | None,
) -> Iterator[tuple[Prompt, Sampling]]:
    """A request of each form: the seeds alone differ among those of a form."""
    seen = set()
    asked = [
        (row_prompt(row, templates, _EXAMPLE, _RATIONALE), row_sampling(row, config, templates, 0))
        for row in map(find_row, rows)
        if row.prompt is not None
    ]
    if teacher is not None:
        prompt = teacher_prompt(teacher, templates, _EXAMPLE, hinted=teacher.rationalise)
        sampling = teacher_sampling(teacher, config, templates, 0, hinted=False)
        asked.append((prompt, sampling))
    for prompt, sampling in asked:
        form = replace(sampling, seed=None if sampling.seed is None else 0)
        if form not in seen:
            seen.add(form)
            yield prompt, sampling


def _judgements(templates: PromptTemplates) -> list[Prompt]:
    return [templates.judge(_EXAMPLE, _RATIONALE, one) for one in islice(ASPECTS, _JUDGEMENTS)]


def _reason(one: _Asked, lacks: Mapping[Measure, str]) -> str:
    return "; ".join(lacks[measure] for measure in sorted(one.calls & lacks.keys()))


def _wanted(one: _Asked, lacks: Mapping[Measure, str]) -> str:
    return " and ".join(_LACKS[measure] for measure in sorted(one.calls & lacks.keys()))
