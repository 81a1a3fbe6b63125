"""A run's demonstrations: drawn once, kept apart from its questions, and kept in its directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmcot.actors.reward_actor import RewardActor
from lmcot.answering.pair import open_pair
from lmcot.config import GivenDemonstrations, dump_config, load_config
from lmcot.errors import UserError
from lmcot.evaluation.evaluate import _demonstrations
from lmcot.models.sources import resolve_source
from lmcot.monitor.metrics import Monitor
from lmcot.run.context import Run
from lmcot.run.demonstrations import write_demonstrations
from lmcot.run.directory import RunDirectory
from lmcot.run.inputs import check_contents, contents
from lmcot.run.interruption import Interruption

pytestmark = pytest.mark.usefixtures("model_cache")

Open = Callable[..., Run]
DRAWN = {"kind": "drawn", "count": 2, "choose": "first", "pool": 4}


def question(number: int, text: str = "") -> dict[str, Any]:
    return {
        "id": f"q{number}",
        "question": text or f"Where is place {number}?",
        "answer": "Velm",
        "context": [{"title": f"Place {number}", "sentences": [f"It, {number}, is in Velm."]}],
        "supporting_facts": [{"title": f"Place {number}", "sent_id": 0}],
    }


def write(path: Path, *questions: dict[str, Any]) -> None:
    path.write_text("".join(json.dumps(one) + "\n" for one in questions), encoding="utf-8")


@pytest.fixture
def opened(tmp_path: Path) -> Open:
    write(tmp_path / "train.jsonl", *map(question, range(6)))
    write(tmp_path / "validation.jsonl", question(8), question(9, "where is place 1"), question(10))

    def open_(demonstrations: Any = DRAWN, **data: Any) -> Run:
        values = {
            "data": {
                **{
                    part: {"kind": "file", "path": str(tmp_path / f"{part}.jsonl")}
                    for part in ("train", "validation")
                },
                **data,
            },
            "policy": {"source": "random:llama"},
            "frozen": {"backend": "transformers", "source": "random:llama"},
            "teacher": {"kind": "supporting_facts"},
            "prompts": {"demonstrations": demonstrations},
        }
        path = tmp_path / "config.yaml"
        path.write_text(yaml.safe_dump(values), encoding="utf-8")
        directory = RunDirectory(tmp_path / "run")
        directory.path.mkdir(exist_ok=True)
        return Run(load_config(path), directory, Monitor(tmp_path), Interruption())

    return open_


def begin(run: Run) -> None:
    """As the first stage does."""
    write_demonstrations(run.demonstrations, run.directory)
    run.directory.write_config(run.config)
    run.directory.begin("distill", contents(run, "distill"))
    run.directory.finish("distill")


def shown(run: Run) -> list[str]:
    assert run.demonstrations is not None
    return [one.id for one in run.demonstrations.examples]


def asked(run: Run) -> tuple[list[str], list[str]]:
    train = [one.example.id for one in run.train]
    return train, [one.example.id for one in run.validation]


def test_what_is_shown_is_neither_trained_on_nor_measured_on(opened: Open) -> None:
    run = opened(max_train=3)
    assert shown(run) == ["q0", "q1"]
    # As many are trained on as the settings say; q9 has the words of q1.
    assert asked(run) == (["q2", "q3", "q4"], ["q8", "q10"])
    assert run.left_out["data.validation"] == (
        "1 questions of data.validation: shown as demonstrations, left out"
    )
    assert asked(opened(0, max_train=3))[0] == ["q0", "q1", "q2"]


def test_another_file_may_be_the_source(opened: Open, tmp_path: Path) -> None:
    write(tmp_path / "more.jsonl", question(20), question(3))
    source = {"kind": "file", "path": str(tmp_path / "more.jsonl")}
    run = opened({**DRAWN, "source": source})
    assert shown(run) == ["q20", "q3"]
    assert asked(run)[0] == ["q0", "q1", "q2", "q4", "q5"]
    (tmp_path / "more.jsonl").unlink()
    with pytest.raises(UserError, match=r"prompts.demonstrations.source.path names .*more.jsonl'"):
        opened({**DRAWN, "source": source})


def test_nothing_is_left_to_train_on(opened: Open) -> None:
    with pytest.raises(UserError, match=r"all 6 questions of .*train.jsonl are shown"):
        _ = opened({**DRAWN, "choose": "first", "count": 6, "pool": 6}).train


def test_the_teachers_rationales_come_from_another_run(opened: Open, tmp_path: Path) -> None:
    lines = [
        {
            "example_id": f"q{n}", "teacher": "frozen", "rationale": f"{n}. So the answer is Velm.",
            "answer": "Velm", "kept": n != 2, "reason": "right answer",
        }
        for n in (2, 3, 4)
    ]  # fmt: skip
    write(tmp_path / "rationales.jsonl", *lines)
    wanted = {**DRAWN, "rationale": "teacher", "rationales": str(tmp_path / "rationales.jsonl")}
    run = opened({**wanted, "pool": 6})
    assert shown(run) == ["q3", "q4"]
    assert run.templates.cot(run.train[0].example)[-2].content == "4. So the answer is Velm."
    with pytest.raises(UserError, match=r"pool|count is 2, but 1 of the first 4"):
        opened(wanted)
    (tmp_path / "rationales.jsonl").unlink()
    with pytest.raises(UserError, match=r"rationales names .*which is not a file"):
        opened(wanted)


def test_a_run_that_has_begun_shows_what_stands_in_its_directory(
    opened: Open, tmp_path: Path
) -> None:
    begin(opened())
    file = tmp_path / "run" / "demonstrations.jsonl"
    assert [json.loads(one)["id"] for one in file.read_text("utf-8").splitlines()] == ["q0", "q1"]
    # Another first question would be drawn now.
    write(tmp_path / "train.jsonl", question(7), *map(question, range(6)))
    run = opened()
    assert shown(run) == ["q0", "q1"]
    with pytest.raises(UserError, match=r"data\.train has changed since the stage 'distill'"):
        check_contents(run)
    write(tmp_path / "train.jsonl", *map(question, range(6)))
    check_contents(opened())
    text = file.read_text("utf-8")
    file.write_text(text.replace("It, 0, is", "It is"), encoding="utf-8")
    with pytest.raises(UserError, match=r"prompts.demonstrations has changed since the stage"):
        check_contents(opened())
    with pytest.raises(UserError, match=r"another value of prompts.demonstrations.count"):
        run.directory.check_config(opened({**DRAWN, "count": 3}).config)
    with pytest.raises(UserError, match=r"another value of prompts.demonstrations"):
        run.directory.check_config(opened(2).config)


def test_before_the_first_stage_another_draw_replaces_them(opened: Open, tmp_path: Path) -> None:
    run = opened()
    write_demonstrations(run.demonstrations, run.directory)
    again = opened({**DRAWN, "count": 3})
    assert shown(again) == ["q0", "q1", "q2"]
    write_demonstrations(again.demonstrations, again.directory)
    file = tmp_path / "run" / "demonstrations.jsonl"
    assert len(file.read_text("utf-8").splitlines()) == 3
    write_demonstrations(None, run.directory)
    assert not file.exists()


def test_digests_of_prompts_depend_on_the_demonstrations(opened: Open) -> None:
    def text(run: Run) -> str:
        return run.templates.as_text(rationale_only=False)

    first = text(opened())
    assert text(opened()) == first
    assert text(opened({**DRAWN, "choose": "stratified", "seed": 3})) != first
    assert text(opened(2)) == text(opened(1)) != first  # as in runs of earlier versions


def test_the_report_says_how_they_were_drawn(opened: Open) -> None:
    assert _demonstrations(opened()) == (
        "2 first, drawn from data.train (see demonstrations.jsonl)"
    )
    assert _demonstrations(opened(2)) == 2


def test_a_trained_pair_needs_no_data_any_more(opened: Open, tmp_path: Path) -> None:
    run = opened()
    begin(run)
    run_dir = tmp_path / "run"
    (run_dir / "config.yaml").write_text(dump_config(run.config), encoding="utf-8")
    shutil.copytree(resolve_source("random:llama"), run_dir / "distilled")
    for part in ("train", "validation"):
        (tmp_path / f"{part}.jsonl").unlink()
    given = open_pair(run_dir).config.prompts.demonstrations
    assert isinstance(given, GivenDemonstrations)
    assert given == run.demonstrations
    assert open_pair(run_dir, None, ["prompts.demonstrations=1"]).config.prompts.demonstrations == 1
    with pytest.raises(UserError, match="cannot be drawn in another way than the run's"):
        open_pair(run_dir, None, ["prompts.demonstrations.count=1"])
    file = run_dir / "demonstrations.jsonl"
    file.write_text(file.read_text("utf-8").replace("It, 0, is", "It is"), encoding="utf-8")
    with pytest.raises(UserError, match="are not those that the stage 'distill' was shown"):
        open_pair(run_dir)
    open_pair(run_dir, None, ["prompts.demonstrations=1"])
    file.unlink()
    with pytest.raises(UserError, match="the run's demonstrations are missing"):
        open_pair(run_dir)


def test_demonstrations_that_exceed_the_window_are_refused(opened: Open) -> None:
    many = {**DRAWN, "count": 4, "max_tokens": 100_000, "context": {"max_tokens": 5000}}
    run = opened(many)
    assert run.demonstrations is not None
    long = [
        one.model_copy(update={"rationale": "river " * 3000}) for one in run.demonstrations.examples
    ]
    given = run.demonstrations.model_copy(update={"examples": tuple(long)})
    with pytest.raises(UserError, match=r"the prompt without any question has \d+ tokens, which"):
        _ = opened(given.model_dump(mode="json")).train


def test_reward_actors_get_the_drawn_demonstrations_at_their_setup(opened: Open) -> None:
    run = opened()
    actor = RewardActor(run.config)
    actor.setup([], run.demonstrations)
    assert actor._model._templates.demonstrations == run.templates.demonstrations
