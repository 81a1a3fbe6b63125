"""Samples rationales from the small policy."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from lmcot.actors.base import ActorBase, NotSetUp
from lmcot.actors.kept import Split
from lmcot.actors.samplers import Sampler, open_sampler
from lmcot.actors.units import Packed, RolloutUnit, WeightsRef
from lmcot.actors.weights import Weights
from lmcot.config import PolicySettings, PromptSettings, Rollout, TransformersRollout
from lmcot.data.prompts import templates_for
from lmcot.data.render import rationale_ids
from lmcot.errors import UserError
from lmcot.models.generation.requests import Generated, SampleRequest
from lmcot.process import use_threads
from lmcot.records import Example, Failure
from lmcot.records import Rollout as Sampled


class RolloutActor(ActorBase):
    """Holds one copy of the policy, of the version that its last unit asked for.

    Units of one version may be sampled in several threads at the same time, where the engine
    batches them; a unit of another version waits until they are done.
    """

    def __init__(
        self,
        policy: PolicySettings,
        source: str,
        prompts: PromptSettings,
        threads: int,
        *,
        rollout: Rollout | None = None,
        trains: bool = False,
        verify: bool = False,
        rests: bool = False,
    ) -> None:
        """Starts the process; `setup` loads the model.

        Args:
            rollout: the engine that samples; unset: lmcot's own.
            trains: whether the learner's versions will come, in adapters where it has them.
            verify: whether to check of each version that it holds what the learner sent.
            rests: whether it will be asked to `rest`.
        """
        use_threads(threads)
        self._trains = trains
        self._verify = verify
        self._rests = rests
        self._settings = policy
        self._engine = rollout or TransformersRollout()
        self._source = source
        self._prompts = prompts
        self._templates = templates_for(prompts)
        self._version = 0
        self._held = ""
        self._sampler: Sampler
        self._resting = False
        self._sampling = 0
        """Units that are being sampled."""
        self._changed = threading.Condition()

    def setup(self) -> str:
        """Loads the model that the fleet starts from; returns what its user should know."""
        self.use_source(self._source)
        return self._sampler.notice

    def use_source(self, source: str) -> None:
        """Takes its weights from a model source; those are its own from now on."""
        with self._alone():
            self._source = source
            if hasattr(self, "_sampler"):
                self._sampler.close()
            self._sampler = open_sampler(
                self._engine,
                self._settings,
                source,
                trains=self._trains,
                verify=self._verify,
                sleeps=self._rests,
            )
            self._version, self._held, self._resting = 0, "", False

    def rest(self) -> None:
        """Frees its memory of a GPU until its next unit, once no unit is being sampled."""
        with self._alone():
            if not self._resting and hasattr(self, "_sampler"):
                self._sampler.sleep()
                self._resting = True

    def use_weights(self, weights: WeightsRef) -> None:
        """Takes up a version that the learner published, or its own source's if there is none.

        Which it holds goes by the object, not by the version's number: learners that were
        restored count again from their checkpoint.

        Raises:
            RuntimeError: if what it then holds is not what the learner sent.
        """
        import ray

        if self._resting:
            self._sampler.wake()
            self._resting = False
        wanted = _name_of(weights)
        if wanted == self._held:
            return
        if not weights:
            self.use_source(self._source)
            return
        fetched: Weights = ray.get(weights[0])
        with self._alone():
            self._held = "in between"  # a load that fails half-way leaves no version
            self._sampler.load(fetched)
            self._version, self._held = fetched.version, wanted

    def checksum(self) -> int:
        """Checksum of the weights that it samples with."""
        return self._sampler.checksum()

    def sample(self, unit: RolloutUnit) -> Packed[list[Sampled]]:
        """All samples of a unit: question by question, K each; takes up its version before.

        Raises:
            RuntimeError: if the unit's weights are not of the version that it names.
            UserError: if the policy cannot go on from a prompt: it is too long for the model, or
                the model's logits are no numbers.
        """
        if not hasattr(self, "_sampler"):
            raise NotSetUp("Ray restarted it")
        with self._with_weights_of(unit):
            return Packed.of(self._sample(unit))

    def sample_split(self, unit: RolloutUnit) -> Split[None]:
        """As `sample`, with the samples kept in the object store."""
        return Split(None, (self.sample(unit),))

    @contextmanager
    def _with_weights_of(self, unit: RolloutUnit) -> Iterator[None]:
        """Takes up a unit's version, and keeps it inside the block.

        It waits for units of another version; the unit's own time limit ends the wait.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: not self._sampling or self._held == _name_of(unit.weights)
            )
            self.use_weights(unit.weights)
            if unit.policy_version != self._version:
                raise RuntimeError(
                    f"unit {unit.unit_id} wants policy version {unit.policy_version}, but its "
                    f"weights are of version {self._version}"
                )
            self._sampling += 1
        try:
            yield
        finally:
            with self._changed:
                self._sampling -= 1
                self._changed.notify_all()

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Waits until no unit is being sampled; none begins inside the block."""
        with self._changed:
            self._changed.wait_for(lambda: not self._sampling)
            yield

    def _sample(self, unit: RolloutUnit) -> list[Sampled]:
        """All samples of a unit, from the weights that are held."""
        examples = unit.questions.open()
        requests = [
            SampleRequest(
                prompt_ids=self._prompt_ids(example),
                seeds=[unit.sample_seed(example.id, k) for k in range(unit.samples)],
                max_new_tokens=unit.max_new_tokens,
                temperature=unit.temperature,
                eos_ids=self._sampler.eos_ids,
            )
            for example in examples
        ]
        rollouts: list[Sampled] = []
        found = self._sampler.sample(requests)
        for example, request, samples in zip(examples, requests, found, strict=True):
            if isinstance(samples, Failure):
                raise UserError(
                    f"no rationale for question {example.id} from policy version "
                    f"{unit.policy_version}: {samples.reason}"
                )
            prompt_ids = tuple(request.prompt_ids)
            rollouts.extend(
                self._rollout(unit, example.id, prompt_ids, k, one) for k, one in enumerate(samples)
            )
        return rollouts

    def _prompt_ids(self, example: Example) -> tuple[int, ...]:
        return rationale_ids(example, self._templates, self._sampler.tokenizer, self._prompts.chat)

    def _rollout(
        self,
        unit: RolloutUnit,
        example_id: str,
        prompt_ids: tuple[int, ...],
        sample: int,
        one: Generated,
    ) -> Sampled:
        return Sampled(
            unit_id=unit.unit_id,
            example_id=example_id,
            sample=sample,
            prompt_ids=prompt_ids,
            response_ids=one.response_ids,
            logprobs=one.logprobs,
            finish_reason="eos" if one.finish_reason == "eos" else "length",
            text=self._sampler.tokenizer.decode(one.response_ids, skip_special_tokens=True).strip(),
            policy_version=unit.policy_version,
        )


def _name_of(weights: WeightsRef) -> str:
    """Names the object that holds a version's weights; empty: those of the actor's own source."""
    return weights[0].hex() if weights else ""
