"""The frozen LM's first answers, which the small LM advises on (``prompts.guidance: advice``).

Each question is asked once, before the first stage that needs it. What came is kept in
``first_answers.jsonl`` as it arrives, so that samples, stages and resumed runs share it.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, Final

from lmcot import run_files
from lmcot.actors.resources.cluster import check_plan
from lmcot.actors.units import PromptUnit
from lmcot.config import digested_settings
from lmcot.config.dependence import CONCLUSION, FROZEN_READS
from lmcot.config.rows import find_row
from lmcot.data.row_requests import row_prompt, row_sampling
from lmcot.errors import UserError
from lmcot.files import drop_cut_line, open_private, whole_object
from lmcot.frozen.cached import Replies
from lmcot.monitor.progress import progress, say
from lmcot.records import Completion, Example, Failure, FailureKind, Usage
from lmcot.run.budgets import Losses, usage_metrics
from lmcot.run.inputs import example_digest

if TYPE_CHECKING:
    from pathlib import Path

    from lmcot.run.context import Question, Run

STAGE: Final = "first_answers"


@dataclass(frozen=True, slots=True)
class FirstAnswer:
    """What the frozen LM answered first to a question, and what that cost."""

    id: str
    text: str
    """The reply; empty if it failed."""
    tokens_in: int
    tokens_out: int
    seconds: float
    """Seconds that it took; questions that arrived together share theirs equally."""
    cached: float
    """Share of the request that the frozen LM's cache answered."""
    made_from: str
    """Digest of the question and of the settings that the reply depends on."""
    estimated: bool = False
    """Whether a count of tokens is an estimate."""
    failure: str = ""
    """Why there is no reply; empty if there is one."""


class FirstAnswers:
    """The first answers that a run has, in its directory."""

    def __init__(self, path: Path, mark: str) -> None:
        """Reads the file, if there is one.

        Args:
            mark: names everything that the answers depend on, but the questions.

        Raises:
            UserError: naming a line that is damaged.
        """
        self._path, self._mark = path, mark
        self._found: dict[str, FirstAnswer] = {}
        if not path.exists():
            return
        drop_cut_line(path)
        for number, line in enumerate(path.read_bytes().splitlines(), 1):
            try:
                one = FirstAnswer(**whole_object(line, ("made_from",)))
            except (ValueError, TypeError) as error:
                raise UserError(
                    f"line {number} of '{path}' is damaged ({error}): delete it to have its "
                    "question asked again"
                ) from None
            self._found[one.made_from] = one

    def of(self, example: Example) -> FirstAnswer | None:
        """The first answer to a question; None if it was not asked."""
        return self._found.get(self._made_from(example))

    def add(self, example: Example, reply: Completion | Failure, **more: Any) -> None:
        """Keeps a reply; it is on disk when this returns.

        Args:
            more: ``seconds`` and ``cached``.
        """
        one = FirstAnswer(
            id=example.id,
            text="" if isinstance(reply, Failure) else reply.text.strip(),
            tokens_in=0 if isinstance(reply, Failure) else reply.tokens_in,
            tokens_out=0 if isinstance(reply, Failure) else reply.tokens_out,
            made_from=self._made_from(example),
            estimated=not isinstance(reply, Failure) and reply.estimated,
            failure=reply.reason if isinstance(reply, Failure) else "",
            **more,
        )
        with open_private(self._path, "ab") as file:
            file.write((json.dumps(asdict(one), ensure_ascii=False) + "\n").encode())
        self._found[one.made_from] = one

    def _made_from(self, example: Example) -> str:
        bare = replace(example, first_answer="")
        return hashlib.sha256(f"{self._mark}/{example_digest(bare)}".encode()).hexdigest()[:16]


def open_first_answers(run: Run) -> FirstAnswers:
    """The first answers of a run; those of other settings or questions are not used."""
    settings = {
        key: value
        for key, value in digested_settings(run.config, "evaluate").items()
        if key.startswith(("frozen.", "prompts.")) and key not in (FROZEN_READS, CONCLUSION)
    }
    known = json.dumps([settings, run.templates.as_text(rationale_only=False)], sort_keys=True)
    mark = hashlib.sha256(known.encode()).hexdigest()[:16]
    return FirstAnswers(run.directory.path / run_files.FIRST_ANSWERS, mark)


def ask_first(run: Run, questions: list[Question], rows: Iterable[int] | None = None) -> None:
    """Puts the frozen LM's first answers into questions of a run, where the small LM advises.

    Those that are not there yet are asked.

    Args:
        rows: of the questions that need one; unset: all.

    Raises:
        UserError: if more of them fail than the failure budgets allow.
    """
    if not run.config.prompts.advises:
        return
    wanted = sorted(set(range(len(questions)) if rows is None else rows))
    store = run.first_answers
    missing = [questions[row].example for row in wanted]
    missing = [one for one in missing if store.of(one) is None]
    if missing:
        _ask(run, store, missing)
    for row in wanted:
        question = questions[row]
        found = store.of(question.example)
        assert found is not None  # it was there, or was just asked
        example = replace(question.example, first_answer=found.text)
        questions[row] = replace(question, example=example)


def _ask(run: Run, store: FirstAnswers, examples: Sequence[Example]) -> None:
    """Asks the frozen LM; failures are kept only once all is asked and few enough failed."""
    check_plan(STAGE, {"frozen": run.config.actors.frozen}, run.config.actors)
    losses = Losses(run.config.failures, len(examples), "first answers")
    size = run.config.actors.prompts_per_unit
    groups = [examples[at : at + size] for at in range(0, len(examples), size)]
    failed: list[tuple[Example, Failure]] = []
    usage, last = Usage(), time.monotonic()

    def keep(index: int, replies: Replies) -> None:
        nonlocal usage, last
        now, group = time.monotonic(), groups[index]
        usage += replies.usage
        cost = {
            "seconds": (now - last) / len(group),
            "cached": (replies.usage.asked - replies.usage.sent) / len(group),
        }
        last = now
        results = [_said(run, *pair) for pair in zip(group, replies.results, strict=True)]
        for example, reply in zip(group, results, strict=True):
            if isinstance(reply, Failure):
                failed.append((example, reply))
            else:
                store.add(example, reply, **cost)
        run.spending.add(STAGE, replies.usage)
        losses.add(one if isinstance(one, Failure) else None for one in results)
        bar.update(len(group))

    with run.frozen_fleet() as fleet:
        fleet.wait_ready()
        with progress("first answers", total=len(examples), unit="question") as bar:
            run.frozen_client(fleet).map([_unit(run, one) for one in groups], on_result=keep)
    for example, reply in failed:
        store.add(example, reply, seconds=0.0, cached=0.0)
    if failed:
        say(
            f"{len(failed)} of {len(examples)} first answers failed, so that the small LM advises "
            f"without one; the first: {failed[0][1].reason}; to ask again, delete their lines in "
            f"'{run.directory.home / run_files.FIRST_ANSWERS}'"
        )
    run.monitor.log(0, STAGE, usage_metrics(usage))


def _unit(run: Run, examples: Sequence[Example]) -> PromptUnit:
    row = find_row(run.config.prompts.first_answer)
    prompts = tuple(row_prompt(row, run.templates, example, "") for example in examples)
    sampling = row_sampling(row, run.config, run.templates, 0)
    return PromptUnit(f"{STAGE}/{examples[0].id}", prompts, sampling)


def _said(run: Run, example: Example, reply: Completion | Failure) -> Completion | Failure:
    """The reply; a failure if it is nothing but hidden thinking."""
    if isinstance(reply, Failure):
        return reply
    said = run.task.answer(reply, example.question)
    return Failure(FailureKind.PERMANENT, said.silent) if said.silent else reply
