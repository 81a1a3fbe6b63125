"""Checkpoints of the real engine: a resumed run is the run that was never stopped."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from lmcot.config import Config
from lmcot.errors import UserError
from lmcot.learner.checkpoints import MARKER, CheckpointStore
from lmcot.learner.session import LearnerSession
from lmcot.learner.state_files import reads
from lmcot.records import RunState
from tests.support.learner_cases import (
    LORA,
    Layout,
    make_config,
    moved,
    open_session,
    optimiser_state,
    parameters,
    rollouts,
    same,
)

pytestmark = pytest.mark.usefixtures("one_thread", "model_cache")

LLAMA, T5 = "counting-llama", "counting-t5"


class Case(NamedTuple):
    kind: str
    stage: int
    dtype: str = "float32"
    offload: str = "none"
    lora: bool = False
    critic: str = "head"


CASES = (
    Case(LLAMA, 0),
    Case(T5, 0),
    Case(LLAMA, 1),
    Case(LLAMA, 2),
    Case(T5, 2, critic="model"),
    Case(LLAMA, 3),
    Case(LLAMA, 0, "bfloat16"),
    Case(LLAMA, 2, "bfloat16"),
    Case(LLAMA, 2, offload="optimiser"),
    Case(LLAMA, 3, offload="optimiser_and_parameters"),
    Case(LLAMA, 0, lora=True),
    Case(T5, 2, lora=True),
    Case(LLAMA, 3, lora=True),
)


def _config(case: Case, **changes: Any) -> Config:
    return make_config(
        case.kind,
        {"learning_rate": 1e-2, "warmup_steps": 6, "decay": "linear"},
        Layout(case.stage, 2048 if case.stage == 3 else 40, True),
        minibatches=2,
        scale_rewards=True,
        advantage={"kind": "gae", "critic_warmup_steps": 1, "critic": {"kind": case.critic}},
        kl={"kind": "adaptive", "coefficient": 0.1, "target": 0.01, "horizon": 20},
        policy__dtype=case.dtype,
        policy__lora=LORA if case.lora else None,
        learner__offload=case.offload,
        **changes,
    )


def _state(session: LearnerSession, step: int) -> RunState:
    ppo = session.ppo
    controllers = ppo.kl_controller.state(), ppo.reward_scale.state()
    return RunState("refine", step, kl_controller=controllers[0], reward_statistics=controllers[1])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_resumed_refinement_is_the_same_to_the_bit(tmp_path: Path, case: Case) -> None:
    """[29] [14] [12] N + M steps equal N steps, a checkpoint, a new session, M steps."""
    config, store = _config(case), CheckpointStore(tmp_path)
    straight = open_session(config)
    batches = [rollouts(case.kind, seed=step) for step in range(4)]
    metrics = []
    for step, batch in enumerate(batches):
        metrics.append(straight.ppo.step(batch, step))
        if step == 1:
            state = _state(straight, 2)
            folder = store.begin(state)
            assert isinstance(folder, Path)
            store.finish(state, folder, straight.save_engine(folder))

    resumed = open_session(config)
    before = parameters(resumed)
    torch.manual_seed(999)
    random.seed(999)
    found = store.latest()
    assert found is not None
    state, folder = found
    assert isinstance(folder, Path)
    resumed.restore(folder, state)
    assert resumed.ppo.kl_controller.coefficient == metrics[1]["kl/coefficient"] != 0.1
    again = [resumed.ppo.step(batches[step], step) for step in range(state.step, 4)]
    assert again == metrics[2:]
    assert not moved(parameters(resumed), parameters(straight))
    assert same(optimiser_state(resumed._engine), optimiser_state(straight._engine))
    assert {name.split(".")[0] for name in moved(before, parameters(resumed))} == {"lm", "critic"}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the first case at stage 2, after one step."""
    folder = tmp_path_factory.mktemp("checkpoint")
    session = open_session(_config(Case(LLAMA, 2)))
    session.ppo.step(rollouts(LLAMA), 0)
    session.save_engine(folder)
    return folder


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        (Case(LLAMA, 0), r"written with learner\.zero_stage 2, not 0: .* restore it"),
        (Case(LLAMA, 3), r"written with learner\.zero_stage 2, not 3"),
        (Case(LLAMA, 2, offload="optimiser"), r"learner\.offload 'none', not 'optimiser'"),
        (Case(T5, 2), r"is of another model \(its parameters differ\)"),
        (Case(LLAMA, 2, lora=True), r"another model \(its parameters differ\)"),
        (Case(LLAMA, 2, critic="model"), r"another model \(its parameters differ\)"),
        (Case(LLAMA, 2, "bfloat16"), r"policy\.dtype 'float32', not 'bfloat16'"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_layout_is_refused(
    checkpoint: Path, case: Case, reason: str
) -> None:
    """[29] with the setting that differs by name, before anything is taken up."""
    session = open_session(_config(case))
    before = parameters(session)
    with pytest.raises(UserError, match=reason):
        session.restore(checkpoint, RunState("refine", 1))
    assert not moved(before, parameters(session))


def test_what_does_not_shape_the_state_may_differ(checkpoint: Path) -> None:
    """[29] the cut of the batches is free to change, and so is where the reference lies."""
    config = _config(Case(LLAMA, 2), learner__offload_reference=True)
    learner = config.learner.model_copy(
        update={
            "tokens_per_micro_batch": 24,
            "share_prompts": False,
            "gradient_checkpointing": True,
        }
    )
    session = open_session(config.model_copy(update={"learner": learner}))
    original = open_session(_config(Case(LLAMA, 2)))
    for one in (session, original):
        state = RunState("refine", 1, kl_controller={"coefficient": 0.1})
        one.restore(checkpoint, state)
    metrics = [one.ppo.step(rollouts(LLAMA, seed=1), 1) for one in (session, original)]
    assert metrics[0] == pytest.approx(metrics[1], rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("decay", ["constant", "linear"])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_a_resumed_stage_uses_the_learning_rate_of_its_settings(
    tmp_path: Path, stage: int, decay: str
) -> None:
    """[25] a tenth of the rate from the next step on, in its place in the schedule."""
    base = _config(Case(LLAMA, stage))
    rates = []
    for rate in (None, 0.1):
        optimiser = base.refine.optimiser.model_copy(
            update={
                "decay": decay,
                "learning_rate": base.refine.optimiser.learning_rate * (rate or 1),
            }
        )
        refine = base.refine.model_copy(update={"optimiser": optimiser})
        session = open_session(base.model_copy(update={"refine": refine}))
        if rate is None:
            session.ppo.step(rollouts(LLAMA), 0)
            session.save_engine(tmp_path)
        else:
            session.restore(tmp_path, RunState("refine", 1))
        metrics = session.ppo.step(rollouts(LLAMA, seed=1), 1)
        rates.append(metrics["optimiser/learning_rate"])
    assert rates[1] == pytest.approx(rates[0] * 0.1, rel=1e-12)


def test_a_stage_that_stopped_before_its_first_step_goes_on(tmp_path: Path) -> None:
    """Its checkpoint has no state of the controllers, which have steered nothing yet."""
    config = _config(Case(LLAMA, 0))
    session = open_session(config)
    session.save_engine(tmp_path)
    session.restore(tmp_path, RunState("refine"))
    assert session.ppo.kl_controller.coefficient == config.refine.kl.coefficient


@pytest.mark.parametrize("damage", ["missing", "no json"])
def test_a_checkpoint_without_its_layout_is_damaged(tmp_path: Path, damage: str) -> None:
    session = open_session(_config(Case(LLAMA, 0)))
    session.save_engine(tmp_path)
    layout = tmp_path / "layout.json"
    if damage == "missing":
        layout.unlink()
    else:
        layout.write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"is damaged \(layout\.json: .* the one before"):
        session.restore(tmp_path, RunState("refine"))


class _Payload:
    """What an attacker would put in a checkpoint."""

    def __init__(self, mark: Path) -> None:
        self._mark = mark

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self._mark,)


def _saved(session: LearnerSession, root: Path) -> Path:
    """A whole checkpoint, marker and all."""
    store, state = CheckpointStore(root), RunState("refine")
    folder = store.begin(state)
    assert isinstance(folder, Path)
    store.finish(state, folder, session.save_engine(folder))
    return folder


def _list_again(folder: Path, file: Path) -> None:
    """The marker as whoever put another file there would write it."""
    listed = json.loads((folder / MARKER).read_text(encoding="utf-8"))
    listed[file.relative_to(folder).as_posix()] = {
        "bytes": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }
    (folder / MARKER).write_text(json.dumps(listed), encoding="utf-8")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("stage", [0, 1, 3])
def test_no_code_of_a_checkpoint_is_run(tmp_path: Path, stage: int, zipped: bool) -> None:
    """Whichever of its files holds it, and though the marker fits."""
    session = open_session(_config(Case(LLAMA, stage)))
    folder = _saved(session, tmp_path)
    files = sorted(folder.rglob("*.pt"))
    assert len(files) == (1 if stage == 0 else 2)
    for file in files:
        before = file.read_bytes()
        mark = tmp_path / "ran"
        torch.save(_Payload(mark), file, _use_new_zipfile_serialization=zipped)
        _list_again(folder, file)
        with pytest.raises(UserError, match="could run code; none of it was run") as caught:
            session.restore(folder, RunState("refine"))
        assert file.name in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not mark.exists()
        torch.load(file, weights_only=False)  # elsewhere it would have run
        assert mark.exists()
        mark.unlink()
        file.write_bytes(before)
        _list_again(folder, file)


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_byte_that_has_changed_is_damage(tmp_path: Path, stage: int) -> None:
    """In the middle of the weights or of Adam's moments, where every other number is as good."""
    session = open_session(_config(Case(LLAMA, stage)))
    session.ppo.step(rollouts(LLAMA), 0)
    folder = _saved(session, tmp_path)
    for file in sorted(folder.rglob("*.pt")):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
        with pytest.raises(
            UserError, match=r"is damaged \(the content of .*_states.pt has changed"
        ):
            session.restore(folder, RunState("refine"))
        content[len(content) // 2] ^= 1
        file.write_bytes(content)


def test_a_rank_reads_its_own_share_and_what_all_ranks_read() -> None:
    names = [
        "COMPLETE", "layout.json", "engine/mp_rank_00_model_states.pt",
        "engine/zero_pp_rank_0_mp_rank_00_model_states.pt",
        "engine/bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt",
        "engine/zero_pp_rank_11_mp_rank_00_optim_states.pt",
    ]  # fmt: skip
    assert [reads(name, 1) for name in names] == [True, True, True, False, True, False]
