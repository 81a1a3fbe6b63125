"""Settings of data and prompts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from lmcot.config.base import NonNegativeInt, PositiveInt, Settings

FileFormat = Literal["auto", "jsonl", "hotpotqa", "2wikimultihopqa", "musique"]
"""The names of `lmcot.data.formats.FORMATS`."""


class SampleData(Settings):
    """The small HotpotQA sample that comes with lmcot."""

    kind: Literal["sample"]
    split: Literal["train", "validation"]
    """The sample's split, a file for each."""


class Columns(Settings):
    """Where a record holds what is read of it, if not in the fields of docs/data.md.

    Each is the name of a field or column, or a path to it: ``gold.text`` is the field ``text`` of
    the object ``gold``, or of each object of a list ``gold``; ``gold.0`` is a list's first value.
    What is set replaces all fields that would be read in its place.
    """

    question: str | None = None
    """The question."""
    id: str | None = None
    """The record's id."""
    answer: str | None = None
    """The right answer, or all of them."""
    choices: str | None = None
    """The options of the task ``multiple_choice``: one field that holds them all, or several, an
    option each, with commas between (``opa,opb,opc,opd``)."""
    context: str | None = None
    """The passages."""
    supporting_facts: str | None = None
    """The supporting facts."""
    title: str | None = None
    """The title of a context that is one text."""
    type: str | None = None
    """The question's type."""
    level: str | None = None
    """The question's level."""

    def named(self) -> dict[str, str]:
        """The columns that are set, by the fields that they stand for."""
        return {name: path for name, path in self.model_dump().items() if path is not None}


class FileData(Settings):
    """Questions in files: JSON, CSV, TSV, parquet or Arrow, packed or not; see docs/data.md."""

    kind: Literal["file"]
    path: str
    """Path or URL of a file, of a folder of files, or a pattern such as ``shards/train-*``."""
    format: FileFormat = "auto"
    """``auto`` recognises every layout by the file's content; the others require one."""
    columns: Columns = Columns()
    """The names of fields or columns, where they are others than those of docs/data.md."""
    part: Literal["all", "train", "validation"] = "all"
    """Which questions are read, where one file serves both: ``validation`` reads the share
    ``held_out``, ``train`` the others. The words of a question decide, so that it stays in its part
    when the file grows, and the same question twice is in one part."""
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Share of the questions that are in the part ``validation``."""


class HubData(Settings):
    """A data set of the Hugging Face hub, read through ``datasets``."""

    kind: Literal["hub"]
    name: str
    """The data set's id, for example ``hotpotqa/hotpot_qa``."""
    config: str | None = None
    """The data set's configuration, for example ``distractor``."""
    split: str
    """The split, for example ``validation``."""
    revision: str | None = None
    """A commit or tag; the newest if unset."""
    columns: Columns = Columns()
    """The names of columns, where they are others than those of docs/data.md."""


class CountingData(Settings):
    """The toy task's prompts: each asks for increasing numbers."""

    kind: Literal["counting"]
    examples: PositiveInt = 64
    """Number of prompts."""


DataSource = Annotated[SampleData | FileData | HubData | CountingData, Field(discriminator="kind")]


class ContextSettings(Settings):
    """Which paragraphs the models see."""

    distractors: NonNegativeInt | Literal["all"] = "all"
    """Paragraphs shown beside the gold ones: a number (0: gold only), or ``all``."""
    max_tokens: PositiveInt = 1024
    """Largest length of the context in tokens of the small LM, in any language: whole sentences are
    dropped from the ends of the paragraphs until it fits, and a single sentence that is longer is
    cut. The question is never cut."""


class DataSettings(Settings):
    """Questions to train on and to evaluate on."""

    train: DataSource
    """Questions for annotation, distillation and refinement."""
    validation: DataSource
    """Questions for evaluation."""
    max_train: PositiveInt | None = None
    """Use only this many training questions, the first ones."""
    max_validation: PositiveInt | None = None
    """Use only this many validation questions, the first ones."""
    on_bad_record: Literal["refuse", "skip"] = "refuse"
    """Whether a malformed record ends the run, naming its file and line, or is skipped and
    counted."""
    context: ContextSettings = ContextSettings()
    """Which paragraphs the models see."""
    require_context: bool | None = None
    """Whether a question without passages is a bad record. Unset: it is for the task
    ``extractive_qa``, where a context under an unknown name would otherwise be missed."""
