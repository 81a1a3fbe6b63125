"""What a run's first requests to its endpoint cost, and that the budget binds them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lmcot.config import load_config
from lmcot.errors import UserError
from lmcot.monitor.metrics import Monitor
from lmcot.run.context import Run
from lmcot.run.directory import RunDirectory
from lmcot.run.interruption import Interruption
from tests.support.endpoint import Endpoint, completion

CONFIG = Path(__file__).parents[3] / "configs" / "smoke_t5.yaml"


@contextmanager
def _run(folder: Path, endpoint: Endpoint, **budget: int) -> Iterator[Run]:
    frozen = {
        "backend": "openai", "base_url": endpoint.url, "model": "m", "max_retries": 0,
        "budget": budget,
    }  # fmt: skip
    config = load_config(CONFIG, [f"frozen={json.dumps(frozen)}"])
    with RunDirectory(folder) as directory, Monitor(folder) as monitor:
        run = Run(config, directory, monitor, Interruption())
        try:
            yield run
        finally:
            run.spending.save()


def _spent(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "spending.json").read_text(encoding="utf-8"))
    return found


def test_first_requests_are_spent_and_told(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.respond = lambda call: completion(call, "No", {"No": -0.1, "Yes": -3.0})
    with _run(tmp_path, endpoint) as run:
        run.check_inputs()
    sent = len(endpoint.calls)
    assert sent > 0
    assert _spent(tmp_path)["check"]["sent"] == sent
    told = capsys.readouterr().err
    assert f"the frozen LM's endpoint was checked: {sent} requests, {10 * sent} tokens" in told
    with _run(tmp_path, endpoint) as run:
        run.check_inputs()
    assert _spent(tmp_path)["check"]["sent"] == 2 * sent, "each session asks"


def test_first_requests_end_where_the_budget_does(
    endpoint: Endpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.respond = lambda call: completion(call, "No", {"No": -0.1, "Yes": -3.0})
    with (
        _run(tmp_path, endpoint, max_requests=1) as run,
        pytest.raises(
            UserError, match=r"2 requests so far \(check 2\), frozen.budget.max_requests"
        ),
    ):
        run.check_inputs()
    assert len(endpoint.calls) == 2
    assert _spent(tmp_path)["check"]["sent"] == 2
    # What asks nothing more, such as another report of the same answers, still works.
    with _run(tmp_path, endpoint, max_requests=1) as run:
        run.check_inputs()
        assert "budget is spent: its endpoint is not checked" in capsys.readouterr().err
        with pytest.raises(UserError, match="budget is spent"):
            run.frozen_fleet()
    assert len(endpoint.calls) == 2
