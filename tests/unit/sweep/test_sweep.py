"""The space of a sweep, how trials are drawn and compared, and the table of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from ray import cloudpickle

from lmcot.config import PpoLoss, load_config
from lmcot.errors import UserError
from lmcot.run.directory import RunDirectory
from lmcot.sweep import sweep as stage
from lmcot.sweep.space import SweepSettings, Trial, load_sweep, plan_trials
from lmcot.sweep.table import SweepTable
from lmcot.sweep.trial import bundles, running_means

TOY = Path(__file__).parents[3] / "configs" / "toy.yaml"
RATE = "refine.optimiser.learning_rate"


def settings(folder: Path, **values: Any) -> SweepSettings:
    """As read from a file."""
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return load_sweep(path)


def plan(folder: Path, space: dict[Any, Any], *overrides: str, **values: Any) -> list[Trial]:
    """The trials of the toy over a space."""
    return plan_trials(TOY, list(overrides), settings(folder, space=space, **values))


def log(folder: Path, trial: Trial, *rewards: float | None) -> None:
    """Leaves what a trial's steps would leave."""
    run = folder / "trials" / trial.name
    run.mkdir(parents=True, exist_ok=True)
    lines = [
        {"step": step, "stage": "refine", "time": 0.0, "reward/mean": reward, "kl": step / 10}
        for step, reward in enumerate(rewards, 1)
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"space": {RATE: {"logunifrom": [1, 2]}}}, "it should be one of {choice: [...]}, {uni"),
        ({"space": {RATE: [1, 2]}}, f"'space.{RATE}' is [1, 2]: it should be one of {{choice"),
        ({"space": {RATE: {"choice": []}}}, f"'space.{RATE}.choice' is []: the list should have"),
        ({"space": {RATE: {"uniform": 3}}}, f"'space.{RATE}.uniform' is 3: it should be a list"),
        ({"space": {RATE: {"uniform": [2, 1]}}}, "give two numbers, the lower one first"),
        ({"space": {RATE: {"loguniform": [0, 1]}}}, "loguniform.0' is 0: it should be greater"),
        ({"space": {RATE: {"randint": [1, 2.5]}}}, "randint.1' is 2.5: it should be a valid int"),
        ({"space": {3: {"choice": [1]}}}, "'space.3' is 3: it should be a valid string"),
        ({"spaces": {}}, "unknown key 'spaces': did you mean 'space'?"),
        ({"space": {RATE: {"grid": [1]}}, "asha": {"grace": 1}}, "did you mean 'grace_steps'?"),
        ({"space": {RATE: {"grid": [1]}}, "trials": 2}, "set trials to 1"),
    ],
)
def test_a_wrong_space_is_told_in_a_sentence(
    tmp_path: Path, values: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError) as refused:
        settings(tmp_path, **values)
    assert told in str(refused.value)
    assert str(refused.value).startswith(f"in '{tmp_path / 'space.yaml'}': ")


@pytest.mark.parametrize(
    ("space", "told"),
    [
        ({"refine.clipp": {"grid": [0.1]}}, "gives refine.clipp=0.1, but unknown key 'refine.cl"),
        ({RATE: {"choice": [0.1, 0]}}, f"gives {RATE}=0, but '{RATE}' is 0: it should be greater"),
        ({"refine.steps": {"grid": [5, 6]}}, "varies 'refine.steps', which must be the same in"),
        ({"policy": {"grid": [{"source": "x"}]}}, "varies 'policy.source', which must be"),
        (
            {
                "refine.advantage": {"grid": [{"kind": "gae"}, {"kind": "rloo"}]},
                "refine.samples_per_prompt": {"grid": [4, 1]},
            },
            "refine.advantage={kind: rloo}, refine.samples_per_prompt=1, but refine: advantage.kin",
        ),
    ],
)
def test_a_value_that_no_trial_could_have_names_itself(
    tmp_path: Path, space: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError) as refused:
        plan(tmp_path, space)
    assert told in str(refused.value)


def test_values_that_were_not_drawn_are_checked_too(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="=-1, but"):
        plan(tmp_path, {"refine.clip": {"choice": [0.1] * 50 + [-1]}})


def test_grace_is_within_a_trial(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"grace_steps is 10, but a trial has only 5 steps"):
        plan(tmp_path, {RATE: {"grid": [1]}}, "refine.steps=5")


def test_draws_repeat_and_keep_to_their_bounds(tmp_path: Path) -> None:
    space = {
        RATE: {"loguniform": ["1e-5", "1e-2"]},
        "refine.clip": {"uniform": [0.1, 0.3]},
        "refine.epochs": {"randint": [1, 3]},
        "policy.temperature": {"choice": [0.7, 1.0]},
        "seed": {"grid": [0, 1]},
    }
    trials = plan(tmp_path, space, trials=30)
    assert [trial.values for trial in plan(tmp_path, space, trials=30)] == [
        trial.values for trial in trials
    ]
    fewer = plan(tmp_path, space, trials=10)
    assert [trial.name for trial in fewer] == [trial.name for trial in trials[:20]]
    assert [trial.number for trial in trials] == [*range(1, 61)]
    assert [trial.config.seed for trial in trials] == [0, 1] * 30
    rates = [trial.config.refine.optimiser.learning_rate for trial in trials]
    assert all(1e-5 <= rate <= 1e-2 for rate in rates)
    assert 10 < sum(rate < 3e-4 for rate in rates) < 50
    losses = [trial.config.refine.loss for trial in trials]
    assert all(isinstance(loss, PpoLoss) and 0.1 <= loss.clip <= 0.3 for loss in losses)
    assert {trial.config.refine.epochs for trial in trials} == {1, 2, 3}
    assert {trial.config.policy.temperature for trial in trials} == {0.7, 1.0}


def test_a_trials_name_is_a_folders(tmp_path: Path) -> None:
    space = {RATE: {"grid": [1e-05]}, "refine.advantage": {"grid": [{"kind": "gae", "lam": 0.9}]}}
    (trial,) = plan(tmp_path, space)
    assert trial.name == "0001-advantage=_kind_gae_,_lam_0.9_,learning_rate=1e-05"


def test_a_bundle_for_the_driver_and_each_actor(tmp_path: Path) -> None:
    sweep = settings(tmp_path, space={RATE: {"grid": [1e-3]}}, driver_cpus=0.2)
    overrides = ["actors.rollout={count: 2, cpus: 1, gpus: 0.5, resources: {fast: 1}}"]
    (trial,) = plan_trials(TOY, [*overrides, "actors.reward.cpus=0"], sweep)
    rollout = {"CPU": 1, "GPU": 0.5, "fast": 1}
    assert bundles(trial, sweep) == [{"CPU": 0.2}, rollout, rollout, {"CPU": 0.5}]


def test_the_metric_is_a_mean_over_the_last_steps(tmp_path: Path) -> None:
    sweep = settings(tmp_path, space={RATE: {"grid": [1e-3]}}, average_over=2)
    (trial,) = plan_trials(TOY, [], sweep)
    log(tmp_path, trial, 1.0, 3.0, None, 5.0)
    folder = tmp_path / "trials" / trial.name
    assert running_means(folder, sweep) == [1.0, 2.0, 3.0, 5.0]
    with pytest.raises(UserError, match="'rewards' is not a metric of refine's steps: set "):
        running_means(folder, sweep.model_copy(update={"metric": "rewards"}))


def test_the_table_ranks_and_goes_on(tmp_path: Path) -> None:
    space = {RATE: {"grid": [1e-3, 1e-4, 1e-5, 1e-6]}}
    sweep = settings(tmp_path, space=space, average_over=1)
    trials = plan_trials(TOY, ["refine.steps=10"], sweep)
    table = SweepTable(tmp_path, sweep, trials)
    assert table.numbers("unfinished") == [1, 2, 3, 4]
    log(tmp_path, trials[0], 0.9, 0.8)
    log(tmp_path, trials[1], *[0.1] * 9, 0.7)
    table.record(1, "stopped early", None, 3.0)
    table.record(2, "finished", None, 9.0)
    table.record(4, "failed", "it broke", 1.0)
    again = SweepTable(tmp_path, sweep, trials)
    assert again.rows == table.rows
    assert again.numbers("unfinished") == [3]
    assert again.best() == 2  # what was stopped early was not refined to the end
    lines = again.markdown().splitlines()
    assert lines[0] == (
        f"| trial | `{RATE}` | steps | reward/mean (max, over 1 steps), last | best | KL | status "
        "| seconds |"
    )
    assert lines[2:] == [
        "| 0001 | 0.001 | 2 | 0.8 | 0.9 | 0.2 | stopped early | 3 |",
        "| 0002 | 0.0001 | 10 | 0.7 | 0.7 | 1 | finished | 9 |",
        "| 0003 | 1e-05 | 0 | - | - | - | unfinished | 0 |",
        "| 0004 | 1e-06 | 0 | - | - | - | failed | 1 |",
        "",
        "- trial 0004 failed: it broke",
    ]
    record = json.loads((tmp_path / "sweep.json").read_text())
    assert [row["trial"][:4] for row in record["trials"]] == ["0001", "0002", "0003", "0004"]
    longer = plan_trials(TOY, ["refine.steps=11"], sweep)
    assert SweepTable(tmp_path, sweep, longer).numbers("unfinished") == [2, 3]
    others = settings(tmp_path, space={RATE: {"grid": [1e-3, 2e-4, 1e-5, 1e-6]}})
    with pytest.raises(UserError, match=r"began with other trials \('0002-learning_rate=0.0001' "):
        SweepTable(tmp_path, others, plan_trials(TOY, [], others))


def test_a_resumed_sweep_compares_with_what_was_done(tmp_path: Path) -> None:
    """ASHA is told of the trials before: it stops the next one if that is worse."""
    space = {RATE: {"grid": [1e-3, 1e-4, 1e-5]}}
    sweep = settings(
        tmp_path, space=space, average_over=1, asha={"grace_steps": 2, "reduction_factor": 2}
    )
    trials = plan_trials(TOY, ["refine.steps=10"], sweep)
    for trial in trials[:2]:
        log(tmp_path, trial, *[0.5] * 10)
    table = SweepTable(tmp_path, sweep, trials)
    scheduler = stage._scheduler(sweep, trials, [3], table)
    new = SimpleNamespace(trial_id="new")
    scheduler.on_trial_add(None, new)
    decisions = [
        scheduler.on_trial_result(None, new, {"step": step, "value": value})
        for step, value in ((1, 0.0), (2, 0.6), (3, 0.0), (4, 0.4))
    ]
    assert decisions == ["CONTINUE", "CONTINUE", "CONTINUE", "STOP"]


def test_trials_share_the_distilled_model(tmp_path: Path) -> None:
    values = ["refine.start_from=distilled", "teacher={kind: supporting_facts}"]
    sweep = settings(tmp_path, space={RATE: {"grid": [1e-3]}})
    (trial,) = plan_trials(TOY, values, sweep)
    source = RunDirectory(tmp_path)
    folder = tmp_path / "trials" / trial.name
    with pytest.raises(UserError, match=r"there is no distilled model in .* for the trials to"):
        stage._prepare(folder, trial, source)
    source.policy("distilled").mkdir()
    (source.policy("distilled") / "config.json").write_text("{}")
    source.finish("distill", steps=7)
    for _ in range(2):  # the second time as a resumed sweep does
        stage._prepare(folder, trial, source)
    shared = RunDirectory(folder)
    assert shared.finished("distill") == {"steps": 7}
    assert (shared.policy("distilled") / "config.json").read_text() == "{}"
    assert not Path((folder / "distilled").readlink()).is_absolute()


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("mend it"), "mend it"),
        (SimpleNamespace(cause=UserError("mend it")), "mend it"),
        (SimpleNamespace(cause=ValueError("so\nand so")), "ValueError: so"),
        (RuntimeError(), "RuntimeError: "),
    ],
)
def test_why_a_trial_failed_is_one_line(tmp_path: Path, error: Any, told: str) -> None:
    file = tmp_path / "error.pkl"
    file.write_bytes(cloudpickle.dumps(error))
    assert stage._reason(SimpleNamespace(pickled_error_file=str(file))) == told


def test_the_example_space_is_one_of_the_toy() -> None:
    trials = plan_trials(TOY, [], load_sweep(TOY.parent / "sweeps" / "toy.yaml"))
    assert len(trials) == 4
    assert {t.config.refine.steps for t in trials} == {load_config(TOY).refine.steps}
