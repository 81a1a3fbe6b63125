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


class FileData(Settings):
    """Questions in files: JSON, CSV, TSV, parquet or Arrow, packed or not; see docs/data.md."""

    kind: Literal["file"]
    path: str
    """Path or URL of a file, of a folder of files, or a pattern such as ``shards/train-*``."""
    format: FileFormat = "auto"
    """``auto`` recognises every layout by the file's content; the others require one."""


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
