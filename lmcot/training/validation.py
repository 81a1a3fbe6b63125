"""Validation while a stage trains on rationales: the loss of questions that are kept out.

The policy with the lowest loss is what the stage makes. Until the stage ends it lies beside the
checkpoints, as ``STAGE-best-NNNNNN``.
"""

from __future__ import annotations

import math
import re
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from lmcot import run_files
from lmcot.config import TrainingStage, ValidationSettings
from lmcot.errors import UserError
from lmcot.files import write_atomically
from lmcot.monitor.progress import say
from lmcot.records import RunState
from lmcot.run.context import Run
from lmcot.storage import on_disk, remove, replacing
from lmcot.training.learners import Learners
from lmcot.training.pairs import TrainingPair, answers_of
from lmcot.training.sample_texts import compared

if TYPE_CHECKING:
    from lmcot.storage import Place

STEP: Final = "step"
BEST_STEP: Final = "best_step"
BEST_LOSS: Final = "best_loss"
WORSE: Final = "worse"
"""Keys of `RunState.validation`: the step of the last validation, the step and the loss of the best
one, and how many have followed the best one."""

_LOGGED: Final = {"loss": "loss/validation", "loss/answer": "loss/validation_answer"}


class Validation:
    """Validates every few steps and after the last one, and keeps the best policy."""

    def __init__(
        self,
        run: Run,
        stage: TrainingStage,
        settings: ValidationSettings,
        answer_weight: float,
        learners: Learners,
        pairs: Sequence[TrainingPair],
        total: int,
    ) -> None:
        """Args:
        answer_weight: weight of the answers' loss beside the rationales'.
        pairs: those that are kept out.
        total: the stage's number of steps.
        """
        self._run = run
        self._stage = stage
        self._settings = settings
        self._answer_weight = answer_weight
        self._learners = learners
        self._pairs = pairs
        self._total = total

    def resume(self, state: RunState) -> None:
        """Begins at a state: drops what was kept after it.

        Raises:
            UserError: if the best policy of before is gone.
        """
        for step, folder in self._kept().items():
            if step > state.step:
                remove(folder)
        for file in self._samples.glob("*.md"):
            if (run_files.samples_step(self._stage.training, file.name) or 0) > state.step:
                file.unlink()
        if not state.validation:
            return
        best = self._learners.exported(self._best(state.validation[BEST_STEP]))
        if not best.is_dir():
            raise UserError(
                f"the best policy of '{self._stage.training}' so far is gone from '{best}': put it "
                f"back, or delete the folders '{self._stage.checkpoint_prefix}*' in "
                f"'{self._run.directory.checkpoints}' to train from the start"
            )

    def due(self, state: RunState) -> bool:
        """Whether the policy of a state is to be validated, and was not yet."""
        wanted = state.step % self._settings.every == 0 or state.step == self._total
        return bool(state.step) and wanted and state.validation.get(STEP) != state.step

    def stops(self, state: RunState) -> bool:
        """Whether the loss has not fallen for so long that training ends."""
        patience = self._settings.patience
        return patience is not None and state.validation.get(WORSE, 0) >= patience

    def validate(self, state: RunState) -> None:
        """Measures the loss, keeps the policy if it is the best, and shows what it writes."""
        started = time.monotonic()
        rationales = [one.tokens for one in self._pairs]
        losses = self._learners.validate(rationales, answers_of(self._pairs))
        loss = losses["loss"] + self._answer_weight * losses.get("loss/answer", 0.0)
        found = {**state.validation, STEP: float(state.step)}
        if math.isfinite(loss) and loss < found.get(BEST_LOSS, math.inf):
            self._learners.begin_export(self._best(state.step)).result()
            found |= {BEST_STEP: float(state.step), BEST_LOSS: loss, WORSE: 0.0}
        elif BEST_LOSS in found:
            found[WORSE] += 1
        self._show(state.step, losses["loss"])
        state.validation = found
        self._drop_worse(state)
        values = {_LOGGED[name]: value for name, value in losses.items()}
        values["seconds/validate"] = time.monotonic() - started
        self._run.monitor.log(state.step, self._stage.training, values)
        if self.stops(state) and state.step < self._total:
            say(
                f"{self._stage.training}: stopped after step {state.step} of {self._total}: the "
                f"validation loss has not fallen since step {found[BEST_STEP]:.0f}"
            )

    def _show(self, step: int, loss: float) -> None:
        """Shows some of the policy's rationales beside the teacher's."""
        shown = self._pairs[: self._settings.samples]
        if not shown:
            return
        prompts = [one.tokens[0] for one in shown]
        written = self._learners.write_greedily(prompts, self._run.config.policy.max_new_tokens)
        examples, taught = [one.example for one in shown], [one.rationale for one in shown]
        stage, monitor = self._stage.training, self._run.monitor
        monitor.text(step, stage, "samples", compared(examples, taught, written, escaped=True))
        head = f"# {stage}, step {step}: validation loss {loss:.4f}\n\n"
        text = head + compared(examples, taught, written, escaped=False) + "\n"
        file = self._samples / run_files.samples_name(stage, step)
        write_atomically(file, text, private=True)

    def export(self, state: RunState, folder: Place) -> None:
        """Makes the best policy the stage's.

        Raises:
            UserError: if no validation had a finite loss.
        """
        if BEST_STEP not in state.validation:
            raise UserError(
                f"{self._stage.training}: the validation loss was never finite, so that there is "
                f"no best policy: lower {self._stage.name}.optimiser.learning_rate"
            )
        kept = self._learners.exported(self._best(state.validation[BEST_STEP]))
        with on_disk(kept) as best, replacing(self._learners.exported(folder)) as policy:
            shutil.copytree(best, policy, dirs_exist_ok=True)
        self._learners.finish_export(folder)
        say(
            f"{self._stage.training}: kept the policy of step "
            f"{state.validation[BEST_STEP]:.0f}, whose validation loss is the lowest "
            f"({state.validation[BEST_LOSS]:.4f})"
        )

    def drop_all(self) -> None:
        """Removes what was kept beside the checkpoints, once the stage has finished."""
        for folder in self._kept().values():
            remove(folder)

    def _drop_worse(self, state: RunState) -> None:
        """Removes policies that are the best neither for this state nor for a checkpoint's."""
        kept = self._kept()
        needed = {
            max((step for step in kept if step <= end), default=0)
            for end in (*self._learners.checkpointed_steps(), state.step)
        }
        for step in kept.keys() - needed:
            remove(kept[step])

    def _kept(self) -> dict[int, Place]:
        """Folders of the policies that were the best at their time, by their step."""
        root = self._run.directory.checkpoints
        if not root.is_dir():
            return {}
        name = re.compile(re.escape(self._prefix) + r"(\d{6,})(-adapters)?")
        found = {folder: name.fullmatch(folder.name) for folder in root.iterdir()}
        return {int(match[1]): folder for folder, match in found.items() if match}

    @property
    def _samples(self) -> Path:
        return self._run.directory.path / run_files.SAMPLES

    def _best(self, step: float) -> Place:
        return self._run.directory.checkpoints / f"{self._prefix}{int(step):06d}"

    @property
    def _prefix(self) -> str:
        return f"{self._stage.training}-best-"
