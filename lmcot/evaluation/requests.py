"""How rationales and answers are asked for, at the end of a run and in the middle of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lmcot.actors.units import Packed, PromptUnit, RolloutUnit
from lmcot.config import Config
from lmcot.config.rows import plain, votes
from lmcot.evaluation.predictions import Attempt, Rationales
from lmcot.records import Completion, Example, Failure, Prompt, Rollout
from lmcot.rewards.first_check import row_sampling
from lmcot.run.context import Run, in_units
from lmcot.text.reading import read_answer


def rationale_units(
    config: Config,
    examples: Sequence[Example],
    sampled: bool,
    *,
    version: int = 0,
    weights: Sequence[Any] = (),
    name: str = "evaluate",
) -> list[RolloutUnit]:
    """Units for the rollout actors: one greedy rationale a question, or as many as vote.

    Args:
        version, weights: of the policy, if it is not the actors' own source.
        name: what the units are called by.
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
    """What a unit's rollouts, ``samples`` of each question, come to."""
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
    run: Run, row: str, examples: Sequence[Example], texts: Sequence[Sequence[str]]
) -> Iterator[PromptUnit]:
    """Units for the frozen LM: one, or as many as vote; each asks all of the questions once.

    Args:
        texts: the rationales that are shown with each question; none in rows without.
    """
    config = run.config
    for number in range(config.evaluate.samples if votes(row) else 1):
        prompts = tuple(
            _prompt(run, row, example, shown[number] if shown else "")
            for example, shown in zip(examples, texts, strict=True)
        )
        sampling = row_sampling(config, run.templates, row, number)
        yield PromptUnit(f"{row}/{examples[0].id}/{number}", prompts, sampling)


def answers_of(texts: Sequence[str], replies: Sequence[Completion | Failure]) -> list[Attempt]:
    """A question's attempts, the answers read out of the replies."""
    return [
        Attempt(
            texts[at] if texts else "",
            reply if isinstance(reply, Failure) else read_answer(reply),
        )
        for at, reply in enumerate(replies)
    ]


def _prompt(run: Run, row: str, example: Example, rationale: str) -> Prompt:
    templates, shown = run.templates, run.config.prompts.demonstrations
    if plain(row) == "standard":
        return templates.standard(example, shown)
    if plain(row) == "cot":
        return templates.cot(example, shown)
    return templates.guided(example, rationale, shown)
