"""`lmcot init` and `lmcot train --data` write settings for questions, models and machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from lmcot import run_files
from lmcot.config import parse_config, read_yaml_mapping
from lmcot.config.short_forms import SHORT_FORMS
from lmcot.errors import UserError
from lmcot.files import write_atomically
from lmcot.monitor.progress import say
from lmcot.storage import local_path, reaching, write_whole
from lmcot.tools.starting_settings import Wanted, settings_text

if TYPE_CHECKING:
    from lmcot.config import Config
    from lmcot.storage import Place


def init(wanted: Wanted, output: Path) -> None:
    """Writes settings to a file, and prints what follows.

    Raises:
        UserError: if the data or the small LM's tokenizer cannot be read, or the file exists.
    """
    if output.exists():
        raise UserError(f"'{output}' exists: name another file by --output, or remove it")
    text = settings_text(wanted)
    write_atomically(output, text.encode())
    parse_config(read_yaml_mapping(output))
    print(
        f"wrote {output}: read it, then\n"
        f"  lmcot data --config {output}\n"
        f"  lmcot doctor --config {output}\n"
        f"  lmcot train --config {output} --run-dir runs/{output.stem}"
    )


def settings_of_run(wanted: Wanted, run_dir: Place) -> Place:
    """The settings file of a run that is begun without one, in its directory.

    The first time it is made and shown. A run that is resumed uses the file that it began with, so
    that its settings stay as they are when the data grow or the machine is another.

    Raises:
        UserError: as `init`; or if the run began with other data or models.
    """
    file = run_dir / run_files.SETTINGS
    with reaching(run_dir):
        begun = (run_dir / run_files.CONFIG).is_file()
        there = file.is_file()
    if begun:
        if not there:
            raise UserError(
                f"the run in '{run_dir}' was begun with a settings file of yours: resume it with "
                "--config in place of --data, or name another --run-dir"
            )
        _check_same(wanted, parse_config(read_yaml_mapping(file)), file)
        say(f"settings: {file}")
        return file
    text = settings_text(wanted)
    with reaching(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(file, text)
    parse_config(read_yaml_mapping(file))
    say(f"settings, kept in {file}:\n\n{text}")
    return file


def default_run_dir(data: str) -> Place:
    """Where a run goes that is given none: a folder below ``runs/`` of the data's name."""
    name = re.sub(r"[^\w-]+", "-", data.rstrip("/").rpartition("/")[2].partition(".")[0])
    return local_path(f"runs/{name.strip('-') or 'run'}")


def _check_same(wanted: Wanted, made: Config, file: Place) -> None:
    """Compares what a command names with the settings that the run began with."""
    source = {"kind": "file", "columns": wanted.columns.model_dump()}
    given: dict[str, tuple[BaseModel | None, Mapping[str, Any]]] = {
        "data": (made.data.train, {**source, "path": wanted.data}),
        "validation": (made.data.validation, {**source, "path": wanted.validation or wanted.data}),
        "small": (made.policy, {"source": wanted.small}),
        "task": (made.task, {"kind": wanted.task}),
        "large": (made.frozen, SHORT_FORMS["frozen"](wanted.large, {})),
    }
    other = [f"--{name}" for name, (section, now) in given.items() if not _holds(section, now)]
    if other:
        raise UserError(
            f"the run began with other values of {' and '.join(other)} (see '{file}'): repeat "
            "those, give that file as --config, or name another --run-dir"
        )


def _holds(section: BaseModel | None, values: Mapping[str, Any]) -> bool:
    held = {} if section is None else section.model_dump()
    return all(held.get(name) == value for name, value in values.items())
