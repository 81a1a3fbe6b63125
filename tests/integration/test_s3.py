"""Runs in a bucket of moto's S3, a real server: two machines, each with a disk of its own."""

from __future__ import annotations

import json
import signal
import urllib.request
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import fsspec
import pytest
import torch
from safetensors.torch import load_file

from lmcot import Guide
from lmcot.files import cache_folder
from lmcot.learner.checkpoints import CheckpointStore
from lmcot.run import ownership
from lmcot.run.mirror import working_folder
from lmcot.storage import fetched, is_remote, place, versions_of
from tests.integration.cloud import cloud, needs_cloud, settings
from tests.integration.command import lmcot
from tests.integration.runtime_cases import (
    Killer,
    assert_counted_once,
    command,
    end_after,
    kill,
    metrics,
    run,
    samples,
)
from tests.integration.watching import tensorboard, wait_for

pytestmark = [pytest.mark.e2e, needs_cloud]

SMOKE = Path(__file__).parents[2] / "configs" / "smoke_t5.yaml"
STEPS = 12


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """The URL of an empty one; this process, and what it starts, takes it for AWS's."""
    with cloud() as endpoint, pytest.MonkeyPatch.context() as environment:
        for name, value in settings(endpoint).items():
            environment.setenv(name, value)
        fsspec.filesystem("s3").mkdir("lmcot")
        yield "s3://lmcot"
        fsspec.filesystem("s3").clear_instance_cache()


@pytest.fixture(scope="module", autouse=True)
def cluster(bucket: str) -> Iterator[None]:
    """Its nodes find the bucket by the environment that they are started with."""
    import ray

    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


def test_a_run_goes_on_on_another_machine_as_if_nothing_had_been(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """[29] kill -9 of the driver, whose disk is lost with it."""
    steps = f"refine.steps={STEPS}"
    run(tmp_path / "undisturbed", steps)
    url = place(f"{bucket}/toy")
    assert is_remote(url)
    monkeypatch.setenv("LMCOT_CACHE", str(tmp_path / "first machine"))
    driver = command(url, steps)
    code, left = end_after(driver, working_folder(url), 7, signal.SIGKILL)
    assert code == -9
    assert not left, "its Ray processes end with it"
    found = CheckpointStore(url / "checkpoints").latest()
    assert found is not None
    reached = found[0].step
    assert 4 <= reached < STEPS
    logged = (url / "metrics.jsonl").read_text().splitlines()
    assert len(logged) >= reached, "what was logged before a checkpoint is there with it"

    monkeypatch.setenv("LMCOT_CACHE", str(tmp_path / "second machine"))
    monkeypatch.setattr(ownership, "LEASE_S", 2.0)
    capsys.readouterr()
    run(url, steps)
    told = capsys.readouterr().err
    assert "is presumed dead" in told
    assert f"resuming after step {reached}" in told
    folder = working_folder(url)
    assert_counted_once(folder, STEPS)
    assert metrics(folder) == metrics(tmp_path / "undisturbed")
    assert samples(folder, STEPS) == samples(tmp_path / "undisturbed", STEPS)
    trained = url / "refined"
    mine = load_file(fetched(trained) / "model.safetensors")
    theirs = load_file(tmp_path / "undisturbed" / "refined" / "model.safetensors")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    names = list(versions_of(url))
    assert [name for name in names if name.endswith("COMPLETE")] == [
        f"checkpoints/step-{STEPS:06d}-2/COMPLETE"  # of the run's second owner
    ]
    for step in range(1, STEPS + 1):
        assert f"rollouts/step-{step:06d}.jsonl" in names
    assert not [name for name in names if ".partial" in name or ".lock" in name]


def test_ranks_that_die_take_up_their_checkpoint_from_the_bucket(
    bucket: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two of them, each with its share of the optimiser's state.

    That such a run ends as an undisturbed one is seen in `test_two_nodes`.
    """
    url = place(f"{bucket}/ranks")
    killer = Killer({3: kill("LearnerActor")}, seed=0)
    settings = ("actors.learner.count=2", "learner.zero_stage=1", "refine.steps=8")
    run(url, *settings, on_step=killer.on_step)
    killer.finish()
    said = capsys.readouterr().err
    assert "refine: the learners are back after" in said
    assert "refine: resuming after step" in said
    assert is_remote(url)
    assert_counted_once(working_folder(url), 8)
    shares = [name for name in versions_of(url / "checkpoints") if "optim_states" in name]
    assert len(shares) == 2, shares
    assert not list((cache_folder() / "fetched").glob("step-*")), "copies of checkpoints are gone"


@pytest.fixture(scope="module")
def trained(bucket: str) -> str:
    """All stages with LoRA, on data from the bucket; the run's URL."""
    for split in ("train", "validation"):
        sample = resources.files("lmcot.data") / "samples" / f"hotpotqa-sample-{split}.jsonl.gz"
        fsspec.filesystem("s3").pipe_file(f"lmcot/{split}.jsonl.gz", sample.read_bytes())
    done = lmcot(
        "train", "--config", str(SMOKE), "--run-dir", f"{bucket}/t5",
        *(f"data.{one}={{kind: file, path: '{bucket}/{one}.jsonl.gz'}}"
          for one in ("train", "validation")),
        "policy.lora.rank=2", "evaluate.during.every=1", "evaluate.during.keep_best=true",
        "actors.rollout.count=1", "evaluate.aspect_questions=0",
        "evaluate.rows=[standard, guided_distilled, guided_refined]",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return f"{bucket}/t5"


def test_all_stages_leave_what_they_leave_in_a_folder(trained: str) -> None:
    names = set(versions_of(place(trained)))
    for left in (
        "config.yaml", "rationales.jsonl", "distilled/model.safetensors", "metrics.jsonl",
        "distilled-adapters/adapter_model.safetensors", "refined/model.safetensors", "report.md",
        "best/lmcot-best.json", "best/model.safetensors", "critic/model.safetensors",
        "report.json", "report.png", "rollouts/step-000002.jsonl", "predictions/standard.jsonl",
        "checkpoints/step-000002/COMPLETE", "stages.json",
    ):  # fmt: skip
        assert left in names
    assert not [name for name in names if name.startswith(".candidate")]


def test_a_run_in_a_bucket_is_read_by_all_that_reads_runs(
    trained: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """On a machine that has seen nothing of it."""
    monkeypatch.setenv("LMCOT_CACHE", str(tmp_path / "cache"))
    for arguments, said in (
        (["inspect", trained, "--limit", "1"], "sample 0"),
        (["inspect", trained, "--evaluation"], "guided_refined ->"),
        (["compare", trained, trained], f"- B: {trained}"),
        (["doctor", "--run-dir", trained], f"the run directory {trained} can be written"),
    ):
        assert lmcot(*arguments).returncode == 0
        assert said in capsys.readouterr().out
    again = lmcot("evaluate", "--run-dir", trained)
    assert again.returncode == 0, again.stderr
    assert "all rows are done already" in again.stderr
    answer = Guide(trained, threads=1).answer("Who wrote it?", "The book. Ann wrote it.")
    assert answer.votes


def test_what_is_not_there_is_told_in_one_sentence(bucket: str, trained: str) -> None:
    for arguments, said in (
        (["inspect", f"{bucket}/none"], "holds no rationales"),
        (["inspect", "s3://no-such-bucket/x"], "bucket does not exist"),
        (["compare", trained, f"{bucket}/none"], "report.json is missing"),
        (["evaluate", "--run-dir", f"{bucket}/none"], "is not a run directory"),
        (["serve", "--run-dir", f"{bucket}/none"], "is not a run directory"),
        (["refine", "--config", str(SMOKE), "--run-dir", "s3://no-such-bucket/x"],
         "bucket does not exist"),
        (["refine", "--config", f"{bucket}/none.yaml", "--run-dir", f"{bucket}/new"],
         "there is nothing at"),
        (["sweep", "--config", str(SMOKE), "--space", "none", "--run-dir", f"{bucket}/sweep"],
         "cannot be at a URL"),
    ):  # fmt: skip
        done = lmcot(*arguments)
        assert done.returncode == 2, arguments
        assert said in done.stderr
        assert "Traceback" not in done.stderr


def test_tensorboard_reads_a_run_where_it_is(trained: str, tmp_path: Path) -> None:
    with tensorboard(f"{trained}/tensorboard", tmp_path) as server:

        def tags() -> list[str]:
            address = f"{server}/data/plugin/scalars/tags"
            with urllib.request.urlopen(address, timeout=30) as response:
                return list(json.load(response).get("refine", {}))

        assert "reward/mean" in wait_for("the run's scalars", tags)
