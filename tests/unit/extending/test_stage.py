"""A stage of its own: rejection sampling, as docs/extending.md adds it to a copy of the product."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.worked import extended_product

TITLE = "A stage of its own"
CONFIG = Path(__file__).parents[3] / "configs" / "toy.yaml"
ROUND = """
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
from lmcot.training.reject import reject

config_file, folder = sys.argv[1], Path(sys.argv[2])
changes = [
    "data.train={kind: counting, examples: 8}",
    "reject={start_from: base, samples: 3, batch_size: 2, epochs: 2}",
    "actors.rollout.count=1",
    "checkpoints.every=1",
]
config = load_config(config_file, changes)
step, taken = learners.Learners.distill_step, []


def interrupted_once(self, pairs, *answers):
    if len(taken) == 3:
        taken.append("interrupted")
        raise Interrupted
    taken.append(len(pairs))
    return step(self, pairs, *answers)


learners.Learners.distill_step = interrupted_once
with open_run(config, folder) as run:
    assert [plan.stage for plan in stage_plans(config)] == ["reject", "refine"]
    with pytest.raises(Interrupted):
        reject(run)
    assert run.directory.begun(config) == ["reject"]
    assert (folder / "checkpoints" / "reject-step-000003").is_dir()
    assert most_trained(folder) is None
    sampled = (folder / "rejection.json").read_bytes()
    other = load_config(config_file, [*changes, "reject.samples=2"])
    with pytest.raises(UserError, match=r"another value of reject.samples: .*: reject$"):
        run.directory.check_config(other)
    reject(run)
    assert (folder / "rejection.json").read_bytes() == sampled
    assert run.directory.finished("reject") == {"steps": 8, "rationales": 8}
    reject(run)
assert taken == [2, 2, 2, "interrupted", 2, 2, 2, 2, 2], "a step was taken twice, or left out"
assert holds_model(folder / "rejection")
assert most_trained(folder) == "rejection"
logged = [line for line in (folder / "metrics.jsonl").read_text().splitlines() if "reject" in line]
assert len(logged) == 8
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
        env={**os.environ, "PYTHONPATH": str(product)},
        cwd=product,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_the_command_line_knows_the_stage(product: Path) -> None:
    """Without its section of the settings it says so."""
    shown = _run(product, "-m", "lmcot.cli", "--help")
    assert "train the small LM on the best right ones of its own rationales" in " ".join(
        shown.stdout.split()
    )
    resolved = _run(
        product, "-m", "lmcot.cli", "config", "--config", str(CONFIG), "refine.start_from=rejection"
    )
    assert resolved.returncode == 0, resolved.stderr
    assert "start_from: rejection" in resolved.stdout


def test_its_policy_has_rows(product: Path) -> None:
    shown = _run(
        product, "-c",
        "from lmcot.config.rows import find_row\n"
        "for name in ('guided_rejection', 'rationale_only_rejection+sc', 'guided_refined'):\n"
        "    row = find_row(name)\n"
        "    print(row.policy, row.label([], 5), *row.against, sep='|')\n",
    )  # fmt: skip
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines() == [
        "rejection|guided by the small LM after reject|standard|cot|guided_distilled|guided_base",
        "rejection|guided by the small LM after reject, without the passages, vote of 5|standard|"
        "cot+sc|guided_rejection+sc|rationale_only_distilled+sc|rationale_only_base+sc|"
        "small_alone|rationale_only_rejection",
        "refined|guided by the small LM after PPO|standard|cot|guided_rejection|guided_distilled|"
        "guided_base",
    ]


@pytest.mark.e2e
def test_rejection_sampling_runs_and_resumes(product: Path, tmp_path: Path) -> None:
    done = _run(product, "-c", ROUND, str(CONFIG), str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr[-4000:]
