"""The `lmcot` command: one subcommand a stage.

Heavy imports happen inside the commands: `lmcot --help` answers at once.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lmcot import __version__
from lmcot.errors import Interrupted, UserError

if TYPE_CHECKING:
    from lmcot.config import Config

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130

_STAGES = {
    "train": "run all stages: annotate, distill, refine, evaluate",
    "annotate": "gather the teacher's rationales for the training questions",
    "distill": "train the small LM on the kept rationales",
    "refine": "refine the small LM by PPO on the frozen LM's rewards",
    "evaluate": "measure the frozen LM with and without guidance, and write the report",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit code (0 done, 2 for the user to mend, 130 interrupted)."""
    options = _parser().parse_args(arguments)
    try:
        return _run(options)
    except UserError as error:
        print(f"lmcot: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except (Interrupted, KeyboardInterrupt):
        print("lmcot: interrupted; the same command goes on from here", file=sys.stderr)
        return EXIT_INTERRUPTED
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" (writing {error.filename})" if error.filename else ""
        print(
            f"lmcot: no space left on the disk{where}: free some and run the same command again",
            file=sys.stderr,
        )
        return EXIT_USER_ERROR


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lmcot",
        description="LM-guided chain of thought: a small language model is distilled and refined "
        "by PPO to write rationales that help a frozen large one to answer.",
    )
    parser.add_argument("--version", action="version", version=f"lmcot {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in _STAGES.items():
        command = commands.add_parser(name, help=summary, description=summary)
        _add_config(command, required=name != "evaluate")
        if name == "evaluate":
            command.add_argument(
                "--of",
                type=Path,
                metavar="RUN",
                help="evaluate that run's policies, and leave the results in --run-dir: on other "
                "data, with another frozen LM",
            )
        _add_run_dir(command)
        _add_overrides(command)
    _add_sweep(commands)
    _add_cache(commands)
    _add_aspects(commands)
    _add_debug(commands)
    _add_compare(commands)
    _add_inspect(commands)
    text = "show what each stage's actors take, and whether the cluster has room for them"
    plan = commands.add_parser("plan", help=text, description=text)
    _add_config(plan)
    _add_overrides(plan)
    show = commands.add_parser("config", help="check settings and print them as resolved")
    _add_config(show)
    _add_overrides(show)
    return parser


def _add_config(command: argparse.ArgumentParser, *, required: bool = True) -> None:
    command.add_argument(
        "--config",
        required=required,
        metavar="FILE",
        help="settings, a YAML file (see configs/)" + ("" if required else "; default: the run's"),
    )


def _add_run_dir(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--run-dir",
        required=True,
        type=Path,
        metavar="DIR",
        help="where the run leaves everything; the same DIR again goes on with it",
    )


def _add_sweep(commands: Any) -> None:
    text = "refine over a search space, with Ray Tune, and show which settings do best"
    command = commands.add_parser("sweep", help=text, description=text)
    _add_config(command)
    command.add_argument(
        "--space", required=True, metavar="FILE", help="what is varied and how, a YAML file"
    )
    _add_run_dir(command)
    command.add_argument(
        "--retry-failed", action="store_true", help="run the trials that failed again"
    )
    _add_overrides(command)


def _add_cache(commands: Any) -> None:
    text = "show, or clear, what the frozen LM's replies on this machine's disk take up"
    cache = commands.add_parser("cache", help=text, description=text)
    cache.add_argument("action", choices=("show", "clear"))
    cache.add_argument("--folder", metavar="DIR", help="frozen.cache.folder, if it is set")
    cache.add_argument("--model", metavar="IDENTITY", help="clear this model's replies only")


def _add_aspects(commands: Any) -> None:
    text = "fit measures of rationale quality to human labels, or score rationales"
    actions = commands.add_parser("aspects", help=text, description=text).add_subparsers(
        dest="action", metavar="ACTION", required=True
    )
    fit = actions.add_parser("fit", help="fit aspects to labels")
    fit.add_argument("--labels", required=True, type=Path, metavar="FILE", help="JSON lines")
    fit.add_argument("--output", required=True, type=Path, metavar="MODEL.json")
    fit.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="ASPECT=COLUMN",
        help="the column of an aspect's labels, if it has another name; may be given again",
    )
    fit.add_argument("--features", choices=("metrics", "embeddings", "all"), default="metrics")
    score = actions.add_parser("score", help="score rationales")
    score.add_argument("--rationales", required=True, type=Path, metavar="FILE", help="JSON lines")
    score.add_argument("--source", required=True, choices=("metrics", "judge", "learned"))
    score.add_argument("--model", type=Path, metavar="MODEL.json", help="for --source learned")
    score.add_argument("--output", type=Path, metavar="FILE", help="unset: the terminal")
    for action in (fit, score):
        action.add_argument(
            "--config", metavar="FILE", help="settings, whose frozen LM judges if one is needed"
        )


def _add_debug(commands: Any) -> None:
    text = "run a part of refinement by itself"
    parts = commands.add_parser("debug", help=text, description=text).add_subparsers(
        dest="part", metavar="PART", required=True
    )
    summaries = {
        "rollout": "sample and judge the first steps' rationales, without a learner",
        "learn": "learn from rationales on disk, without any other actor",
        "replay": "do a step's learning once more, and compare its metrics",
    }
    for name, summary in summaries.items():
        part = parts.add_parser(name, help=summary, description=summary)
        _add_config(part)
        part.add_argument("--run-dir", required=True, type=Path, metavar="DIR")
        if name == "rollout":
            part.add_argument("--steps", type=int, default=1, metavar="N", help="default: 1")
            part.add_argument("--policy", metavar="SOURCE", help="model to sample with")
        elif name == "learn":
            part.add_argument("--rollouts", type=Path, metavar="DIR", help="default: the run's own")
            part.add_argument("--steps", type=int, metavar="N", help="default: all that are there")
        else:
            part.add_argument("--step", type=int, required=True, metavar="N")
        _add_overrides(part)


def _add_compare(commands: Any) -> None:
    text = "show evaluated runs side by side, with paired differences"
    command = commands.add_parser("compare", help=text, description=text)
    command.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="the first is what the others are "
        "compared with",
    )  # fmt: skip
    command.add_argument("--markdown", type=Path, metavar="FILE", help="write the same there")
    command.add_argument("--json", type=Path, metavar="FILE", help="write it as JSON there")


def _add_inspect(commands: Any) -> None:
    text = "read what the policy wrote, with answers and rewards"
    command = commands.add_parser("inspect", help=text, description=text)
    command.add_argument("run", type=Path, metavar="RUN")
    command.add_argument("--step", metavar="N[-M]", help="steps of refinement; default: the last")
    command.add_argument("--question", default="", metavar="TEXT", help="an id, or words of it")
    command.add_argument("--limit", type=int, default=5, metavar="N", help="default: 5")
    command.add_argument(
        "--order", choices=("file", "best", "worst"), default="file",
        help="by reward; with --evaluation by what F1 gained",
    )  # fmt: skip
    command.add_argument(
        "--evaluation",
        action="store_true",
        help="the evaluation's answers: the refined policy beside the distilled one",
    )
    command.add_argument("--json", action="store_true", help="a line of JSON for each")


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings that replace the file's"
    )


def _run(options: argparse.Namespace) -> int:
    from lmcot.config import dump_config, load_config

    if options.command == "cache":
        return _run_cache(options.action, options.folder, options.model)
    if options.command == "aspects":
        return _run_aspects(options)
    if options.command == "sweep":
        return _run_sweep(options)
    if options.command == "compare":
        return _run_compare(options)
    if options.command == "inspect":
        return _run_inspect(options)
    if options.command == "evaluate":
        config = _evaluate_config(options)
    else:
        config = load_config(options.config, options.overrides)
    if options.command == "config":
        print(dump_config(config), end="")
        return 0
    if options.command == "plan":
        return _run_plan(config)
    if options.command == "debug":
        return _run_debug(options, config)
    return _run_stage(options.command, config, options.run_dir)


def _evaluate_config(options: argparse.Namespace) -> Config:
    """The settings given, else the run's own; with --of that run's policies."""
    from lmcot.config import load_config

    run = options.of or options.run_dir
    file = options.config or run / "config.yaml"
    if options.config is None and not file.is_file():
        raise UserError(f"'{run}' is no run directory (it has no config.yaml): give --config FILE")
    policies = []
    if options.of is not None:
        found = [name for name in ("distilled", "refined") if (options.of / name).is_dir()]
        if not found:
            raise UserError(f"'{options.of}' holds no trained policy to evaluate")
        policies = [f"evaluate.{name}={options.of / name}" for name in found]
    return load_config(str(file), [*policies, *options.overrides])


def _run_cache(action: str, folder: str | None, model: str | None) -> int:
    from lmcot.frozen.cache import ReplyCache, cache_path

    path = cache_path(folder)
    if not path.is_file():
        print(f"there is no cache at {path}")
        return 0
    cache = ReplyCache(path, max_bytes=0)
    held = cache.held()
    if action == "clear":
        cache.clear(model)
        dropped = [one for one in held if model in (None, one.model)]
        print(f"dropped {sum(one.replies for one in dropped)} replies from {path}")
        return 0
    for one in held:
        print(f"{one.replies:9d} replies {one.bytes / 2**20:9.1f} MiB  {one.model}")
    total = sum(one.bytes for one in held) / 2**20
    print(f"{sum(one.replies for one in held):9d} replies {total:9.1f} MiB  in {path}")
    return 0


def _run_aspects(options: argparse.Namespace) -> int:
    from lmcot.config import load_config
    from lmcot.stages import aspects

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
    unpaired = [one for one in options.label if "=" not in one]
    if unpaired:
        raise UserError(f"--label '{unpaired[0]}' is not of the form ASPECT=COLUMN")
    aspects.fit(
        options.labels,
        options.output,
        mapped=dict(one.split("=", 1) for one in options.label),
        features=options.features,
        config=config,
    )
    return 0


def _run_compare(options: argparse.Namespace) -> int:
    from lmcot.stages.compare import compare

    compare(options.runs, markdown=options.markdown, output=options.json)
    return 0


def _run_inspect(options: argparse.Namespace) -> int:
    from lmcot.stages.inspect import Wanted, parse_steps, show_evaluation, show_rollouts

    if options.limit < 1:
        raise UserError(f"--limit is {options.limit}: it must be at least 1")
    steps = parse_steps(options.step) if options.step else None
    wanted = Wanted(steps, options.question, options.limit, options.order)
    if options.evaluation:
        show_evaluation(options.run, wanted, as_json=options.json)
    else:
        show_rollouts(options.run, wanted, as_json=options.json)
    return 0


def _run_plan(config: Config) -> int:
    from lmcot.actors.base import prepare_process
    from lmcot.stages.plan import show_plan

    prepare_process(threads=1)
    show_plan(config)
    return 0


def _run_sweep(options: argparse.Namespace) -> int:
    from lmcot.stages.sweep import sweep

    sweep(
        options.config,
        options.overrides,
        options.space,
        options.run_dir,
        retry=options.retry_failed,
    )
    return 0


def _run_stage(command: str, config: Config, run_dir: Path) -> int:
    from importlib import import_module

    from lmcot.actors.base import prepare_process
    from lmcot.stages.run import open_run

    prepare_process(threads=1)
    stage = getattr(import_module(f"lmcot.stages.{command}"), command)
    with open_run(config, run_dir) as run:
        stage(run)
    return 0


def _run_debug(options: argparse.Namespace, config: Config) -> int:
    from lmcot.actors.base import prepare_process
    from lmcot.stages import debug
    from lmcot.stages.run import open_run

    for name in ("steps", "step"):
        number = getattr(options, name, None)
        if number is not None and number < 1:
            raise UserError(f"--{name} is {number}, but steps count from 1")
    prepare_process(threads=1)
    with open_run(config, options.run_dir) as run:
        if options.part == "rollout":
            debug.rollout_only(run, steps=options.steps, policy=options.policy)
        elif options.part == "learn":
            debug.learn_only(run, rollouts=options.rollouts, last=options.steps)
        else:
            debug.replay(run, step=options.step)
    return 0


if __name__ == "__main__":
    sys.exit(main())
