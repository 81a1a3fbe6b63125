"""Annotation through the fleet, against the frozen LM's backend alone.

    python -m benchmarks.annotation [--questions 32] [--tokens 48] [--unit 16] [--repeats 3]

SmolLM2-135M (or --source) is the teacher of HotpotQA questions with their gold paragraphs. The
backend alone gets all prompts in one call, in a process that does nothing else. Annotation goes its
whole way: units, actor, judging, filters, files. Models and questions are read before, and there is
no cache. Both take turns on the same threads; the ratio is that of their medians. The goal is 0.9.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.cases import SMOLLM2, questions
from benchmarks.timing import medians
from lmcot.actors.fleet import Fleet
from lmcot.actors.frozen_actor import FrozenActor
from lmcot.actors.resources.cluster import ray_cluster
from lmcot.config import Config, FrozenTeacher, parse_config
from lmcot.data.row_requests import teacher_prompt, teacher_sampling
from lmcot.errors import UserError
from lmcot.frozen.cached import CachedLM
from lmcot.frozen.open import open_frozen_lm
from lmcot.monitor.metrics import Monitor
from lmcot.monitor.progress import say
from lmcot.process import use_threads
from lmcot.run.context import Run
from lmcot.run.directory import RunDirectory, read_annotations
from lmcot.run.interruption import Interruption
from lmcot.training.annotate import annotate

GOAL = 0.9


def main() -> None:
    """Prints the ratio of the two speeds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--source", default=SMOLLM2)
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--unit", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    config = settings(options)
    threads = config.actors.frozen.threads
    use_threads(threads)
    with tempfile.TemporaryDirectory() as folder, ray_cluster(config.actors):
        home = Path(folder)
        with opened(config, home / "first") as run:
            say(f"{len(run.train)} questions")
            lm = open_frozen_lm(settings_of(run.effective), run.effective.prompts)
            with run.frozen_fleet() as fleet:
                fleet.wait_ready()
                taken = medians(
                    {
                        "alone": lambda: ask_alone(run, lm),
                        "fleet": lambda: ask_fleet(run, Path(tempfile.mkdtemp(dir=home)), fleet),
                    },
                    options.repeats,
                )
    for name, seconds in taken.items():
        print(f"{name}: {seconds:.2f} s, {options.questions / seconds:.2f} rationales a second")
    print(f"the machine's load is {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")
    print(f"annotation reaches {taken['alone'] / taken['fleet']:.2f} of the backend (goal: {GOAL})")


def settings(options: argparse.Namespace) -> Config:
    """The settings of the run."""
    data = questions().model_dump()
    values: dict[str, Any] = {
        "data": {
            "train": data, "validation": data,
            "max_train": options.questions, "max_validation": 1,
            "context": {"distractors": 0, "max_tokens": 256},
        },
        "prompts": {"demonstrations": 2},
        "policy": {"source": options.source, "dtype": "float32"},
        "frozen": {
            "backend": "transformers", "source": options.source, "dtype": "float32",
            "max_rationale_tokens": options.tokens, "cache": {"enabled": False},
        },
        "teacher": {"kind": "frozen", "right_by": "f1", "min_f1": 0.0},
        "actors": {"prompts_per_unit": options.unit, "frozen": {"threads": os.cpu_count() or 1}},
    }  # fmt: skip
    return parse_config(values)


def settings_of(config: Config) -> Any:
    """The settings of the frozen LM."""
    assert config.frozen is not None
    return config.frozen


@contextmanager
def opened(config: Config, home: Path) -> Iterator[Run]:
    """A run in a folder of its own."""
    with RunDirectory(home) as directory, Monitor(directory.path) as monitor:
        yield Run(config, directory, monitor, Interruption())


def ask_alone(run: Run, lm: CachedLM) -> None:
    """Asks the backend for all rationales at once."""
    teacher = run.config.teacher
    assert isinstance(teacher, FrozenTeacher)
    prompts = [
        teacher_prompt(teacher, run.templates, one.example, hinted=False) for one in run.train
    ]
    lm.generate(prompts, teacher_sampling(teacher, run.config, run.templates, 0, hinted=False))


class _Started:
    """A fleet that stays when its stage ends."""

    def __init__(self, fleet: Fleet[FrozenActor]) -> None:
        self._fleet = fleet

    def __enter__(self) -> Fleet[FrozenActor]:
        return self._fleet

    def __exit__(self, *ending: object) -> None:
        """It is used again."""


def ask_fleet(like: Run, home: Path, fleet: Fleet[FrozenActor]) -> None:
    """Annotates all questions in a new run."""
    with opened(like.config, home) as run:
        run.train, run.tokenizer = like.train, like.tokenizer
        run.frozen_fleet = lambda: _Started(fleet)  # type: ignore[assignment,method-assign,return-value]
        try:
            annotate(run)
        except UserError:
            # How good the rationales are does not matter here, but each must be there.
            if len(read_annotations(run.directory.rationales)) < len(run.train):
                raise


if __name__ == "__main__":
    main()
