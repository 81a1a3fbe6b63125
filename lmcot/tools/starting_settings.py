"""Settings to start with: for a file of questions, two models and this machine.

`lmcot init` writes them into a file, `lmcot train --data` into the run directory.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from lmcot.config import CheckpointSettings, DistillSettings, RefineSettings, SupportingFactsTeacher
from lmcot.config.data import Columns, FileData
from lmcot.config.short_forms import is_address
from lmcot.config.task import task_named
from lmcot.data import load_examples
from lmcot.data.context import CountTokens, render_context
from lmcot.data.facts import facts_rationale
from lmcot.data.tasks import open_task
from lmcot.errors import UserError
from lmcot.models.limits import read_limits
from lmcot.models.sources import load_tokenizer, resolve_dtype
from lmcot.records import Example

_MOST_VALIDATION = 200
_CONTEXT = (64, 1024)
"""Least and most tokens of a context."""
_RATIONALE = (64, 192)
"""Least and most tokens of a rationale that are asked for."""
_ANSWER = 32
"""Tokens of an answer: more than the default, for data whose answers nobody has looked at yet."""
_WORDING = 320
"""Tokens that are left in a window for the question, the prompt's wording and the answer."""
_MOST_SHOWN = 1024
"""Most tokens of the demonstrations."""
_HELD_OUT = (0.1, 0.25)
"""Least and most share of the questions that are held out of one file to evaluate on."""
_FEWEST_HELD_OUT = 20
"""Questions that are held out, where the greatest share has as many."""
_VALIDATED = 200
"""From this many questions on, some are kept out of distillation to validate on."""
_LONG_ENOUGH = 0.95
"""Share of the questions whose context, or whose rationale, is not cut."""
_SEEN = 400
"""A few questions are learnt in several passes, until this many rationales were seen."""
_MOST_EPOCHS = 4
_PER_STEP = 8
"""Questions of a step of PPO: half the default, for one machine."""
_DISTILL_RATE = 1e-4
_REFINE_RATE = 2e-6
"""Learning rates: above the defaults, which are for long runs of larger models."""
_KL = 0.01
_TOKENS_AT_ONCE = {False: 4096, True: 16384}
"""Tokens that go through the small LM at once, without and with a GPU."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the user names."""

    data: str
    """A file, a folder, a pattern or a URL of one."""
    validation: str | None
    """The same for evaluation; None: a part of ``data``."""
    small: str
    """Source of the small LM."""
    large: str
    """Source of the frozen LM, or ``http://HOST/v1#MODEL``."""
    columns: Columns
    task: str = "extractive_qa"
    """What a question is: a name of ``task``."""


def settings_text(wanted: Wanted) -> str:
    """The settings as commented YAML.

    Raises:
        UserError: if the data or the tokenizer of a local model cannot be read, or an endpoint has
            no model.
    """
    tokenizer = load_tokenizer(wanted.small)
    room = _room(wanted, tokenizer)
    source = FileData(kind="file", path=wanted.data, columns=wanted.columns)
    task = task_named(wanted.task)
    loaded = load_examples(
        source, on_bad="skip", task=open_task(task), require_context=task.needs_context
    )
    found = _Found.of(
        loaded.examples, lambda text: len(tokenizer.encode(text, add_special_tokens=False))
    )
    sections = [
        f"# Made from {found.count} questions; 'lmcot config --config FILE' shows all settings.",
        "seed: 0",
        f"task: {wanted.task}",
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
    if not is_address(wanted.large):
        limits.append(read_limits(wanted.large, load_tokenizer(wanted.large)))
    windows = [one.window for one in limits if one.window is not None]
    return max(_CONTEXT[0], min(windows) - _RATIONALE[1] - _WORDING) if windows else None


@dataclass(frozen=True, slots=True)
class _Found:
    """What the questions are like."""

    count: int
    context: int
    """Tokens that are enough for most contexts."""
    rationale: int
    """Tokens that are enough for most rationales of supporting facts; 0: there are none."""
    passages: int
    """The most passages of a question; 0: there are none."""

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
            max(len(one.context) for one in examples),
        )


def _enough(lengths: list[int]) -> int:
    """A multiple of 16 that is enough for most lengths."""
    at = sorted(lengths)[min(len(lengths) - 1, math.ceil(_LONG_ENOUGH * len(lengths)) - 1)]
    return 16 * math.ceil(at / 16)


def held_out_share(count: int) -> float:
    """The share of so many questions to evaluate on: a tenth, but at least 20 questions, or a
    quarter of fewer than 80."""
    least, most = _HELD_OUT
    return round(max(least, min(most, _FEWEST_HELD_OUT / count)), 3)


def _data(wanted: Wanted, found: _Found, bad: int, room: int | None) -> str:
    named = [f"{field}: {_quoted(path)}" for field, path in wanted.columns.named().items()]
    columns = f", columns: {{{', '.join(named)}}}" if named else ""
    files = {"train": wanted.data, "validation": wanted.validation or wanted.data}
    held_out = held_out_share(found.count)
    lines = ["data:"]
    if not wanted.validation:
        about = f"about {held_out * found.count:.0f} of {found.count} questions"
        lines.append(f"  # Held out to evaluate on: {about} (a tenth or 20; of few a quarter).")
    for part, path in files.items():
        one = "" if wanted.validation else f", part: {part}, held_out: {held_out}"
        lines.append(f"  {part}: {{kind: file, path: {_quoted(path)}{columns}{one}}}")
    lines.append(f"  max_validation: {_MOST_VALIDATION}")
    if bad:
        lines.append(f"  on_bad_record: skip  # {bad} records: 'lmcot data' says what is wrong")
    if found.passages:
        lines.append(_context(found, room))
    return "\n".join(lines)


def _context(found: _Found, room: int | None) -> str:
    tokens = min(max(found.context, _CONTEXT[0]), _CONTEXT[1])
    if room is not None:
        tokens = min(tokens, room // 2)  # the other half is for the demonstrations
    if not found.rationale or found.passages < 2:
        return f"  context: {{max_tokens: {tokens}}}  # most have up to {found.context}"
    return (
        "  # Gold passages and two others; 'distractors: all' shows every passage.\n"
        f"  context: {{distractors: 2, max_tokens: {tokens}}}"
    )


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
        f"  dtype: auto  # {str(resolve_dtype('auto')).removeprefix('torch.')} on this machine",
        f"  max_new_tokens: {most}  # of a rationale",
        "frozen:",
    ]
    address, _, model = wanted.large.partition("#")
    if is_address(address):
        if not model:
            raise UserError(
                "the large LM is an address without a model: add the model's name after a '#', as "
                "in http://127.0.0.1:8000/v1#my-model"
            )
        lines += [
            "  backend: openai  # the key is read from OPENAI_API_KEY",
            f"  base_url: {_quoted(address)}",
            f"  model: {_quoted(model)}",
        ]
    else:
        lines += ["  backend: transformers", f"  source: {_quoted(wanted.large)}"]
    lines += [f"  max_answer_tokens: {_ANSWER}", f"  max_rationale_tokens: {_RATIONALE[1]}"]
    if found.rationale:
        lines.append("teacher: {kind: supporting_facts, titles: true}  # or {kind: frozen}")
    else:
        lines.append("teacher: {kind: frozen, rationalise: true}  # the frozen LM's own reasoning")
    return "\n".join(lines)


def _training(found: _Found) -> str:
    import torch

    distill, refine, checkpoints = DistillSettings(), RefineSettings(), CheckpointSettings()
    epochs = max(1, min(_MOST_EPOCHS, _SEEN // max(1, found.count)))
    validation = "  validation: {share: 0.1, every: 50}\n" if found.count >= _VALIDATED else ""
    tokens = _TOKENS_AT_ONCE[torch.cuda.is_available()]
    return (
        "distill:\n"
        f"  epochs: {epochs}\n"
        f"  batch_size: {distill.batch_size}\n"
        f"  optimiser: {{learning_rate: {_DISTILL_RATE:.1e}, warmup_steps: 10, decay: cosine}}\n"
        f"{validation}"
        "refine:\n"
        f"  steps: {refine.steps}\n"
        f"  prompts_per_step: {_PER_STEP}\n"
        f"  samples_per_prompt: {refine.samples_per_prompt}\n"
        "  advantage: {kind: grpo}\n"
        f"  kl: {{kind: fixed, coefficient: {_KL}, apply_to: loss}}\n"
        f"  optimiser: {{learning_rate: {_REFINE_RATE:.1e}, eps: {refine.optimiser.eps:.1e}, "
        "warmup_steps: 5}\n"
        f"checkpoints: {{every: {checkpoints.every}}}\n"
        f"learner: {{zero_stage: 0, tokens_per_micro_batch: {tokens}}}"
    )


def _actors(wanted: Wanted) -> str:
    import torch

    threads = os.cpu_count() or 1
    cpus = 0.5 if threads > 1 else 0.25
    gpus = torch.cuda.device_count()
    remote = is_address(wanted.large)
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
