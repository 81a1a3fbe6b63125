"""`lmcot init` and `lmcot train --data` write settings for questions, models and machine."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel

from lmcot import run_files
from lmcot.config import overridden, parse_config, read_yaml_mapping
from lmcot.config.short_forms import SHORT_FORMS
from lmcot.config.yaml_text import parse_yaml
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


def settings_of_run(
    wanted: Wanted, run_dir: Place, changes: Mapping[str, Any] | None = None
) -> Place:
    """The settings file of a run that is begun without one, in its directory.

    The first time it is made and shown. A run that is resumed uses the file that it began with, so
    that its settings stay as they are when the data grow or the machine is another.

    Args:
        changes: the values of overrides by dotted keys, which the file holds as well.

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
        _check_same(wanted, changes or {}, parse_config(read_yaml_mapping(file)), file)
        say(f"settings: {file}")
        return file
    text = changed_text(settings_text(wanted), changes or {})
    parse_config(parse_yaml(text))
    with reaching(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(file, text)
    say(f"settings, kept in {file}:\n\n{text}")
    return file


def changed_text(text: str, changes: Mapping[str, Any]) -> str:
    """Settings as YAML with other values at dotted keys; the first line's end names these keys.

    Sections that stay as they are keep their comments.

    Raises:
        UserError: if a key goes below a plain value.
    """
    if not changes:
        return text
    before = parse_yaml(text)
    after = overridden(before, changes)
    head, *sections = re.split(r"^(?=\w)", text, flags=re.MULTILINE)
    kept = {one.partition(":")[0]: one for one in sections}
    written = [
        kept[key] if key in before and before[key] == value else _dumped({key: value})
        for key, value in after.items()
    ]
    return "".join([head, f"# With overrides of {', '.join(changes)}.\n", *written])


def _dumped(section: Mapping[str, Any]) -> str:
    text: str = yaml.safe_dump(
        dict(section), sort_keys=False, allow_unicode=True, default_flow_style=None, width=100
    )
    return text


def default_run_dir(data: str) -> Place:
    """Where a run goes that is given none: a folder below ``runs/`` of the data's name."""
    name = re.sub(r"[^\w-]+", "-", data.rstrip("/").rpartition("/")[2].partition(".")[0])
    return local_path(f"runs/{name.strip('-') or 'run'}")


def _check_same(wanted: Wanted, changes: Mapping[str, Any], made: Config, file: Place) -> None:
    """Compares what a command names with the settings that the run began with.

    What an override replaces, whose value holds before that of the file, is not compared.
    """
    source = {"kind": "file", "columns": wanted.columns.model_dump()}
    validation = {**source, "path": wanted.validation or wanted.data}
    given: dict[str, tuple[str, BaseModel | None, Mapping[str, Any]]] = {
        "data": ("data.train", made.data.train, {**source, "path": wanted.data}),
        "validation": ("data.validation", made.data.validation, validation),
        "small": ("policy", made.policy, {"source": wanted.small}),
        "task": ("task", made.task, {"kind": wanted.task}),
        "large": ("frozen", made.frozen, SHORT_FORMS["frozen"](wanted.large, {})),
    }
    other = [
        f"--{name}"
        for name, (key, section, now) in given.items()
        if not _holds(section, {k: v for k, v in now.items() if not _names(changes, f"{key}.{k}")})
    ]
    if other:
        raise UserError(
            f"the run began with other values of {' and '.join(other)} (see '{file}'): repeat "
            "those, give that file as --config, or name another --run-dir"
        )


def _names(changes: Mapping[str, Any], key: str) -> bool:
    """Whether a dotted key, a section that holds it, or a key within it is among the changes."""
    return any(f"{key}.".startswith(f"{one}.") or one.startswith(f"{key}.") for one in changes)


def _holds(section: BaseModel | None, values: Mapping[str, Any]) -> bool:
    held = {} if section is None else section.model_dump()
    return all(held.get(name) == value for name, value in values.items())
