"""Refinement against a real HTTP endpoint: at fault half of the time, and with a budget."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lmcot.monitor.catalogue import VARYING
from lmcot.monitor.metrics import read_metrics
from tests.integration.command import Done, lmcot
from tests.support.endpoint import FAULTS, Answer, Call, Endpoint, at_fault, completion, running

pytestmark = [pytest.mark.e2e, pytest.mark.usefixtures("cluster", "one_thread")]

STEPS, ROLLOUTS = 2, 6
SETTINGS = f"""
data:
  train: {{kind: sample, split: train}}
  validation: {{kind: sample, split: validation}}
  max_train: 8
  max_validation: 2
  context: {{distractors: 0, max_tokens: 300}}
prompts: {{demonstrations: 1}}
policy: {{source: "random:llama", dtype: float32, max_new_tokens: 24}}
frozen: {{backend: openai, model: m, read_timeout_s: 1, concurrency: 16}}
rewards:
  kind: guidance
  aspects:
    factuality: {{source: judge, weight: 1.0}}
    consistency: {{source: judge, weight: 0.5}}
    logicality: {{source: off}}
refine:
  start_from: base
  steps: {STEPS}
  prompts_per_step: {ROLLOUTS // 2}
  samples_per_prompt: 2
  optimiser: {{learning_rate: 1.0e-4}}
learner: {{zero_stage: 0, tokens_per_micro_batch: 4096}}
actors:
  prompts_per_unit: 1
  rollout: {{count: 1, cpus: 0.25, threads: 1}}
  reward: {{count: 2, cpus: 0.25}}
  frozen: {{count: 1, cpus: 0.25, threads: 1}}
  learner: {{cpus: 0.25, threads: 1}}
checkpoints: {{every: 1}}
"""
# With the machine's other work, timings and traffic are all that may differ.
PASSING = ("time", *VARYING, "frozen/")


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with running() as server:
        server.respond = _sound
        yield server


def _sound(call: Call) -> Answer:
    """The same of the same text, and of each text something else."""
    draw = random.Random(call.text)
    alternatives = {"Yes": -draw.uniform(0.1, 5.0), "No": -draw.uniform(0.1, 5.0)}
    return completion(call, f"answer {draw.random()}", alternatives)


def _faulty(call: Call) -> Answer:
    """Half of all requests get one of the faults, told by what is asked and how often it was."""
    digest = hashlib.sha256(f"{json.dumps(call.body)} {call.attempt}".encode()).digest()
    fault = FAULTS[digest[1] % len(FAULTS)]
    return at_fault(fault, call, _sound(call)) if digest[0] % 2 else _sound(call)


def _sometimes(call: Call) -> Answer:
    """A fault for about a fifth of all requests: half of the rationales lose one of their three."""
    digest = hashlib.sha256(f"{json.dumps(call.body)} sometimes".encode()).digest()
    fault = FAULTS[digest[1] % len(FAULTS)]
    return at_fault(fault, call, _sound(call)) if digest[0] % 5 == 0 else _sound(call)


def _refine(run_dir: Path, endpoint: Endpoint, *overrides: str) -> Done:
    config = run_dir.parent / "config.yaml"
    config.write_text(SETTINGS, encoding="utf-8")
    return lmcot(
        "refine", "--config", str(config),
        "--run-dir", str(run_dir), f"frozen.base_url={endpoint.url}",
        f"frozen.cache.folder={run_dir.parent / 'cache'}", *overrides,
    )  # fmt: skip


def _metrics(run_dir: Path) -> list[dict[str, Any]]:
    return [
        {name: value for name, value in line.items() if not name.startswith(PASSING)}
        for line in read_metrics(run_dir / "metrics.jsonl")
    ]


def _rollouts(run_dir: Path, step: int) -> list[dict[str, Any]]:
    path = run_dir / "rollouts" / f"step-{step:06d}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def sound(cluster: None, endpoint: Endpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with an endpoint that is never at fault."""
    endpoint.respond = _sound
    run_dir = tmp_path_factory.mktemp("sound") / "run"
    done = _refine(run_dir, endpoint)
    assert done.returncode == 0, done.stderr
    assert len({r["reward"] for r in _rollouts(run_dir, 1)}) == ROLLOUTS
    return run_dir


def test_faults_that_pass_change_nothing(endpoint: Endpoint, sound: Path, tmp_path: Path) -> None:
    """Every rationale is judged in the end, so all rewards and all that follows are the same."""
    endpoint.reset()
    endpoint.respond = _faulty
    done = _refine(tmp_path / "run", endpoint, "frozen.max_retries=14")
    assert done.returncode == 0, done.stderr
    assert any(call.attempt > 1 for call in endpoint.calls)
    assert _metrics(tmp_path / "run") == _metrics(sound)
    for step in range(1, STEPS + 1):
        assert _rollouts(tmp_path / "run", step) == _rollouts(sound, step)


def test_what_is_lost_is_dropped_and_the_rest_has_its_own_rewards(
    endpoint: Endpoint, sound: Path, tmp_path: Path
) -> None:
    """[16] Rationales without a judgement are dropped; the others keep their own rewards."""
    endpoint.reset()
    endpoint.respond = _sometimes
    budgets = "failures={max_infrastructure_share: 1, max_data_share: 1}"
    done = _refine(tmp_path / "run", endpoint, "frozen.max_retries=0", budgets, "refine.steps=1")
    found = {True: 0, False: 0}
    right = _rollouts(sound, 1)
    assert done.returncode == 0, done.stderr
    for one, wanted in zip(_rollouts(tmp_path / "run", 1), right, strict=True):
        judged = one["judgement"]["failure"] is None
        found[judged] += 1
        assert one["reward"] == (wanted["reward"] if judged else None)
    assert min(found.values()) > 0
    assert _metrics(tmp_path / "run")[0]["batch/judged_share"] == found[True] / ROLLOUTS


def test_a_budget_for_failures_stops_the_run_and_it_goes_on_later(
    endpoint: Endpoint, sound: Path, tmp_path: Path
) -> None:
    endpoint.reset()
    endpoint.respond = lambda call: at_fault("500", call, _sound(call))
    # The first request, before anything starts, finds it out.
    refused = _refine(tmp_path / "run", endpoint, "frozen.max_retries=0")
    assert refused.returncode == 2
    assert "does not answer a first request" in refused.stderr

    asked = 0

    def breaks_down(call: Call) -> Answer:
        nonlocal asked
        asked += 1
        return _sound(call) if asked < 25 else at_fault("500", call, _sound(call))

    endpoint.respond = breaks_down
    stopped = _refine(tmp_path / "run", endpoint, "frozen.max_retries=0")
    assert stopped.returncode == 2, stopped.stderr
    assert "failures.max_infrastructure_share (0.5) allows; the first: " in stopped.stderr
    steps_done = len(_metrics(tmp_path / "run"))
    assert 0 < steps_done < STEPS

    endpoint.respond = _sound
    done = _refine(tmp_path / "run", endpoint, "frozen.max_retries=0")
    assert done.returncode == 0, done.stderr
    assert f"resuming after step {steps_done}" in done.stderr
    assert _metrics(tmp_path / "run") == _metrics(sound)


def test_a_spent_budget_stops_the_run_and_more_of_it_goes_on(
    endpoint: Endpoint, sound: Path, tmp_path: Path
) -> None:
    endpoint.reset()
    endpoint.respond = _sound
    run_dir = tmp_path / "run"
    stopped = _refine(run_dir, endpoint, "frozen.budget.max_requests=20")
    assert stopped.returncode == 2, stopped.stderr
    assert "frozen.budget.max_requests is 20" in stopped.stderr
    # A unit is two rationales, of an answer and two judgements each; two actors are at work.
    spent = json.loads((run_dir / "spending.json").read_text(encoding="utf-8"))
    assert spent.keys() == {"check", "refine"}
    assert 20 < sum(one["sent"] for one in spent.values()) <= 26
    again = _refine(run_dir, endpoint, "frozen.budget.max_requests=20")
    assert again.returncode == 2
    done = _refine(run_dir, endpoint, "frozen.budget.max_requests=1000")
    assert done.returncode == 0, done.stderr
    assert _metrics(run_dir) == _metrics(sound)
    cached = [m["frozen/cache_hit_rate"] for m in read_metrics(run_dir / "metrics.jsonl")]
    assert max(cached) > 0  # what the interrupted step had asked was not asked again
