"""The frozen LM's first answers: asked once for each question, kept, counted."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmcot.actors.units import PromptUnit
from lmcot.config import parse_config
from lmcot.errors import UserError
from lmcot.evaluation.predictions import Attempt, Rationales, predict
from lmcot.frozen.cached import Replies
from lmcot.monitor.metrics import Monitor
from lmcot.records import Answer, Completion, Failure, FailureKind, Usage
from lmcot.run.context import Run
from lmcot.run.directory import RunDirectory
from lmcot.run.first_answers import ask_first
from lmcot.run.interruption import Interruption
from lmcot.training.questions import rows_of_steps

Opened = Callable[..., Run]


class Frozen:
    """Answers each question with its number; those of ``down`` fail."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.down: set[str] = set()

    def map(self, units: list[PromptUnit], *, on_result: Callable[[int, Replies], None]) -> None:
        for index, unit in enumerate(units):
            replies = [self._reply(prompt[-1].content) for prompt in unit.prompts]
            count = len(replies)
            on_result(index, Replies(replies, Usage(asked=count, sent=count - 1, tokens=12)))

    def _reply(self, text: str) -> Completion | Failure:
        number = text.split("place ")[1].split("?")[0]
        self.asked.append(number)
        if number in self.down:
            return Failure(FailureKind.PERMANENT, "it is filtered")
        return Completion(f" at {number} \n", 10, 2, "stop")


@pytest.fixture
def frozen() -> Frozen:
    return Frozen()


@pytest.fixture
def opened(
    tmp_path: Path, model_cache: Path, frozen: Frozen, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Opened]:
    """Opens the run again, with some of its settings changed."""
    lines = [
        {"id": f"q{n}", "question": f"Where is place {n}?", "answer": "Velm",
         "context": f"Place {n} is in Velm."}
        for n in range(5)
    ]  # fmt: skip
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    fleet = SimpleNamespace(wait_ready=lambda: None)
    monkeypatch.setattr(Run, "frozen_fleet", lambda self: nullcontext(fleet))
    monkeypatch.setattr(Run, "frozen_client", lambda self, fleet: frozen)
    monkeypatch.setattr("lmcot.run.first_answers.check_plan", lambda *_: None)
    with ExitStack() as stack:

        def open_again(**changes: Any) -> Run:
            stack.close()
            values: dict[str, Any] = {
                "data": {"train": str(tmp_path / "train.jsonl"),
                         "validation": {"kind": "counting"}},
                "policy": {"source": "random:llama", "max_new_tokens": 200},
                "frozen": {"backend": "transformers", "source": "random:llama"},
                "refine": {"start_from": "base"},
                "prompts": {"guidance": "advice", "demonstrations": 0},
                "actors": {"prompts_per_unit": 2},
            }  # fmt: skip
            directory = stack.enter_context(RunDirectory(tmp_path / "run"))
            monitor = stack.enter_context(Monitor(directory.path))
            return Run(parse_config(values | changes), directory, monitor, Interruption())

        yield open_again


def answers(run: Run) -> list[str]:
    return [one.example.first_answer for one in run.train]


def test_each_question_is_asked_once_and_kept(opened: Opened, frozen: Frozen) -> None:
    run = opened()
    ask_first(run, run.train, [3, 1, 1])
    assert answers(run) == ["", "at 1", "", "at 3", ""]
    resumed = opened()
    ask_first(resumed, resumed.train)
    assert frozen.asked == ["1", "3", "0", "2", "4"]
    assert answers(resumed) == ["at 0", "at 1", "at 2", "at 3", "at 4"]
    ask_first(resumed, resumed.train)
    assert len(frozen.asked) == 5
    assert "First answer: at 3" in resumed.tokenizer.decode(
        resumed.rationale_prompt(resumed.train[3].example)
    )


def test_other_settings_ask_again_and_a_cut_line_too(
    opened: Opened, frozen: Frozen, tmp_path: Path
) -> None:
    run = opened()
    ask_first(run, run.train)
    path = tmp_path / "run" / "first_answers.jsonl"
    path.write_bytes(path.read_bytes()[:-5])
    again = opened(prompts={"guidance": "advice", "demonstrations": 0, "conclusion": "hidden"})
    ask_first(again, again.train)
    assert frozen.asked[5:] == ["4"], "what guided prompts show does not matter to them"
    other = opened(prompts={"guidance": "advice", "demonstrations": 0, "first_answer": "cot"})
    ask_first(other, other.train, [0])
    assert frozen.asked[6:] == ["0"]
    path.write_text("{}\n", encoding="utf-8")
    damaged = opened()
    with pytest.raises(UserError, match=r"line 1 of .* is damaged"):
        ask_first(damaged, damaged.train)


def test_failures_are_counted_told_and_not_asked_for_ever(
    opened: Opened, frozen: Frozen, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen.down = {"1", "2"}
    run = opened(failures={"max_data_share": 0.2})
    with pytest.raises(UserError, match=r"2 of 5 first answers failed, more than failures\."):
        ask_first(run, run.train)
    again = opened(failures={"max_data_share": 0.7})
    ask_first(again, again.train)
    assert "2 of 3 first answers failed, so that" in capsys.readouterr().err
    assert answers(again) == ["at 0", "", "", "at 3", "at 4"]
    asked = len(frozen.asked)
    last = opened(failures={"max_data_share": 0.7})
    ask_first(last, last.train)
    assert len(frozen.asked) == asked
    found = last.first_answers.of(last.train[1].example)
    assert found is not None
    assert found.failure == "it is filtered"


def test_without_advice_nothing_is_asked(opened: Opened, frozen: Frozen) -> None:
    run = opened(prompts={"demonstrations": 0})
    ask_first(run, run.train)
    assert frozen.asked == []
    assert set(answers(run)) == {""}


def test_an_evaluation_bears_the_cost(opened: Opened) -> None:
    run = opened()
    ask_first(run, run.train)
    first = run.first_answers.of(run.train[0].example)
    assert first is not None
    assert (first.tokens_in, first.tokens_out, first.cached) == (10, 2, 0.5)
    example = run.train[0].example
    attempts = [Attempt("So.", Answer("Velm", "Velm", 20, 3))]
    rationales = Rationales("q0", ["So."], 7, [4], ["eos"], 1.0)
    options = {"own": True, "cached": 0.0, "seconds": 2.0}
    bare = predict(example, attempts, rationales, **options)  # type: ignore[arg-type]
    whole = predict(example, attempts, rationales, **options, first=first)  # type: ignore[arg-type]
    assert (bare.requests, bare.large_lm_tokens_in, bare.large_lm_tokens_out) == (1, 20, 3)
    assert (whole.requests, whole.large_lm_tokens_in, whole.large_lm_tokens_out) == (2, 30, 5)
    assert (whole.cached_requests, whole.first_answer) == (0.5, "at 0")
    assert whole.seconds == 3.0 + first.seconds
    assert whole.small_lm_tokens_in == bare.small_lm_tokens_in


def test_steps_need_the_first_answers_that_they_draw(opened: Opened) -> None:
    few = opened(refine={"start_from": "base", "steps": 2, "prompts_per_step": 3}).config
    assert len(rows_of_steps(100, few)) == 6
    assert set(rows_of_steps(4, few)) == set(range(4))
    chosen = {"steps": 2, "prompts_per_step": 3, "start_from": "base",
              "filter": {}, "advantage": {"kind": "grpo"}}  # fmt: skip
    assert rows_of_steps(100, opened(refine=chosen).config) == range(100)


def test_advice_needs_a_frozen_lm() -> None:
    with pytest.raises(UserError, match=r"guidance is 'advice', but there is no frozen LM"):
        parse_config(
            {
                "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
                "policy": {"source": "random:llama"},
                "rewards": {"kind": "increasing"},
                "refine": {"start_from": "base"},
                "prompts": {"guidance": "advice"},
            }
        )
