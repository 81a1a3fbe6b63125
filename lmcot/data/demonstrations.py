"""Demonstrations that are made of questions: which ones, and what each of them shows."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from lmcot.config import DrawnDemonstrations, GivenDemonstrations, SupportingFactsTeacher
from lmcot.config.prompts import Demonstration, DemonstrationParagraph, QuestionDemonstration
from lmcot.data.context import CountTokens, apply_context, render_context
from lmcot.data.facts import facts_rationale
from lmcot.errors import UserError
from lmcot.records import Example, Paragraph
from lmcot.storage import reaching
from lmcot.text.answers import normalize_answer

if TYPE_CHECKING:
    from lmcot.storage import Place

Embed = Callable[[Sequence[str]], npt.NDArray[np.float32]]
"""Gives a row of unit length for each text."""
DEMONSTRATIONS_KEY = "prompts.demonstrations"
"""Under which stages record the digest of the demonstrations that they were shown."""
_REASONS_NAMED = 3


@dataclass(frozen=True, slots=True)
class Drawn:
    """The demonstrations that were drawn."""

    given: GivenDemonstrations
    notes: tuple[str, ...]
    """What users should know of them, a sentence each."""


def draw(
    settings: DrawnDemonstrations,
    pool: Sequence[Example],
    kept: Mapping[str, str],
    teacher: SupportingFactsTeacher,
    longest: int,
    count_tokens: CountTokens,
) -> Drawn:
    """Draws demonstrations from a pool of questions; the same settings and pool draw the same.

    Args:
        kept: the teacher's kept rationales by question, if the settings take those.
        teacher: makes the rationales of supporting facts, as it makes those that are learnt.
        longest: tokens that such a rationale may have.

    Raises:
        UserError: if too few questions can be used, or none fits into the token budget.
    """
    maker = _Maker(settings, kept, teacher, longest, count_tokens)
    made = [maker.make(example) for example in pool]
    usable = [one for one in made if isinstance(one, QuestionDemonstration)]
    unusable = Counter(one for one in made if isinstance(one, str))
    if len(usable) < settings.count:
        reasons = "; ".join(f"{n} {why}" for why, n in unusable.most_common(_REASONS_NAMED))
        raise UserError(
            f"prompts.demonstrations.count is {settings.count}, but {len(usable)} of the first "
            f"{len(pool)} questions of prompts.demonstrations.source can be demonstrations"
            f"{f' ({reasons})' if reasons else ''}: raise prompts.demonstrations.pool, lower the "
            "count, or change the settings that this speaks of"
        )
    if settings.choose == "similar":
        return Drawn(_given(settings, usable, settings.count), ())
    chosen = usable if settings.choose == "first" else _stratified(usable, settings.seed)
    chosen = chosen[: settings.count]
    fitting = _within(chosen, settings.max_tokens, maker.length)
    if not fitting:
        raise UserError(
            f"none of the {len(chosen)} demonstrations fits into prompts.demonstrations.max_tokens "
            f"({settings.max_tokens}): the shortest takes {min(map(maker.length, chosen))} tokens; "
            "raise it, or lower prompts.demonstrations.context.max_tokens"
        )
    notes: tuple[str, ...] = ()
    if left := len(chosen) - len(fitting):
        notes = (
            f"{left} of {len(chosen)} demonstrations do not fit into "
            f"prompts.demonstrations.max_tokens ({settings.max_tokens}) and are left out",
        )
    return Drawn(_given(settings, fitting, None), notes)


@dataclass(frozen=True, slots=True)
class _Maker:
    """Makes demonstrations of questions."""

    settings: DrawnDemonstrations
    kept: Mapping[str, str]
    teacher: SupportingFactsTeacher
    longest: int
    count_tokens: CountTokens

    def make(self, example: Example) -> QuestionDemonstration | str:
        """The question's demonstration, or the reason why there is none."""
        settings = self.settings
        answer = example.answer.strip()
        if not answer:
            return "have no answer"
        shown = apply_context([example], settings.context, self.count_tokens)[0]
        if shown.gold_sentences() != example.gold_sentences():
            return "have supporting facts that exceed prompts.demonstrations.context.max_tokens"
        if settings.rationale == "teacher":
            rationale = self.kept.get(example.id, "")
            if not rationale:
                return f"have no kept rationale in '{settings.rationales}'"
        else:
            if not shown.gold_sentences():
                return "have no supporting facts, which prompts.demonstrations.rationale asks for"
            told = facts_rationale(shown, self.teacher, self._is_short)
            if not told.fits:
                return f"have supporting facts that exceed policy.max_new_tokens ({self.longest})"
            rationale = told.text
        made = QuestionDemonstration(
            id=example.id,
            type=example.type,
            context=tuple(
                DemonstrationParagraph(title=one.title, sentences=one.sentences)
                for one in shown.context
                if one.sentences
            ),
            question=example.question,
            rationale=rationale,
            answer=answer,
        )
        share = settings.max_tokens // settings.count
        if settings.choose == "similar" and self.length(made) > share:
            return f"are longer than their share of prompts.demonstrations.max_tokens ({share})"
        return made

    def _is_short(self, rationale: str) -> bool:
        return self.count_tokens(rationale) + 1 <= self.longest  # one token is EOS's

    def length(self, one: Demonstration) -> int:
        """Tokens of a demonstration."""
        context = render_context([Paragraph(p.title, p.sentences) for p in one.context])
        return self.count_tokens("\n".join([context, one.question, one.rationale, one.answer]))


def _stratified(usable: Sequence[QuestionDemonstration], seed: int) -> list[QuestionDemonstration]:
    """All of them, the types in turn, each type's in random order."""
    by_type: dict[str, list[QuestionDemonstration]] = {}
    for one in usable:
        by_type.setdefault(one.type, []).append(one)
    for name, group in by_type.items():
        random.Random(f"{seed}/{name}").shuffle(group)
    rounds = zip_longest(*(by_type[name] for name in sorted(by_type)))
    return [one for one in chain.from_iterable(rounds) if one is not None]


def _within(
    chosen: Sequence[QuestionDemonstration], budget: int, length: Callable[[Demonstration], int]
) -> list[QuestionDemonstration]:
    """Those that fit together, in their order."""
    fitting, left = [], budget
    for one in chosen:
        if (tokens := length(one)) <= left:
            fitting.append(one)
            left -= tokens
    return fitting


def _given(
    settings: DrawnDemonstrations, examples: Sequence[QuestionDemonstration], nearest: int | None
) -> GivenDemonstrations:
    return GivenDemonstrations(
        kind="given", examples=tuple(examples), nearest=nearest, embeddings=settings.embeddings
    )


class Nearest:
    """Demonstrations whose questions are nearest to a question."""

    def __init__(self, examples: Sequence[Demonstration], count: int, embed: Embed) -> None:
        """Embeds the demonstrations' questions."""
        self._examples, self._count, self._embed = examples, count, embed
        self._vectors = embed([one.question for one in examples])

    def __call__(self, question: str) -> tuple[Demonstration, ...]:
        """The nearest ones, the nearest last; of equal ones the first in the pool is nearer."""
        near = self._vectors @ self._embed([question])[0]
        order = np.argsort(-near, kind="stable")[: self._count]
        return tuple(self._examples[at] for at in reversed(order.tolist()))


class SetApart:
    """The questions that may be shown as demonstrations: neither trained on nor measured on."""

    def __init__(self, given: GivenDemonstrations | None) -> None:
        examples = given.examples if given is not None else ()
        self._ids = {one.id for one in examples}
        self._questions = {normalize_answer(one.question) for one in examples}

    def __contains__(self, example: Example) -> bool:
        """Whether a demonstration has the question's id or its words."""
        return example.id in self._ids or normalize_answer(example.question) in self._questions


def to_lines(given: GivenDemonstrations) -> str:
    """The demonstrations as JSON lines."""
    lines = (json.dumps(one.model_dump(mode="json"), ensure_ascii=False) for one in given.examples)
    return "".join(f"{line}\n" for line in lines)


def demonstrations_digest(given: GivenDemonstrations) -> str:
    """A digest of the demonstrations, which stages record as one of their inputs."""
    return hashlib.sha256(to_lines(given).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def read_given(path: Place, settings: DrawnDemonstrations) -> GivenDemonstrations:
    """The demonstrations that a run has drawn with these settings.

    Raises:
        UserError: if the file is not there or is damaged.
    """
    remedy = "put it back from a copy, or use another --run-dir"
    try:
        with reaching(path):
            lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        raise UserError(f"the run's demonstrations are missing ('{path}'): {remedy}") from None
    try:
        examples = [QuestionDemonstration.model_validate_json(line) for line in lines]
    except ValidationError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the file '{path}' is damaged ({reason}): {remedy}") from None
    if not examples:
        raise UserError(f"the file '{path}' holds no demonstrations: {remedy}")
    similar = settings.choose == "similar"
    return _given(settings, examples, settings.count if similar else None)
