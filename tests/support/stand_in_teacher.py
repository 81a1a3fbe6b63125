"""A stand-in for the frozen LM's actors where it is the teacher: a function of the prompt."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lmcot.actors.units import PromptUnit
from lmcot.config import parse_config
from lmcot.frozen.cached import Replies
from lmcot.monitor.metrics import Monitor
from lmcot.records import Completion, Failure, Prompt, Sampling, Usage
from lmcot.run.context import Run
from lmcot.run.directory import RunDirectory
from lmcot.run.interruption import Interruption
from lmcot.training.teachers import frozen

Says = Callable[[Prompt, Sampling], Completion | Failure]


class StandInTeacher:
    """Takes the place of the fleet and of its client; remembers what it was asked."""

    def __init__(self, says: Says) -> None:
        self.says = says
        self.units: list[PromptUnit] = []

    def __enter__(self) -> StandInTeacher:
        return self

    def __exit__(self, *ending: object) -> None:
        """There is nothing to end."""

    def wait_ready(self) -> None:
        """It is."""

    def map(
        self, units: Sequence[PromptUnit], on_result: Callable[[int, Replies], None]
    ) -> list[Replies]:
        """Answers the units one after the other."""
        done = []
        for index, unit in enumerate(units):
            self.units.append(unit)
            replies = [self.says(prompt, unit.sampling) for prompt in unit.prompts]
            done.append(Replies(replies, Usage(len(replies), len(replies), 10 * len(replies))))
            on_result(index, done[-1])
        return done


def said(text: str) -> Completion:
    """A complete reply."""
    return Completion(text, tokens_in=10, tokens_out=5, finish_reason="stop")


def place_question(number: int, **fields: Any) -> dict[str, Any]:
    """A question whose answer is Velm."""
    return {
        "id": f"q{number}",
        "question": f"Where is place {number}?",
        "answer": "Velm",
        "type": "odd" if number % 2 else "even",
        "context": [{"title": f"Place {number}", "sentences": ["It is in Velm.", "It is old."]}],
        "supporting_facts": [{"title": f"Place {number}", "sent_id": 0}],
        **fields,
    }


def write_lines(path: Path, records: Sequence[dict[str, Any]]) -> Path:
    """Writes JSON lines."""
    path.write_text("".join(json.dumps(one) + "\n" for one in records), encoding="utf-8")
    return path


@contextmanager
def opened_run(folder: Path, questions: int = 3, **changes: Any) -> Iterator[Run]:
    """A run with some questions, as `open_run` opens one but without a cluster."""
    train = folder / "train.jsonl"
    if not train.exists():
        write_lines(train, [place_question(number) for number in range(questions)])
    data = {"kind": "file", "path": str(train)}
    values: dict[str, Any] = {
        "data": {"train": data, "validation": data},
        "policy": {"source": "random:llama", "max_new_tokens": 200},
        "frozen": {"backend": "transformers", "source": "random:llama"},
        "actors": {"prompts_per_unit": 2},
        "failures": {"max_infrastructure_share": 0.9},
    }
    config = parse_config(values | changes)
    with RunDirectory(folder / "run") as directory, Monitor(directory.path) as monitor:
        for difference in directory.check_config(config):
            print(difference)
        run = Run(config, directory, monitor, Interruption())
        directory.write_config(config)
        yield run


def take_the_place_of_actors(teacher: StandInTeacher, replace: Callable[..., None]) -> None:
    """Puts the stand-in in place of the frozen LM's actors.

    Args:
        replace: as ``monkeypatch.setattr``.
    """
    replace(Run, "frozen_fleet", lambda run: teacher)
    replace(Run, "frozen_client", lambda run, fleet: fleet)
    replace(frozen, "check_plan", lambda *about: None)
