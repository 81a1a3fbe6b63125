"""The quickstart's settings on a real small LM, cut down to a few questions."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmcot.monitor.metrics import read_metrics

ROOT = Path(__file__).parents[2]


@pytest.mark.e2e
def test_all_stages_on_a_real_small_lm(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    overrides = [
        "data.max_train=24", "data.max_validation=2", "refine.steps=1",
        "refine.prompts_per_step=2", "policy.max_new_tokens=64",
        "evaluate.rows=[standard, guided_distilled, guided_refined, small_alone]",
        "evaluate.aspect_questions=0",
    ]  # fmt: skip
    done = subprocess.run(
        [
            sys.executable, "-m", "lmcot.cli", "train",
            "--config", str(ROOT / "configs" / "quickstart.yaml"),
            "--run-dir", str(run_dir), *overrides,
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = read_metrics(run_dir / "metrics.jsonl")
    step = next(m for m in metrics if m["stage"] == "refine")
    assert step["sampler/gap"] < 1e-3, "[1] the sampler's log-probs are the learner's"
    assert abs(step["kl"]) < 1e-6, "[9] the reference is the policy at step 0"
    assert abs(step["sampler/importance_weight"] - 1) < 1e-4
    assert step["batch/judged_share"] == 1
    assert 0 < step["component/aspect/fluency"] < 1
    assert step["optimiser/grad_norm"] > 0
    assert step["optimiser/updates"] == 1
    report = json.loads((run_dir / "report.json").read_text(encoding="utf-8"))
    assert list(report["rows"]) == [
        "standard", "guided_distilled", "guided_refined", "small_alone",
    ]  # fmt: skip
    assert report["rows"]["standard"]["large_lm_tokens_in"] > 200
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "refined")
    model = AutoModelForCausalLM.from_pretrained(run_dir / "refined", dtype="float32")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Where is Rome?"}], add_generation_prompt=True,
        return_tensors="pt", return_dict=True,
    )  # fmt: skip
    reply = model.generate(**prompt, max_new_tokens=5, do_sample=False)
    assert tokenizer.decode(reply[0, prompt["input_ids"].shape[1] :]).strip()
