"""`lmcot init` writes a settings file for a file of questions, two models and this machine."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lmcot.config import SupportingFactsTeacher, parse_config, read_yaml_mapping
from lmcot.config.data import Columns, FileData
from lmcot.data import load_examples
from lmcot.data.context import CountTokens, render_context
from lmcot.data.facts import facts_rationale
from lmcot.errors import UserError
from lmcot.files import write_atomically
from lmcot.models.limits import read_limits
from lmcot.models.sources import load_tokenizer
from lmcot.records import Example

_HELD_OUT = 0.1
_MOST_VALIDATION = 200
_MOST_CONTEXT = 1024
_RATIONALE = (64, 192)
"""Least and most tokens of a rationale that are asked for."""
_WORDING = 320
"""Tokens that are left in a window for the question, the prompt's wording and the answer."""
_MOST_SHOWN = 1024
"""Most tokens of the demonstrations."""
_VALIDATED = 200
"""From this many questions on, some are kept out of distillation to validate on."""
_BATCH = 8
_LONG_ENOUGH = 0.95
"""Share of the questions whose context, or whose rationale, is not cut."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user names."""

    data: str
    """A file, a folder, a pattern or a URL of one."""
    validation: str | None
    """The same for evaluation; None: a tenth of ``data``."""
    small: str
    """Source of the small LM."""
    large: str
    """Source of the frozen LM, or ``http://HOST/v1#MODEL``."""
    columns: Columns


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


def settings_text(wanted: Wanted) -> str:
    """The settings as commented YAML.

    Raises:
        UserError: see `init`.
    """
    tokenizer = load_tokenizer(wanted.small)
    room = _room(wanted, tokenizer)
    source = FileData(kind="file", path=wanted.data, columns=wanted.columns)
    loaded = load_examples(source, on_bad="skip")
    found = _Found.of(
        loaded.examples, lambda text: len(tokenizer.encode(text, add_special_tokens=False))
    )
    sections = [
        f"# Made by lmcot init from {found.count} questions; 'lmcot config' shows all settings.",
        "seed: 0",
        _data(wanted, found, loaded.skipped, room),
        _prompts(found, room),
        _models(wanted, found),
        _training(found),
        _actors(wanted),
    ]
    return "\n".join(sections) + "\n"


def _room(wanted: Wanted, tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Tokens that the models' windows leave for contexts; None: no window is known."""
    limits = [read_limits(wanted.small, tokenizer)]
    if not _is_address(wanted.large):
        limits.append(read_limits(wanted.large, load_tokenizer(wanted.large)))
    windows = [one.window for one in limits if one.window is not None]
    return max(64, min(windows) - _RATIONALE[1] - _WORDING) if windows else None


def _is_address(source: str) -> bool:
    return source.startswith(("http://", "https://"))


@dataclass(frozen=True, slots=True)
class _Found:
    """What the questions are like."""

    count: int
    context: int
    """Tokens that are enough for most contexts."""
    rationale: int
    """Tokens that are enough for most rationales of supporting facts; 0: there are none."""

    @staticmethod
    def of(examples: list[Example], count_tokens: CountTokens) -> _Found:
        teacher = SupportingFactsTeacher(kind="supporting_facts")
        rationales = [
            facts_rationale(one, teacher, lambda text: True).text
            for one in examples
            if one.gold_sentences()
        ]
        enough = len(rationales) > len(examples) // 2
        return _Found(
            len(examples),
            _enough([count_tokens(render_context(one.context)) for one in examples]),
            _enough([count_tokens(text) for text in rationales]) if enough else 0,
        )


def _enough(lengths: list[int]) -> int:
    """A multiple of 16 that is enough for most lengths."""
    at = sorted(lengths)[min(len(lengths) - 1, math.ceil(_LONG_ENOUGH * len(lengths)) - 1)]
    return 16 * math.ceil(at / 16)


def _data(wanted: Wanted, found: _Found, bad: int, room: int | None) -> str:
    named = [f"{field}: {_quoted(path)}" for field, path in wanted.columns.named().items()]
    columns = f", columns: {{{', '.join(named)}}}" if named else ""
    files = {"train": wanted.data, "validation": wanted.validation or wanted.data}
    lines = ["data:"]
    for part, path in files.items():
        one = "" if wanted.validation else f", part: {part}, held_out: {_HELD_OUT}"
        lines.append(f"  {part}: {{kind: file, path: {_quoted(path)}{columns}{one}}}")
    lines.append(f"  max_validation: {_MOST_VALIDATION}")
    if bad:
        lines.append(f"  on_bad_record: skip  # {bad} records: 'lmcot data' says what is wrong")
    context = min(found.context, _MOST_CONTEXT)
    if room is not None:
        context = min(context, room // 2)  # the other half is for the demonstrations
    lines.append(f"  context: {{max_tokens: {context}}}  # most have up to {found.context}")
    if found.rationale:
        lines[-1] = (
            "  # Gold passages and two others; 'distractors: all' shows every passage.\n"
            f"  context: {{distractors: 2, max_tokens: {context}}}"
        )
    return "\n".join(lines)


def _prompts(found: _Found, room: int | None) -> str:
    if not found.rationale:
        return "prompts: {demonstrations: 2}  # those that ship; or draw them from your data"
    shown = _MOST_SHOWN if room is None else min(_MOST_SHOWN, room // 2)
    return f"prompts:\n  demonstrations: {{kind: drawn, count: 2, max_tokens: {shown}}}"


def _models(wanted: Wanted, found: _Found) -> str:
    most = min(max(found.rationale or _RATIONALE[1], _RATIONALE[0]), _RATIONALE[1])
    lines = [
        "policy:",
        f"  source: {_quoted(wanted.small)}",
        f"  max_new_tokens: {most}  # of a rationale",
        "frozen:",
    ]
    address, mark, model = wanted.large.partition("#")
    if _is_address(address):
        if not mark or not model:
            raise UserError(
                f"--large '{wanted.large}' is an address without a model: add its name, as in "
                f"'{address}#my-model'"
            )
        lines += [
            "  backend: openai  # the key is read from OPENAI_API_KEY",
            f"  base_url: {_quoted(address)}",
            f"  model: {_quoted(model)}",
        ]
    else:
        lines += ["  backend: transformers", f"  source: {_quoted(wanted.large)}"]
    lines += ["  max_answer_tokens: 32", f"  max_rationale_tokens: {_RATIONALE[1]}"]
    if found.rationale:
        lines.append("teacher: {kind: supporting_facts, titles: true}  # or {kind: frozen}")
    else:
        lines.append("teacher: {kind: frozen, rationalise: true}  # the frozen LM's own reasoning")
    return "\n".join(lines)


def _training(found: _Found) -> str:
    epochs = max(1, min(4, 400 // max(1, found.count)))
    return (
        "distill:\n"
        f"  epochs: {epochs}\n"
        f"  batch_size: {_BATCH}\n"
        "  optimiser: {learning_rate: 1.0e-4, warmup_steps: 10, decay: cosine}\n"
        + ("  validation: {share: 0.1, every: 50}\n" if found.count >= _VALIDATED else "")
        + "refine:\n"
        "  steps: 100\n"
        f"  prompts_per_step: {_BATCH}\n"
        "  samples_per_prompt: 4\n"
        "  advantage: {kind: grpo}\n"
        "  kl: {kind: fixed, coefficient: 0.01, apply_to: loss}\n"
        "  optimiser: {learning_rate: 2.0e-6, eps: 1.0e-5, warmup_steps: 5}\n"
        "checkpoints: {every: 10}\n"
        "learner: {zero_stage: 0, tokens_per_micro_batch: 4096}"
    )


def _actors(wanted: Wanted) -> str:
    import torch

    threads = os.cpu_count() or 1
    cpus = 0.5 if threads > 1 else 0.25
    gpus = torch.cuda.device_count()
    remote = _is_address(wanted.large)
    share = [0.0, 0.0, 0.0] if not gpus else [0.3, 0.0 if remote else 0.4, 0.3]
    rollout, frozen, learner = (f", gpus: {one}" if one else "" for one in share)
    note = f"{threads} CPUs, {gpus} GPUs" + ("" if gpus < 2 else ": give each role whole ones")
    return (
        f"actors:  # this machine: {note}\n"
        "  prompts_per_unit: 16\n"
        f"  rollout: {{cpus: {cpus}, threads: {threads}{rollout}}}\n"
        f"  reward: {{cpus: {cpus / 2}}}\n"
        f"  frozen: {{cpus: {cpus}, threads: {1 if remote else threads}{frozen}}}\n"
        f"  learner: {{cpus: {cpus}, threads: {threads}{learner}}}"
    )


def _quoted(text: str) -> str:
    """The text as YAML within braces."""
    plain = all(one.isalnum() or one in "/._-~" for one in text) and text[:1].isalnum()
    return text if plain and not text.isdigit() else "'" + text.replace("'", "''") + "'"
