"""Alarms say in one line what is wrong with the latest steps, and what to do."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass

from lmcot.config import AlarmSettings
from lmcot.config.dependence import KL_COEFFICIENT, LEVERS, NO_STAGE_DEPENDS_ON, below

Values = Mapping[str, float | None]
"""A step's metrics by name; None where one was not finite."""

_KEY = re.compile(r"\b(?:refine|policy|frozen|rewards|prompts)\.[a-z_.]*[a-z]")
_WHILE_RUNNING = (KL_COEFFICIENT, *LEVERS, *NO_STAGE_DEPENDS_ON)
WINDOW = 5
"""Steps that noisy metrics are averaged over."""
CLEARS_AFTER = 20
"""Steps without its cause after which an alarm clears."""


@dataclass(frozen=True, slots=True)
class Bound:
    """A limit beyond which one metric raises an alarm, and the alarm's text.

    ``{value}`` and ``{limit}`` in the text are filled in.
    """

    name: str
    metric: str
    limit: float | None
    text: str
    below: bool = False
    mean: bool = True
    """Whether the mean of the last steps is compared, not only the last step."""
    overlapping: bool = False
    """Whether it holds only while sampling and learning overlap: when they take turns, each waits
    for the other."""

    def passed(self, value: float) -> bool:
        """Whether the value lies beyond the limit."""
        if self.limit is None:
            return False
        return value < self.limit if self.below else value > self.limit


class Alarms:
    """Checks each step of a stage.

    An alarm is raised, and printed once, when its cause appears.

    Args:
        window: steps that noisy metrics are averaged over; until there are so many, their alarms
            wait.
        clears_after: steps without its cause after which an alarm clears; it may be printed again
            then.
    """

    def __init__(
        self, settings: AlarmSettings, *, window: int = WINDOW, clears_after: int = CLEARS_AFTER
    ) -> None:
        self._window = window
        self._clears_after = clears_after
        self._not_finite = settings.not_finite
        self._bounds = _bounds(settings)
        self._history: deque[Values] = deque(maxlen=window)
        self._quiet: dict[str, int] = {}
        """Number of steps without its cause, for each raised alarm."""

    def look(self, metrics: Values) -> tuple[dict[str, float], list[str]]:
        """Checks a step.

        Returns:
            ``alarm/NAME`` (1 if it is raised, else 0) for each alarm that these metrics can raise;
            and a line for each that this step raises, with what to do.
        """
        self._history.append(metrics)
        states: dict[str, float] = {}
        told = []
        for name, found in self._causes(metrics).items():
            if found:
                if name not in self._quiet:
                    told.append(f"{name}: {found}")
                self._quiet[name] = 0
            elif name in self._quiet:
                self._quiet[name] += 1
                if self._quiet[name] >= self._clears_after:
                    del self._quiet[name]
            states[f"alarm/{name}"] = float(name in self._quiet)
        return states, told

    def _causes(self, metrics: Values) -> dict[str, str]:
        """The text of each alarm; empty if its cause is absent."""
        causes = {}
        for bound in self._bounds:
            if bound.limit is not None and bound.metric in metrics:
                causes[bound.name] = self._cause(bound)
        if self._not_finite:
            causes["not_finite"] = _not_finite(metrics)
        return causes

    def _cause(self, bound: Bound) -> str:
        value = self._value(bound)
        if value is None or not bound.passed(value):
            return ""
        if bound.overlapping and not any(one.get("batch/staleness") for one in self._history):
            return ""
        text = bound.text.format(value=value, limit=bound.limit)
        return text + how_to_change(bound.text)

    def _value(self, bound: Bound) -> float | None:
        """The value that is compared with the limit; None if there are too few steps."""
        if not bound.mean:
            return self._history[-1][bound.metric]
        values = [value for one in self._history if (value := one.get(bound.metric)) is not None]
        return sum(values) / len(values) if len(values) == self._window else None


def _not_finite(metrics: Values) -> str:
    lost = [name for name, value in metrics.items() if value is None]
    skipped = metrics.get("optimiser/skipped_updates") or 0
    if skipped:
        return (
            f"{skipped:.0f} update(s) were skipped because a loss or gradient was not finite: "
            "lower the stage's optimiser.learning_rate if it happens again (the same command "
            "resumes with another one)"
        )
    if lost:
        return (
            f"{', '.join(lost)} is not finite: lower the stage's optimiser.learning_rate if it "
            "happens again (the same command resumes with another one), or compute in float32 "
            "(policy.dtype) in a new --run-dir"
        )
    return ""


def how_to_change(advice: str) -> str:
    """Says which of the settings named by an advice may change in this run, and which need a new
    run.

    Returns:
        the end of a sentence, with a space before it; empty if the advice names no settings.
    """
    keys = list(dict.fromkeys(_KEY.findall(advice)))
    now = [key for key in keys if below(key, _WHILE_RUNNING)]
    new = [key for key in keys if key not in now]
    told = [
        f"the same command resumes with another {', '.join(now)}" if now else "",
        f"another {', '.join(new)} takes a new --run-dir" if new else "",
    ]
    parts = "; ".join(part for part in told if part)
    return f" ({parts})" if parts else ""


def _bounds(settings: AlarmSettings) -> tuple[Bound, ...]:
    failed = settings.failed_share_above
    judged = None if failed is None else 1 - failed
    return (
        Bound(
            "kl_high", "kl", settings.kl_above,
            "the KL to the reference is {value:.3g} nats per rationale, above {limit:g}: the "
            "policy runs away from it; raise refine.kl.coefficient if it is fixed, lower "
            "refine.optimiser.learning_rate, or set refine.target_kl",
            mean=False,
        ),
        Bound(
            "kl_negative", "kl", settings.kl_below,
            "the KL to the reference has been {value:.3g} nats per rationale on average, below "
            "{limit:g}: rationales do not come from the distribution that they are scored under; "
            "compare sampler/gap and sampler/kl, and sample more rationales a step",
            below=True,
        ),
        Bound(
            "entropy_collapse", "policy/entropy", settings.entropy_below,
            "the policy's entropy has been {value:.3g} nats per token on average, below {limit:g}: "
            "it hardly explores; raise refine.entropy_coefficient or "
            "refine.kl.coefficient, or resume from an earlier checkpoint",
            below=True,
        ),
        Bound(
            "no_signal", "reward/equal_groups", settings.equal_groups_above,
            "the rationales of {value:.0%} of the questions all had one reward: there is nothing "
            "to learn from these; sample more of each (refine.samples_per_prompt), take questions "
            "that are neither too hard nor too easy, give weight to graded rewards, or ask others "
            "in their place (refine.filter)",
        ),
        Bound(
            "unfilled_steps", "filter/filled", settings.filled_share_below,
            "steps have learnt from only {value:.0%} of the questions that they want, since "
            "refine.filter left out the others: raise refine.filter.refill, sample more of each "
            "(refine.samples_per_prompt), or take questions that are neither too hard nor too easy "
            "(refine.curriculum lets such questions rest)",
            below=True,
        ),
        Bound(
            "length_limit", "response/cut_share", settings.cut_share_above,
            "{value:.0%} of the rationales were cut at the length limit: raise "
            "policy.max_new_tokens, or set a penalty (rewards.penalties.missing_end or length)",
        ),
        Bound(
            "empty_answers", "answer/empty_share", settings.empty_answers_above,
            "{value:.0%} of the frozen LM's replies held no answer and counted as wrong: see "
            "judgement.answer.text in rollouts/; raise frozen.max_thinking_tokens if it thinks "
            "before it answers, or change prompts.templates",
        ),
        Bound(
            "cut_answers", "answer/cut_share", settings.cut_answers_above,
            "{value:.0%} of the frozen LM's replies were cut before their answer: raise "
            "frozen.max_answer_tokens, or frozen.max_thinking_tokens if it thinks first; where "
            "judgement.answer.text in rollouts/ is blank, the frozen LM writes special tokens "
            "alone and does not fit prompts.templates",
        ),
        Bound(
            "failed_judgements", "batch/judged_share", judged,
            "only {value:.0%} of a step's rationales could be judged: see judgement.failure in "
            "rollouts/ for why; check the frozen LM's endpoint and its time limits",
            below=True,
            mean=False,
        ),
        Bound(
            "sampler_mismatch", "sampler/kl", settings.sampler_kl_above,
            "what sampled the rationales and the learner have been {value:.3g} nats per token "
            "apart on average: give both one policy.dtype, or lower refine.max_staleness or "
            "refine.optimiser.learning_rate",
        ),
        Bound(
            "uneven_weights", "sampler/effective_sample_size",
            settings.effective_sample_size_below,
            "the importance weights between sampler and learner have been so uneven that the "
            "tokens counted as {value:.0%} of their number on average, below {limit:.0%}: lower "
            "refine.max_staleness, refine.importance_cap or refine.optimiser.learning_rate",
            below=True,
        ),
        Bound(
            "much_clipping", "policy/clip_fraction", settings.clip_fraction_above,
            "the ratio of {value:.0%} of the tokens has been clipped on average: the policy moves "
            "far within a step; lower refine.optimiser.learning_rate, or take fewer updates a step "
            "(refine.epochs, refine.minibatches)",
        ),
        Bound(
            "idle_learner", "idle/learner", settings.idle_learner_above,
            "the learner has waited {value:.0%} of the time for rationales: add rollout, reward or "
            "frozen actors, whichever has the least idle/ROLE, or raise refine.max_staleness",
            overlapping=True,
        ),
        Bound(
            "idle_rollout", "idle/rollout", settings.idle_rollout_above,
            "the rollout actors have been without work {value:.0%} of the time: the learner or the "
            "judging is slower, whichever has less idle/ROLE; give it their CPUs or GPUs",
            overlapping=True,
        ),
    )  # fmt: skip
