"""What a stage learns from: prompts with rationales, how they are cut into steps and kept out."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lmcot.config import AnswerTask, DistillSettings, TrainingStage, ValidationSettings
from lmcot.data.render import encode, encode_continuation
from lmcot.data.sampler import PromptSampler
from lmcot.errors import UserError
from lmcot.models.limits import Limits, read_limits
from lmcot.monitor.progress import say
from lmcot.records import Example, Message
from lmcot.run.context import Run

if TYPE_CHECKING:
    from lmcot.learner.batching import TokenPair


@dataclass(frozen=True, slots=True)
class TrainingPair:
    """A question's prompt and the rationale that is to be learnt."""

    example: Example
    rationale: str
    tokens: TokenPair
    """Token ids of the prompt and of the rationale, with EOS at its end."""
    answer: TokenPair | None = None
    """Likewise of the prompt for the answer alone, and of the right answer; None if answers are
    not learnt."""

    @property
    def length(self) -> int:
        """Number of tokens of all prompts and what is learnt together."""
        return sum(len(ids) for pair in (self.tokens, self.answer or ()) for ids in pair)


def answers_of(pairs: Sequence[TrainingPair]) -> list[TokenPair]:
    """The answers that are learnt with some rationales; none without that task."""
    return [one.answer for one in pairs if one.answer is not None]


def training_pairs(
    run: Run,
    stage: TrainingStage,
    rationales: Mapping[str, str],
    answer_task: AnswerTask | None = None,
) -> list[TrainingPair]:
    """The questions of ``data.train`` that have a rationale, with it.

    Those that do not fit into the model's window are left out, and counted on the terminal.

    Args:
        rationales: by the id of their question.
        answer_task: whether and how answers are learnt too.
    """
    limits = read_limits(run.config.policy.source, run.tokenizer)
    pairs: list[TrainingPair] = []
    too_long = 0
    for question in run.train:
        example = question.example
        rationale = rationales.get(example.id)
        if rationale is None:
            continue
        taught = _continued(run, limits, run.rationale_prompt(example), rationale)
        answer = _answered(run, limits, example, answer_task) if answer_task else None
        if all(limits.fit(*map(len, pair)) for pair in (taught, answer) if pair):
            pairs.append(TrainingPair(example, rationale, taught, answer))
        else:
            too_long += 1
    if too_long:
        say(
            f"{stage.name}: {too_long} rationales are left out: with their prompts they do not fit "
            f"into the {limits.window} positions of '{limits.source}'"
        )
    return pairs


def sampled_pairs(
    run: Run,
    sampled: Iterable[tuple[Example, str, Sequence[int]]],
    answer_task: AnswerTask | None = None,
) -> list[TrainingPair]:
    """Rationales that a policy sampled, by the very tokens that it emitted.

    They fit into the model's window, since they were sampled there.

    Args:
        sampled: questions with a rationale and its tokens.
    """
    limits = read_limits(run.config.policy.source, run.tokenizer)
    return [
        TrainingPair(
            example,
            text,
            (run.rationale_prompt(example), tuple(tokens)),
            _answered(run, limits, example, answer_task) if answer_task else None,
        )
        for example, text, tokens in sampled
    ]


def _answered(run: Run, limits: Limits, example: Example, task: AnswerTask) -> TokenPair:
    """The prompt for an answer without reasoning, and the right answer."""
    *before, last = run.templates.showing(0).standard(example)
    asked = (*before, Message(last.role, task.prefix + last.content))
    prompt = tuple(encode(asked, run.tokenizer, run.config.prompts.chat))
    reply = run.templates.reply(run.templates.file.standard, example)
    return _continued(run, limits, prompt, reply)


def _continued(run: Run, limits: Limits, prompt: tuple[int, ...], text: str) -> TokenPair:
    ids = encode_continuation(prompt, text, run.tokenizer, encoder_decoder=limits.encoder_decoder)
    return prompt, (*ids, run.tokenizer.eos_token_id)


def keep_out(
    pairs: Sequence[TrainingPair], settings: ValidationSettings | None, stage: str, seed: int
) -> tuple[list[TrainingPair], list[TrainingPair]]:
    """Those that are learnt from, and those that are kept out to validate on.

    Which ones are kept out depends on the seed and on each question's text alone, so that it stays
    the same where rationales are added, and equal questions are on one side.

    Raises:
        UserError: if the settings keep out none, or all.
    """
    if settings is None:
        return list(pairs), []
    questions = {one.example.question for one in pairs}
    drawn = sorted(questions, key=lambda text: hashlib.sha256(f"{seed}/{text}".encode()).digest())
    count = settings.questions or round(len(drawn) * (settings.share or 0.0))
    if not 0 < count < len(drawn):
        key = f"{stage}.validation.{'questions' if settings.questions else 'share'}"
        value = settings.questions or settings.share
        whom = "none of them is validated on: raise" if not count else "none is learnt from: lower"
        raise UserError(
            f"{key} is {value:g}, but {len(drawn)} questions have a rationale, so that {whom} it"
        )
    out = set(drawn[:count])
    return (
        [one for one in pairs if one.example.question not in out],
        [one for one in pairs if one.example.question in out],
    )


def batch_sizes(
    pairs: Sequence[TrainingPair], settings: DistillSettings, stage: str, seed: int
) -> list[int]:
    """The number of pairs in each optimiser step, in the order in which the sampler draws them.

    Raises:
        UserError: if a pair alone exceeds ``batch_tokens``.
    """
    drawn = len(pairs) * settings.epochs
    if settings.batch_size is not None:
        size = settings.batch_size
        return [min(size, drawn - start) for start in range(0, drawn, size)]
    budget = settings.batch_tokens or 0
    longest = max(pairs, key=lambda one: one.length)
    if longest.length > budget:
        raise UserError(
            f"{stage}.batch_tokens is {budget}, but the rationale for question "
            f"{longest.example.id} has {longest.length} tokens with its prompt: raise it to "
            f"{longest.length} or more"
        )
    sizes: list[int] = []
    left = 0
    for row in PromptSampler(len(pairs), seed).next(drawn):
        length = pairs[row].length
        if length > left:
            sizes.append(0)
            left = budget
        sizes[-1] += 1
        left -= length
    return sizes
