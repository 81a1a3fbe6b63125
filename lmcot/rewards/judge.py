"""What the reward side says of rationales: the frozen LM's answers and the aspects of quality."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from lmcot.config import GuidanceRewards
from lmcot.data.prompts import PromptTemplates, reply_sampling
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
from lmcot.rewards.aspects import AspectMeter, Measured
from lmcot.rewards.combine import component_weights
from lmcot.rewards.custom import load_custom, with_custom
from lmcot.rewards.likelihood import likelihood_gains
from lmcot.text.answers import best, contains_gold, exact_match, f1, inclusion
from lmcot.text.reading import read_answer


class RewardModel:
    """Judges rationales with the frozen LM.

    Components of a judgement: ``em``, ``f1`` and ``inclusion`` of the frozen LM's answer given
    the rationale, each with the right answer that fits it best, and ``aspect/NAME`` for each
    aspect that is not off; each in [0, 1]. Where the settings ask for them, ``likelihood_gain`` in
    [-1, 1], and ``custom``, any finite number.

    Raises:
        UserError: if there is no such custom reward or learned model; in `judge`, if the custom
            reward raises.
    """

    def __init__(
        self,
        rewards: GuidanceRewards,
        frozen: FrozenLM,
        templates: PromptTemplates,
        demonstrations: int,
        max_answer_tokens: int,
    ) -> None:
        self._rewards = rewards
        self._meter = AspectMeter(rewards)
        self._frozen = frozen
        self._templates = templates
        self._demonstrations = demonstrations
        self._max_answer_tokens = max_answer_tokens
        self._weights = component_weights(rewards)
        self._custom = None if rewards.custom is None else load_custom(rewards.custom)

    def judge(self, examples: Sequence[Example], rationales: Sequence[str]) -> list[Judgement]:
        """One judgement for each rationale and the example it belongs to, in order.

        It holds all components but ``custom``, which is given to rollouts alone. If a call that a
        judgement needs fails, the frozen LM was cut within its thinking, or a component is not a
        finite number, the judgement is that failure and holds no components. A component of weight
        0 is not needed: the judgement goes without it.
        """
        return self._judge(examples, rationales, lambda name: self._weights[name] > 0)

    def judge_rollouts(
        self, examples: Sequence[Example], rollouts: Sequence[Rollout]
    ) -> list[Judgement]:
        """The judgements of the rollouts' texts, with ``custom`` where the settings name one.

        A custom reward may look at any other component, so that it needs all of them.
        """
        if self._rewards.custom is None or self._custom is None:
            return self.judge(examples, [one.text for one in rollouts])
        judgements = self._judge(examples, [one.text for one in rollouts], lambda name: True)
        return [
            with_custom(judgement, example, rollout, name=self._rewards.custom, reward=self._custom)
            for judgement, example, rollout in zip(judgements, examples, rollouts, strict=True)
        ]

    def _judge(
        self,
        examples: Sequence[Example],
        rationales: Sequence[str],
        needed: Callable[[str], bool],
    ) -> list[Judgement]:
        prompts = [
            self._templates.guided(example, rationale, self._demonstrations)
            for example, rationale in zip(examples, rationales, strict=True)
        ]
        sampling = reply_sampling(self._templates.file.guided, self._max_answer_tokens)
        answers = answer_prompts(self._frozen, prompts, sampling)
        aspects = self._meter.measure(
            examples, rationales, frozen=self._frozen, templates=self._templates
        )
        measured = self._with_likelihood_gains(aspects, examples, rationales)
        return [
            _judgement(answer, example.answers, rationale, values, needed)
            for answer, example, rationale, values in zip(
                answers, examples, rationales, measured, strict=True
            )
        ]

    def _with_likelihood_gains(
        self,
        measured: list[dict[str, Measured]],
        examples: Sequence[Example],
        rationales: Sequence[str],
    ) -> list[dict[str, Measured]]:
        if self._rewards.likelihood_gain_weight is None:
            return measured
        gains = likelihood_gains(
            examples,
            rationales,
            frozen=self._frozen,
            templates=self._templates,
            demonstrations=self._demonstrations,
        )
        return [
            {**values, "likelihood_gain": gain}
            for values, gain in zip(measured, gains, strict=True)
        ]


def answer_prompts(
    frozen: FrozenLM, prompts: Sequence[Prompt], sampling: Sampling
) -> list[Answer | Failure]:
    """The frozen LM's greedy answer to each prompt, as written and as read out of that.

    A reply that was cut within its hidden thinking says nothing of the prompt: a failure.
    """
    return [
        completion if isinstance(completion, Failure) else _answer(completion)
        for completion in frozen.generate(prompts, sampling)
    ]


def _answer(reply: Completion) -> Answer | Failure:
    """The answer in a reply; a failure if the reply was cut within its hidden thinking."""
    said = read_answer(reply)
    if said.silent and said.missing == "cut":
        return Failure(FailureKind.PERMANENT, said.silent)
    return said


def _judgement(
    answer: Answer | Failure,
    golds: Sequence[str],
    rationale: str,
    measured: dict[str, Measured],
    needed: Callable[[str], bool],
) -> Judgement:
    if isinstance(answer, Failure):
        return Judgement(failure=answer)
    components = {
        "em": best(exact_match, answer.extracted, golds),
        "f1": best(f1, answer.extracted, golds),
        "inclusion": best(inclusion, answer.extracted, golds),
    }
    unmeasured = {}
    for name, value in measured.items():
        found = _finite(name, value)
        if not isinstance(found, Failure):
            components[name] = found
        elif needed(name):
            return Judgement(failure=found)
        else:
            unmeasured[name] = found.reason
    return Judgement(components, answer, contains_gold(rationale, golds), unmeasured=unmeasured)


def _finite(name: str, value: Measured) -> Measured:
    if isinstance(value, Failure) or math.isfinite(value):
        return value
    reason = f"the reward component '{name}' is {value}, not a finite number"
    return Failure(FailureKind.PERMANENT, reason)
