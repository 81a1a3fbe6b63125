"""Model cards: the ``README.md`` of each trained policy, as the Hugging Face hub reads it."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal

import yaml

from lmcot import run_files
from lmcot.config import Config, FileData, HubData, SampleData
from lmcot.config.models import public_source
from lmcot.config.rows import find_row
from lmcot.config.stages import TRAINING_STAGES
from lmcot.storage import is_url, local_path, write_whole
from lmcot.version import __version__

if TYPE_CHECKING:
    from lmcot.run.context import Run

_HUB_ID: Final = re.compile(r"[\w.-]+/[\w.-]+")
_LICENCE: Final = re.compile(r"[A-Za-z0-9.+-]{1,40}")
"""The name of one licence, and not its text."""
_METRICS: Final = {"em": "exact_match", "f1": "f1"}
_LOADED_BY: Final = {
    "transformers": "Plain transformers loads it.",
    "peft": "These are its LoRA adapters: peft adds them to the base, and so does `policy.source`.",
}
_PROJECT: Final = "https://arxiv.org/abs/2404.03414"


def write_model_card(run: Run, policy: str, report: Mapping[str, Any] | None = None) -> None:
    """Writes the card of a policy, and that of its adapters, if the run holds them.

    Args:
        report: the evaluation of the policy as it is now; None: there is none.
    """
    folder = run.directory.policy(policy)
    if not run_files.holds_model(folder):
        return
    write_whole(folder / run_files.CARD, card(run.config, policy, report or {}))
    adapters = run_files.adapters_folder(folder)
    if adapters.is_dir():  # peft has left a card there that nobody has filled in
        text = card(run.config, policy, report or {}, library="peft")
        write_whole(adapters / run_files.CARD, text)


def card(
    config: Config,
    policy: str,
    report: Mapping[str, Any],
    licence: str | None = None,
    library: Literal["transformers", "peft"] = "transformers",
) -> str:
    """The text of a card.

    It names files and models without the folders and addresses that they lie at, since cards are
    published.

    Args:
        report: what ``report.json`` holds; empty if there is none.
        licence: that of the weights, as the hub writes it, such as ``apache-2.0``; None: that of
            the model that they are made from, if it is known.
        library: what loads the weights; peft, if they are adapters.
    """
    licence = licence or licence_of(config.policy.source)
    parts = [
        f"---\n{_front_matter(config, policy, report, licence, library)}---",
        f"# {public_source(config.policy.source)}, {policy}",
        f"{_what_it_is(config)} {_LOADED_BY[library]}",
        "## Data\n\n" + _data(config),
        "## Settings\n\n" + _settings(config),
        "## Results\n\n" + _results(policy, report),
        "## Licence\n\n" + _licence(config, licence),
    ]
    return "\n\n".join(parts) + "\n"


def licence_of(source: str) -> str | None:
    """The licence that a model's own card, or the package that it comes in, names; else None."""
    if source.startswith("package:"):
        package = source.removeprefix("package:").partition("/")[0]
        for name in importlib.metadata.packages_distributions().get(package, ()):
            fields = importlib.metadata.metadata(name).json
            named = str(fields.get("license_expression") or fields.get("license") or "")
            return named.lower() if _LICENCE.fullmatch(named) else None
    if is_url(source):
        return None
    file = local_path(source) / run_files.CARD
    if not file.is_file():
        return None
    front = re.match(r"---\n(.*?)\n---\n", file.read_text(encoding="utf-8"), re.DOTALL)
    found = yaml.safe_load(front[1]) if front else None
    licence = found.get("license") if isinstance(found, dict) else None
    return licence if isinstance(licence, str) else None


def _front_matter(
    config: Config, policy: str, report: Mapping[str, Any], licence: str | None, library: str
) -> str:
    found: dict[str, Any] = {"library_name": library}
    if licence is not None:
        found["license"] = licence
    source = config.policy.source
    if _HUB_ID.fullmatch(source) and not Path(source).exists():
        found["base_model"] = source
    if isinstance(config.data.train, HubData):
        found["datasets"] = [config.data.train.name]
    found["tags"] = ["lmcot", "chain-of-thought", "rationale"]
    row = _own_row(policy, report)
    if row is not None:
        metrics = [
            {"type": kind, "value": round(row[name], 2), "name": f"{name.upper()}, guided answers"}
            for name, kind in _METRICS.items()
        ]
        data = {"name": _name(config.data.validation), "type": config.data.validation.kind}
        result = {"task": {"type": "question-answering"}, "dataset": data, "metrics": metrics}
        named = {"name": f"{public_source(source)}-{policy}", "results": [result]}
        found["model-index"] = [named]
    return yaml.safe_dump(found, sort_keys=False, allow_unicode=True)


def _what_it_is(config: Config) -> str:
    frozen = "a frozen LM" if config.frozen is None else f"`{config.frozen.public_name}`"
    return (
        "A small language model that reads a question with its context and writes a rationale; a "
        f"large one, which was not trained, reads the rationale and answers ([LM-guided chain of "
        f"thought]({_PROJECT})). It was trained by lmcot {__version__} from "
        f"`{public_source(config.policy.source)}` to guide {frozen}. Its "
        "prompts are those of lmcot (`lmcot serve`, `lmcot.Guide`)."
    )


def _data(config: Config) -> str:
    teacher = "none" if config.teacher is None else f"`{config.teacher.kind}`"
    return (
        f"- training questions: {_described(config.data.train)}\n"
        f"- evaluated on: {_described(config.data.validation)}\n"
        f"- teacher of the rationales: {teacher}"
    )


def _described(source: Any) -> str:
    if isinstance(source, SampleData):
        return f"lmcot's HotpotQA sample (CC BY-SA 4.0), {source.split}"
    if isinstance(source, HubData):
        return f"`{source.name}` of the Hugging Face hub, {source.split}"
    if isinstance(source, FileData) and source.part != "all":
        return f"`{_name(source)}`, the part `{source.part}` (held out: {source.held_out:g})"
    return f"`{_name(source)}`"


def _name(source: Any) -> str:
    if isinstance(source, FileData):
        return source.path.rstrip("/").rpartition("/")[2]
    return source.name if isinstance(source, HubData) else f"{source.kind} data"


def _settings(config: Config) -> str:
    shown = {
        "seed": config.seed,
        "policy": config.policy.model_dump(mode="json", exclude={"source"}),
        **{
            stage.name: getattr(config, stage.name).model_dump(mode="json")
            for stage in TRAINING_STAGES
            if getattr(config, stage.name, None) is not None
        },
        "rewards": config.rewards.model_dump(
            mode="json", exclude={"learned_model", "embeddings", "custom"}
        ),
    }
    return f"```yaml\n{yaml.safe_dump(shown, sort_keys=False, allow_unicode=True)}```"


def _results(policy: str, report: Mapping[str, Any]) -> str:
    if not report:
        return "Not evaluated yet."
    lines = ["| row | what | EM | F1 | n |", "|---|---|---:|---:|---:|"]
    for name, row in report["rows"].items():
        if find_row(name).policy in (None, policy):
            ranges = [
                f"{row[metric]:.1f} [{row['ci'][metric][0]:.1f}, {row['ci'][metric][1]:.1f}]"
                for metric in _METRICS
            ]
            lines.append(f"| `{name}` | {row['label']} | {' | '.join(ranges)} | {row['n']} |")
    notes = [f"- {note}" for note in report.get("notes", [])]
    return "\n".join(lines) + (
        "\n\nIn percent; brackets hold 95% bootstrap intervals over the questions."
        + ("\n\n" + "\n".join(notes) if notes else "")
    )


def _own_row(policy: str, report: Mapping[str, Any]) -> Mapping[str, Any] | None:
    row: Mapping[str, Any] | None = report.get("rows", {}).get(f"guided_{policy}")
    return row


def _licence(config: Config, licence: str | None) -> str:
    base = f"`{public_source(config.policy.source)}`"
    if licence is None:
        return (
            f"The weights are made from {base}, whose licence holds for them. lmcot does not know "
            "it: look it up, and give it (`lmcot push --licence`) before you share them."
        )
    return f"The weights are made from {base}, whose licence (`{licence}`) holds for them."
