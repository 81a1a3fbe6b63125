"""Which changes of the settings make predictions old."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from lmcot.config import parse_config
from lmcot.stages.evaluate import _fingerprint

SETTINGS: dict[str, Any] = {
    "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting", "examples": 8}},
    "policy": {"source": "random:llama"},
    "teacher": {"kind": "supporting_facts"},
}
FROZEN = {"backend": "transformers", "source": "random:llama"}


def _mark(frozen: dict[str, Any], **settings: Any) -> str:
    config = parse_config({**SETTINGS, "frozen": {**FROZEN, **frozen}, **settings})
    run: Any = SimpleNamespace(config=config)
    return _fingerprint(run, "")


@pytest.mark.parametrize(
    ("frozen", "settings"),
    [
        ({"budget": {"max_requests": 9}}, {}),
        ({"cache": {"enabled": False}}, {}),
        ({}, {"failures": {"max_data_share": 0.9}}),
        ({}, {"refine": {"steps": 7}}),
    ],
)
def test_what_a_resumed_run_may_change_keeps_predictions(
    frozen: dict[str, Any], settings: dict[str, Any]
) -> None:
    assert _mark(frozen, **settings) == _mark({})


def test_what_answers_depend_on_does_not() -> None:
    marks = {
        _mark({}),
        _mark({"max_answer_tokens": 9}),
        _mark({}, prompts={"demonstrations": 1}),
        _mark({"source": "random:t5"}),
    }
    assert len(marks) == 4
