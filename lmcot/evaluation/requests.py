"""Requests for rationales and answers, in an evaluation after training and during it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lmcot.actors.units import Packed, PromptUnit, RolloutUnit
from lmcot.config import Config
from lmcot.config.rows import RowSpec
from lmcot.data.row_requests import row_prompt, row_sampling
from lmcot.data.tasks import EXTRACTIVE_QA, Task
from lmcot.evaluation.predictions import Attempt, Rationales
from lmcot.frozen.cached import Replies
from lmcot.records import Answer, Choice, Completion, Example, Failure, Rollout
from lmcot.run.context import Run, in_units


def rationale_units(
    config: Config,
    examples: Sequence[Example],
    sampled: bool,
    *,
    version: int = 0,
    weights: Sequence[Any] = (),
    name: str = "evaluate",
) -> list[RolloutUnit]:
    """Units for the rollout actors: one greedy rationale for each question, or as many as vote.

    Args:
        version, weights: of the policy, if it is not that of the actors' own source.
        name: prefix of the units' ids.
    """
    settings = config.evaluate
    return [
        RolloutUnit(
            unit_id=f"{name}/{rows[0]}",
            questions=Packed.of(tuple(examples[i] for i in rows)),
            samples=settings.samples if sampled else 1,
            temperature=settings.temperature if sampled else 0.0,
            max_new_tokens=config.policy.max_new_tokens,
            seed=config.seed,
            step=0,
            policy_version=version,
            weights=tuple(weights),
        )
        for rows in in_units(range(len(examples)), config.actors.prompts_per_unit)
    ]


def rationales_of(rollouts: Sequence[Rollout], samples: int) -> list[Rationales]:
    """The rationales in a unit's rollouts, of which each question has ``samples``."""
    found = []
    for start in range(0, len(rollouts), samples):
        group = rollouts[start : start + samples]
        found.append(
            Rationales(
                id=group[0].example_id,
                texts=[one.text for one in group],
                tokens_in=len(group[0].prompt_ids),
                tokens_out=[len(one.response_ids) for one in group],
                finish_reasons=[one.finish_reason for one in group],
                seconds=0.0,
            )
        )
    return found


def prompt_units(
    run: Run,
    row: RowSpec,
    examples: Sequence[Example],
    texts: Sequence[Sequence[str]],
    options: Sequence[str] = (),
) -> Iterator[PromptUnit]:
    """Units for the frozen LM: one for each attempt, each of which asks all questions once.

    Args:
        texts: the rationales that are shown with each question; none in rows without.
        options: those of all the questions, if the frozen LM is to choose one of them.
    """
    config = run.config
    for attempt in range(row.attempts(config.evaluate.samples)):
        prompts = tuple(
            row_prompt(row, run.templates, example, shown[attempt] if shown else "")
            for example, shown in zip(examples, texts, strict=True)
        )
        sampling = row_sampling(row, config, run.templates, attempt)
        name = f"{row.name}/{examples[0].id}/{attempt}"
        yield PromptUnit(name, prompts, sampling, tuple(options))


class Votes:
    """Gathers the replies to groups of questions that are asked ``attempts`` times each."""

    def __init__(self, attempts: int) -> None:
        self._attempts = attempts
        self._came: dict[int, dict[int, Replies]] = {}

    def add(self, index: int, replies: Replies) -> tuple[int, list[Replies]] | None:
        """Takes the replies to a unit.

        Args:
            index: of the unit, where all attempts of a group come before those of the next group.

        Returns:
            the group's index and the replies of all of its attempts in order, with the last one;
            None before.
        """
        group, attempt = divmod(index, self._attempts)
        came = self._came.setdefault(group, {})
        came[attempt] = replies
        if len(came) < self._attempts:
            return None
        del self._came[group]
        return group, [came[number] for number in range(self._attempts)]


def answers_of(
    texts: Sequence[str],
    replies: Sequence[Completion | Choice | Failure],
    question: str,
    task: Task = EXTRACTIVE_QA,
) -> list[Attempt]:
    """A question's attempts, the answers read out of the replies."""

    def answer(reply: Completion | Choice | Failure) -> Answer | Failure:
        if isinstance(reply, Failure):
            return reply
        return chosen(reply) if isinstance(reply, Choice) else task.answer(reply, question)

    return [Attempt(texts[at] if texts else "", answer(one)) for at, one in enumerate(replies)]


def chosen(choice: Choice) -> Answer:
    """The likeliest option as an answer; of equal ones the first."""
    best = max(choice.probabilities, key=lambda option: choice.probabilities[option])
    return Answer(
        best, best, choice.tokens_in, choice.tokens_out, estimated=choice.estimated
    )  # fmt: skip


def own_answers(rationales: Rationales, question: str, task: Task = EXTRACTIVE_QA) -> list[Attempt]:
    """A question's attempts, the answers read out of the small LM's own rationales."""
    attempts = []
    for text, reason in zip(rationales.texts, rationales.finish_reasons, strict=True):
        said = task.read(text, question, cut=reason == "length")
        attempts.append(Attempt(text, Answer("", said.answer, 0, 0, said.missing)))
    return attempts
