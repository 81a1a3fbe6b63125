"""The `lmcot` command, with a subcommand for each stage.

Heavy imports happen inside the commands: `lmcot --help` answers at once.
"""

from __future__ import annotations

import argparse
import errno
import os
import select
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lmcot import run_files
from lmcot.arguments import make_parser, parse_arguments
from lmcot.errors import Interrupted, UserError
from lmcot.process import prepare

if TYPE_CHECKING:
    from lmcot.config import Config
    from lmcot.config.data import Columns
    from lmcot.storage import Place
    from lmcot.tools.starting_settings import Wanted

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130
EXIT_NOBODY_READS = 141
"""Exit code as after SIGPIPE: ``lmcot inspect RUN | head`` ended as intended."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code (0 done, 2 for the user to fix, 130 interrupted)."""
    try:
        try:
            options = parse_arguments(arguments)
            prepare()
            return _run(options)
        finally:
            sys.stdout.flush()  # here, since an error at the interpreter's end would not be handled
    except UserError as error:
        print(f"lmcot: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except (Interrupted, KeyboardInterrupt):
        print("lmcot: interrupted; rerun the same command to resume", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        # The rest of the buffer would fail again at the interpreter's end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_NOBODY_READS
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" (writing {error.filename})" if error.filename else ""
        print(
            f"lmcot: no space left on the disk{where}: free some and rerun the same command",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR


def _nobody_reads() -> bool:
    """Whether the reader of standard output is gone."""
    poller = select.poll()
    poller.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poller.poll(0))


def _run(options: argparse.Namespace) -> int:
    from lmcot.config import dump_config, load_config, renamed_settings

    if getattr(options, "quiet", False):
        from lmcot.monitor.progress import be_quiet

        be_quiet()
    if options.command == "cache":
        return _run_cache(options)
    if options.command == "aspects":
        return _run_aspects(options)
    if options.command == "sweep":
        return _run_sweep(options)
    if options.command == "serve":
        from lmcot.serve.run import serve

        prefix = [] if options.prefix is None else [f"serve.prefix={options.prefix}"]
        serve(
            options.run_dir,
            [*options.overrides, *prefix],
            policy=options.policy,
            update=options.update,
            status=options.status,
            as_json=options.json,
        )
        return 0
    if options.command == "compare":
        return _run_compare(options)
    if options.command == "inspect":
        return _run_inspect(options)
    if options.command == "data":
        return _run_data(options)
    if options.command == "init":
        return _run_init(options)
    if options.command == "export":
        from lmcot.tools.export import export

        export(options.run, options.to, options.project)
        return 0
    if options.command == "push":
        return _run_push(options)
    if options.command == "completion":
        from lmcot.tools.completion import show_completion

        show_completion(make_parser(), options.shell)
        return 0
    if options.command == "doctor":
        return _run_doctor(options)
    if options.command == "evaluate":
        config = _evaluate_config(options)
    elif options.command == "train":
        config = _train_config(options)
    else:
        config = load_config(options.config, options.overrides)
    if options.config is not None:
        for sentence in renamed_settings(options.config, options.overrides):
            print(f"lmcot: {sentence}", file=sys.stderr)
    if options.command == "config":
        print(dump_config(config), end="")
        return 0
    if options.command == "plan":
        return _run_plan(config, as_json=options.json)
    if options.command == "debug":
        return _run_debug(options, config)
    chosen = {"retry_failed": True} if getattr(options, "retry_failed", False) else {}
    return _run_stage(options.command, config, options.run_dir, **chosen)


def _evaluate_config(options: argparse.Namespace) -> Config:
    """The given settings, or else the run's own; with --of, that run's policies."""
    from lmcot.config import load_config
    from lmcot.storage import reaching

    run = options.of or options.run_dir
    file = options.config or run / run_files.CONFIG
    with reaching(run):
        run_files.check_format(run)
        policies = _policies_of(options)
        there = options.config is not None or file.is_file()
    if not there:
        raise UserError(
            f"'{run}' is not a run directory (it has no config.yaml): give --config FILE"
        )
    return load_config(str(file), [*policies, *options.overrides])


def _train_config(options: argparse.Namespace) -> Config:
    """The given settings, or those that are made for the given questions and models."""
    from lmcot.config import load_config, parse_overrides

    named = {name: getattr(options, name) for name in ("data", "small", "large")}
    given = [name for name, value in named.items() if value is not None]
    if options.config is None:
        if missing := [f"--{name}" for name in named if name not in given]:
            raise UserError(
                f"train lacks {' and '.join(missing)}: give --data, --small and --large, or the "
                "settings by --config"
            )
        from lmcot.tools.init import default_run_dir, settings_of_run

        options.run_dir = options.run_dir or default_run_dir(options.data)
        changes = parse_overrides(options.overrides)
        options.config = str(settings_of_run(_wanted(options), options.run_dir, changes))
    elif given or options.validation or options.column or options.task:
        raise UserError(
            "train is given --config, which names the questions and the models, and "
            f"--{[*given, 'validation, --task or --column'][0]} too: leave out the one or the "
            "other; data=FILE, policy=SOURCE and frozen=SOURCE replace what the file names"
        )
    if options.run_dir is None:
        raise UserError("train lacks --run-dir: name the folder for what the run leaves behind")
    return load_config(options.config, options.overrides)


def _wanted(options: argparse.Namespace) -> Wanted:
    from lmcot.tools.starting_settings import Wanted

    return Wanted(
        options.data, options.validation, options.small, options.large, _columns(options),
        *([options.task] if options.task else []),
    )  # fmt: skip


def _policies_of(options: argparse.Namespace) -> list[str]:
    """Settings that name another run's policies."""
    from lmcot.config import TRAINED_POLICIES

    if options.of is None:
        return []
    found = [name for name in TRAINED_POLICIES if (options.of / name).is_dir()]
    if not found:
        raise UserError(f"'{options.of}' holds no trained policy to evaluate")
    return [f"evaluate.policies.{name}={options.of / name}" for name in found]


def _run_cache(options: argparse.Namespace) -> int:
    from lmcot.tools.cache import clear_cache, show_cache

    if options.action == "clear":
        clear_cache(options.folder, options.model, as_json=options.json)
    else:
        show_cache(options.folder, as_json=options.json)
    return 0


def _run_aspects(options: argparse.Namespace) -> int:
    from lmcot.config import load_config
    from lmcot.tools import fit_aspects as aspects

    config = load_config(options.config) if options.config else None
    if options.action == "score":
        aspects.score(
            options.rationales,
            options.source,
            model=options.model,
            config=config,
            output=options.output,
        )
        return 0
    aspects.fit(
        options.labels,
        options.output,
        mapped=_pairs("--label", options.label, "ASPECT=COLUMN"),
        features=options.features,
        config=config,
        as_json=options.json,
    )
    return 0


def _run_data(options: argparse.Namespace) -> int:
    from lmcot.config import DataSource, FileData, load_config
    from lmcot.config.task import task_named
    from lmcot.tools.describe_data import describe_data

    if options.show < 0:
        raise UserError(f"--show is {options.show}: it must be at least 0")
    config = load_config(options.config) if options.config else None
    if options.file is not None:
        columns = _columns(options)
        sources: list[DataSource] = [FileData(kind="file", path=options.file, columns=columns)]
    elif config is not None:
        sources = [config.data.train, config.data.validation]
    else:
        raise UserError("name a file, or give --config FILE for the data of those settings")
    task = task_named(options.task) if options.task else None
    describe_data(sources, config, show=options.show, as_json=options.json, task=task)
    return 0


def _run_init(options: argparse.Namespace) -> int:
    from lmcot.tools.init import init

    init(_wanted(options), options.output)
    return 0


def _run_push(options: argparse.Namespace) -> int:
    from lmcot.tools.push import push

    push(
        options.run,
        options.repo,
        policy=options.policy,
        private=options.private,
        licence=options.licence,
    )
    return 0


def _columns(options: argparse.Namespace) -> Columns:
    from lmcot.config.data import Columns

    named = _pairs("--column", options.column, "FIELD=NAME")
    unknown = named.keys() - Columns.model_fields.keys()
    if unknown:
        known = ", ".join(Columns.model_fields)
        raise UserError(f"--column names the field '{min(unknown)}', but there is only {known}")
    return Columns(**named)


def _pairs(option: str, given: Sequence[str], form: str) -> dict[str, str]:
    """What an option says in a form such as ``NAME=VALUE``."""
    unpaired = [one for one in given if "=" not in one]
    if unpaired:
        raise UserError(f"{option} '{unpaired[0]}' is not of the form {form}")
    return dict(one.split("=", 1) for one in given)


def _run_doctor(options: argparse.Namespace) -> int:
    from lmcot.config import load_config
    from lmcot.tools.doctor import doctor

    config = load_config(options.config, options.overrides) if options.config else None
    found = doctor(config, options.run_dir, as_json=options.json)
    return EXIT_USER_ERROR if found else 0


def _run_compare(options: argparse.Namespace) -> int:
    from lmcot.tools.compare import compare

    compare(options.runs, markdown=options.markdown, output=options.json)
    return 0


def _run_inspect(options: argparse.Namespace) -> int:
    from lmcot.storage import reaching
    from lmcot.tools.show import Wanted, parse_steps, show_evaluation, show_rollouts

    if options.limit < 1:
        raise UserError(f"--limit is {options.limit}: it must be at least 1")
    steps = parse_steps(options.step) if options.step else None
    wanted = Wanted(steps, options.question, options.limit, options.order)
    with reaching(options.run):
        if options.evaluation:
            show_evaluation(options.run, wanted, as_json=options.json)
        else:
            show_rollouts(options.run, wanted, rounds=options.rejection, as_json=options.json)
    return 0


def _run_plan(config: Config, *, as_json: bool) -> int:
    from lmcot.process import use_threads
    from lmcot.tools.plan import show_plan

    use_threads(threads=1)
    show_plan(config, as_json=as_json)
    return 0


def _run_sweep(options: argparse.Namespace) -> int:
    from lmcot.sweep.sweep import sweep

    sweep(
        options.config,
        options.overrides,
        options.space,
        options.run_dir,
        retry=options.retry_failed,
        as_json=options.json,
    )
    return 0


def _run_stage(command: str, config: Config, run_dir: Place, **chosen: bool) -> int:
    from lmcot.process import use_threads
    from lmcot.run.context import open_run
    from lmcot.training.train import STAGES, train

    use_threads(threads=1)
    stages = {"train": train, **{stage.name: stage.run for stage in STAGES}}
    with open_run(config, run_dir) as run:
        stages[command](run, **chosen)
    return 0


def _run_debug(options: argparse.Namespace, config: Config) -> int:
    from lmcot.process import use_threads
    from lmcot.run.context import open_run
    from lmcot.tools import debug

    for name in ("steps", "step"):
        number = getattr(options, name, None)
        if number is not None and number < 1:
            raise UserError(f"--{name} is {number}, but steps count from 1")
    use_threads(threads=1)
    with open_run(config, options.run_dir) as run:
        if options.part == "rollout":
            debug.rollout_only(run, steps=options.steps, policy=options.policy)
        elif options.part == "learn":
            debug.learn_only(run, rollouts=options.rollouts, last=options.steps)
        else:
            debug.replay(run, step=options.step, as_json=options.json)
    return 0


if __name__ == "__main__":
    sys.exit(main())
