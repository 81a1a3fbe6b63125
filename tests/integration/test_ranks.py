"""Two learners do what one does: real processes, real DeepSpeed, models of a few tokens.

Three processes go through `rank_cases` at once: two ranks of one group, and one rank alone. The
tests compare what they found.
"""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from lmcot.errors import UserError
from lmcot.learner.checkpoints import CheckpointStore
from lmcot.models.sources import resolve_source
from tests.integration import rank_cases as cases
from tests.integration.rank_cases import Found, Setting

pytestmark = pytest.mark.e2e

ROOT = Path(__file__).parents[2]
RANKS = {"rank 0": (2, 0), "rank 1": (2, 1), "alone": (1, 0)}
LIMIT_S = 600.0


class Ranks:
    """What each process found, case by case."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._found: dict[str, dict[str, Found]] = {
            name: torch.load(folder / f"found-{world}-{number}.pt", weights_only=True)
            for name, (world, number) in RANKS.items()
        }

    def both(self, case: str, setting: Setting) -> list[Found]:
        """Of two ranks."""
        return [self._found[name][f"{case}: {setting.name}"] for name in ("rank 0", "rank 1")]

    def alone(self, case: str, setting: Setting) -> Found:
        """Of one rank that did the same."""
        return self._found["alone"][f"{case}: {setting.name}"]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, model_cache: Path) -> Ranks:
    """All cases, done."""
    for kind in (cases.LLAMA, cases.T5):
        resolve_source(f"random:{kind}")  # three processes would build it at once
    folder = tmp_path_factory.mktemp("ranks")
    environment = {**os.environ, "LMCOT_CACHE": str(model_cache), "PYTHONWARNINGS": "ignore"}
    logs = {name: folder / f"{name}.log" for name in RANKS}
    processes: dict[str, subprocess.Popen[bytes]] = {}
    deadline = time.monotonic() + LIMIT_S
    try:
        for name, (world, number) in RANKS.items():
            with logs[name].open("wb") as log:
                processes[name] = subprocess.Popen(
                    [sys.executable, "-m", "tests.integration.rank_cases",
                     str(folder), str(world), str(number)],
                    cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT,
                )  # fmt: skip
        # One that fails leaves the other waiting for it.
        while any(process.poll() is None for process in processes.values()):
            if any(process.poll() for process in processes.values()):
                break
            if time.monotonic() > deadline:
                last = [log.read_text(errors="replace")[-300:] for log in logs.values()]
                pytest.fail("the ranks wait for each other, after\n" + "\n".join(last))
            time.sleep(0.1)
    finally:
        failed = [name for name, process in processes.items() if process.poll()]
        for process in processes.values():
            process.kill()
            process.wait()
    for name in failed:
        pytest.fail(f"{name} failed:\n{logs[name].read_text(errors='replace')[-4000:]}")
    return Ranks(folder)


def named(settings: tuple[Setting, ...]) -> Any:
    """Parametrizes by settings."""
    return pytest.mark.parametrize("setting", settings, ids=[one.name for one in settings])


def assert_ranks_agree(both: list[Found]) -> None:
    """To the bit: the ranks would drift apart otherwise."""
    assert _plain(both[0]["metrics"]) == _plain(both[1]["metrics"])
    for name, tensor in both[0].get("parameters", {}).items():
        assert torch.equal(tensor, both[1]["parameters"][name]), name


def assert_like_one_rank(found: Found, alone: Found, dtype: str) -> None:
    """Metrics and parameters, tight in float32 and loose in bfloat16."""
    tight = dtype == "float32"
    relative, absolute = (1e-5, 1e-6) if tight else (2e-2, 2e-3)
    assert len(found["metrics"]) == len(alone["metrics"]) > 0
    for mine, theirs in zip(found["metrics"], alone["metrics"], strict=True):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            expected = pytest.approx(value, rel=relative, abs=absolute, nan_ok=True)
            assert mine[name] == expected, name
    assert found["parameters"].keys() == alone["parameters"].keys()
    for name, tensor in alone["parameters"].items():
        other = found["parameters"][name]
        assert other.dtype == tensor.dtype
        gap = (other.float() - tensor.float()).abs()
        # bfloat16 has steps of 0.004 and more below 1: single numbers may fall on another one.
        assert float(gap.max()) < (1e-6 if tight else 0.01), name
        assert float(gap.mean()) < (1e-6 if tight else 2e-4), name


def _plain(metrics: list[dict[str, float]]) -> list[dict[str, float | None]]:
    """With None for what is not a number, which does not equal itself."""
    return [{k: None if math.isnan(v) else v for k, v in step.items()} for step in metrics]


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest between two numbers."""
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


@named(cases.TRAJECTORIES)
def test_two_ranks_take_the_steps_that_one_takes(ranks: Ranks, setting: Setting) -> None:
    """[31] [22] [18] one trajectory for one rank and two, for every ZeRO stage and offloading.

    All metrics are compared (losses, gradient norms before clipping, KL), whitened advantages
    and adaptive coefficients with them, and the parameters after some updates by Adam.
    """
    both, alone = ranks.both("steps", setting), ranks.alone("steps", setting.reference)
    assert_ranks_agree(both)
    assert_like_one_rank(both[0], alone, setting.dtype)
    assert distance(alone["before"], alone["parameters"]) > 4e-3, "or there is nothing to compare"
    assert all(torch.equal(alone["before"][name], t) for name, t in both[0]["before"].items())
    assert [m.get("optimiser/skipped_updates") for m in both[0]["metrics"]] == [0, 0]
    assert max(m["optimiser/grad_norm"] for m in alone["metrics"]) > 0.02
    if setting.algorithm == "gspo":
        assert max(m["batch/no_backward"] for m in both[0]["metrics"]) > 0
    assert ("written" in alone) == (setting.algorithm == "distill")
    if "written" in alone:
        assert [found["written"] for found in both] == [alone["written"], []]


@named(cases.FEW_SETTINGS)
@pytest.mark.parametrize("number", cases.FEW)
def test_a_rank_without_a_response_takes_part_for_nothing(
    ranks: Ranks, setting: Setting, number: int
) -> None:
    """[22] [31] fewer responses than ranks, and odd numbers: what fills the gap counts for 0."""
    case = f"{number} responses"
    both, alone = ranks.both(case, setting), ranks.alone(case, setting.reference)
    assert_ranks_agree(both)
    assert_like_one_rank(both[0], alone, setting.dtype)
    counted = [found["counted"] for found in both]
    assert len(counted[0]) == len(counted[1]), "or one would wait for the other"
    assert 0 not in alone["counted"]
    assert 0 in counted[0] + counted[1], "there was no gap to fill"
    # In each of two steps every response is scored once, and learnt from once.
    assert sum(map(sum, counted)) == sum(alone["counted"]) == 2 * 2 * number


@named(cases.STOPPED)
def test_all_ranks_stop_at_the_same_update(ranks: Ranks, setting: Setting) -> None:
    """[26] early stop on the approximate KL of all ranks together, as one rank stops."""
    both, alone = ranks.both("early stop", setting), ranks.alone("early stop", setting.reference)
    assert_ranks_agree(both)
    updates = [metrics["optimiser/updates"] for metrics in both[0]["metrics"]]
    assert updates == [metrics["optimiser/updates"] for metrics in alone["metrics"]]
    assert len(set(updates)) >= 4, "the bounds are to stop it at different updates"
    assert [metrics["optimiser/stopped_early"] for metrics in both[0]["metrics"]] == [1, 1, 1, 1, 0]


@named(cases.POISONED)
def test_what_is_not_a_number_on_one_rank_is_skipped_by_both(
    ranks: Ranks, setting: Setting
) -> None:
    """[31] the update is counted and left out; those after it are as if it had not been."""
    both, alone = ranks.both("poisoned", setting), ranks.alone("poisoned", setting.reference)
    lost = sorted(found["finite"].count(False) for found in both)
    assert lost == [0, 1], "one rank alone is to see it"
    assert_ranks_agree(both)
    assert_like_one_rank(both[0], alone, setting.dtype)
    first, second = both[0]["metrics"]
    assert (first["optimiser/updates"], first["optimiser/skipped_updates"]) == (1, 1)
    assert (second["optimiser/updates"], second["optimiser/skipped_updates"]) == (2, 0)
    assert math.isfinite(first["optimiser/grad_norm"])
    assert all(math.isfinite(value) for value in second.values())
    assert all(bool(t.isfinite().all()) for t in both[0]["parameters"].values())


@named(cases.RESUMED)
def test_ranks_resume_to_the_bit(ranks: Ranks, setting: Setting) -> None:
    """[29] [12] [14] saved and restored by new sessions on both, the next step is the same."""
    both, alone = ranks.both("resumed", setting), ranks.alone("resumed", setting.reference)
    for found in both:
        assert found["resumed metrics"] == found["metrics"]
        assert found["resumed parameters"].keys() == found["parameters"].keys()
        for name, tensor in found["parameters"].items():
            assert torch.equal(found["resumed parameters"][name], tensor), name
    assert_ranks_agree(both)
    assert_like_one_rank(both[0], alone, setting.dtype)


@named(cases.PUBLISHED)
def test_weights_are_gathered_whole(ranks: Ranks, setting: Setting) -> None:
    """[28] [27] stage 3 too sends and exports whole parameters, and the ranks go on together."""
    both, alone = ranks.both("published", setting), ranks.alone("published", setting.reference)
    assert_ranks_agree(both)
    assert_like_one_rank(both[0], alone, setting.dtype)
    trained = {
        name.removeprefix("lm."): tensor
        for name, tensor in both[0]["parameters"].items()
        if name.startswith("lm.")
    }
    assert both[1]["sent"] is None
    sent = _unpacked(both[0]["sent"])
    assert list(sent) == list(trained)
    assert all(torch.equal(sent[name], tensor) for name, tensor in trained.items())

    folder = Path(both[0]["folder"])
    if setting.algorithm == "lora":
        written = load_file(folder / "adapter_model.safetensors")
        trained = {name.replace(".default", ""): tensor for name, tensor in trained.items()}
        assert written.keys() == trained.keys()
    else:
        auto: Any = AutoModelForSeq2SeqLM if setting.kind == cases.T5 else AutoModelForCausalLM
        written = dict(auto.from_pretrained(folder).named_parameters())
        assert written.keys() == trained.keys()
    assert all(torch.equal(written[name], tensor) for name, tensor in trained.items())
    if setting.algorithm == "critic model":
        critic = load_file(folder.with_name(f"{setting.name}, critic") / "model.safetensors")
        assert len(critic) > 10
        for name, tensor in critic.items():
            assert torch.equal(tensor, both[0]["parameters"][f"critic.{name}"]), name


def _unpacked(sent: dict[str, Any]) -> dict[str, Tensor]:
    return {
        name: sent["buffer"][offset : offset + nbytes].clone().view(torch.float32).reshape(shape)
        for name, shape, offset, nbytes in sent["entries"]
    }


def test_a_checkpoint_of_other_ranks_is_refused(ranks: Ranks) -> None:
    """[29] DeepSpeed would take up a part of it without a word."""
    told = [*ranks.both("foreign", cases.FOREIGN), ranks.alone("foreign", cases.FOREIGN)]
    for found, (wrote, reads) in zip(told, ((1, 2), (1, 2), (2, 1)), strict=True):
        expected = f"was written with actors.learner.count {wrote}, not {reads}: "
        assert expected in found["said"]
        assert found["said"].endswith("so restore it")
        assert found["untouched"]


@pytest.mark.parametrize("number", [0, 1])
def test_a_truncated_file_of_one_rank_is_told(ranks: Ranks, tmp_path: Path, number: int) -> None:
    """[29] before any learner reads it, with what to do."""
    folder = tmp_path / "checkpoints"
    shutil.copytree(cases.checkpoints_of(ranks.folder, 2, cases.FOREIGN), folder)
    store = CheckpointStore(folder)
    assert store.latest() is not None
    [file] = folder.rglob(f"*_rank_{number}_*optim_states.pt")
    size = file.stat().st_size
    os.truncate(file, size // 2)
    with pytest.raises(UserError) as told:
        store.latest()
    assert f"{file.name} has {size // 2} of its {size} bytes" in str(told.value)
    assert "delete it, and the same command continues from the one before" in str(told.value)
