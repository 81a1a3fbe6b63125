"""Questions that a model has no room for: left out, counted, and never more than may be lost."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmcot.config import AnswerTask, load_config
from lmcot.errors import UserError
from lmcot.models.sources import resolve_source
from lmcot.monitor.metrics import Monitor
from lmcot.records import Annotation
from lmcot.run.context import Run
from lmcot.run.directory import RunDirectory
from lmcot.run.interruption import Interruption
from lmcot.training.distill import STAGE, kept_rationales
from lmcot.training.pairs import training_pairs

pytestmark = pytest.mark.usefixtures("model_cache")

Open = Callable[..., Run]


def _question(number: int, sentence: str) -> dict[str, Any]:
    return {
        "id": f"q{number}",
        "question": "Which river does Elko straddle?",
        "answer": "Humboldt River",
        "context": [{"title": "Elko", "sentences": [sentence]}],
        "supporting_facts": [{"title": "Elko", "sent_id": 0}],
    }


def _model(folder: Path, window: int) -> str:
    """A random model with so many positions."""
    shutil.copytree(resolve_source("random:llama"), folder)
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "max_position_embeddings": window}), encoding="utf-8")
    return str(folder)


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    def open_(*words: int, own: int = 2048, other: int = 2048, **changes: Any) -> Run:
        """Args: words: in each context; own, other: windows of the small and of the frozen LM."""
        lines = [
            json.dumps(_question(number, " ".join(["river"] * count)))
            for number, count in enumerate(words)
        ]
        data = tmp_path / "data.jsonl"
        data.write_text("\n".join(lines), encoding="utf-8")
        values = {
            "data": {
                "train": {"kind": "file", "path": str(data)},
                "validation": {"kind": "file", "path": str(data)},
                "context": {"max_tokens": 100_000},
            },
            "policy": {
                "source": _model(tmp_path / "policy", own), "dtype": "float32",
                "max_new_tokens": 16,
            },
            "frozen": {
                "backend": "transformers", "source": _model(tmp_path / "frozen", other),
                "dtype": "float32", "max_answer_tokens": 4, "max_rationale_tokens": 16,
            },
            "teacher": {"kind": "supporting_facts"},
            "prompts": {"demonstrations": 0},
            **changes,
        }  # fmt: skip
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        directory = RunDirectory(tmp_path / "run")
        return Run(load_config(path), directory, Monitor(tmp_path), Interruption())

    return open_


def _ids(run: Run) -> tuple[list[str], list[str]]:
    train = [question.example.id for question in run.train]
    return train, [question.example.id for question in run.validation]


def test_questions_that_fit_are_all_kept(opened: Open) -> None:
    run = opened(10, 20, 30)
    assert _ids(run) == (["q0", "q1", "q2"], ["q0", "q1", "q2"])
    assert run.left_out == {"data.train": "", "data.validation": ""}


@pytest.mark.parametrize("windows", [{"own": 700}, {"other": 700}])
def test_one_long_question_costs_that_question(
    opened: Open, capsys: pytest.CaptureFixture[str], windows: dict[str, int]
) -> None:
    """Whichever of the models has no room for it; told at the start and kept for the report."""
    run = opened(10, 900, 20, 30, **windows)
    assert _ids(run) == (["q0", "q2", "q3"], ["q0", "q2", "q3"])
    told = run.left_out["data.validation"]
    assert told.startswith(
        "1 of 4 questions of data.validation: too long for the model, left out; the first, q1: "
    )
    assert "do not fit into the 700 positions of" in told
    assert "data.context.max_tokens" in told
    assert told in capsys.readouterr().err


_FROZEN_READS_NONE: dict[str, Any] = {
    "prompts": {"demonstrations": 0, "frozen_reads": "rationale_only"},
    "evaluate": {"rows": ["rationale_only_base", "small_alone"]},
}


def test_what_the_frozen_model_does_not_read_needs_no_room(opened: Open) -> None:
    run = opened(10, 900, 20, 30, other=700, **_FROZEN_READS_NONE)
    assert _ids(run) == (["q0", "q1", "q2", "q3"],) * 2


def test_rows_that_read_the_passages_decide_what_is_measured(opened: Open) -> None:
    """The questions of training stay: its rewards read none."""
    changes = {**_FROZEN_READS_NONE, "evaluate": {"rows": ["standard", "rationale_only_base"]}}
    run = opened(10, 900, 20, 30, other=700, **changes)
    assert _ids(run) == (["q0", "q1", "q2", "q3"], ["q0", "q2", "q3"])
    assert "frozen.max_answer_tokens" in run.left_out["data.validation"]


def test_a_judge_with_a_weight_reads_the_passages(opened: Open) -> None:
    rewards = {"aspects": {"factuality": {"source": "judge", "weight": 1.0}}}
    run = opened(10, 900, 20, 30, other=700, rewards=rewards, **_FROZEN_READS_NONE)
    assert _ids(run) == (["q0", "q2", "q3"],) * 2


def test_the_limit_is_to_the_token(opened: Open) -> None:
    """Prompt and reply fill the window exactly, and exceed it by one."""
    run = opened(50)
    prompt = len(run.rationale_prompt(run.train[0].example))
    room = prompt + 16
    [need] = [one for one in run._needs if one.reply == 16 and not one.beside][:1]
    for window, lacks in ((room, False), (room - 1, True)):
        object.__setattr__(need.limits, "window", window)
        lack = need.lack(run.train[0].example)
        assert bool(lack) is lacks
    assert f"{prompt} tokens of the prompt and 16 of the reply do not fit" in lack


def test_more_than_may_be_lost_is_refused(opened: Open) -> None:
    run = opened(10, 900, 800, own=700)
    with pytest.raises(UserError, match=r"2 of 3 questions of data\.train") as caught:
        _ = run.train
    said = str(caught.value)
    assert "failures.max_data_share (0.25)" in said
    assert "lower data.context.max_tokens or policy.max_new_tokens" in said
    assert "\n" not in said


def test_the_share_is_a_setting(opened: Open) -> None:
    run = opened(10, 900, 800, own=700, failures={"max_data_share": 0.7})
    assert _ids(run)[0] == ["q0"]


def test_an_endpoints_window_is_its_own_affair(opened: Open) -> None:
    endpoint = {"backend": "openai", "model": "m", "base_url": "http://127.0.0.1:9/v1"}
    assert len(opened(10, 1500, frozen=endpoint).train) == 2


def test_a_thinking_frozen_model_needs_room_for_that(opened: Open) -> None:
    frozen = {"backend": "transformers", "source": "random:llama", "max_thinking_tokens": 4000}
    with pytest.raises(UserError, match=r"frozen\.max_thinking_tokens"):
        _ = opened(10, frozen=frozen).train


def test_a_rationale_that_does_not_fit_is_not_distilled(
    opened: Open, capsys: pytest.CaptureFixture[str]
) -> None:
    """As somebody's own rationales may be."""
    run = opened(10, 20, own=400)
    annotations = [
        Annotation("q0", "frozen", "river " * 500, "a", True, "right answer"),
        Annotation("q1", "frozen", "river", "a", True, "right answer"),
    ]
    [pair] = training_pairs(run, STAGE, kept_rationales(annotations))
    assert pair.tokens[0] == run.rationale_prompt(run.train[1].example)
    assert "1 rationales are left out" in capsys.readouterr().err


def test_answers_are_asked_as_the_frozen_lm_is(opened: Open) -> None:
    """Without demonstrations, behind a prefix; an answer ends as a rationale does."""
    run = opened(10)
    task = AnswerTask(prefix="[answer] ")
    [pair] = training_pairs(run, STAGE, {"q0": "It is a river."}, task)
    assert pair.answer is not None
    prompt, answer = (run.tokenizer.decode(ids, skip_special_tokens=True) for ids in pair.answer)
    asked = run.templates.showing(0).standard(run.train[0].example)
    assert "[answer] " + asked[-1].content in prompt
    assert answer.strip() == "Humboldt River"
    assert pair.answer[1][-1] == pair.tokens[1][-1] == run.tokenizer.eos_token_id
    assert pair.length == sum(map(len, (*pair.tokens, *pair.answer)))
