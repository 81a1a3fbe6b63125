"""Rewards and teachers as plain functions."""

from __future__ import annotations

import json
import threading
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ray import cloudpickle

import lmcot
from lmcot.api.functions import Rewards, with_rewards, write_rationales
from lmcot.config import Config, GuidanceRewards, parse_config
from lmcot.config.load import overridden
from lmcot.data.rationale_file import read_rationales
from lmcot.errors import UserError
from lmcot.records import Example, Judgement, Rollout
from lmcot.rewards.custom import AbsentReward, load_custom, load_customs
from lmcot.run.inputs import _source

VALUES: dict[str, Any] = {
    "data": "questions.jsonl",
    "policy": "random:llama",
    "frozen": "random:llama",
    "teacher": {"kind": "supporting_facts"},
}


def brevity(
    example: Example, rollout: Rollout, judgement: Judgement, lock: Any = None, table: bytes = b""
) -> float:
    return 1.0


LOCK = threading.Lock()


def of_a_notebook(text: str = "lambda example, rollout, judgement: 0.5") -> Any:
    """A function whose module is that of a program."""
    function = eval(text, {"__name__": "__main__"})
    assert function.__module__ == "__main__"
    return function


def test_a_function_of_a_module_is_named_by_it() -> None:
    found = Rewards.of({"short": (brevity, 0.2)})
    where = f"{__name__}:brevity"
    assert found.settings == {"short": {"function": where, "weight": 0.2}}
    assert found.functions == {where: brevity}


def test_a_function_of_a_program_goes_to_the_actors_by_value() -> None:
    function = of_a_notebook()
    found = Rewards.of({"half": function})
    assert found.settings == {"half": {"function": "__main__:half", "weight": 1.0}}
    sent = cloudpickle.loads(cloudpickle.dumps(found.functions))
    rewards = GuidanceRewards(custom=found.settings)
    (custom,) = load_customs(rewards, sent)
    assert (custom.component, custom.reward(None, None, None)) == ("custom/half", 0.5)  # type: ignore[arg-type]


def test_a_function_that_is_not_there_is_told_when_it_is_needed() -> None:
    reward = load_custom("__main__:half")
    assert isinstance(reward, AbsentReward)
    with pytest.raises(UserError, match="run the stage there"):
        reward(None, None, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"lock": partial(brevity, lock=LOCK)}, "cannot be sent"),
        ({"table": partial(brevity, table=bytes(10**6))}, "may take 65,536"),
        ({"none": None}, "give a function"),
    ],
)
def test_a_function_that_cannot_be_sent_is_refused(given: Any, said: str) -> None:
    with pytest.raises(UserError, match=said):
        Rewards.of(given)


def test_rewards_stand_beside_those_of_the_settings() -> None:
    custom = {"names": {"function": "mine:names", "weight": 0.3}}
    config = parse_config({**VALUES, "rewards": {"custom": custom}})
    changes = with_rewards(config, Rewards.of({"short": brevity}))
    rewards = parse_config(overridden(config.model_dump(mode="json"), changes)).rewards
    assert isinstance(rewards, GuidanceRewards)
    assert list(rewards.custom_rewards) == ["custom/names", "custom/short"]
    assert with_rewards(config, Rewards.of({})) == {}


@pytest.mark.parametrize(
    ("rewards", "said"),
    [({"custom": "mine:one"}, "leave rewards.custom out"), ({"kind": "increasing"}, "'guidance'")],
)
def test_settings_that_take_no_rewards_are_named(rewards: dict[str, Any], said: str) -> None:
    config = parse_config({**VALUES, "rewards": rewards})
    with pytest.raises(UserError, match=said):
        with_rewards(config, Rewards.of({"short": brevity}))


def test_a_changed_function_is_a_changed_input() -> None:
    given = {"__main__:brevity": brevity}
    assert _source(brevity, given).startswith("def brevity(")
    assert "def of_a_notebook" not in _source(brevity, given)
    assert "def of_a_notebook" in _source(brevity, {})


@pytest.fixture
def config(tmp_path: Path) -> Config:
    passages = [["Velm", ["Velm is in Oster."]]]
    lines = [
        json.dumps({"id": f"q{n}", "question": f"{n}?", "answer": "Oster", "context": passages})
        for n in range(5)
    ]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines))
    file = {"kind": "file", "path": str(tmp_path / "questions.jsonl")}
    return parse_config(VALUES | {"data": {"train": file, "validation": file, "max_train": 3}})


def test_a_teachers_rationales_are_those_of_the_teacher_file(
    config: Config, tmp_path: Path
) -> None:
    file = tmp_path / "run" / "teacher.jsonl"
    several: dict[str, Any] = {"q0": "One.", "q1": ["Two.", "Three."], "q2": None}
    write_rationales(lambda example: several[example.id], config, file)
    found = [(one.example_id, one.rationale) for one in read_rationales(str(file))]
    assert found == [("q0", "One."), ("q1", "Two."), ("q1", "Three."), ("q2", "")]


def test_a_teacher_is_not_asked_again(config: Config, tmp_path: Path) -> None:
    file, asked = tmp_path / "teacher.jsonl", []

    def teacher(example: Example) -> str:
        asked.append(example.id)
        if example.id == "q1" and asked.count("q1") == 1:
            raise TimeoutError("no reply")
        return f"{example.id}."

    with pytest.raises(UserError, match=r"raised TimeoutError: no reply for the question 'q1'"):
        write_rationales(teacher, config, file)
    with file.open("a") as lines:
        lines.write('{"id": "q1", "ratio')  # as a kill leaves it
    write_rationales(teacher, config, file)
    write_rationales(teacher, config, file)
    assert asked == ["q0", "q1", "q1", "q2"]
    assert [one.rationale for one in read_rationales(str(file))] == ["q0.", "q1.", "q2."]


@pytest.mark.parametrize("wrong", [3, ["a", 3]])
def test_a_teacher_returns_texts(config: Config, tmp_path: Path, wrong: Any) -> None:
    with pytest.raises(UserError, match="it must return a text"):
        write_rationales(lambda example: wrong, config, tmp_path / "teacher.jsonl")


def test_settings_are_made_of_files_mappings_and_objects(tmp_path: Path, config: Config) -> None:
    changed = lmcot.settings(config, overrides={"refine.steps": 3, "policy": "random:t5"})
    assert (changed.refine.steps, changed.policy.source) == (3, "random:t5")
    assert changed.data == config.data
    values = config.model_dump(mode="json")
    assert lmcot.settings(values) == config
    assert lmcot.settings(config) is config


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "give settings, or name data, small and large"),
        ({"data": "a.jsonl", "small": "random:llama"}, "give settings, or name"),
        ({"source": VALUES, "data": "a.jsonl"}, "settings are given, and data"),
        ({"source": VALUES}, r"data\.train\.path names"),
        ({"source": VALUES, "overrides": {"refine.stepps": 1}}, "did you mean 'steps'"),
        (
            {"data": "a", "small": "b", "large": "c", "columns": {"text": "t"}},
            "unknown key 'text'",
        ),
    ],
)
def test_wrong_settings_are_one_sentence(given: Any, said: str) -> None:
    with pytest.raises(lmcot.UserError, match=said):
        lmcot.settings(**given)


def test_a_run_needs_a_place(config: Config) -> None:
    with pytest.raises(lmcot.UserError, match="give run_dir"):
        lmcot.train(config)
