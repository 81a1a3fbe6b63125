"""Each stage's work depends on some settings.

Once a stage has begun, what it depends on cannot change within its run directory; all else can.
"""

from __future__ import annotations

from typing import Any

from lmcot.config.load import flat_settings
from lmcot.config.renamed import ADDED
from lmcot.config.root import Config
from lmcot.config.stages import TRAINING_STAGES, TrainingStage, training_stage

NO_STAGE_DEPENDS_ON = (
    "actors",
    "checkpoints",
    "distill.validation.samples",
    "monitor",
    "serve",
    "estimate",
    "failures",
    "evaluate",
    "frozen.api_key_env",
    "frozen.budget",
    "frozen.ca_file",
    "frozen.cache",
    "frozen.cache_gib",
    "frozen.concurrency",
    "frozen.connect_timeout_s",
    "frozen.headers",
    "frozen.max_batch_tokens",
    "frozen.max_cached_tokens",
    "frozen.max_context",
    "frozen.max_retries",
    "frozen.parameters",
    "frozen.query",
    "frozen.read_timeout_s",
    "frozen.rename_parameters",
    "frozen.requests_per_minute",
    "frozen.tokens_per_minute",
    "frozen.total_timeout_s",
    "frozen.verify_tls",
    "reject.rounds",
    "rollout.cache_gib",
    "rollout.max_context",
    "rollout.units_at_once",
    "refine.steps",
    "learner.tokens_per_micro_batch",
    "learner.share_prompts",
    "learner.attention",
    "learner.compile",
    "learner.gradient_checkpointing",
    "learner.offload_reference",
    "learner.max_skipped_updates",
)
"""Keys that say how the work is done, how much of it, or what it may cost, but do not change its
results."""

LEVERS = (
    "distill.optimiser.learning_rate",
    "distill.validation.patience",
    "reject.optimiser.learning_rate",
    "refine.optimiser.learning_rate",
    "refine.advantage.critic.learning_rate",
    "refine.entropy_coefficient",
    "refine.loss.clip",
    "refine.loss.clip_low",
    "refine.loss.clip_high",
    "refine.loss.dual_clip",
    "refine.target_kl",
)
"""Keys that steer a training in progress: a resumed stage uses their new values from its next step
on. Other keys of a stage define what it samples, or how its state is to be read: the temperature
and the lengths define the policy whose log-probabilities are stored, the number of samples and the
staleness define the batches in flight."""
KL_COEFFICIENT = "refine.kl.coefficient"
"""The coefficient is a lever only if it is fixed."""

FROZEN_READS = "prompts.frozen_reads"
"""Only rewards depend on it: rows of an evaluation have prompts of their own."""
CONCLUSION = "prompts.conclusion"
"""Only rewards and rows of an evaluation depend on it: they guide the frozen LM."""

_READING = ("task", "data.context", "data.require_context")
"""How a question is read, whichever data it comes from."""
_QUESTIONS = ("data.train", "data.max_train", "data.on_bad_record", *_READING)
_RATIONALES = (*_QUESTIONS, "teacher", "policy.source", "policy.max_new_tokens")
_MODEL = ("seed", "prompts", "policy.source", "policy.dtype", "policy.lora")

_LAYOUT = ("learner",)
"""A stage's checkpoints depend on these, but the model that it writes at its end does not."""


def depends(stage: str, key: str, config: Config, *, finished: bool = False) -> bool:
    """Whether what a stage does with these settings depends on a key (dotted).

    Args:
        finished: the stage is done, and will not resume.
    """
    if below(key, NO_STAGE_DEPENDS_ON):
        return False
    if stage == "sweep":
        return True  # the trials' settings are made of all of them
    judges = any(one.judges for one in TRAINING_STAGES if one.name == stage)
    if key == FROZEN_READS and not judges:
        return False
    if key == CONCLUSION and not judges and stage != "evaluate":
        return False
    if not finished and is_lever(key, config):
        return False
    return below(key, _keys(stage, config, finished))


def digested_settings(config: Config, stage: str) -> dict[str, Any]:
    """The settings that what a stage makes depends on, for a digest of them.

    Keys that came later are left out at the values at which nothing changes (see `ADDED`).
    """
    return {
        key: value
        for key, value in flat_settings(config).items()
        if depends(stage, key, config) and not (key in ADDED and value == ADDED[key])
    }


def is_lever(key: str, config: Config) -> bool:
    """Whether a training in progress may resume with another value of a key (dotted).

    The KL coefficient is a lever where it is fixed: an adaptive one is part of the training's
    state, and its setting says only where it began.
    """
    if key == KL_COEFFICIENT:
        return config.refine.kl.kind == "fixed"
    return below(key, LEVERS)


def _keys(stage: str, config: Config, finished: bool) -> tuple[str, ...]:
    if stage == "annotate":
        teacher = config.teacher
        if teacher is None or teacher.kind != "frozen":
            return _RATIONALES
        sampled = ("seed",) if teacher.temperature else ()
        return (*_RATIONALES, "prompts", "frozen", *sampled)
    if stage == "evaluate":
        return ("seed", "prompts", "policy", "rollout", "frozen", *_READING)
    return _keys_of_training(training_stage(stage), config, finished)


def _keys_of_training(stage: TrainingStage, config: Config, finished: bool) -> tuple[str, ...]:
    keys: tuple[str, ...] = (*_MODEL, stage.name)
    if config.prompts.advises:
        keys += ("frozen",)  # the prompts hold its first answers
    if stage.extends or not finished:
        keys += _LAYOUT
    if stage.reads_rationales:
        keys += _keys("annotate", config, finished)
    if stage.judges:
        keys += (*_QUESTIONS, "policy", "rollout", "frozen", "rewards")
    if stage.evaluates and config.evaluate.during.every:
        keys += ("data.validation", "data.max_validation")
    return keys


def below(key: str, above: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of some keys, or lies below one."""
    return any(key == one or key.startswith(one + ".") for one in above)
