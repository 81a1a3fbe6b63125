"""The frozen backend of docs/extending.md, as it stands there: a teacher, a judge, its cache."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from pydantic import create_model

import lmcot.config.frozen as settings_module
from lmcot.actors import frozen_client
from lmcot.config import Config, FrozenSettings, GuidanceRewards, PromptSettings, parse_settings
from lmcot.data.prompts import load_templates
from lmcot.errors import UserError
from lmcot.frozen import open as open_module
from lmcot.frozen.open import BACKENDS, open_frozen_lm
from lmcot.monitor.metrics import Monitor
from lmcot.records import Completion, Example, Failure, Message, Prompt, Sampling
from lmcot.rewards.first_check import check_frozen
from lmcot.rewards.judge import RewardModel
from lmcot.run.context import Run
from lmcot.run.directory import RunDirectory
from lmcot.run.interruption import Interruption
from lmcot.training.annotate import annotate
from tests.support.learner_seams import add_to
from tests.support.worked import python_blocks

GREEDY = Sampling(max_new_tokens=20)
PRODUCT = dict(BACKENDS)


@pytest.fixture(autouse=True)
def followed_the_page(monkeypatch: pytest.MonkeyPatch) -> None:
    settings, backend, table = python_blocks("A frozen backend")
    add_to(settings_module, settings, monkeypatch)
    module = ModuleType("lmcot.frozen.recorded")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(backend, "docs/extending.md, lmcot/frozen/recorded.py", "exec"), vars(module))
    add_to(open_module, table, monkeypatch)


@pytest.fixture
def replies(tmp_path: Path) -> Path:
    path = tmp_path / "replies.jsonl"
    record(
        path,
        {"asked": "place 0", "reply": "It is in Velm. So the answer is Velm."},
        {"asked": "place 1", "reply": "It is in Parrow. So the answer is Parrow."},
    )
    return path


def record(path: Path, *lines: dict[str, str]) -> None:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def configured(folder: Path, **changes: Any) -> Config:
    """Settings of a run whose frozen LM is recorded."""
    extended = create_model(
        "Extended", __base__=Config, frozen=(settings_module.Frozen | None, None)
    )
    for part, numbers in (("train", range(3)), ("validation", range(9, 10))):
        record(folder / f"{part}.jsonl", *map(question, numbers))
    values: dict[str, Any] = {
        "data": {
            part: {"kind": "file", "path": str(folder / f"{part}.jsonl")}
            for part in ("train", "validation")
        },
        "policy": {"source": "random:llama", "max_new_tokens": 200},
        "frozen": {
            "backend": "recorded", "replies": str(folder / "replies.jsonl"),
            "cache": {"folder": str(folder)},
        },
        "teacher": {"kind": "frozen"},
        "actors": {"prompts_per_unit": 1},
        "failures": {"max_data_share": 0.5},
    }  # fmt: skip
    return parse_settings(extended, values | changes)


def question(number: int) -> dict[str, Any]:
    return {
        "id": f"q{number}",
        "question": f"Where is place {number}?",
        "answer": "Velm",
        "context": [{"title": f"Place {number}", "sentences": ["It is in Velm.", "It is old."]}],
        "supporting_facts": [{"title": f"Place {number}", "sent_id": 0}],
    }


def settings_of(config: Config) -> FrozenSettings:
    assert config.frozen is not None
    return config.frozen


def test_the_page_leaves_the_products_backends_as_they_are() -> None:
    assert dict(list(open_module.BACKENDS.items())[:-1]) == PRODUCT


class _Ray:
    """Actors in this process: a call's result is there at once, and so is its own reference."""

    def wait(self, refs: Sequence[Any], **_: Any) -> tuple[list[Any], list[Any]]:
        return list(refs), []

    def get(self, ref: Any) -> Any:
        return ref.result


class _Ref:
    def __init__(self, result: Any) -> None:
        self.result = result


class _Fleet:
    """One actor that opens its frozen LM as the real one does."""

    def __init__(self, config: Config) -> None:
        self._lm = open_frozen_lm(settings_of(config), config.prompts)
        self.handles = [self]
        self.ask = self

    def remote(self, *asked: Any) -> _Ref:
        return _Ref(self._lm.replies(*asked))

    def __enter__(self) -> _Fleet:
        return self

    def __exit__(self, *_: object) -> None:
        self._lm.close()

    def wait_ready(self) -> None:
        """It is."""

    def keep_up(self) -> None:
        """Nobody dies."""


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[Path, Config], Run]]:
    monkeypatch.setattr(frozen_client, "ray", _Ray())
    monkeypatch.setattr(frozen_client, "wait_for_news", lambda client: None)
    monkeypatch.setattr("lmcot.training.teachers.frozen.check_plan", lambda *about: None)
    monkeypatch.setattr(Run, "frozen_fleet", lambda run: _Fleet(run.effective))
    with ExitStack() as stack:

        def open_run(folder: Path, config: Config) -> Run:
            directory = stack.enter_context(RunDirectory(folder))
            monitor = stack.enter_context(Monitor(directory.path))
            return Run(config, directory, monitor, Interruption())

        yield open_run


def test_it_is_a_teacher(
    opened: Callable[[Path, Config], Run], tmp_path: Path, replies: Path, model_cache: Path
) -> None:
    """Its replies go the whole way: settings, check, client, cache, annotation."""
    run = opened(tmp_path / "run", configured(tmp_path))
    run.check_inputs()
    annotations = {one.example_id: one for one in annotate(run)}
    assert {key: one.reason for key, one in annotations.items()} == {
        "q0": "right answer",
        "q1": "the teacher's answer is wrong",
        "q2": "failed: no recorded reply fits the prompt: add one",
    }
    assert annotations["q0"].rationale == "It is in Velm. So the answer is Velm."
    run.spending.save()
    spent = json.loads((tmp_path / "run" / "spending.json").read_text(encoding="utf-8"))
    assert (spent["annotate"]["sent"], spent["annotate"]["estimated"]) == (3, 2)


def test_it_judges(tmp_path: Path) -> None:
    """Without likelihoods, fluency is left out by itself, and refused where it is asked for."""
    record(
        tmp_path / "replies.jsonl",
        {"asked": "yes or no", "reply": "Yes"},
        {"asked": "place 0", "reply": "Velm"},
    )
    config = configured(tmp_path, rewards={"kind": "guidance"})
    rewards = config.rewards
    assert isinstance(rewards, GuidanceRewards)
    checked = check_frozen(config, load_templates("default"))
    assert checked.usage.sent == 0
    lm = open_frozen_lm(settings_of(checked.config), config.prompts)
    assert isinstance(checked.config.rewards, GuidanceRewards)
    example = Example("q0", "Where is place 0?", "Velm", ())
    model = RewardModel(checked.config.rewards, lm, load_templates("default"), 20)
    (judgement,) = model.judge([example], ["It is in Velm."])
    assert judgement.failure is None
    assert judgement.components["em"] == 1.0
    assert "aspect/fluency" not in judgement.components
    with pytest.raises(UserError, match=r"frozen\.backend 'recorded' gives no log-likelihoods"):
        configured(tmp_path, rewards={"kind": "guidance", "likelihood_gain_weight": 0.5})


def test_other_replies_are_another_model(tmp_path: Path, replies: Path) -> None:
    """What the cache keeps of the one is no reply of the other."""
    prompt: Prompt = (Message("user", "Where is place 0?"),)
    settings = settings_of(configured(tmp_path))

    def reply() -> tuple[str, int]:
        lm = open_frozen_lm(settings, PromptSettings())
        found = lm.replies("generate", [prompt], GREEDY)
        lm.close()
        (one,) = found.results
        assert isinstance(one, Completion)
        return one.text.rpartition(" ")[2], found.usage.sent

    assert [reply(), reply()] == [("Velm.", 1), ("Velm.", 0)]
    record(replies, {"asked": "place 0", "reply": "Elko."})
    assert reply() == ("Elko.", 1)
    lm = open_frozen_lm(settings, PromptSettings())
    (chosen,) = lm.choose([prompt], ("Elko", "Velm"))
    assert not isinstance(chosen, Failure)
    assert chosen.probabilities == {"Elko": 1.0, "Velm": 0.0}
    lm.close()


def test_a_file_without_replies_is_refused_before_anything_starts(tmp_path: Path) -> None:
    config = configured(tmp_path)
    with pytest.raises(UserError, match=r"frozen\.replies names '.*', which holds no replies"):
        check_frozen(config, load_templates("default"))
    assert settings_of(config).public_name == "recorded"
