"""Supervised training with validation, early stopping and resumes, on models of a few tokens."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lmcot.config import parse_config, training_stage
from lmcot.errors import UserError
from lmcot.models.sources import load_model
from lmcot.monitor.catalogue import VARYING
from lmcot.monitor.metrics import Monitor, read_metrics
from lmcot.records import Example
from lmcot.run.context import Run
from lmcot.run.directory import RunDirectory
from lmcot.run.interruption import Interruption
from lmcot.training.pairs import TrainingPair, batch_sizes, keep_out
from lmcot.training.supervised import train_on
from tests.support.learners_in_process import Killed, learn_in_process

pytestmark = pytest.mark.usefixtures("one_thread", "model_cache")

STAGE = training_stage("distill")
LORA = {"rank": 2, "alpha": 4}
LLAMA, T5 = "random:counting-llama", "random:counting-t5"
KINDS = pytest.mark.parametrize(
    ("source", "lora"), [(LLAMA, None), (T5, None), (LLAMA, LORA)], ids=["llama", "t5", "lora"]
)


def pairs(count: int = 12) -> list[TrainingPair]:
    """Questions with rationales of several lengths; by heart is the only way to learn them."""
    generator = random.Random(7)
    found = []
    for number in range(count):
        prompt = [generator.randrange(3, 13) for _ in range(generator.randint(2, 9))]
        response = [*(generator.randrange(3, 13) for _ in range(generator.randint(2, 5))), 1]
        example = Example(f"q{number}", f"Question {number}?", "a", ())
        found.append(TrainingPair(example, f"rationale {number}", (prompt, response)))
    return found


def opened(folder: Path, distill: dict[str, Any], **policy: Any) -> Run:
    source = policy.pop("source", "random:counting-llama")
    config = parse_config(
        {
            "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
            "policy": {"source": source, "dtype": "float32", **policy},
            "rewards": {"kind": "increasing"},
            "refine": {"start_from": "base"},
            "distill": {"batch_size": 3, "epochs": 4, "optimiser": {"learning_rate": 0.02}}
            | distill,
            "learner": {"zero_stage": 0, "tokens_per_micro_batch": 32},
            "checkpoints": {"every": 4},
            "monitor": {"ray_metrics": False},
        }
    )
    folder.mkdir(exist_ok=True)
    return Run(config, RunDirectory(folder), Monitor(folder, config.monitor), Interruption())


def train(folder: Path, distill: dict[str, Any], **policy: Any) -> Run:
    run = opened(folder, distill, **policy)
    with run.monitor:
        train_on(run, STAGE, run.config.distill, run.config.policy.source, pairs())
    return run


def logged(folder: Path) -> list[dict[str, Any]]:
    left_out = ("time", *VARYING)
    return [
        {name: value for name, value in line.items() if not name.startswith(left_out)}
        for line in read_metrics(folder / "metrics.jsonl")
    ]


def validations(folder: Path) -> dict[int, float]:
    lines = logged(folder)
    return {one["step"]: one["loss/validation"] for one in lines if "loss/validation" in one}


def facts(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "stages.json").read_text())["distill"]
    return found


def loss_of(model: Path | str, kept_out: list[TrainingPair]) -> float:
    """The loss by a plain loop over single pairs of a model that transformers loads."""
    lm, _ = load_model(str(model), "float32")
    total, tokens = 0.0, 0
    for prompt, response in (one.tokens for one in kept_out):
        if lm.config.is_encoder_decoder:
            start = [lm.config.decoder_start_token_id]
            decoder = torch.tensor([[*start, *response[:-1]]])
            logits = lm(input_ids=torch.tensor([prompt]), decoder_input_ids=decoder).logits[0]
        else:
            logits = lm(input_ids=torch.tensor([[*prompt, *response]])).logits[0]
            logits = logits[len(prompt) - 1 : -1]
        chosen = torch.log_softmax(logits, -1).gather(1, torch.tensor(response)[:, None])
        total, tokens = total - chosen.sum().item(), tokens + len(response)
    return total / tokens


@KINDS
def test_the_policy_of_the_lowest_validation_loss_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, lora: dict[str, Any] | None
) -> None:
    """Later policies know what they were taught by heart, and are worse."""
    learn_in_process(monkeypatch)
    validation = {"questions": 3, "every": 2}
    rate = {"learning_rate": 0.02 if lora else 0.05}
    run = train(tmp_path, {"validation": validation, "optimiser": rate}, source=source, lora=lora)
    losses = validations(tmp_path)
    assert list(losses) == [2, 4, 6, 8, 10, 12]
    best = min(losses, key=lambda step: losses[step])
    assert best < 12, "the case shows nothing"
    learnt, kept_out = keep_out(pairs(), run.config.distill.validation, "distill", 0)
    assert not {one.example.id for one in learnt} & {one.example.id for one in kept_out}
    assert loss_of(tmp_path / "distilled", kept_out) == pytest.approx(losses[best], rel=1e-4)
    assert facts(tmp_path)["rationales"] == 9
    assert facts(tmp_path)["validation"]["best_step"] == best
    assert (tmp_path / "distilled-adapters").is_dir() == bool(lora)
    if lora:
        card = (tmp_path / "distilled-adapters" / "README.md").read_text(encoding="utf-8")
        assert "library_name: peft" in card
        assert "More Information Needed" not in card, "peft's own card is an empty form"
    assert not list(tmp_path.glob("checkpoints/*best*")), "it is in distilled/ now"
    assert (tmp_path / "distill.png").stat().st_size > 1000


def test_validation_does_not_change_what_is_learnt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However often it is done; and without it the last policy is kept, as ever."""
    learn_in_process(monkeypatch)
    often, seldom = tmp_path / "often", tmp_path / "seldom"
    train(often, {"validation": {"share": 0.25, "every": 1}})
    train(seldom, {"validation": {"share": 0.25, "every": 100}})
    assert len(validations(often)) == 12
    assert list(validations(seldom)) == [12], "the last policy is always validated"
    assert validations(seldom)[12] == validations(often)[12]
    steps = [[one for one in logged(run) if "loss" in one] for run in (often, seldom)]
    assert steps[0] == steps[1]


def test_training_stops_once_the_loss_has_not_fallen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = learn_in_process(monkeypatch)
    validation = {"questions": 3, "every": 1, "patience": 2}
    settings = {"validation": validation, "optimiser": {"learning_rate": 0.05}, "epochs": 20}
    train(tmp_path, settings)
    losses = list(validations(tmp_path).values())
    assert facts(tmp_path)["steps"] == len(losses) == calls.count("distill_step") < 60
    best = losses.index(min(losses))
    assert len(losses) == best + 3
    since_best = [n - losses.index(min(losses[: n + 1])) for n in range(len(losses))]
    assert max(since_best[:-1]) < 2, "it stopped at the first chance"
    said = capsys.readouterr().err
    assert f"stopped after step {len(losses)} of 60: the validation loss has not fallen" in said
    assert f"kept the policy of step {best + 1}, whose validation loss is the lowest" in said


@pytest.mark.parametrize(
    ("source", "lora", "killed_at"),
    [
        (LLAMA, None, ("distill_step", 7)),
        (LLAMA, None, ("validate", 2)),
        (LLAMA, None, ("validate", 4)),
        (LLAMA, None, ("export", 2)),
        (LLAMA, None, ("save_engine", 2)),
        (T5, None, ("validate", 3)),
        (LLAMA, LORA, ("validate", 3)),
    ],
    ids=str,
)
def test_a_killed_training_resumes_to_the_same_bytes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    source: str,
    lora: dict[str, Any] | None,
    killed_at: tuple[str, int],
) -> None:
    """[29] weights, metrics, and which policy is the best, wherever it was killed."""
    settings = {
        "validation": {"questions": 3, "every": 2, "patience": 3},
        "optimiser": {"learning_rate": 0.005, "warmup_steps": 2, "decay": "cosine"},
        "batch_size": None,
        "batch_tokens": 30,
    }
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    learn_in_process(monkeypatch)
    train(straight, settings, source=source, lora=lora)
    learn_in_process(monkeypatch, killed_at)
    with pytest.raises(Killed):
        train(killed, settings, source=source, lora=lora)
    learn_in_process(monkeypatch)
    train(killed, settings, source=source, lora=lora)
    assert logged(killed) == logged(straight)
    assert facts(killed) == facts(straight)
    mine = (killed / "distilled" / "model.safetensors").read_bytes()
    assert mine == (straight / "distilled" / "model.safetensors").read_bytes()


def test_an_error_between_step_and_validation_leaves_the_validation_to_the_resume(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint that such an error leaves is of a step that was not validated."""
    settings = {"validation": {"questions": 3, "every": 2}}
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    learn_in_process(monkeypatch)
    train(straight, settings)
    with monkeypatch.context() as patched:

        def full(*_: Any) -> dict[str, float]:
            raise UserError("the disk is full")

        patched.setattr("lmcot.training.learners.Learners.validate", full)
        with pytest.raises(UserError, match="the disk is full"):
            train(stopped, settings)
    assert (stopped / "checkpoints" / "distill-step-000002").is_dir()
    train(stopped, settings)
    assert logged(stopped) == logged(straight)


def test_the_small_lms_rationales_stand_beside_the_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a file for each validation, and in TensorBoard; a resume drops those that come again."""
    settings = {"validation": {"questions": 3, "every": 2, "samples": 2}, "epochs": 2}
    learn_in_process(monkeypatch, ("distill_step", 6))
    with pytest.raises(Killed):
        train(tmp_path, settings)
    names = ["distill-step-000002.md", "distill-step-000004.md"]
    assert sorted(file.name for file in (tmp_path / "samples").iterdir()) == names
    (tmp_path / "samples" / "distill-step-000005.md").write_text("of a run that was killed")
    (tmp_path / "samples" / "notes.md").write_text("somebody's own")
    calls = learn_in_process(monkeypatch)
    run = train(tmp_path, settings)
    assert calls.count("write_greedily") == 1
    found = sorted(file.name for file in (tmp_path / "samples").iterdir())
    assert found == [*names, "distill-step-000006.md", "notes.md"]
    text = (tmp_path / "samples" / "distill-step-000006.md").read_text(encoding="utf-8")
    assert text.startswith(f"# distill, step 6: validation loss {validations(tmp_path)[6]:.4f}\n")
    _, kept_out = keep_out(pairs(), run.config.distill.validation, "distill", 0)
    for one in kept_out[:2]:
        assert f"#### Question {one.example.id}: {one.example.question}" in text
        assert f"> {one.rationale}" in text
    assert kept_out[2].rationale not in text
    lm, tokenizer = load_model(str(tmp_path / "distilled"), "float32")
    events = b"".join(file.read_bytes() for file in tmp_path.rglob("distill/events.out.*"))
    assert events.count(b"#### Question q") == 6
    if facts(tmp_path)["validation"]["best_step"] == 6:
        prompt = torch.tensor([kept_out[0].tokens[0]])
        ids = lm.generate(input_ids=prompt, max_new_tokens=128, do_sample=False)[0]
        written = tokenizer.decode(ids[prompt.shape[1] :], skip_special_tokens=True).strip()
        assert f"> {written}" in text


def test_answers_count_in_the_validation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best policy is that of the lowest loss of both tasks."""
    learn_in_process(monkeypatch)
    settings = {
        "validation": {"questions": 3, "every": 2},
        "answer_task": {"weight": 5.0},
        "optimiser": {"learning_rate": 0.05},
    }
    run = opened(tmp_path, settings)
    both = [replace(one, answer=(one.tokens[0][:2], (4, 1))) for one in pairs()]
    assert both[0].length == pairs()[0].length + 4
    with run.monitor:
        train_on(run, STAGE, run.config.distill, run.config.policy.source, both)
    lines = [one for one in logged(tmp_path) if "loss/validation" in one]
    totals = {
        one["step"]: one["loss/validation"] + 5 * one["loss/validation_answer"] for one in lines
    }
    best = min(totals, key=lambda step: totals[step])
    found = facts(tmp_path)["validation"]
    assert (found["best_step"], found["best_loss"]) == (best, pytest.approx(totals[best]))
    assert all("loss/answer" in one for one in logged(tmp_path) if "loss" in one)


def test_the_best_policy_that_is_gone_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"validation": {"questions": 3, "every": 2}}
    learn_in_process(monkeypatch, ("distill_step", 6))
    with pytest.raises(Killed):
        train(tmp_path, settings)
    (tmp_path / "checkpoints" / "distill-best-000004").rename(tmp_path / "elsewhere")
    learn_in_process(monkeypatch)
    with pytest.raises(UserError, match=r"best policy of 'distill' so far is gone from .*000004"):
        train(tmp_path, settings)


def test_no_finite_validation_loss_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    learn_in_process(monkeypatch)
    nan = lambda *_: {"loss": float("nan")}  # noqa: E731
    monkeypatch.setattr("lmcot.training.learners.Learners.validate", nan)
    with pytest.raises(UserError, match="the validation loss was never finite"):
        train(tmp_path, {"validation": {"questions": 3, "every": 2}})
    assert not (tmp_path / "distilled").exists()


def test_what_is_kept_out_depends_on_the_questions_alone() -> None:
    settings = parse_validation(questions=4)
    all_pairs = pairs(20)
    learnt, kept_out = keep_out(all_pairs, settings, "distill", 3)
    assert (len(learnt), len(kept_out)) == (16, 4)
    shuffled = random.Random(0).sample(all_pairs, 20)
    assert set(ids(keep_out(shuffled, settings, "distill", 3)[1])) == set(ids(kept_out))
    assert set(ids(keep_out(all_pairs, settings, "distill", 4)[1])) != set(ids(kept_out))
    fewer = [one for one in all_pairs if one in kept_out or one in learnt[:5]]
    assert set(ids(keep_out(fewer, settings, "distill", 3)[1])) == set(ids(kept_out))


def test_a_question_that_is_there_twice_is_on_one_side() -> None:
    twice = [*pairs(6), *pairs(6)]
    learnt, kept_out = keep_out(twice, parse_validation(share=0.5), "distill", 0)
    assert len(learnt) == len(kept_out) == 6
    assert not set(ids(learnt)) & set(ids(kept_out))


@pytest.mark.parametrize(
    ("validation", "words"),
    [
        ({"share": 0.01}, "share is 0.01, but 12 questions have a .* validated on: raise it"),
        ({"share": 0.99}, "share is 0.99, but 12 questions have a .* learnt from: lower it"),
        ({"questions": 12}, "questions is 12, but 12 questions have a .* learnt from: lower it"),
    ],
)
def test_a_validation_that_leaves_nothing_is_refused(
    validation: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=r"distill\.validation\." + words):
        keep_out(pairs(), parse_validation(**validation), "distill", 0)


@pytest.mark.parametrize(
    ("distill", "words"),
    [
        ({"validation": {"patience": 3}}, "'share' of the questions .*neither is set"),
        ({"validation": {"share": 0.1, "questions": 3}}, "'share' of the questions .*both are set"),
        ({"batch_size": 4, "batch_tokens": 100}, "'batch_tokens'.*both are set"),
        ({"batch_size": None}, "'batch_tokens'.*neither is set"),
        ({"validation": {"share": 0.0}}, "distill.validation.share"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(
    tmp_path: Path, distill: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        opened(tmp_path, distill)


def test_steps_by_tokens_are_full_and_deterministic(tmp_path: Path) -> None:
    run = opened(tmp_path, {"batch_size": None, "batch_tokens": 30, "epochs": 3})
    all_pairs, settings = pairs(), run.config.distill
    sizes = batch_sizes(all_pairs, settings, "distill", 5)
    assert sum(sizes) == 3 * 12
    assert sizes == batch_sizes(all_pairs, settings, "distill", 5)
    from lmcot.data.sampler import PromptSampler

    sampler = PromptSampler(12, 5)
    tokens = [[all_pairs[row].length for row in sampler.next(size)] for size in sizes]
    assert all(sum(step) <= 30 for step in tokens)
    following = [step[0] for step in tokens[1:]]
    assert all(sum(step) + first > 30 for step, first in zip(tokens, following, strict=False)), (
        "another one would have had room"
    )
    one_step = opened(tmp_path, {"batch_size": None, "batch_tokens": 10_000}).config.distill
    assert batch_sizes(all_pairs, one_step, "distill", 5) == [48]
    assert batch_sizes(all_pairs, opened(tmp_path, {"batch_size": 9}).config.distill, "", 5) == [
        9, 9, 9, 9, 9, 3,
    ]  # fmt: skip


def test_a_budget_below_one_rationale_is_refused(tmp_path: Path) -> None:
    longest = max(pairs(), key=lambda one: one.length)
    run = opened(tmp_path, {"batch_size": None, "batch_tokens": longest.length - 1})
    words = rf"distill\.batch_tokens is .* for question {longest.example.id} has {longest.length} "
    with pytest.raises(UserError, match=words):
        batch_sizes(pairs(), run.config.distill, "distill", 0)


def parse_validation(**values: Any) -> Any:
    from lmcot.config import ValidationSettings

    return ValidationSettings.model_validate(values)


def ids(some: list[TrainingPair]) -> list[str]:
    return [one.example.id for one in some]
