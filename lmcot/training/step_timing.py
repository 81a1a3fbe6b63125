"""How a step's time was spent: phases, idle shares, queues, lost work."""

from __future__ import annotations

import time

from lmcot.monitor.memory import MemoryMeter
from lmcot.training.batch import Batch
from lmcot.training.learners import Learners
from lmcot.training.pipeline import Fleets, Pipeline


class StepTimer:
    """Measures one step after the other.

    The phases of the loop add up to the step. A batch may have been sampled and judged before its
    step, or while others were learnt.
    """

    def __init__(self, fleets: Fleets, learners: Learners, pipeline: Pipeline) -> None:
        self._fleets = fleets
        self._learners = learners
        self._pipeline = pipeline
        self._phases: dict[str, float] = {}
        self._marked = time.monotonic()
        self._driver = time.process_time()
        self._frozen = pipeline.frozen_seconds
        self._memory = MemoryMeter()

    def mark(self, phase: str) -> None:
        """Ends a phase, which began at the last mark."""
        now = time.monotonic()
        self._phases[phase] = now - self._marked
        self._marked = now

    def metrics(self, batch: Batch, learned_tokens: float) -> dict[str, float]:
        """Metrics of the step that ends now.

        ``seconds/sample`` is the time from the batch's opening to its last rationale,
        ``seconds/judge`` from there to its last judgement; ``seconds/driver`` is the driver's own
        CPU time; ``idle/ROLE`` is the share of the step in which its actors had no work. Lost
        units and restarts count from the start of the stage; ``seconds/recovery`` is the longest
        recovery.

        Args:
            learned_tokens: that went through the learners.
        """
        fleets = self._fleets
        step = sum(self._phases.values())
        driver, self._driver = time.process_time() - self._driver, time.process_time()
        recoveries = [s for fleet in fleets.all for s in fleet.recoveries]
        recoveries += self._learners.recoveries
        return {
            **{f"seconds/{phase}": seconds for phase, seconds in self._phases.items()},
            "seconds/step": step,
            "seconds/sample": batch.sampled - batch.opened,
            "seconds/judge": batch.judged - batch.sampled,
            "seconds/driver": driver,
            "seconds/recovery": max(recoveries, default=0.0),
            "idle/rollout": fleets.rollout.idle_share(),
            "idle/reward": fleets.reward.idle_share(),
            **self._frozen_idle(step),
            "idle/learner": self._phases["wait"] / step,
            "batch/staleness": float(batch.step - batch.version),
            "queue/sample": float(fleets.rollout.waiting),
            "queue/judge": float(fleets.reward.waiting),
            "queue/learn": float(self._pipeline.ready()),
            "health/lost_units": float(fleets.rollout.lost + fleets.reward.lost),
            "health/actor_restarts": float(sum(len(fleet.recoveries) for fleet in fleets.all)),
            "health/learner_restarts": float(self._learners.restarts),
            **self._speeds(batch, learned_tokens, step),
            **self._memory.metrics(),
        }

    def _speeds(self, batch: Batch, learned_tokens: float, step: float) -> dict[str, float]:
        """Tokens per second."""
        sampled = float(batch.columns["response_length"].sum())
        asked = sum(one.frozen_seconds for one in batch.judged_by_unit.values())
        return {
            "speed/run": sampled / step,
            "speed/rollout": sampled / (batch.sampled - batch.opened),
            "speed/learner": learned_tokens / self._phases["learn"],
            **({"speed/frozen": batch.usage.tokens / asked} if asked else {}),
        }

    def _frozen_idle(self, step: float) -> dict[str, float]:
        """Idle share by the units that came back in this step; an actor's calls may overlap."""
        if self._fleets.frozen is None:
            return {}
        seconds = self._pipeline.frozen_seconds - self._frozen
        self._frozen = self._pipeline.frozen_seconds
        return {"idle/frozen": max(0.0, 1 - seconds / (step * len(self._fleets.frozen.handles)))}
