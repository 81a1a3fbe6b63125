"""A stage of its own, on answers alone, as docs/extending.md adds it to a copy of the product."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.worked import extended_product

TITLE = "A stage of its own"
ROOT = Path(__file__).parents[3]
CONFIG = ROOT / "configs" / "toy.yaml"
ROUND = """
import json
import sys
from pathlib import Path

import pytest

from lmcot.config import load_config
from lmcot.config.stages import most_trained
from lmcot.errors import Interrupted, UserError
from lmcot.run.context import open_run
from lmcot.run_files import holds_model
from lmcot.tools.plan import stage_plans
from lmcot.training import learners
from lmcot.training.direct import direct
from lmcot.training.reject import reject
from tests.support.forked_workers import forked_workers

config_file, folder = sys.argv[1], Path(sys.argv[2])
changes = [
    "data.train={kind: counting, examples: 12}",
    "direct={questions: 8, batch_size: 2, epochs: 2}",
    "checkpoints.every=1",
    "actors.rollout.count=1",
    "policy.max_new_tokens=24",
    "reject={start_from: base, teacher_rationales: false, samples: 4, keep: 2, rounds: 2, "
    "batch_size: 4, filters: {min_words: 0, repeats_question: false, prompt_words: 0, "
    "near_duplicates: null}}",
]
config = load_config(config_file, changes)
step, taken = learners.Learners.distill_step, []


def interrupted_once(self, pairs, *answers):
    if len(taken) == 3:
        taken.append("interrupted")
        raise Interrupted
    taken.append(len(pairs))
    return step(self, pairs, *answers)


trained = []


def interrupted_in_round_2(self, *about):
    if self._plan.stage == "reject-2" and trained.count("reject-2") == 1:
        trained.append("interrupted")
        raise Interrupted
    trained.append(self._plan.stage)
    return step(self, *about)


learners.Learners.distill_step = interrupted_once
with forked_workers(), open_run(config, folder) as run:
    assert [plan.stage for plan in stage_plans(config)] == ["direct", "reject", "refine"]
    with pytest.raises(Interrupted):
        direct(run)
    assert run.directory.begun(config) == ["direct"]
    assert (folder / "checkpoints" / "direct-step-000003").is_dir()
    assert most_trained(folder) is None
    other = load_config(config_file, [*changes, "direct.questions=4"])
    with pytest.raises(UserError, match=r"another value of direct.questions: .*: direct$"):
        run.directory.check_config(other)
    direct(run)
    assert run.directory.finished("direct") == {"steps": 8, "rationales": 8}
    direct(run)
    assert taken == [2, 2, 2, "interrupted", 2, 2, 2, 2, 2], "a step was taken twice, or left out"
    assert holds_model(folder / "direct")
    assert most_trained(folder) == "direct"
    logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["stage"] for line in logged] == ["direct"] * 8

    # Rejection sampling beside it: interrupted while its second round trains.
    learners.Learners.distill_step = interrupted_in_round_2
    with pytest.raises(Interrupted):
        reject(run)
    assert run.directory.finished("reject") is None
    assert most_trained(folder) == "direct"
    written = [(folder / "reject" / f"round-{n}.jsonl").read_bytes() for n in (1, 2)]
    trained.remove("interrupted")
    trained.remove("reject-2")
    learners.Learners.distill_step = lambda self, *about: (
        trained.append(self._plan.stage) or step(self, *about)
    )
    reject(run)
    assert written == [(folder / "reject" / f"round-{n}.jsonl").read_bytes() for n in (1, 2)]
    assert run.directory.finished("reject")["rounds"] == 2
    steps = [run.directory.finished(f"reject-{n}")["steps"] for n in (1, 2)]
    reject(run)
assert trained == ["reject-1"] * steps[0] + ["reject-2"] * (steps[1] - 1), "a step was taken twice"
assert most_trained(folder) == "rejection"
assert holds_model(folder / "checkpoints" / "reject-1")
rounds = [[json.loads(line) for line in text.splitlines()] for text in written]
assert [len(lines) for lines in rounds] == [48, 48]
texts = [[one["text"] for one in lines] for lines in rounds]
assert texts[0] != texts[1], "the second round did not sample with another policy or other seeds"
for lines in rounds:
    for one in lines:
        assert one["kept"] <= (one["finish_reason"] == "eos")
        assert one["reason"]
    kept = [one["example_id"] for one in lines if one["kept"]]
    assert kept and max(map(kept.count, kept)) <= 2
logged = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
assert [one["step"] for one in logged if one["stage"] == "reject"] == [1, 2]
assert [one["step"] for one in logged if one["stage"] == "reject-2"] == list(range(1, steps[1] + 1))
"""


@pytest.fixture
def product(tmp_path: Path) -> Path:
    root = tmp_path / "product"
    files = extended_product(TITLE, root)
    assert len(set(files)) == 4
    return root


def _run(product: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(product), str(ROOT)])},
        cwd=product,
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


def test_the_command_line_knows_the_stage(product: Path) -> None:
    """Without its section of the settings it says so."""
    shown = _run(product, "-m", "lmcot.cli", "--help")
    assert "train the small LM to answer without reasoning" in " ".join(shown.stdout.split())
    resolved = _run(
        product, "-m", "lmcot.cli", "config", "--config", str(CONFIG), "refine.start_from=direct"
    )
    assert resolved.returncode == 0, resolved.stderr
    assert "start_from: direct" in resolved.stdout


def test_its_policy_has_rows(product: Path) -> None:
    shown = _run(
        product, "-c",
        "from lmcot.config.rows import find_row\n"
        "for name in ('guided_direct', 'rationale_only_direct+sc', 'guided_distilled'):\n"
        "    row = find_row(name)\n"
        "    print(row.policy, row.label([], 5), *row.against, sep='|')\n",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines() == [
        "direct|guided by the small LM after direct|standard|cot|guided_base",
        "direct|guided by the small LM after direct, without the passages, vote of 5|standard|"
        "cot+sc|guided_direct+sc|rationale_only_base+sc|small_alone|rationale_only_direct",
        "distilled|guided by the distilled small LM|standard|cot|guided_direct|guided_base",
    ]


@pytest.mark.e2e
def test_the_stage_runs_and_resumes_and_so_does_rejection_sampling(
    product: Path, tmp_path: Path
) -> None:
    done = _run(product, "-c", ROUND, str(CONFIG), str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-4000:]
