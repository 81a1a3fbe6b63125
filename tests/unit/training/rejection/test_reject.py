"""The order of rounds: who samples, what is trained, what a later command adds or refuses."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lmcot.config import parse_config
from lmcot.config.rows import find_row
from lmcot.config.stages import POLICIES, most_trained
from lmcot.errors import UserError
from lmcot.records import Annotation, Example, to_json
from lmcot.run.directory import RunDirectory
from lmcot.training import reject as module

BASE = "random:t5"


class Stand:
    """A run whose rounds are written down instead of done."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.rounds: list[tuple[int, str, str, int]] = []
        """Of each round its number, the sources that sample and that are trained, and the number of
        rationales."""
        self._sampler = ""
        monkeypatch.setattr(module, "gather", self._gather)
        monkeypatch.setattr(module, "train_on", self._train_on)
        monkeypatch.setattr(module, "check_plan", lambda *about: None)
        monkeypatch.setattr(module, "training_pairs", lambda run, stage, texts, task: list(texts))
        monkeypatch.setattr(module, "sampled_pairs", lambda run, sampled, task: list(sampled))
        notes = [Annotation("q", "t", "It is so.", "a", True, "?"),
                 Annotation("r", "t", "Not so.", "a", False, "?")]  # fmt: skip
        lines = "".join(json.dumps(to_json(one)) + "\n" for one in notes)
        (folder / "rationales.jsonl").write_text(lines)
        (folder / "distilled").mkdir()
        with RunDirectory(folder) as directory:
            directory.finish("distill", steps=1)

    def reject(self, refine_from: str = "rejection", **settings: Any) -> None:
        config = parse_config({
            "data": {"train": {"kind": "sample", "split": "train"},
                     "validation": {"kind": "sample", "split": "validation"}},
            "policy": {"source": BASE}, "frozen": {"backend": "transformers", "source": BASE},
            "teacher": {"kind": "supporting_facts"}, "reject": settings,
            "refine": {"start_from": refine_from},
        })  # fmt: skip
        train = [SimpleNamespace(example=Example("q", "?", "a", ()))]
        with RunDirectory(self.folder) as directory:
            run: Any = SimpleNamespace(
                config=config, directory=directory, train=train, functions={}
            )
            module.reject(run)

    def _gather(self, run: Any, settings: Any, number: int, source: str, learnt: Any) -> Any:
        assert list(learnt) == (["It is so."] if settings.teacher_rationales else [])
        self._sampler = source
        return [{"example_id": "q", "text": "x", "response_ids": [1]}]

    def _train_on(self, run: Any, stage: Any, settings: Any, source: str, pairs: Any) -> None:
        self.rounds.append((stage.round, self._sampler, source, len(pairs)))
        folder = run.directory.policy(stage.policy)
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(stage.round))
        run.directory.finish(stage.training, steps=3, rationales=len(pairs))

    @property
    def policy(self) -> int:
        """The round whose policy is the stage's."""
        return int((self.folder / "rejection" / "config.json").read_text())


@pytest.fixture
def stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stand:
    return Stand(tmp_path, monkeypatch)


def test_each_round_samples_with_the_policy_before_and_trains_the_base(stand: Stand) -> None:
    stand.reject(rounds=2)
    first, second = str(stand.folder / "distilled"), str(stand.folder / "checkpoints" / "reject-1")
    assert stand.rounds == [(1, first, BASE, 2), (2, second, BASE, 2)]
    assert stand.policy == 2
    assert most_trained(stand.folder) == "rejection"
    stand.reject(rounds=2)
    assert len(stand.rounds) == 2


def test_what_is_trained_and_what_is_learnt_are_settings(stand: Stand) -> None:
    stand.reject(rounds=2, train_from="round", teacher_rationales=False, start_from="base")
    second = str(stand.folder / "checkpoints" / "reject-1")
    assert stand.rounds == [(1, BASE, BASE, 1), (2, second, second, 1)]


def test_further_rounds_continue_a_finished_stage(stand: Stand) -> None:
    stand.reject(rounds=1)
    stand.reject(rounds=3)
    assert [one[0] for one in stand.rounds] == [1, 2, 3]
    assert stand.policy == 3
    stand.reject(rounds=2)  # done already
    assert stand.policy == 3


def test_further_rounds_are_refused_once_ppo_has_begun_with_the_policy(stand: Stand) -> None:
    stand.reject(rounds=1)
    with RunDirectory(stand.folder) as directory:
        directory.finish("refine", steps=1)
    with pytest.raises(UserError, match=r"'refine' has begun with the policy 'rejection'"):
        stand.reject(rounds=2)
    assert stand.policy == 1
    stand.reject("distilled", rounds=2)
    assert stand.policy == 2


def test_a_run_without_what_the_stage_needs_is_refused(stand: Stand) -> None:
    (stand.folder / "stages.json").unlink()
    with pytest.raises(UserError, match=r"there is no distilled model in .* run 'lmcot distill'"):
        stand.reject()
    (stand.folder / "rationales.jsonl").unlink()
    with pytest.raises(UserError, match=r"reject.teacher_rationales is true, but there are none"):
        stand.reject(start_from="base")
    assert not stand.rounds


def test_its_policy_is_served_and_has_rows_against_the_distilled_one() -> None:
    assert POLICIES[:3] == ("refined", "rejection", "distilled")
    guided = ("standard", "cot", "guided_distilled", "guided_base")
    assert find_row("guided_rejection").against == guided
    assert find_row("guided_refined").against[:4] == (*guided[:2], "guided_rejection", guided[2])
    assert "rationale_only_distilled" in find_row("rationale_only_rejection").against
