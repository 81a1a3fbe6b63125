"""The script for a machine with a GPU: its parts on the CPU, and what it tells of each check."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import gpu_check
from benchmarks.gpu_check import Outcome, judged, main, table
from benchmarks.gpu_parts import Result
from lmcot.models.policy import response_logits

SMALL = ("--cpu", "--source=random:llama", "--dtype=float32", "--questions=1")
OPTIONS = gpu_check._options(SMALL)


@pytest.mark.parametrize("name", ["attention", "own-engine", "zero-0", "distillation"])
def test_a_part_measures_on_the_cpu_too(name: str, one_thread: None) -> None:
    result = gpu_check.CHECKS[name](OPTIONS)
    assert result.trouble == ""
    assert result.peak_gib > 0
    if name in ("attention", "own-engine"):
        assert 0 < result.figure < 1e-4, "other arithmetic, the same numbers"
    else:
        assert result.figure > 0


def test_log_probabilities_that_are_too_far_apart_are_a_failure(
    monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    def wrong(lm: object, batch: object) -> tuple[torch.Tensor, torch.Tensor]:
        logits, hidden = response_logits(lm, batch)  # type: ignore[arg-type]
        logits[0] += 10 * torch.eye(1, logits.shape[1])[0]
        return logits, hidden

    monkeypatch.setattr("benchmarks.gpu_parts.response_logits", wrong)
    result = gpu_check.CHECKS["own-engine"](OPTIONS)
    assert result.trouble.startswith("log-probabilities differ by ")
    (outcome,) = judged([Outcome("own-engine", result, 1.0)])
    assert outcome.failed


def test_a_check_that_fails_or_hangs_is_told_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing = gpu_check._options(["--cpu", "--source=random:nothing"])
    monkeypatch.setattr(gpu_check, "NEEDS_VLLM", ())
    found = gpu_check.run("attention", nothing, 300.0)
    assert found.failed
    assert found.trouble.startswith("lmcot.errors.UserError: there is no model 'random:nothing'")
    late = gpu_check.run("attention", OPTIONS, 0.2)
    assert (late.failed, late.trouble) == (True, "it had not ended after 0 s")
    assert gpu_check.run("attention", OPTIONS, 0.0).trouble.startswith("not run: no time was left")


def test_without_vllm_its_checks_are_told_as_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    outcome = gpu_check.run("grpo", OPTIONS, 100.0)
    assert (outcome.failed, outcome.trouble) == (False, "not run: vllm is not installed")


def test_stages_must_agree_and_the_table_says_which_does_not() -> None:
    def stage(number: int, norm: float) -> Outcome:
        return Outcome(f"zero-{number}", Result(f"norm {norm}", 1.5, norm), 20.0)

    outcomes = judged([stage(0, 2.0), stage(1, 2.05), stage(2, 2.5), stage(3, float("nan"))])
    assert [one.failed for one in outcomes] == [False, False, True, True]
    lines = table([*outcomes, Outcome("grpo", None, 0.0, "not run: no time")]).splitlines()
    assert lines[2] == "| zero-0 | ok | norm 2.0 | 1.50 GiB | 20 s |"
    assert lines[4].startswith("| zero-2 | FAILED: its figure is 2.5, zero-0's 2 | norm 2.5 |")
    assert lines[6] == "| grpo | not run: no time |  |  | 0 s |"


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main([]) == 2
    assert "sees no GPU" in capsys.readouterr().out


def test_the_make_target_runs_it() -> None:
    makefile = (Path(__file__).parents[2] / "Makefile").read_text(encoding="utf-8")
    assert "\ngpu-check: ##" in makefile
    assert "-m benchmarks.gpu_check" in makefile
