"""A run's demonstrations: drawn before its first stage, and then as its directory holds them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lmcot import run_files
from lmcot.config import (
    Config,
    DrawnDemonstrations,
    GivenDemonstrations,
    SupportingFactsTeacher,
)
from lmcot.data.demonstrations import draw, read_given, to_lines
from lmcot.data.loaders import load_examples
from lmcot.data.tasks import open_task
from lmcot.errors import UserError
from lmcot.files import write_atomically
from lmcot.monitor.progress import say
from lmcot.run.directory import RunDirectory, read_annotations
from lmcot.storage import local_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def given_demonstrations(
    config: Config, directory: RunDirectory, tokenizer: Callable[[], PreTrainedTokenizerBase]
) -> GivenDemonstrations | None:
    """The demonstrations of a run; None where they are those of the templates file.

    Where a stage has begun, they are those in the run directory; they are drawn otherwise.

    Raises:
        UserError: if they cannot be drawn, or the run directory lacks them.
    """
    wanted = config.prompts.demonstrations
    if isinstance(wanted, int):
        return None
    if isinstance(wanted, GivenDemonstrations):
        return wanted
    if directory.begun(config):
        return read_given(directory.path / run_files.DEMONSTRATIONS, wanted)
    encode = tokenizer().encode
    source = config.data.train if wanted.source == "train" else wanted.source
    pool = load_examples(
        source, limit=wanted.pool, on_bad=config.data.on_bad_record,
        task=open_task(config.task), require_context=config.requires_context,
    ).examples  # fmt: skip
    drawn = draw(
        wanted,
        pool,
        _kept(wanted),
        _facts_teacher(config),
        config.policy.max_new_tokens,
        lambda text: len(encode(text, add_special_tokens=False)),
    )
    for note in drawn.notes:
        say(note)
    return drawn.given


def write_demonstrations(given: GivenDemonstrations | None, directory: RunDirectory) -> None:
    """Writes the demonstrations into the run directory, so that the whole run shows these."""
    file = directory.path / run_files.DEMONSTRATIONS
    if given is None:
        file.unlink(missing_ok=True)
        return
    lines = to_lines(given)
    if not file.exists() or file.read_text(encoding="utf-8") != lines:
        write_atomically(file, lines, private=True)


def _facts_teacher(config: Config) -> SupportingFactsTeacher:
    """The run's teacher if it makes rationales of supporting facts; else one with the defaults."""
    if isinstance(config.teacher, SupportingFactsTeacher):
        return config.teacher
    return SupportingFactsTeacher(kind="supporting_facts")


def _kept(wanted: DrawnDemonstrations) -> dict[str, str]:
    """The rationales that another run's teacher wrote and that were kept, by question."""
    if wanted.rationales is None:
        return {}
    path = local_path(wanted.rationales)
    if not path.is_file():
        raise UserError(f"prompts.demonstrations.rationales names '{path}', which is not a file")
    return {one.example_id: one.rationale for one in read_annotations(path) if one.kept}
