"""Loads questions from the shipped sample, files or the Hugging Face hub as `Example` records."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from importlib import resources
from typing import Literal

from lmcot.config.data import Columns, CountingData, DataSource, FileData, HubData, SampleData
from lmcot.data.columns import missing
from lmcot.data.files import question_files
from lmcot.data.formats import DERIVED, FORMATS, parse_record, with_columns
from lmcot.data.layouts import Located, describe_record, read_records, renamed
from lmcot.data.tasks import EXTRACTIVE_QA, Task
from lmcot.data.values import BadRecord
from lmcot.errors import UserError
from lmcot.records import Example
from lmcot.storage import is_url, local_path

_PROBLEMS_KEPT = 5


@dataclass(frozen=True, slots=True)
class LoadedExamples:
    """Examples in the order of their source, and the number of skipped records."""

    examples: list[Example] = field(default_factory=list)
    skipped: int = 0
    problems: list[str] = field(default_factory=list)
    """What was wrong with the first few skipped records, one sentence each."""
    remedy: str = ""
    """What to do about the first of them; empty if none was skipped."""
    left_out: int = 0
    """Number of good examples that the caller wanted left out."""

    @property
    def without_id(self) -> int:
        """Number of records without an id, which got one that is derived from their content."""
        return sum(example.id.startswith(DERIVED) for example in self.examples)


def load_examples(
    source: DataSource,
    *,
    limit: int | None = None,
    on_bad: Literal["refuse", "skip"] = "refuse",
    leaves_out: Callable[[Example], bool] = lambda example: False,
    task: Task = EXTRACTIVE_QA,
    require_context: bool = True,
) -> LoadedExamples:
    """The first ``limit`` good examples of a source; all of them if unset.

    Args:
        leaves_out: whether a good example is left out; it does not count towards the limit.
        task: says what a question is.
        require_context: whether a question without passages is a bad record.

    Raises:
        UserError: if the source cannot be read or holds no question; at the first bad record,
            naming its file and line (or its place and id), unless ``on_bad`` is ``skip``.
    """
    if isinstance(source, CountingData):
        found = [one for one in _counting(source.examples) if not leaves_out(one)]
        return LoadedExamples(found[:limit])
    opened = replace(_opened(source), task=task, require_context=require_context)
    loaded = _collect(opened, limit, on_bad, leaves_out)
    if not loaded.examples and loaded.skipped:
        raise UserError(
            f"{opened.name} holds bad records only; the first: {loaded.problems[0]}; "
            f"{loaded.remedy}"
        )
    if not loaded.examples and loaded.left_out:
        raise UserError(
            f"all {loaded.left_out} questions of {opened.name} are shown as demonstrations: give "
            "more questions, or lower prompts.demonstrations.count or pool"
        )
    if not loaded.examples:
        raise UserError(
            f"{opened.name} holds no questions: check that it is the right file or split"
        )
    return loaded


@dataclass(frozen=True, slots=True)
class _Opened:
    """A source whose records can be read."""

    name: str
    """The name of the source in error messages."""
    records: Iterator[Located]
    dataset: str
    """The data set's name, for records that do not give it."""
    requires: tuple[str, ...] = ()
    """Fields that every record must have."""
    columns: Columns = field(default_factory=Columns)
    """The names that the settings give to fields."""
    takes: Callable[[Example], bool] = lambda example: True
    """Whether a question is in the part that is read."""
    task: Task = EXTRACTIVE_QA
    """What a question is."""
    require_context: bool = True
    """Whether a question without passages is a bad record."""


def _opened(source: SampleData | FileData | HubData) -> _Opened:
    match source:
        case SampleData():
            return _Opened(f"sample ({source.split})", _sample(source), "hotpotqa")
        case FileData():
            format = with_columns(FORMATS[source.format], source.columns)
            files = question_files(source.path)
            records = (one for file in files for one in read_records(file, format))
            return _Opened(
                source.path, records, format.dataset, format.requires, source.columns,
                partial(_is_in_part, source=source),
            )  # fmt: skip
        case HubData():
            name = f"{source.name} ({source.split})"
            return _Opened(name, _hub(source), source.name, columns=source.columns)


def _collect(
    opened: _Opened,
    limit: int | None,
    on_bad: Literal["refuse", "skip"],
    leaves_out: Callable[[Example], bool],
) -> LoadedExamples:
    examples: dict[str, Example] = {}
    places: dict[str, str] = {}
    skipped = left_out = 0
    problems: list[str] = []
    remedy = ""
    for where, record in opened.records:
        try:
            example = _parse(record, opened, places)
        except BadRecord as problem:
            if on_bad == "refuse":
                raise UserError(
                    f"{where}: {problem}; {problem.remedy}, or set data.on_bad_record to 'skip'"
                ) from None
            skipped += 1
            remedy = remedy or problem.remedy
            if len(problems) < _PROBLEMS_KEPT:
                problems.append(f"{where}: {problem}")
            continue
        places[example.id] = where
        if not opened.takes(example):
            continue
        if leaves_out(example):
            left_out += 1
            continue
        examples[example.id] = example
        if len(examples) == limit:
            break
    return LoadedExamples(list(examples.values()), skipped, problems, remedy, left_out)


def _parse(record: object, opened: _Opened, places: dict[str, str]) -> Example:
    if isinstance(record, BadRecord):
        raise record
    column = opened.columns.question
    if column is not None and isinstance(record, Mapping) and "question" not in record:
        raise missing("question", column)
    if isinstance(record, Mapping):
        try:
            record = opened.task.fields(record)
        except RecursionError:
            raise BadRecord("the record is nested too deeply") from None
    example = parse_record(
        record, opened.dataset, opened.requires, require_context=opened.require_context
    )
    if example.id in places:
        what = "the whole question" if example.id.startswith(DERIVED) else f"the id '{example.id}'"
        raise BadRecord(f"{what} occurs a second time, first at {places[example.id]}")
    return example


def _is_in_part(example: Example, source: FileData) -> bool:
    if source.part == "all":
        return True
    words = " ".join(example.question.casefold().split())
    place = int.from_bytes(hashlib.sha256(words.encode()).digest()[:8], "big") / 2**64
    return (place < source.held_out) == (source.part == "validation")


def _counting(count: int) -> list[Example]:
    return [
        Example(f"counting-{n}", f"Write increasing numbers from {n}.", "", (), dataset="counting")
        for n in range(1, count + 1)
    ]


def _sample(source: SampleData) -> Iterator[Located]:
    samples = resources.files("lmcot.data") / "samples"
    with resources.as_file(samples / f"hotpotqa-sample-{source.split}.jsonl.gz") as path:
        yield from read_records(path, FORMATS["jsonl"])


def _hub(source: HubData) -> Iterator[Located]:
    import datasets  # heavy, and needed for this source only

    name = source.name if is_url(source.name) else str(local_path(source.name))
    # The library reports unknown names, splits and unreachable hubs by errors of many types.
    try:
        rows = datasets.load_dataset(
            name, source.config, split=source.split, revision=source.revision
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"the data set '{source.name}' (split '{source.split}') cannot be loaded from the hub "
            f"({type(error).__name__}: {reason}): check name, config, split and connection"
        ) from None
    format = with_columns(FORMATS["auto"], source.columns)
    for number, row in enumerate(rows, 1):
        place = f"{source.name} ({source.split}): {describe_record(number, row)}"
        yield place, renamed(row, format)
