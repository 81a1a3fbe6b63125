"""What the ranks of `test_ranks` do: that test starts this file once for each rank.

One process goes through all cases, for importing DeepSpeed takes longer than any of them. What
the cases found is written to a file, by their names, for the test to compare.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from lmcot.config import Config, parse_config
from lmcot.records import Judgement, Rollout, RunState, ScoredRollout

if TYPE_CHECKING:
    from torch import Tensor

    from lmcot.learner.batching import TokenPair
    from lmcot.learner.session import LearnerSession

LLAMA, T5 = "counting-llama", "counting-t5"
PROMPTS = (2, 5, 3, 9, 4)
"""Length of each question's prompt."""
SAMPLES = 3
"""Rationales to one question."""
WAIT_S = 300.0

# An eps far above the gradients' rounding errors: Adam would make them as large as a step.
_OPTIMISER = {"learning_rate": 1e-2, "eps": 1e-3, "warmup_steps": 2, "max_grad_norm": 0.3}
# Where a token's value or ratio is at the clip, its gradient is there or not, as rounding will have
# it: bfloat16 has steps of 0.001 at 0.2, and two tokens there made 11% of an update's norm. Which
# side they are on depends on the micro-batches, and so on the ranks. In float32 the clips are on.
_NEVER = 10.0

ALGORITHMS: dict[str, dict[str, Any]] = {
    "gae": {
        "refine.advantage": {"kind": "gae", "critic_warmup_steps": 1, "value_coefficient": 0.5},
        "refine.kl": {"kind": "adaptive", "coefficient": 0.1, "target": 0.01, "horizon": 60},
        "refine.entropy_coefficient": 0.01,
    },
    "critic model": {
        "refine.advantage": {
            "kind": "gae",
            "lam": 0.9,
            "critic": {"kind": "model", "learning_rate": 3e-3},
        },
        "refine.loss": {"kind": "cispo"},
        "refine.epochs": 1,
    },
    "rloo": {
        "refine.advantage": {"kind": "rloo"},
        "refine.kl": {"kind": "fixed", "coefficient": 0.1, "apply_to": "loss"},
        "refine.loss.aggregation": "sequence_mean",
    },
    "grpo": {
        "refine.advantage": {"kind": "grpo"},
        "refine.loss.dual_clip": 3.0,
        "refine.loss.aggregation": "constant",
        "refine.scale_rewards": True,
    },
    "gspo": {
        "refine.advantage": {"kind": "grpo"},
        "refine.loss": {"kind": "gspo", "clip_low": 0.01, "clip_high": 0.02},
        "refine.kl": {"kind": "fixed", "coefficient": 0.0},
        # Clipped to one value, a question's rewards are often equal: its backward pass is spared.
        "refine.reward_clip": 0.1,
    },
    "sequence mean": {"refine.loss.aggregation": "sequence_mean"},
    "lora": {"policy.lora": {"rank": 4, "alpha": 8}, "refine.epochs": 1},
    "distill": {},
}


@dataclass(frozen=True)
class Setting:
    """How the learners are set up."""

    kind: str
    algorithm: str
    zero_stage: int
    dtype: str = "float32"
    offload: str = "none"

    @property
    def name(self) -> str:
        """In words."""
        words = [self.kind, self.algorithm, self.dtype, f"zero {self.zero_stage}"]
        return ", ".join(words if self.offload == "none" else [*words, f"offload {self.offload}"])

    @property
    def reference(self) -> Setting:
        """What one rank does, to compare with: all else must come to the same."""
        return replace(self, zero_stage=0, offload="none")

    def config(self, world: int, changes: dict[str, Any]) -> Config:
        """The whole configuration; ``changes`` have dotted keys."""
        algorithm = ALGORITHMS[self.algorithm]
        if self.dtype == "bfloat16":
            advantage = {**algorithm["refine.advantage"], "value_clip": _NEVER}
            algorithm = {**algorithm, "refine.advantage": advantage, "refine.loss.clip": _NEVER}
        settings = {
            "data.train": {"kind": "counting"},
            "data.validation": {"kind": "counting"},
            "rewards.kind": "increasing",
            "policy.source": f"random:{self.kind}",
            "policy.dtype": self.dtype,
            "refine.start_from": "base",
            "refine.samples_per_prompt": SAMPLES,
            "refine.epochs": 2 if self.kind == LLAMA else 1,
            "refine.minibatches": 2,
            "refine.optimiser": _OPTIMISER,
            "distill.optimiser": _OPTIMISER,
            "learner.zero_stage": self.zero_stage,
            "learner.offload": self.offload,
            # No result depends on it; at stage 3 each micro-batch takes long.
            "learner.tokens_per_micro_batch": 48 if self.zero_stage == 3 else 24,
            "actors.learner.count": world,
            **algorithm,
            **changes,
        }
        values: dict[str, Any] = {}
        for key, value in settings.items():
            *sections, last = key.split(".")
            node = values
            for section in sections:
                node = node.setdefault(section, {})
            node[last] = value
        return parse_config(values)


TRAJECTORIES = (
    *(Setting(LLAMA, "gae", stage) for stage in (0, 1, 2, 3)),
    *(Setting(T5, "gae", stage) for stage in (0, 3)),
    *(Setting(LLAMA, "gae", stage, offload="optimiser") for stage in (2, 3)),
    Setting(LLAMA, "gae", 3, offload="optimiser_and_parameters"),
    *(Setting(LLAMA, "gae", stage, dtype="bfloat16") for stage in (1, 3)),
    *(Setting(LLAMA, "critic model", stage) for stage in (0, 3)),
    Setting(T5, "critic model", 2),
    Setting(LLAMA, "rloo", 2),
    Setting(T5, "rloo", 1),
    Setting(LLAMA, "grpo", 3),
    Setting(LLAMA, "gspo", 2),
    Setting(LLAMA, "lora", 3),
    Setting(T5, "lora", 2),
    *(Setting(LLAMA, "distill", stage) for stage in (0, 3)),
    Setting(T5, "distill", 2),
)
"""Two steps each, of several updates."""

FEW = {1: 1, 3: 2}
"""How many responses a step has, and minibatches: fewer than ranks in one of those, or odd."""
FEW_SETTINGS = (
    Setting(LLAMA, "gae", 0),
    Setting(LLAMA, "sequence mean", 2),
    Setting(LLAMA, "gae", 3),
)

TARGETS = (1e-4, 1e-3, 5e-3, 1e-2, 1e3)
"""Bounds of the approximate KL, each exceeded an update later, the last one never."""
STOPPED = tuple(Setting(LLAMA, "rloo", stage) for stage in (0, 2))

POISONED = (
    *(Setting(LLAMA, "gae", stage) for stage in (0, 1, 2, 3)),
    *(Setting(LLAMA, "gae", stage, dtype="bfloat16") for stage in (1, 3)),
    Setting(LLAMA, "gae", 3, offload="optimiser"),
)

RESUMED = (
    *(Setting(LLAMA, "gae", stage) for stage in (0, 2, 3)),
    Setting(LLAMA, "gae", 1, dtype="bfloat16"),
    Setting(LLAMA, "gae", 3, dtype="bfloat16", offload="optimiser"),
    Setting(LLAMA, "lora", 3),
)
FOREIGN = Setting(LLAMA, "gae", 2)
"""Whose checkpoint is offered to the other number of ranks."""

PUBLISHED = (
    *(Setting(LLAMA, "critic model", stage) for stage in (2, 3)),
    Setting(T5, "distill", 3),
    Setting(LLAMA, "lora", 3),
)


def made_up(step: int, number: int = len(PROMPTS) * SAMPLES) -> list[ScoredRollout]:
    """A step's rollouts: of uneven lengths, as likely as under a random model, more or less."""
    generator = random.Random(f"rollouts of step {step}")

    def ids(length: int) -> tuple[int, ...]:
        return tuple(generator.randrange(3, 18) for _ in range(length))

    scored = []
    for question, length in enumerate(PROMPTS):
        prompt = ids(length)
        for sample in range(SAMPLES):
            response = ids(generator.randint(1, 9))
            rollout = Rollout(
                unit_id=f"{step}/{question}",
                example_id=str(question),
                sample=sample,
                prompt_ids=prompt,
                response_ids=response,
                logprobs=tuple(generator.gauss(-math.log(18), 0.2) for _ in response),
                finish_reason="length" if generator.random() < 0.3 else "eos",
                text="",
                policy_version=step,
            )
            scored.append(ScoredRollout(rollout, Judgement(), generator.uniform(-1, 1)))
    return scored[:number]


def pairs_of(scored: Sequence[ScoredRollout]) -> list[TokenPair]:
    """Rationales to distil."""
    return [(one.rollout.prompt_ids, one.rollout.response_ids) for one in scored]


def poison(scored: Sequence[ScoredRollout]) -> list[ScoredRollout]:
    """Gives one response a log-probability that is not a number: its loss is none then."""
    rollout = scored[0].rollout
    logprobs = (math.nan, *rollout.logprobs[1:])
    return [replace(scored[0], rollout=replace(rollout, logprobs=logprobs)), *scored[1:]]


Found = dict[str, Any]
"""What a case found; every one has ``metrics``, a list of those of its steps."""


class Rank:
    """One rank, and its cases."""

    def __init__(self, folder: Path, world: int, number: int) -> None:
        self.folder = folder
        self.world = world
        self.number = number

    def join(self) -> None:
        """Meets the other rank, by way of the folder."""
        from lmcot.files import write_atomically
        from lmcot.learner.ranks import host_meeting, join_group

        file, meeting = self.folder / "meeting.json", None
        if self.world > 1 and self.number == 0:
            meeting = host_meeting()
            write_atomically(file, json.dumps(meeting))
        elif self.world > 1:
            _wait_for(file)
            host, port = json.loads(file.read_text(encoding="utf-8"))
            meeting = (host, port)
        join_group(self.number, self.world, meeting, WAIT_S)

    def run(self) -> dict[str, Found]:
        """All cases, in the same order on each rank."""
        found = {}
        for name, case in self._cases().items():
            started = time.perf_counter()
            found[name] = case()
            print(f"{time.perf_counter() - started:6.2f} s  {name}", flush=True)
        return found

    def _cases(self) -> dict[str, Callable[[], Found]]:
        works: dict[str, tuple[Callable[[Setting], Found], Sequence[Setting]]] = {
            "steps": (self._steps, TRAJECTORIES),
            **{f"{n} responses": (partial(self._few, n), FEW_SETTINGS) for n in FEW},
            "early stop": (self._early_stop, STOPPED),
            "poisoned": (self._poisoned, POISONED),
            "resumed": (self._resumed, RESUMED),
            "published": (self._published, PUBLISHED),
            "foreign": (self._foreign, (FOREIGN,)),
        }
        cases: dict[str, Callable[[], Found]] = {}
        for word, (work, settings) in works.items():
            for setting in settings:
                used = setting.reference if self.world == 1 and word != "foreign" else setting
                cases[f"{word}: {used.name}"] = partial(work, used)
        return cases

    def _open(self, setting: Setting, **changes: Any) -> LearnerSession:
        from lmcot.learner.plan import distill_plan, refine_plan
        from lmcot.learner.session import LearnerSession

        plan = distill_plan if setting.algorithm == "distill" else refine_plan
        config = setting.config(self.world, {f"refine.{key}": v for key, v in changes.items()})
        return LearnerSession(config, plan(config, config.policy.source, 10))

    # ---------------------------------------------------------------- the cases

    def _steps(self, setting: Setting) -> Found:
        session = self._open(setting)
        before = _parameters(session)
        metrics = [_step(session, step) for step in range(2)]
        found = {"metrics": metrics, "before": before, "parameters": _parameters(session)}
        if session._plan.ppo is None:
            prompts = [one.rollout.prompt_ids for one in made_up(0)[::SAMPLES]]
            found["written"] = session.write_greedily(prompts, 5)
        return found

    def _few(self, number: int, setting: Setting) -> Found:
        session = self._open(setting, minibatches=FEW[number], epochs=1)
        counted: list[int] = []
        plan = session._planner.plan

        def noted(*arguments: Any) -> Any:
            batches = plan(*arguments)
            counted.extend(len(batch.indices) * batch.counted for batch in batches)
            return batches

        with mock.patch.object(type(session._planner), "plan", staticmethod(noted)):
            metrics = [session.ppo.step(made_up(step, number), step) for step in (1, 2)]
        return {"metrics": metrics, "parameters": _parameters(session), "counted": counted}

    def _early_stop(self, setting: Setting) -> Found:
        optimiser = {**_OPTIMISER, "learning_rate": 5e-4, "warmup_steps": 0}
        metrics = []
        for target in TARGETS:
            session = self._open(setting, target_kl=target, epochs=3, optimiser=optimiser)
            metrics.append(session.ppo.step(made_up(1), 1))
        return {"metrics": metrics}

    def _poisoned(self, setting: Setting) -> Found:
        session = self._open(setting, epochs=1)
        engine, finite = session._engine, []
        backward = engine.backward

        def noted(loss: Tensor) -> None:
            finite.append(math.isfinite(loss.item()))
            backward(loss)

        with mock.patch.object(engine, "backward", noted):
            metrics = [session.ppo.step(poison(made_up(1)), 1), session.ppo.step(made_up(2), 2)]
        return {"metrics": metrics, "parameters": _parameters(session), "finite": finite}

    def _resumed(self, setting: Setting) -> Found:
        """Steps 1 and 2 in one go, then step 2 from the checkpoint that was made before it."""
        from lmcot.learner.checkpoints import CheckpointStore

        straight = self._open(setting, scale_rewards=True, epochs=1, minibatches=1)
        _step(straight, 1)
        controllers = straight.ppo.kl_controller.state(), straight.ppo.reward_scale.state()
        state = RunState(
            "refine", step=2, kl_controller=controllers[0], reward_statistics=controllers[1]
        )
        store = CheckpointStore(checkpoints_of(self.folder, self.world, setting))
        if self.number == 0:
            store.begin(state)
        self._together()
        digests = straight.save_engine(checkpoint_of(self.folder, self.world, setting))
        self._together()
        if self.number == 0:  # the other rank's files are compared by their sizes
            store.finish(state, checkpoint_of(self.folder, self.world, setting), digests)
        self._together()
        found = store.latest()
        assert found is not None
        assert isinstance(found[1], Path)
        resumed = self._open(setting, scale_rewards=True, epochs=1, minibatches=1)
        resumed.restore(found[1], found[0])
        return {
            "metrics": [_step(straight, 2)],
            "parameters": _parameters(straight),
            "resumed metrics": [_step(resumed, 2)],
            "resumed parameters": _parameters(resumed),
        }

    def _published(self, setting: Setting) -> Found:
        """What goes to the rollout actors, and what is exported, after a step."""
        import torch

        from lmcot.actors.weights import pack_weights

        session = self._open(setting, epochs=1)
        metrics = [_step(session, 0)]
        tensors = session.trained_tensors()
        sent: dict[str, Any] | None = None
        if self.number == 0:
            weights = pack_weights(tensors, session.trained_bytes(), version=1)
            sent = {
                "entries": [(e.name, e.shape, e.offset, e.nbytes) for e in weights.entries],
                "buffer": torch.from_numpy(weights.buffer),
                "checksum": weights.checksum,
            }
        else:
            for _ in tensors:
                pass
        folder = self.folder / "exported" / str(self.world) / setting.name
        session.export(folder, folder.with_name(f"{setting.name}, critic"))
        parameters = _parameters(session)
        metrics.append(_step(session, 1))  # still in step with each other
        return {"metrics": metrics, "parameters": parameters, "sent": sent, "folder": str(folder)}

    def _foreign(self, setting: Setting) -> Found:
        """What is said of a checkpoint of one rank to two, and the other way round."""
        from lmcot.errors import UserError
        from lmcot.learner.checkpoints import MARKER

        folder = checkpoint_of(
            self.folder,
            world=3 - self.world,
            setting=setting if self.world == 1 else setting.reference,
        )
        _wait_for(folder / MARKER)
        session = self._open(setting)
        before = _parameters(session)
        try:
            session.restore(folder, RunState("refine"))
        except UserError as error:
            said = str(error)
        untouched = _distance(before, _parameters(session)) == 0
        return {"metrics": [], "said": said, "untouched": untouched}

    def _together(self) -> None:
        """Waits for the other rank."""
        import torch

        from lmcot.learner.ranks import sum_over_ranks

        sum_over_ranks(torch.zeros(()))


def checkpoints_of(folder: Path, world: int, setting: Setting) -> Path:
    """Where so many ranks keep the checkpoints of a setting."""
    return folder / "checkpoints" / str(world) / setting.name


def checkpoint_of(folder: Path, world: int, setting: Setting) -> Path:
    """The one after step 2."""
    return checkpoints_of(folder, world, setting) / "step-000002"


def _step(session: LearnerSession, step: int) -> dict[str, float]:
    """One step of either kind; PPO's first one warms the critic up, where that is set."""
    if session._plan.ppo is None:
        rationales, answers = pairs_of(made_up(step)), pairs_of(made_up(step + 10, 7))
        kept_out = pairs_of(made_up(step + 20, 5)), pairs_of(made_up(step + 30, 1))
        losses = session.distiller.validate(*kept_out)
        validation = {f"validation/{name}": value for name, value in losses.items()}
        return {**session.distiller.step(rationales, answers, 0.5), **validation}
    return session.ppo.step(made_up(step), step)


def _parameters(session: LearnerSession) -> dict[str, Tensor]:
    """All that trains, whole."""
    pairs = session._engine.whole_parameters(session.policy)
    return {name: tensor.cpu().clone() for name, tensor in pairs}


def _distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).abs().max()) for name in one)


def _wait_for(file: Path) -> None:
    deadline = time.monotonic() + WAIT_S
    while not file.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"the other rank did not write {file}")
        time.sleep(0.02)


def main(folder: Path, world: int, number: int) -> None:
    """Goes through all cases as one rank, and writes down what they found."""
    from lmcot.process import use_threads

    use_threads(threads=1)
    import torch

    from lmcot.learner import engine

    rank = Rank(folder, world, number)
    rank.join()
    # Of models this small too, only the norms and biases stay whole on each rank at stage 3.
    with mock.patch.object(engine, "_WHOLE_BELOW", 100):
        found = rank.run()
    torch.save(found, folder / f"found-{world}-{number}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
