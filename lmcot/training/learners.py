"""A stage's learners and their checkpoints: resume, save, and start again when one dies."""

from __future__ import annotations

import copy
import subprocess
import sys
import time
from typing import TYPE_CHECKING, Any

from lmcot.actors.learner_actor import LearnerPlan
from lmcot.actors.learner_group import LearnerGroup, LearnerLost, PendingCall
from lmcot.errors import UserError
from lmcot.learner.checkpoints import CheckpointStore
from lmcot.learner.layout import check_settings
from lmcot.monitor.progress import say
from lmcot.records import RunState
from lmcot.run.context import Run
from lmcot.run.stages import training_stage
from lmcot.run_files import adapters_folder

if TYPE_CHECKING:
    from lmcot.storage import Place

_PROBE_LIMIT_S = 10.0


class Learners:
    """The learner group of one stage. Use as a context manager."""

    def __init__(self, run: Run, plan: LearnerPlan) -> None:
        """Looks at the newest checkpoint, before any actor starts.

        Raises:
            UserError: if it is damaged, does not fit the settings, or is beyond their last step.
        """
        self._run = run
        self._plan = plan
        self._store = CheckpointStore(
            run.directory.checkpoints,
            prefix=training_stage(plan.stage).checkpoint_prefix,
            keep=run.config.checkpoints.keep,
        )
        self._group = LearnerGroup(run.config, plan)
        self._saving: tuple[RunState, Place, PendingCall] | None = None
        self._saved_step = -1
        self.restarts = 0
        self.recoveries: list[float] = []
        """Seconds from each loss of a rank until all stood at the last checkpoint again."""
        found = self._store.latest()
        if found is not None:
            state, folder = found
            check_settings(folder, run.config)
            if state.step > plan.total_steps:
                raise UserError(
                    f"{plan.stage} has come to step {state.step} in this run directory, but the "
                    f"settings ask for {plan.total_steps} steps only: ask for {state.step} or "
                    "more, or begin anew with another --run-dir"
                )

    def __enter__(self) -> Learners:
        self._group.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._group.stop()

    def wait_ready(self) -> None:
        """Waits until all ranks are set up."""
        self._group.wait_ready()
        if self._run.config.learner.share_prompts and not self.call("shares_prompts")[0]:
            say(
                f"{self._plan.stage}: this model's architecture does not let rationales share "
                "their prompt: each goes through the learner with a prompt of its own"
            )

    def call(self, method: str, **kwargs: Any) -> list[Any]:
        """Calls a method on every rank; results by rank. Raises as `LearnerGroup.call` does."""
        return self._group.call(method, **kwargs)

    def begin(self, method: str, **kwargs: Any) -> PendingCall:
        """Calls a method on every rank without waiting for it."""
        return self._group.begin(method, **kwargs)

    def learn(self, method: str, **kwargs: Any) -> dict[str, float]:
        """One step of training; its metrics."""
        return self.learned(self.begin(method, **kwargs))

    def learned(self, pending: PendingCall) -> dict[str, float]:
        """Waits for a step of training that was begun; its metrics.

        A step that is refused ends the ranks: what it left is half a step ahead of the state, and
        must not become a checkpoint.
        """
        try:
            metrics: dict[str, float] = pending.result()[0]
        except UserError:
            self._group.stop()
            raise
        return metrics

    def check_learned(self) -> None:
        """Looks whether the model is another than the stage began with.

        Raises:
            UserError: if every update was skipped.
        """
        if self.call("updates")[0] == 0:
            raise UserError(
                f"{self._plan.stage} has learned nothing: the loss or a gradient was not finite in "
                f"every update; check the weights of '{self._plan.source}', or set policy.dtype to "
                "'float32' in another --run-dir"
            )

    def refs(self) -> list[Any]:
        """What a wait for news of the learners' health waits for."""
        return self._group.refs()

    def check(self) -> None:
        """Raises `LearnerLost` if a rank is known to be dead; never waits."""
        self._group.check()

    def probe(self) -> None:
        """Raises `LearnerLost` if a rank turns out to be dead."""
        self._group.probe(_PROBE_LIMIT_S)

    def resume(self, before: int | None = None) -> RunState | None:
        """Takes up the newest checkpoint; None if there is none.

        Args:
            before: only one of fewer steps.
        """
        found = self._store.latest(before)
        if found is None:
            return None
        state, folder = found
        self.call("restore", folder=str(folder), state=state)
        self.call("forget", folder=str(folder))
        self._saved_step = state.step
        return state

    def recover(self, lost: LearnerLost) -> RunState | None:
        """Starts all ranks again after one was lost, at the newest checkpoint.

        Raises:
            RuntimeError: after ``actors.max_learner_restarts``.
        """
        self._saving = None
        started = time.monotonic()
        while True:
            if self.restarts >= self._run.config.actors.max_learner_restarts:
                raise RuntimeError(
                    f"{lost}; the learners were started again {self.restarts} times before: see "
                    "Ray's logs for why they die"
                )
            self.restarts += 1
            say(f"{self._plan.stage}: {lost}; starting the learners again")
            try:
                self._group.start()
                self.wait_ready()
                state = self.resume()
                self.recoveries.append(time.monotonic() - started)
                say(f"{self._plan.stage}: the learners are back after {self.recoveries[-1]:.1f} s")
                return state
            except LearnerLost as again:
                lost = again

    def begin_save(self, state: RunState) -> None:
        """Has the ranks write a checkpoint while the caller does other work.

        Does nothing if the state has one already, or the ranks are gone.
        """
        self.finish_save()
        if self._saved_step == state.step or not self._group.handles:
            return
        frozen = copy.deepcopy(state)
        folder = self._store.begin(frozen)
        pending = self._group.begin("save_engine", folder=str(folder))
        self._saving = (frozen, folder, pending)

    def finish_save(self) -> None:
        """Waits for a checkpoint that is being written, and completes it."""
        if self._saving is None:
            return
        (state, folder, pending), self._saving = self._saving, None
        digests = {name: digest for one in pending.result() for name, digest in one.items()}
        # What the driver wrote up to here first: a resume elsewhere must find it beside this.
        self._run.directory.sync()
        self._store.finish(state, folder, digests)
        self._saved_step = state.step

    def save(self, state: RunState) -> None:
        """Writes a checkpoint, if the state has none yet."""
        self.begin_save(state)
        self.finish_save()

    def export(self, folder: Place, critic: Place | None = None) -> None:
        """Writes the trained model as a plain Hugging Face folder.

        Adapters are kept beside it, and merged in a process of their own: never on tensors that
        an engine holds.
        """
        self.finish_save()
        self.begin_export(folder, critic).result()
        self.finish_export(folder)

    def begin_export(self, folder: Place, critic: Place | None = None) -> PendingCall:
        """Has the ranks write the model, or its adapters, while the caller does other work.

        It is of the weights as they are now, whatever is begun afterwards. See `finish_export`.
        """
        target = folder if self._run.config.policy.lora is None else adapters_folder(folder)
        return self.begin("export", folder=str(target), critic=str(critic) if critic else None)

    def finish_export(self, folder: Place) -> None:
        """Makes a model of what the ranks wrote, where that was adapters."""
        if self._run.config.policy.lora is None:
            return
        adapters = adapters_folder(folder)
        command = [sys.executable, "-m", "lmcot.models.adapters"]
        merged = subprocess.run(
            [*command, self._plan.source, str(adapters), str(folder)],
            capture_output=True,
            text=True,
            check=False,
        )
        if merged.returncode:
            raise RuntimeError(
                f"merging the adapters in '{adapters}' failed:\n{merged.stderr.strip()}"
            )
