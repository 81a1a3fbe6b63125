"""A stage's learners: their calls, their checkpoints, and their restart when one of them dies."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from lmcot.actors.kept import Kept
from lmcot.actors.learner_actor import DistillMetrics, LearnerActor, StepMetrics
from lmcot.actors.learner_group import LearnerGroup, LearnerLost, PendingCall
from lmcot.actors.resources.placement import Placement
from lmcot.actors.units import Packed, WeightsRef
from lmcot.config import training_stage
from lmcot.errors import Interrupted, UserError
from lmcot.learner.checkpoints import CheckpointStore
from lmcot.learner.layout import check_settings
from lmcot.learner.plan import LearnerPlan
from lmcot.models.adapters import merge_adapters
from lmcot.monitor.progress import Progress, progress, say
from lmcot.ownership import OwnedElsewhere
from lmcot.process import quiet_libraries
from lmcot.records import RunState, ScoredRollout
from lmcot.run.context import Run
from lmcot.run_files import adapters_folder
from lmcot.storage import on_disk

if TYPE_CHECKING:
    from lmcot.learner.batching import TokenPair
    from lmcot.storage import Place

_Result = TypeVar("_Result")
_PROBE_LIMIT_S = 10.0


class Pending(Generic[_Result]):
    """A call to all learners that is under way, and the one result that it will have."""

    def __init__(self, call: PendingCall[Any], read: Callable[[], _Result]) -> None:
        """Args: ``read`` waits for the call and returns the result."""
        self._call = call
        self._read = read

    def refs(self) -> list[Any]:
        """Object references of the ranks that have not answered."""
        return self._call.refs()

    def done(self) -> bool:
        """Whether all ranks have answered. Never waits; raises as `result` does."""
        return self._call.done()

    def result(self) -> _Result:
        """Waits for the result; raises as `PendingCall.result` does."""
        return self._read()


class Learners:
    """The learners of one stage. Use as a context manager."""

    def __init__(self, run: Run, plan: LearnerPlan) -> None:
        """Checks the newest checkpoint, before any actor starts.

        Raises:
            UserError: if it is damaged, does not fit the settings, or is beyond their last step.
        """
        self._run = run
        self._plan = plan
        self._store = CheckpointStore(
            run.directory.checkpoints,
            prefix=plan.checkpoint_prefix or training_stage(plan.stage).checkpoint_prefix,
            keep=run.config.checkpoints.keep,
            claim=run.directory.claim,
        )
        self._group = LearnerGroup(run.config, replace(plan, claim=run.directory.claim))
        self._saving: tuple[RunState, Place, PendingCall[dict[str, str]]] | None = None
        self._saved_step = -1
        self.restarts = 0
        self.recoveries: list[float] = []
        """Seconds from each loss of a rank until all ranks had the last checkpoint again."""
        found = self._store.latest()
        if found is not None:
            state, folder = found
            check_settings(folder, run.config)
            if state.step > plan.total_steps:
                raise UserError(
                    f"{plan.stage} has come to step {state.step} in this run directory, but the "
                    f"settings ask for {plan.total_steps} steps only: ask for {state.step} or "
                    "more, or use a new --run-dir"
                )

    def take_room_beside(self, host: Placement) -> None:
        """Gives each learner the room beside one of those actors; to be called before the start."""
        self._group.host = host

    def __enter__(self) -> Learners:
        self._group.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._group.stop()

    def wait_ready(self) -> None:
        """Waits until all ranks are set up."""
        self._group.wait_ready()
        if self._run.config.learner.share_prompts and not self.shares_prompts():
            say(
                f"{self._plan.stage}: this model's architecture does not let rationales share "
                "their prompt: each goes through the learner with a prompt of its own"
            )

    def shares_prompts(self) -> bool:
        """Whether a question's rationales share one copy of its prompt in the model."""
        return self._group.call(LearnerActor.shares_prompts)[0]

    def updates(self) -> int:
        """Number of updates since the stage began that were applied, not skipped."""
        return self._group.call(LearnerActor.updates)[0]

    def distill_step(
        self, rationales: list[TokenPair], answers: list[TokenPair], answer_weight: float
    ) -> Pending[DistillMetrics]:
        """Begins one optimiser step of distillation."""
        self.finish_checkpoint()
        call = self._group.begin(LearnerActor.distill_step, rationales, answers, answer_weight)
        return self._training(call)

    def validate(self, rationales: list[TokenPair], answers: list[TokenPair]) -> dict[str, float]:
        """The losses of what is not learnt from, by the present weights; waits for them."""
        self.finish_checkpoint()
        return self._group.call(LearnerActor.validate, rationales, answers)[0]

    def write_greedily(self, prompts: list[Sequence[int]], max_new_tokens: int) -> list[str]:
        """Greedy rationales by the present weights; waits for them."""
        return self._group.call(LearnerActor.write_greedily, prompts, max_new_tokens)[0]

    def fetch(self, units: list[Kept[Packed[list[ScoredRollout]]]]) -> Pending[set[int]]:
        """Has each rank fetch what the next step learns from.

        The result: which of the units are lost to a rank.
        """
        self.finish_checkpoint()  # begun after the last step, and usually done by now
        call = self._group.begin(LearnerActor.fetch, units)
        return Pending(call, lambda: set().union(*call.result()))

    def ppo_step(
        self, scored: list[Packed[list[ScoredRollout]]] | None, step: int
    ) -> Pending[StepMetrics]:
        """Begins one PPO step.

        Args:
            scored: the units that it learns from; None: those that were fetched.
            step: how many steps come before it.
        """
        self.finish_checkpoint()
        return self._training(self._group.begin(LearnerActor.ppo_step, scored, step))

    def publish(self, version: int) -> Pending[WeightsRef]:
        """Begins to put the present weights into the object store, for the rollout actors.

        It is these weights that are published, whatever is begun afterwards.
        """
        call = self._group.begin(LearnerActor.publish, version)
        return Pending(call, lambda: call.result()[0])

    def check_learned(self, *, filtered: bool = False) -> None:
        """Checks that the model changed at all.

        Args:
            filtered: steps may have had nothing to learn from.

        Raises:
            UserError: if there was no update, or every update was skipped.
        """
        if self.updates() == 0:
            empty = "refine.filter left out all that it asked, or " if filtered else ""
            raise UserError(
                f"{self._plan.stage} has learned nothing: {empty}the loss or a gradient was not "
                f"finite in every update; check the weights of '{self._plan.source}', or set "
                "policy.dtype to 'float32' in another --run-dir"
            )

    def refs(self) -> list[Any]:
        """What a wait for news of the learners' health waits for."""
        return self._group.refs()

    def check(self) -> None:
        """Raises `LearnerLost` if a rank is known to be dead; never waits."""
        self._group.check()

    def probe(self) -> None:
        """Raises `LearnerLost` if a rank does not answer; waits some seconds at most."""
        self._group.probe(_PROBE_LIMIT_S)

    def run_until_done(
        self, fresh: Callable[[], RunState], train: Callable[[RunState, Progress], None]
    ) -> RunState:
        """Trains a stage to its end: resumes it, and recovers from lost learners.

        An interruption or a `UserError` leaves a checkpoint of the last complete step.

        Args:
            fresh: makes the state before the first step.
            train: trains from a state to the end of the stage. It advances the state in place
                together with the learners, so that both are always at the same step.

        Returns:
            the state at the end.
        """
        stage, total = self._plan.stage, self._plan.total_steps
        state = self._begin_at(self.resume(), fresh)
        with progress(stage, total=total, done=state.step) as bar:
            while True:
                try:
                    train(state, bar)
                    return state
                except LearnerLost as lost:
                    state = self._begin_at(self.recover(lost), fresh)
                    bar.move_to(state.step)
                except OwnedElsewhere:
                    raise  # the checkpoints are another process's now
                except (Interrupted, UserError):
                    self.checkpoint(state, wait=True)
                    raise

    def resume(self, before: int | None = None) -> RunState | None:
        """Loads the newest checkpoint; None if there is none.

        Args:
            before: considers only checkpoints of fewer steps than this.
        """
        found = self._store.latest(before)
        if found is None:
            return None
        state, folder = found
        self._group.call(LearnerActor.restore, str(folder), state)
        self._group.call(LearnerActor.forget, str(folder))
        self._saved_step = state.step
        return state

    def checkpointed_steps(self) -> list[int]:
        """Steps done at each checkpoint that a resume may start from, ascending."""
        return self._store.steps()

    def recover(self, lost: LearnerLost) -> RunState | None:
        """Starts all ranks again after one was lost, and loads the newest checkpoint.

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

    def checkpoint(self, state: RunState, *, wait: bool = False) -> None:
        """Has the ranks write a checkpoint; the next step of training completes it.

        Does nothing if this step has a checkpoint already, or the ranks are gone.

        Args:
            wait: completes it at once.
        """
        self.finish_checkpoint()
        if self._saved_step != state.step and self._group.handles:
            written = copy.deepcopy(state)
            folder = self._store.begin(written)
            pending = self._group.begin(LearnerActor.save_engine, str(folder))
            self._saving = (written, folder, pending)
        if wait:
            self.finish_checkpoint()

    def finish_checkpoint(self) -> None:
        """Waits for a checkpoint that is being written, and completes it."""
        if self._saving is None:
            return
        (state, folder, pending), self._saving = self._saving, None
        digests = {name: digest for one in pending.result() for name, digest in one.items()}
        # What the driver wrote up to here first: a resume elsewhere must find it beside this.
        self._run.directory.sync()
        self._store.finish(state, folder, digests)
        self._saved_step = state.step

    def export(self, folder: Place, critic: Place | None = None) -> None:
        """Writes the trained model as a plain Hugging Face folder.

        Adapters are kept beside it, and merged by the driver, never on tensors that an engine
        holds.
        """
        self.finish_checkpoint()
        self.begin_export(folder, critic).result()
        self.finish_export(folder)

    def begin_export(self, folder: Place, critic: Place | None = None) -> Pending[None]:
        """Has the ranks write the model, or its adapters, while the caller does other work.

        The present weights are written, whatever is begun afterwards. See `finish_export`.
        """
        target = self.exported(folder)
        where = str(critic) if critic else None
        call = self._group.begin(LearnerActor.export, str(target), where)
        return Pending(call, lambda: call.result()[0])

    def exported(self, folder: Place) -> Place:
        """The folder that the ranks write for a model's folder: itself, or that of its adapters."""
        return folder if self._run.config.policy.lora is None else adapters_folder(folder)

    def finish_export(self, folder: Place) -> None:
        """Merges the adapters that the ranks wrote into a model; does nothing without adapters."""
        if self._run.config.policy.lora is None:
            return
        if self._run.directory.claim is not None:
            self._run.directory.claim.check_persistently()
        adapters = adapters_folder(folder)
        with on_disk(adapters) as found, quiet_libraries():
            merge_adapters(self._plan.source, found, folder)

    def _training(self, call: PendingCall[_Result]) -> Pending[_Result]:
        return Pending(call, partial(self._trained, call))

    def _trained(self, call: PendingCall[_Result]) -> _Result:
        """The result of a step of training.

        A step that is refused ends the ranks: they are half a step ahead of the state, which must
        not become a checkpoint.
        """
        try:
            return call.result()[0]
        except UserError:
            self._group.stop()
            raise

    def _begin_at(self, found: RunState | None, fresh: Callable[[], RunState]) -> RunState:
        """The state of a checkpoint, or a fresh one; what was logged after it is dropped."""
        state = fresh() if found is None else found
        if found is not None:
            say(f"{self._plan.stage}: resuming after step {state.step}")
        self._run.monitor.truncate(self._plan.stage, state.step)
        return state
