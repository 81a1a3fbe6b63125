"""All settings of a run."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import model_validator

from lmcot import run_files
from lmcot.config.aspects import ASPECTS
from lmcot.config.base import NonNegativeInt, Settings
from lmcot.config.data import DataSettings
from lmcot.config.distill import DistillSettings
from lmcot.config.estimate import EstimateSettings
from lmcot.config.evaluation import EvaluateSettings
from lmcot.config.frozen import Frozen
from lmcot.config.models import (
    VLLM_RANKS,
    PolicySettings,
    Rollout,
    TransformersRollout,
    VllmSettings,
)
from lmcot.config.monitor import MonitorSettings
from lmcot.config.prompts import GivenDemonstrations, PromptSettings
from lmcot.config.reject import RejectSettings
from lmcot.config.renamed import with_new_names
from lmcot.config.rewards import FailureBudgets, GuidanceRewards, Rewards
from lmcot.config.runtime import ActorsSettings, CheckpointSettings
from lmcot.config.serving import ServeSettings
from lmcot.config.short_forms import in_full
from lmcot.config.stages import RefineSettings
from lmcot.config.task import TEMPLATES, ExtractiveQa, TaskChoice
from lmcot.config.teachers import Teacher
from lmcot.config.training import LearnerSettings


class Config(Settings):
    """All settings of a run."""

    seed: NonNegativeInt = 0
    """Seed of everything random."""
    data: DataSettings
    """Questions to learn from and to measure on."""
    task: TaskChoice = ExtractiveQa()
    """What a question is, and how its answer is read and compared: a section, or its ``kind``
    alone."""
    prompts: PromptSettings = PromptSettings()
    """What the models are asked."""
    policy: PolicySettings
    """The small LM."""
    rollout: Rollout = TransformersRollout()
    """What samples from the small LM in training and evaluation."""
    frozen: Frozen | None = None
    """The frozen large LM; only the toy task goes without."""
    teacher: Teacher | None = None
    """Where the rationales for distillation come from; unset: no distillation."""
    rewards: Rewards = GuidanceRewards()
    """What PPO maximises."""
    failures: FailureBudgets = FailureBudgets()
    """How much may be lost before a stage stops."""
    distill: DistillSettings = DistillSettings()
    """Supervised training on the teacher's rationales."""
    reject: RejectSettings | None = None
    """Rejection sampling, between distillation and PPO; unset: none."""
    refine: RefineSettings = RefineSettings()
    """PPO."""
    learner: LearnerSettings = LearnerSettings()
    """The DeepSpeed engine."""
    evaluate: EvaluateSettings = EvaluateSettings()
    """What is measured at the end."""
    actors: ActorsSettings = ActorsSettings()
    """The Ray side."""
    checkpoints: CheckpointSettings = CheckpointSettings()
    """How often the state is saved."""
    monitor: MonitorSettings = MonitorSettings()
    """What a run shows of itself, and what it warns of."""
    serve: ServeSettings = ServeSettings()
    """The trained pair behind an HTTP endpoint."""
    estimate: EstimateSettings | None = None
    """What the run is expected to take and to cost; unset: no estimate."""

    @model_validator(mode="before")
    @classmethod
    def _short_forms_and_old_keys_are_read(cls, values: Any) -> Any:
        return with_new_names(in_full(values)) if isinstance(values, Mapping) else values

    @model_validator(mode="before")
    @classmethod
    def _templates_are_those_of_the_task(cls, values: Any) -> Any:
        """A task brings its templates, unless the settings name others."""
        if not isinstance(values, Mapping):
            return values
        task, prompts = values.get("task"), values.get("prompts", {})
        kind = task.get("kind") if isinstance(task, Mapping) else task
        own = TEMPLATES.get(kind) if isinstance(kind, str) else None
        if own is None or not isinstance(prompts, Mapping) or "templates" in prompts:
            return values
        return {**values, "prompts": {**prompts, "templates": own}}

    @model_validator(mode="after")
    def _variants_fit(self) -> Config:
        if self.frozen is None and self.rewards.kind == "guidance":
            raise ValueError(
                "frozen is not set, but rewards.kind 'guidance' needs a frozen LM to judge with: "
                "add a 'frozen' section with 'backend' and its model"
            )
        if self.teacher is None and self.refine.start_from == "distilled":
            raise ValueError(
                "refine.start_from is 'distilled', but there is no 'teacher' to distil from: "
                "add a 'teacher' section, or set refine.start_from to 'base'"
            )
        if self.teacher is not None and self.teacher.kind == "frozen" and self.frozen is None:
            raise ValueError("teacher.kind is 'frozen', but there is no 'frozen' section: add one")
        return self

    @model_validator(mode="after")
    def _advice_has_an_answer_to_advise_on(self) -> Config:
        if self.prompts.advises and (self.frozen is None or self.rewards.kind != "guidance"):
            raise ValueError(
                "prompts.guidance is 'advice', but there is no frozen LM that answers first: give "
                "a 'frozen' section and rewards of the kind 'guidance', or set it to 'rationale'"
            )
        return self

    @model_validator(mode="after")
    def _rollout_engine_takes_what_trains(self) -> Config:
        lora = self.policy.lora
        if self.rollout.engine == "vllm" and lora is not None and lora.rank > VLLM_RANKS[-1]:
            raise ValueError(
                f"policy.lora.rank is {lora.rank}, but vLLM takes adapters of rank "
                f"{VLLM_RANKS[-1]} or lower: lower it, or set rollout.engine to 'transformers'"
            )
        return self

    @model_validator(mode="after")
    def _vllm_has_the_gpus_that_it_divides_a_model_among(self) -> Config:
        places: tuple[tuple[str, Any, str, float], ...] = (
            ("rollout", self.rollout, "actors.rollout", self.actors.rollout.gpus),
            ("frozen", self.frozen, "actors.frozen", self.actors.frozen.gpus),
            ("frozen", self.frozen, "serve.frozen", self.serve.frozen.gpus),
            ("serve.small.vllm", self.serve.small.vllm, "serve.small", self.serve.small.gpus),
        )
        for key, settings, role, gpus in places:
            if not isinstance(settings, VllmSettings) or not gpus:
                continue
            if max(gpus, 1) != settings.tensor_parallel:
                raise ValueError(
                    f"{key}.tensor_parallel is {settings.tensor_parallel}, but {role}.gpus is "
                    f"{gpus:g}: set both to the number of GPUs that hold the model together"
                )
        return self

    @model_validator(mode="after")
    def _who_shares_a_gpu_takes_turns(self) -> Config:
        if not self.actors.colocate:
            return self
        rollout, learner = self.actors.rollout, self.actors.learner
        wrong = {
            f"there are {rollout.count} rollout actors and {learner.count} learners": (
                rollout.count != learner.count
            ),
            f"rollout.gpus is {rollout.gpus:g} and learner.gpus {learner.gpus:g}, not shares of "
            "one GPU": rollout.gpus + learner.gpus > 1 or bool(rollout.gpus) != bool(learner.gpus),
            "refine.max_staleness is above 0, so that both work at the same time": (
                self.refine.max_staleness > 0
            ),
            "evaluate.during.every is above 0, so that rationales are sampled while the learners "
            "learn": self.evaluate.during.every > 0,
        }
        if reasons := [reason for reason, holds in wrong.items() if holds]:
            raise ValueError(f"actors.colocate is set, but {'; '.join(reasons)}: change that")
        return self

    @model_validator(mode="after")
    def _rejection_has_what_it_takes(self) -> Config:
        if self.reject is None:
            if self.refine.start_from == run_files.REJECTION:
                raise ValueError(
                    "refine.start_from is 'rejection', but there is no 'reject' section: add one, "
                    "or set refine.start_from to 'distilled'"
                )
            return self
        if self.teacher is None and self.reject.start_from == run_files.DISTILLED:
            raise ValueError(
                "reject.start_from is 'distilled', but there is no 'teacher' to distil from: add a "
                "'teacher' section, or set reject.start_from to 'base'"
            )
        if self.teacher is None and self.reject.teacher_rationales:
            raise ValueError(
                "reject.teacher_rationales is true, but there is no 'teacher': add a 'teacher' "
                "section, or set it to false"
            )
        return self

    @model_validator(mode="after")
    def _answers_tell_what_is_right(self) -> Config:
        if self.rewards.task_weights:
            return self
        lack = "rewards give no weight to the answer (em_weight, f1_weight, inclusion_weight)"
        signal = self.refine.filter
        if signal is not None and signal.by != "reward":
            raise ValueError(
                f"refine.filter.by is '{signal.by}', but {lack}: set refine.filter.by to 'reward', "
                "or give one of them a weight"
            )
        if self.refine.curriculum is not None:
            raise ValueError(
                f"refine.curriculum is set, but {lack}, so that no rationale is right: leave it "
                "out, or give one of them a weight"
            )
        return self

    @model_validator(mode="after")
    def _endpoint_fails_before_its_unit(self) -> Config:
        """An endpoint that is down must show as failures, not as actors that hang."""
        if self.frozen is None or self.frozen.request_limit is None:
            return self
        (key, request), unit = self.frozen.request_limit, self.actors.unit_timeout_s
        if request > 0.75 * unit:
            raise ValueError(
                f"{key} is {request:g} s, more than three quarters of "
                f"actors.unit_timeout_s ({unit:g} s): lower the one or raise the other"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_in_the_middle_asks_the_frozen_lm(self) -> Config:
        every = self.evaluate.during.every
        if every and (self.frozen is None or self.rewards.kind != "guidance"):
            raise ValueError(
                f"evaluate.during.every is {every}, but refinement has no frozen LM to answer: set "
                "it to 0, or give a 'frozen' section and rewards of the kind 'guidance'"
            )
        return self

    @model_validator(mode="after")
    def _options_are_there_to_choose_from(self) -> Config:
        rewards, kind = self.rewards, self.task.kind
        asked = getattr(rewards, "choice_probability_weight", None) is not None
        if asked and kind not in ("boolean", "multiple_choice", "custom"):
            raise ValueError(
                f"rewards.choice_probability_weight is set, but the task '{kind}' has "
                "no options: leave it out, or set task to 'boolean' or 'multiple_choice'"
            )
        return self

    @model_validator(mode="after")
    def _evaluation_has_options_to_choose_from(self) -> Config:
        known = self.task.kind in ("boolean", "multiple_choice", "custom")
        if self.evaluate.choices == "probability" and not known:
            raise ValueError(
                f"evaluate.choices is 'probability', but the task '{self.task.kind}' has no "
                "options: set it to 'reply', or task to 'boolean' or 'multiple_choice'"
            )
        return self

    @model_validator(mode="after")
    def _likelihoods_are_given(self) -> Config:
        """Refuses what takes log-likelihoods where the frozen LM is known to give none."""
        rewards = self.rewards
        if not isinstance(rewards, GuidanceRewards) or not self._lacks_likelihoods:
            return self
        lack = f"{self._lacks_likelihoods} gives no log-likelihoods to measure it by"
        if rewards.likelihood_gain_weight is not None:
            raise ValueError(f"rewards.likelihood_gain_weight is set, but {lack}: leave it out")
        for aspect, one in rewards.aspects.items():
            if ASPECTS[aspect].metric != "likelihood":
                continue
            key = f"rewards.aspects.{aspect}"
            if one.source == "metrics":
                raise ValueError(
                    f"{key}.source is 'metrics', but {lack}: set it to 'judge' or 'off'"
                )
            if one.source == "auto" and one.weight > 0:
                raise ValueError(
                    f"{key}.weight is {one.weight:g}, but {lack}: set {key}.source to 'judge', or "
                    "the weight to 0"
                )
        return self

    def showing(self, given: GivenDemonstrations | None) -> Config:
        """The settings with the demonstrations that were drawn, if any were, in full."""
        if given is None:
            return self
        prompts = self.prompts.model_copy(update={"demonstrations": given})
        return self.model_copy(update={"prompts": prompts})

    def resolved(self) -> Config:
        """The settings with what depends on the frozen LM decided: no aspect is ``auto``."""
        if not isinstance(self.rewards, GuidanceRewards):
            return self
        rewards = self.rewards.resolved(likelihoods=not self._lacks_likelihoods)
        return self.model_copy(update={"rewards": rewards})

    @property
    def requires_context(self) -> bool:
        """Whether a question without passages is a bad record."""
        wanted = self.data.require_context
        return self.task.needs_context if wanted is None else wanted

    @property
    def _lacks_likelihoods(self) -> str:
        return "" if self.frozen is None else self.frozen.lacks_likelihoods
