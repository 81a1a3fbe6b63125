"""The teacher ``frozen``: rationales that the frozen LM wrote, and why some are rejected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lmcot.actors.frozen_client import FrozenClient
from lmcot.actors.resources.cluster import check_plan
from lmcot.actors.units import PromptUnit
from lmcot.config import FrozenTeacher
from lmcot.data.row_requests import teacher_prompt, teacher_sampling, teacher_wording
from lmcot.data.tasks import Task
from lmcot.frozen.cached import Replies
from lmcot.monitor.progress import progress
from lmcot.records import Annotation, Completion, Example, Failure, Prompt, Usage
from lmcot.run.budgets import Losses, usage_metrics
from lmcot.run.context import Run, in_units
from lmcot.run.roles import annotate_roles
from lmcot.training.filters import Filters, is_right
from lmcot.training.reasons import FAILED, RIGHT, WITH_HINT, failed, is_good

Key = tuple[str, bool, int]
"""Names one rationale: its question, whether the answer was given as a hint, its sample."""
Keep = Callable[[list[Annotation]], None]


def key_of(one: Annotation) -> Key:
    """The key of a rationale."""
    return one.example_id, one.hinted, one.sample


@dataclass(frozen=True, slots=True)
class _Ask:
    """A work unit: one sample for each of some training questions."""

    rows: list[int]
    sample: int
    hinted: bool


class FrozenTeaching:
    """Asks the frozen LM for the rationales that are missing.

    The units do not depend on what is there already, so that an interrupted annotation continues
    with the same calls; of a unit, only what is missing is asked.
    """

    def __init__(self, run: Run, teacher: FrozenTeacher, filters: Filters) -> None:
        self._run = run
        self._teacher = teacher
        self._filters = filters
        self._size = run.config.actors.prompts_per_unit

    def missing(self, known: Mapping[Key, Annotation]) -> bool:
        """Whether something must be asked."""
        return bool(self._plain(known) or self._hinted(known))

    def ask(self, known: Mapping[Key, Annotation], keep: Keep) -> None:
        """Asks for what is missing.

        Args:
            known: what is there; the caller adds what it is told to keep.
            keep: told the rationales of a unit as they arrive.
        """
        run = self._run
        check_plan("annotate", annotate_roles(run.config), run.config.actors)
        with run.frozen_fleet() as fleet:
            fleet.wait_ready()
            client = run.frozen_client(fleet)
            asks = self._plain(known)
            usage = self._work_off("annotate", client, asks, len(run.train), known, keep)
            asks = self._hinted(known)
            if asks:
                failing = len(self._failing(known))
                usage += self._work_off("rationalise", client, asks, failing, known, keep)
        run.monitor.log(0, "annotate", usage_metrics(usage))

    def _work_off(
        self,
        name: str,
        client: FrozenClient,
        asks: list[_Ask],
        questions: int,
        known: Mapping[Key, Annotation],
        keep: Keep,
    ) -> Usage:
        run = self._run
        total = questions * self._teacher.samples
        losses = Losses(run.config.failures, total, "answers to the training questions")
        done = total - sum(len(one.rows) for one in asks)
        usage = Usage()

        def take(index: int, replies: Replies) -> None:
            nonlocal usage
            usage += replies.usage
            keep(self._judged(asks[index], replies))
            # What was said is on disk by now, whichever limit ends the run.
            run.spending.add("annotate", replies.usage)
            losses.add(one if isinstance(one, Failure) else None for one in replies.results)
            bar.update(len(replies.results), kept=float(sum(map(is_good, known.values()))))

        with progress(name, total=total, unit="rationale", done=done) as bar:
            client.map([self._unit(one) for one in asks], on_result=take)
        return usage

    def _judged(self, ask: _Ask, replies: Replies) -> list[Annotation]:
        teacher, templates = self._teacher, self._run.templates
        found: list[Annotation] = []
        for row, one in zip(ask.rows, replies.results, strict=True):
            example = self._run.train[row].example
            wording = teacher_wording(teacher, templates, example, hinted=ask.hinted)
            found.append(
                judged(
                    example, one, teacher, self._filters,
                    prompt=wording, hinted=ask.hinted, sample=ask.sample,
                )
            )  # fmt: skip
        return found

    def _plain(self, known: Mapping[Key, Annotation]) -> list[_Ask]:
        rows = range(len(self._run.train))
        return self._asks(list(rows), known, hinted=False)

    def _hinted(self, known: Mapping[Key, Annotation]) -> list[_Ask]:
        if not self._teacher.rationalise:
            return []
        return self._asks(self._failing(known), known, hinted=True)

    def _asks(
        self, rows: list[int], known: Mapping[Key, Annotation], *, hinted: bool
    ) -> list[_Ask]:
        ids = [one.example.id for one in self._run.train]
        return [
            _Ask(missing, sample, hinted)
            for sample in range(self._teacher.samples)
            for places in in_units(range(len(rows)), self._size)
            if (
                missing := [
                    rows[at] for at in places if (ids[rows[at]], hinted, sample) not in known
                ]
            )
        ]

    def _failing(self, known: Mapping[Key, Annotation]) -> list[int]:
        """Questions that have all their replies, and no good one."""
        found = []
        for row, question in enumerate(self._run.train):
            keys = [(question.example.id, False, k) for k in range(self._teacher.samples)]
            replies = [known[key] for key in keys if key in known]
            whole = len(replies) == len(keys) and not any(map(failed, replies))
            if whole and not any(map(is_good, replies)):
                found.append(row)
        return found

    def _unit(self, ask: _Ask) -> PromptUnit:
        kind = "hinted/" if ask.hinted else ""
        run, teacher = self._run, self._teacher
        prompts = tuple(
            teacher_prompt(teacher, run.templates, run.train[row].example, hinted=ask.hinted)
            for row in ask.rows
        )
        sampling = teacher_sampling(
            teacher, run.config, run.templates, ask.sample, hinted=ask.hinted
        )
        return PromptUnit(f"annotate/{kind}{ask.sample}/{ask.rows[0]}", prompts, sampling)


def judged(
    example: Example,
    result: Completion | Failure,
    teacher: FrozenTeacher,
    filters: Filters,
    *,
    prompt: Prompt = (),
    hinted: bool = False,
    sample: int = 0,
) -> Annotation:
    """A reply as a rationale: good only where its own answer is right and no filter rejects it."""
    if isinstance(result, Failure):
        text, answer, reason = "", "", FAILED + result.reason
    else:
        text = result.text.strip()
        answer = filters.task.stated(text, example.question)
        reason = _fault(example, result, answer, teacher, filters.task) or filters.reason(
            example, text, prompt=prompt, hinted=hinted
        )
    told = (WITH_HINT if hinted else "") + (reason or RIGHT)
    return Annotation(
        example.id, teacher.kind, text, answer, not reason, told, hinted=hinted, sample=sample
    )


def _fault(
    example: Example, result: Completion, answer: str, teacher: FrozenTeacher, task: Task
) -> str:
    """Why a reply does not come to the right answer; empty if it does."""
    said = task.answer(result, example.question)
    if said.silent:
        return said.silent
    if is_right(answer, example, teacher.right_by, teacher.min_f1, task):
        return ""
    if result.finish_reason == "length" and (not answer or said.missing == "cut"):
        return "the teacher was cut before it came to its answer: raise frozen.max_rationale_tokens"
    return "the teacher's answer is wrong" if answer else "the teacher came to no answer"
