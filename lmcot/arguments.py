"""The arguments of the `lmcot` command."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from lmcot import run_files
from lmcot.config.stages import BASE, POLICIES, TRAINING_STAGES
from lmcot.storage import local_path, place
from lmcot.version import __version__

SHELLS = ("bash", "zsh", "fish")
_LINE = "a line of JSON"
PUSHED = tuple(policy for policy in POLICIES if policy != BASE)
_STAGES = {
    "train": "run all stages, from annotate to evaluate",
    "annotate": "gather the teacher's rationales for the training questions",
    **{stage.name: stage.summary for stage in TRAINING_STAGES},
    "evaluate": "measure the frozen LM with and without guidance, and write the report",
}


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command and its options; settings and runs may stand before, between and after them."""
    parser = make_parser()
    options, rest = parser.parse_known_args(arguments)
    # argparse fills a list of positional arguments from their first group only.
    for name, kind in (("overrides", str), ("runs", place)):
        if hasattr(options, name):
            getattr(options, name).extend(kind(one) for one in rest if not one.startswith("-"))
            rest = [one for one in rest if one.startswith("-")]
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return options


def make_parser() -> argparse.ArgumentParser:
    """The command's parser, with its subcommands."""
    parser = argparse.ArgumentParser(
        prog="lmcot",
        description="LM-guided chain of thought: a small language model is distilled and refined "
        "by PPO to write rationales that help a frozen large one to answer.",
    )
    parser.add_argument("--version", action="version", version=f"lmcot {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, summary in _STAGES.items():
        command = commands.add_parser(name, help=summary, description=summary)
        _add_config(command, required=name not in ("train", "evaluate"))
        if name == "train":
            _add_questions_and_models(
                command.add_argument_group(
                    "in place of --config",
                    "settings for these and this machine are made, shown, and kept in the run "
                    f"directory as {run_files.SETTINGS}",
                ),
                required=False,
            )
        if name == "annotate":
            command.add_argument(
                "--retry-failed",
                action="store_true",
                help="retry questions where the teacher failed (dead endpoint, refused prompt)",
            )
        if name == "evaluate":
            command.add_argument(
                "--of",
                type=place,
                metavar="RUN",
                help="evaluate that run's policies, and leave the results in --run-dir: on other "
                "data, with another frozen LM",
            )
        _add_run_dir(command, required=name != "train")
        command.add_argument(
            "--quiet", action="store_true", help="no progress; results and errors are still shown"
        )
        _add_overrides(command)
    _add_sweep(commands)
    _add_cache(commands)
    _add_aspects(commands)
    _add_debug(commands)
    _add_serve(commands)
    _add_compare(commands)
    _add_inspect(commands)
    _add_data(commands)
    _add_init(commands)
    _add_push(commands)
    _add_export(commands)
    text = "show what each stage's actors take, and whether the cluster has room for them"
    plan = commands.add_parser("plan", help=text, description=text)
    _add_config(plan)
    plan.add_argument("--json", action="store_true", help=_LINE)
    _add_overrides(plan)
    text = "check a machine, or a cluster, and say what to fix before a run"
    doctor = commands.add_parser("doctor", help=text, description=text)
    _add_config(doctor, required=False)
    doctor.add_argument("--run-dir", type=place, metavar="DIR", help="whether it can be written")
    doctor.add_argument("--json", action="store_true", help="a line of JSON for each finding")
    _add_overrides(doctor)
    text = "print a shell's completion of this command"
    completion = commands.add_parser("completion", help=text, description=text)
    completion.add_argument("shell", choices=SHELLS)
    show = commands.add_parser("config", help="check settings and print them as resolved")
    _add_config(show)
    _add_overrides(show)
    return parser


def _add_config(command: argparse.ArgumentParser, *, required: bool = True) -> None:
    command.add_argument(
        "--config",
        required=required,
        metavar="FILE",
        help="settings, a YAML file (see configs/)" + ("" if required else "; may be left out"),
    )


def _add_run_dir(command: argparse.ArgumentParser, *, required: bool = True) -> None:
    command.add_argument(
        "--run-dir",
        required=required,
        type=place,
        metavar="DIR",
        help="where the run leaves everything, a folder or a URL (s3://, gs://, ...); the same DIR "
        "again resumes it" + ("" if required else "; default with --data: runs/NAME-OF-THE-FILE"),
    )


def _add_sweep(commands: Any) -> None:
    text = "refine over a search space, with Ray Tune, and show the best settings"
    command = commands.add_parser("sweep", help=text, description=text)
    _add_config(command)
    command.add_argument(
        "--space", required=True, metavar="FILE", help="the search space, a YAML file"
    )
    _add_run_dir(command)
    command.add_argument("--retry-failed", action="store_true", help="run failed trials again")
    command.add_argument("--json", action="store_true", help=_LINE)
    _add_overrides(command)


def _add_cache(commands: Any) -> None:
    text = "show the size of the frozen LM's replies on this machine's disk, or clear them"
    cache = commands.add_parser("cache", help=text, description=text)
    cache.add_argument("action", choices=("show", "clear"))
    cache.add_argument("--folder", metavar="DIR", help="frozen.cache.folder, if it is set")
    cache.add_argument("--model", metavar="IDENTITY", help="clear this model's replies only")
    cache.add_argument("--json", action="store_true", help=_LINE)


def _add_aspects(commands: Any) -> None:
    text = "fit measures of rationale quality to human labels, or score rationales"
    actions = commands.add_parser("aspects", help=text, description=text).add_subparsers(
        dest="action", metavar="ACTION", required=True
    )
    fit = actions.add_parser("fit", help="fit aspects to labels")
    fit.add_argument("--labels", required=True, type=local_path, metavar="FILE", help="JSON lines")
    fit.add_argument("--output", required=True, type=local_path, metavar="MODEL.json")
    fit.add_argument(
        "--label",
        action="append",
        default=[],
        metavar="ASPECT=COLUMN",
        help="the column of an aspect's labels, if it has another name; may be given again",
    )
    fit.add_argument("--features", choices=("metrics", "embeddings", "all"), default="metrics")
    fit.add_argument("--json", action="store_true", help=_LINE)
    score = actions.add_parser("score", help="score rationales")
    score.add_argument(
        "--rationales", required=True, type=local_path, metavar="FILE", help="JSON lines"
    )
    score.add_argument("--source", required=True, choices=("metrics", "judge", "learned"))
    score.add_argument(
        "--model", type=local_path, metavar="MODEL.json", help="for --source learned"
    )
    score.add_argument("--output", type=local_path, metavar="FILE", help="unset: the terminal")
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
        "replay": "repeat a step's learning, and compare its metrics",
    }
    for name, summary in summaries.items():
        part = parts.add_parser(name, help=summary, description=summary)
        _add_config(part)
        part.add_argument("--run-dir", required=True, type=place, metavar="DIR")
        if name == "rollout":
            part.add_argument("--steps", type=int, default=1, metavar="N", help="default: 1")
            part.add_argument("--policy", metavar="SOURCE", help="model to sample with")
        elif name == "learn":
            part.add_argument(
                "--rollouts", type=local_path, metavar="DIR", help="default: the run's own"
            )
            part.add_argument("--steps", type=int, metavar="N", help="default: all available")
        else:
            part.add_argument("--step", type=int, required=True, metavar="N")
            part.add_argument("--json", action="store_true", help=_LINE)
        _add_overrides(part)


def _add_serve(commands: Any) -> None:
    text = "serve a run's trained pair over HTTP, until SIGTERM or Ctrl-C"
    command = commands.add_parser("serve", help=text, description=text)
    _add_run_dir(command)
    command.add_argument(
        "--policy",
        choices=POLICIES,
        help="default: most trained",
    )
    command.add_argument(
        "--update",
        action="store_true",
        help="replace what the cluster already serves, without a failed request",
    )
    command.add_argument(
        "--status", action="store_true", help="only show what the cluster of RAY_ADDRESS serves"
    )
    command.add_argument("--json", action="store_true", help="with --status: a line of JSON")
    command.add_argument(
        "--prefix", metavar="PATH", help="path to serve under, such as /guided (serve.prefix)"
    )
    _add_overrides(command)


def _add_compare(commands: Any) -> None:
    text = "show evaluated runs side by side, with paired differences"
    command = commands.add_parser("compare", help=text, description=text)
    command.add_argument(
        "runs", nargs="+", type=place, metavar="RUN", help="the first is what the others are "
        "compared with",
    )  # fmt: skip
    command.add_argument("--markdown", type=local_path, metavar="FILE", help="write the same there")
    command.add_argument("--json", type=local_path, metavar="FILE", help="write it as JSON there")


def _add_inspect(commands: Any) -> None:
    text = "read what the policy wrote, with answers and rewards"
    command = commands.add_parser("inspect", help=text, description=text)
    command.add_argument("run", type=place, metavar="RUN")
    command.add_argument("--step", metavar="N[-M]", help="steps of refinement; default: the last")
    command.add_argument(
        "--rejection",
        action="store_true",
        help="the rationales of rejection sampling; --step then names its rounds",
    )
    command.add_argument("--question", default="", metavar="TEXT", help="an id, or words of it")
    command.add_argument("--limit", type=int, default=5, metavar="N", help="default: 5")
    command.add_argument(
        "--order", choices=("file", "best", "worst"), default="file",
        help="by reward; with --evaluation by the gain in F1",
    )  # fmt: skip
    command.add_argument(
        "--evaluation",
        action="store_true",
        help="the evaluation's answers: the refined policy beside the distilled one",
    )
    command.add_argument("--json", action="store_true", help="a line of JSON for each")


def _add_data(commands: Any) -> None:
    text = "show what is understood of a file of questions: counts, lengths, what is wrong"
    command = commands.add_parser("data", help=text, description=text)
    command.add_argument(
        "file", nargs="?", metavar="FILE",
        help="a file, folder, pattern or URL of one; default: the data of the settings",
    )  # fmt: skip
    _add_columns(command)
    _add_task(command, "extractive_qa (the default without --config)")
    _add_config(command, required=False)
    command.add_argument("--show", type=int, default=1, metavar="N", help="questions; default: 1")
    command.add_argument("--json", action="store_true", help=_LINE)


def _add_init(commands: Any) -> None:
    text = "write a settings file for your questions, two models and this machine"
    command = commands.add_parser("init", help=text, description=text)
    _add_questions_and_models(command)
    command.add_argument(
        "--output", type=local_path, default=local_path("lmcot.yaml"), metavar="FILE",
        help="default: lmcot.yaml",
    )  # fmt: skip


def _add_push(commands: Any) -> None:
    text = "upload a trained policy, with its model card, to the Hugging Face hub"
    command = commands.add_parser("push", help=text, description=text)
    command.add_argument("run", type=place, metavar="RUN")
    command.add_argument("--repo", required=True, metavar="OWNER/NAME", help="made if it is new")
    command.add_argument("--policy", choices=PUSHED, help="default: most trained")
    command.add_argument("--private", action="store_true", help="make a private repository")
    command.add_argument(
        "--licence", "--license", metavar="NAME",
        help="of the weights, such as apache-2.0; default: that of the model they are made from",
    )  # fmt: skip


def _add_export(commands: Any) -> None:
    text = "write a run's settings and metrics into Weights & Biases or MLflow"
    command = commands.add_parser("export", help=text, description=text)
    command.add_argument("run", type=place, metavar="RUN")
    command.add_argument("--to", required=True, choices=("wandb", "mlflow"))
    command.add_argument("--project", default="lmcot", metavar="NAME", help="default: lmcot")


def _add_questions_and_models(
    command: argparse._ActionsContainer, *, required: bool = True
) -> None:
    command.add_argument(
        "--data", required=required, metavar="FILE",
        help="questions: a file, folder, pattern or URL",
    )  # fmt: skip
    command.add_argument(
        "--validation", metavar="FILE", help="questions to measure on; default: a part of --data"
    )
    command.add_argument(
        "--small", required=required, metavar="SOURCE",
        help="the small LM: a hub id, a folder, a .gguf file or package:NAME/FILE.gguf",
    )  # fmt: skip
    command.add_argument(
        "--large", required=required, metavar="SOURCE",
        help="the frozen LM: the same, or an endpoint, http://HOST:PORT/v1#MODEL",
    )  # fmt: skip
    _add_task(command, "extractive_qa (the default)")
    _add_columns(command)


def _add_task(command: argparse._ActionsContainer, default: str) -> None:
    command.add_argument(
        "--task", metavar="NAME",
        help=f"what the questions are: {default}, boolean, multiple_choice, numeric, free_text",
    )  # fmt: skip


def _add_columns(command: argparse._ActionsContainer) -> None:
    command.add_argument(
        "--column", action="append", default=[], metavar="FIELD=NAME",
        help="the name that a field of docs/data.md has in the file, such as answer=gold.text; "
        "may be given again",
    )  # fmt: skip


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="overrides of the file's settings"
    )
