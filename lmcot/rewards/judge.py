"""Judges rationales: the frozen LM's answers, and the components that are measured."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from lmcot.config import GuidanceRewards
from lmcot.config.prompts import GuidedKind
from lmcot.data.prompts import PromptTemplates, reply_sampling
from lmcot.data.tasks import EXTRACTIVE_QA, Task
from lmcot.frozen.protocol import FrozenLM
from lmcot.records import (
    Answer,
    Completion,
    Example,
    Failure,
    FailureKind,
    Judgement,
    Prompt,
    Rollout,
    Sampling,
)
from lmcot.rewards.aspects import AspectMeter
from lmcot.rewards.component import Context, Measured
from lmcot.rewards.components import component_weights, measured_components
from lmcot.rewards.custom import CustomReward, load_customs, with_custom


class RewardModel:
    """Judges rationales with the frozen LM.

    A judgement has the components of `lmcot.rewards.components` that the settings ask for; that of
    a rollout has those of the user's own rewards as well.

    Raises:
        UserError: if there is no such custom reward or learned model; in `judge_rollouts`, if a
            custom reward raises an exception.
    """

    def __init__(
        self,
        rewards: GuidanceRewards,
        frozen: FrozenLM,
        templates: PromptTemplates,
        max_answer_tokens: int,
        kind: GuidedKind = "guided",
        functions: Mapping[str, CustomReward] | None = None,
        task: Task = EXTRACTIVE_QA,
    ) -> None:
        self._meter = AspectMeter(rewards)
        self._components = measured_components(rewards)
        self._weights = component_weights(rewards)
        self._customs = load_customs(rewards, functions or {})
        self._frozen = frozen
        self._templates = templates
        self._max_answer_tokens = max_answer_tokens
        self._kind: GuidedKind = kind
        self._task = task

    def judge(self, examples: Sequence[Example], rationales: Sequence[str]) -> list[Judgement]:
        """One judgement for each rationale and the example it belongs to, in order.

        It holds all components but those of custom rewards, which are given rollouts alone. If a
        call that a judgement needs fails, the frozen LM was cut within its thinking, or a component
        is not a finite number, the judgement is that failure and holds no components. A component
        of weight 0 is not needed: the judgement goes without it.
        """
        return self._judge(examples, rationales, lambda name: self._weights[name] > 0)

    def judge_rollouts(
        self, examples: Sequence[Example], rollouts: Sequence[Rollout]
    ) -> list[Judgement]:
        """The judgements of the rollouts' texts, with the components of custom rewards.

        A custom reward may look at any other component, so that it needs all of them.
        """
        rationales = [one.text for one in rollouts]
        if not self._customs:
            return self.judge(examples, rationales)
        judgements = self._judge(examples, rationales, lambda name: True)
        return [
            with_custom(judgement, example, rollout, self._customs)
            for judgement, example, rollout in zip(judgements, examples, rollouts, strict=True)
        ]

    def _judge(
        self,
        examples: Sequence[Example],
        rationales: Sequence[str],
        needed: Callable[[str], bool],
    ) -> list[Judgement]:
        answers = self._answers(examples, rationales)
        context = Context(
            self._frozen, self._templates, answers, self._meter, self._kind, self._task
        )
        names = [one.name for one in self._components]
        columns = [one.measure(examples, rationales, context) for one in self._components]
        rows = zip(examples, rationales, answers, *columns, strict=True)
        return [
            _judgement(
                answer, dict(zip(names, values, strict=True)), needed,
                self._task.contains(rationale, example),
            )
            for example, rationale, answer, *values in rows
        ]  # fmt: skip

    def _answers(
        self, examples: Sequence[Example], rationales: Sequence[str]
    ) -> list[Answer | Failure]:
        prompts = [
            self._templates.guided(example, rationale, self._kind)
            for example, rationale in zip(examples, rationales, strict=True)
        ]
        template = self._templates.for_frozen(self._kind)
        sampling = reply_sampling(template, self._max_answer_tokens)
        return answer_prompts(
            self._frozen, prompts, sampling, self._task, [one.question for one in examples]
        )


def answer_prompts(
    frozen: FrozenLM,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    task: Task,
    questions: Sequence[str],
) -> list[Answer | Failure]:
    """The frozen LM's greedy answer to each prompt, as written and as extracted.

    A reply that was cut within its hidden thinking is a failure.

    Args:
        task: reads the answers.
        questions: the question in each prompt.
    """
    replies = frozen.generate(prompts, sampling)
    return [
        reply if isinstance(reply, Failure) else _answer(reply, task, question)
        for reply, question in zip(replies, questions, strict=True)
    ]


def _answer(reply: Completion, task: Task, question: str) -> Answer | Failure:
    """The answer in a reply; a failure if the reply was cut within its hidden thinking."""
    said = task.answer(reply, question)
    if said.silent and said.missing == "cut":
        return Failure(FailureKind.PERMANENT, said.silent)
    return said


def _judgement(
    answer: Answer | Failure,
    measured: Mapping[str, Measured],
    needed: Callable[[str], bool],
    contains_gold: bool,
) -> Judgement:
    if isinstance(answer, Failure):
        return Judgement(failure=answer)
    components, unmeasured = {}, {}
    for name, value in measured.items():
        found = _finite(name, value)
        if not isinstance(found, Failure):
            components[name] = found
        elif needed(name):
            return Judgement(failure=found)
        else:
            unmeasured[name] = found.reason
    return Judgement(components, answer, contains_gold, unmeasured=unmeasured)


def _finite(name: str, value: Measured) -> Measured:
    if isinstance(value, Failure) or math.isfinite(value):
        return value
    reason = f"the reward component '{name}' is {value}, not a finite number"
    return Failure(FailureKind.PERMANENT, reason)
