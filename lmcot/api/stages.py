"""The stages of a run as functions: each does what is left of it, and gives the run's results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcot import run_files
from lmcot.api.functions import Rewards, Teacher, Weighed, with_rewards, write_rationales
from lmcot.api.results import Results
from lmcot.config import (
    Config,
    check_files,
    parse_config,
    parse_settings,
    read_yaml_mapping,
)
from lmcot.config.data import Columns
from lmcot.config.load import overridden
from lmcot.errors import UserError
from lmcot.process import as_a_guest
from lmcot.run.context import open_run
from lmcot.storage import is_remote, place
from lmcot.tools.init import default_run_dir, settings_of_run
from lmcot.tools.starting_settings import Wanted, settings_text
from lmcot.training import train as training

if TYPE_CHECKING:
    from lmcot.storage import Place

Settings = str | Path | Mapping[str, Any] | Config
"""Settings: a YAML file, a mapping with the same keys, or an object."""

_TEACHER_FILE = "teacher.jsonl"


def settings(
    source: Settings | None = None,
    *,
    data: str | None = None,
    small: str | None = None,
    large: str | None = None,
    validation: str | None = None,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Config:
    """Settings, checked: those of a file or a mapping, or made for questions, models and machine.

    Args:
        source: a YAML file, a mapping with the same keys, or settings to change.
        data: in place of ``source``: a file, folder, pattern or URL of questions.
        small: source of the small LM, with ``data``.
        large: source of the frozen LM, or ``http://HOST/v1#MODEL``, with ``data``.
        validation: questions to measure on; unset: a tenth of ``data``.
        columns: the names that fields of docs/data.md have in ``data``.
        task: what the questions are: ``extractive_qa`` (unset), ``boolean``, ...
        overrides: values by dotted keys, such as ``{"refine.steps": 20}``.

    Raises:
        UserError: one sentence about what is wrong.
    """
    if source is None:
        return _config(_made(_wanted(data, small, large, validation, columns, task)), overrides)
    if data or small or large or validation or columns or task:
        raise UserError(
            "settings are given, and data, small or large too: give the one or the other (the "
            "overrides 'data', 'policy' and 'frozen' replace what settings name)"
        )
    return _config(source, overrides)


def train(
    source: Settings | None = None,
    *,
    run_dir: str | Place | None = None,
    data: str | None = None,
    small: str | None = None,
    large: str | None = None,
    validation: str | None = None,
    columns: Mapping[str, str] | None = None,
    task: str | None = None,
    overrides: Mapping[str, Any] | None = None,
    rewards: Mapping[str, Weighed] | None = None,
    teacher: Teacher | None = None,
) -> Results:
    """All stages, from the teacher's rationales to the report; what is done is skipped.

    Args:
        source: settings, as for `settings`; or name ``data``, ``small`` and ``large``.
        run_dir: where the run leaves everything, a folder or a URL; the same again resumes it.
            Unset with ``data``: a folder below ``runs/`` of the data's name.
        rewards: functions of ``(example, rollout, judgement)``, by names of one's own, or pairs of
            such a function and its weight.
        teacher: a function that writes a question's rationales, in place of the settings' teacher.

    Raises:
        UserError: one sentence about what is wrong, before anything starts where possible.
        Interrupted: after Ctrl-C; the same call resumes.
    """
    if source is None:
        wanted = _wanted(data, small, large, validation, columns, task)
        run_dir = place(run_dir) if run_dir is not None else default_run_dir(wanted.data)
        config = _config(str(settings_of_run(wanted, run_dir, overrides)), overrides)
    else:
        config = settings(
            source, data=data, small=small, large=large, validation=validation, columns=columns,
            task=task, overrides=overrides,
        )  # fmt: skip
    return _run("train", config, run_dir, rewards, teacher)


def annotate(
    source: Settings | None = None,
    *,
    run_dir: str | Place,
    overrides: Mapping[str, Any] | None = None,
    teacher: Teacher | None = None,
    retry_failed: bool = False,
) -> Results:
    """Gathers the teacher's rationales for the training questions.

    Args:
        source: settings; unset: those that the run was last used with.
        teacher: as for `train`.
        retry_failed: asks the teacher again where it failed before.
    """
    chosen = {"retry_failed": True} if retry_failed else {}
    config = _of_run(source, run_dir, overrides)
    return _run("annotate", config, run_dir, None, teacher, **chosen)


def distill(
    source: Settings | None = None,
    *,
    run_dir: str | Place,
    overrides: Mapping[str, Any] | None = None,
) -> Results:
    """Trains the small LM on the kept rationales. Arguments as for `annotate`."""
    return _run("distill", _of_run(source, run_dir, overrides), run_dir)


def reject(
    source: Settings | None = None,
    *,
    run_dir: str | Place,
    overrides: Mapping[str, Any] | None = None,
    rewards: Mapping[str, Weighed] | None = None,
) -> Results:
    """Trains on the best right ones of the small LM's own rationales. Arguments as for `train`."""
    return _run("reject", _of_run(source, run_dir, overrides), run_dir, rewards)


def refine(
    source: Settings | None = None,
    *,
    run_dir: str | Place,
    overrides: Mapping[str, Any] | None = None,
    rewards: Mapping[str, Weighed] | None = None,
) -> Results:
    """Refines the small LM by PPO. Arguments as for `train`."""
    return _run("refine", _of_run(source, run_dir, overrides), run_dir, rewards)


def evaluate(
    source: Settings | None = None,
    *,
    run_dir: str | Place,
    overrides: Mapping[str, Any] | None = None,
) -> Results:
    """Measures the frozen LM with and without guidance. Arguments as for `annotate`."""
    return _run("evaluate", _of_run(source, run_dir, overrides), run_dir)


def _wanted(
    data: str | None, small: str | None, large: str | None, validation: str | None,
    columns: Mapping[str, str] | None, task: str | None,
) -> Wanted:  # fmt: skip
    if data is None or small is None or large is None:
        raise UserError("give settings, or name data, small and large")
    named = parse_settings(Columns, dict(columns or {}))
    return Wanted(data, validation, small, large, named, *([task] if task else []))


def _made(wanted: Wanted) -> dict[str, Any]:
    from lmcot.config.yaml_text import parse_yaml

    return dict(parse_yaml(settings_text(wanted)))


def _of_run(
    source: Settings | None, run_dir: str | Place, overrides: Mapping[str, Any] | None
) -> Config:
    return _config(Results(run_dir).settings if source is None else source, overrides)


def _config(source: Settings, overrides: Mapping[str, Any] | None) -> Config:
    if isinstance(source, Config):
        if not overrides:
            return source
        values: Mapping[str, Any] = source.model_dump(mode="json")
    else:
        values = source if isinstance(source, Mapping) else read_yaml_mapping(source)
    config = parse_config(overridden(values, overrides or {}))
    check_files(config)
    return config


def _run(
    stage: str,
    config: Config,
    run_dir: str | Place | None,
    rewards: Mapping[str, Weighed] | None = None,
    teacher: Teacher | None = None,
    **chosen: bool,
) -> Results:
    if run_dir is None:
        raise UserError("give run_dir: the folder for what the run leaves behind")
    home = place(run_dir)
    own = Rewards.of(rewards or {})
    with as_a_guest():
        config = _config(config, with_rewards(config, own))
        if teacher is not None:
            config = _taught(teacher, config, home)
        stages: dict[str, Callable[..., object]] = {one.name: one.run for one in training.STAGES}
        with open_run(config, home, functions=own.functions) as run:
            (training.train if stage == "train" else stages[stage])(run, **chosen)
    return Results(home)


def _taught(teacher: Teacher, config: Config, home: Place) -> Config:
    """The settings with the teacher ``file``, which reads what the function wrote."""
    if is_remote(home):
        raise UserError(
            f"the run directory '{home}' is at a URL, where no teacher of a program can write: "
            "name a folder, or give the rationales by the teacher 'file'"
        )
    (home / run_files.CONFIG).parent.mkdir(parents=True, exist_ok=True)
    file = home / _TEACHER_FILE
    write_rationales(teacher, config, file)
    given = {"kind": "file", "path": str(file), "unknown_ids": "ignore"}
    return _config(config, {"teacher": given})
