"""A run as others see it: through TensorBoard's server, and through Ray's metrics endpoint."""

from __future__ import annotations

import json
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from lmcot.monitor.metrics import Monitor
from tests.integration.watching import tensorboard, wait_for


def test_tensorboard_serves_a_run_and_each_step_once_after_a_resume(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "mine"
    settings = {"seed": 7, "policy.source": "random:t5", "refine.clip": 0.2, "unset": None}

    def log(monitor: Monitor, steps: range, sign: int) -> None:
        for step in steps:
            monitor.histograms(step, "refine", {"reward": [0.0, sign * step]})
            monitor.text(step, "refine", "samples", f"**written** with {sign}")
            monitor.log(step, "refine", {"reward/mean": sign * step, "kl": step / 10})

    with Monitor(run_dir, hparams=settings, varied=["refine.clip"]) as monitor:
        log(monitor, range(1, 7), 1)
    with tensorboard(tmp_path, tmp_path) as server:

        def ask(path: str, **query: Any) -> Any:
            address = f"{server}/data/{path}?{urllib.parse.urlencode(query)}"
            with urllib.request.urlopen(address, timeout=30) as response:
                return json.load(response)

        run = "runs/mine/tensorboard/refine"

        def series(path: str, tag: str) -> list[Any]:
            known = ask(f"plugin/{path.split('/')[0]}/tags")
            return ask(f"plugin/{path}", run=run, tag=tag) if tag in known.get(run, {}) else []

        scalars = "scalars/scalars"
        wait_for("the sixth step", lambda: len(series(scalars, "reward/mean")) == 6)
        with Monitor(run_dir, hparams=settings, varied=["refine.clip"]) as monitor:
            monitor.truncate("refine", 3)  # the server looks on
            log(monitor, range(4, 6), -1)
        wait_for("the resumed run", lambda: series(scalars, "reward/mean")[-1][2] == -5)
        values = [(step, value) for _, step, value in series(scalars, "reward/mean")]
        assert values == [(1, 1), (2, 2), (3, 3), (4, -4), (5, -5)]
        spreads = series("histograms/histograms", "spread/reward")
        assert [one[1] for one in spreads] == [1, 2, 3, 4, 5]
        texts = [(one["step"], one["text"]) for one in series("text/text", "samples")]
        assert texts[2:4] == [
            (3, "<p><strong>written</strong> with 1</p>"),
            (4, "<p><strong>written</strong> with -1</p>"),
        ]
        told = ask("plugin/scalars/tags")[run]["kl"]["description"]
        assert "KL of the policy to the reference" in told
        names = [one["name"] for one in _post(server, "experiment", {})["hparamInfos"]]
        assert names == ["refine.clip", "policy.source", "seed"], "what varies comes first"
        (group,) = _post(
            server,
            "session_groups",
            {
                "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_RUNNING"],
                "colParams": [],
                "startIndex": 0,
                "sliceSize": 9,
            },
        )["sessionGroups"]
        assert group["hparams"] == {"seed": 7, "policy.source": "random:t5", "refine.clip": 0.2}
        metrics = {one["name"]["tag"]: one["value"] for one in group["metricValues"]}
        assert metrics["reward/mean"] == -5


def _post(server: str, what: str, question: dict[str, Any]) -> Any:
    request = urllib.request.Request(
        f"{server}/data/plugin/hparams/{what}",
        data=json.dumps({"experimentName": "", **question}).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)


@pytest.mark.usefixtures("cluster")
def test_prometheus_finds_the_metrics_at_the_nodes_endpoint(tmp_path: Path) -> None:
    import ray

    (node,) = ray.nodes()
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with Monitor(tmp_path / "watched") as monitor:
        for step in (1, 2):
            monitor.log(step, "refine", {"reward/mean": step / 4, "batch/tokens": 10.0})

    def exported() -> dict[str, float]:
        with urllib.request.urlopen(address, timeout=30) as response:
            lines = response.read().decode().splitlines()
        ours = [one for one in lines if 'run="watched"' in one and 'stage="refine"' in one]
        return {one.partition("{")[0]: float(one.rpartition(" ")[2]) for one in ours}

    wait_for("the run's metrics", lambda: exported().get("ray_lmcot_reward_mean") == 0.5)
    found = exported()
    assert found["ray_lmcot_step"] == 2
    assert found["ray_lmcot_batch_tokens"] == 10
    assert found["ray_lmcot_learnt_tokens_total"] == 20
