"""Publishes a run's metrics as Ray metrics, for any Prometheus that scrapes the cluster's nodes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from lmcot.monitor.catalogue import describe

_COUNTED = {
    "batch/rationales": "lmcot_rationales",
    "batch/tokens": "lmcot_learnt_tokens",
    "frozen/requests": "lmcot_frozen_requests",
    "frozen/tokens": "lmcot_frozen_tokens",
    "optimiser/updates": "lmcot_updates",
}
"""Metrics that are also summed over steps, and the counter of each sum."""
_TAGS = ("run", "stage")


class RayMetrics:
    """This process's gauges ``lmcot_GROUP_NAME``, with values of the last step, and its counters.

    Where there is no Ray cluster nothing is done.
    """

    def __init__(self, run: str) -> None:
        self._run = run
        self._gauges: dict[str, Any] = {}
        self._counters: dict[str, Any] = {}

    def log(self, step: int, stage: str, metrics: Mapping[str, float | None]) -> None:
        """Publishes a step's metrics; a gauge keeps its value if the new one is not finite."""
        import ray

        if not ray.is_initialized():
            return
        tags = {"run": self._run, "stage": stage}
        self._gauge("step").set(float(step), tags)
        for name, value in metrics.items():
            if value is not None:
                self._gauge(name).set(value, tags)
                if name in _COUNTED and value > 0:
                    self._counter(name).inc(value, tags)

    def _gauge(self, name: str) -> Any:
        from ray.util.metrics import Gauge

        if name not in self._gauges:
            text = "Step of the stage that was logged last." if name == "step" else describe(name)
            self._gauges[name] = Gauge(prometheus_name(name), text, _TAGS)
        return self._gauges[name]

    def _counter(self, name: str) -> Any:
        from ray.util.metrics import Counter

        if name not in self._counters:
            text = f"Sum over this process's steps. {describe(name)}"
            self._counters[name] = Counter(_COUNTED[name], text, _TAGS)
        return self._counters[name]


def prometheus_name(metric: str) -> str:
    """A metric's name as Ray is given it; Ray prefixes ``ray_``."""
    return "lmcot_" + re.sub(r"\W", "_", metric)
