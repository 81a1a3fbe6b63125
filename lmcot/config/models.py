"""Settings of the two language models, the teacher and the rewards."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lmcot.config.base import (
    Aspect,
    Dtype,
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Settings,
)


class LoraSettings(Settings):
    """Low-rank adapters (Hu et al. 2022) that train in place of the model's own weights.

    Without dropout: old and new log-probabilities must agree.
    """

    rank: PositiveInt = 16
    """Rank of the two matrices."""
    alpha: PositiveInt = 32
    """The product is scaled by alpha / rank."""
    target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Linear layers that get adapters: all but the output layer, or those of these names."""


class PolicySettings(Settings):
    """The small LM: the one that writes rationales and is trained."""

    source: str
    """A hub id, a folder, a ``.gguf`` file, ``package:NAME/FILE.gguf`` or ``random:KIND``."""
    dtype: Dtype = "auto"
    """``auto``: bfloat16 where the hardware computes in it, else float32."""
    max_new_tokens: PositiveInt = 128
    """Longest rationale, in tokens."""
    temperature: PositiveFloat = 1.0
    """Temperature of training rollouts; it divides the learner's logits too."""
    lora: LoraSettings | None = None
    """Train adapters only; unset: all weights."""

    @model_validator(mode="before")
    @classmethod
    def _no_truncated_sampling(cls, values: Any) -> Any:
        for key in ("top_k", "top_p", "repetition_penalty"):
            if isinstance(values, dict) and key in values:
                raise ValueError(
                    f"'{key}' is not offered: it would bias PPO's ratio, since the learner scores "
                    "the full distribution; use 'temperature'"
                )
        return values


class FrozenLimits(Settings):
    """Lengths of what the frozen LM writes."""

    max_answer_tokens: PositiveInt = 24
    """Longest answer."""
    max_rationale_tokens: PositiveInt = 128
    """Longest rationale of its own (the ``cot`` row and the ``frozen`` teacher)."""


class TransformersFrozen(FrozenLimits):
    """The frozen LM runs here, in actors of its own, on transformers."""

    backend: Literal["transformers"]
    source: str
    """Where the weights come from: the same forms as ``policy.source``."""
    dtype: Dtype = "auto"
    """Arithmetic of the frozen LM."""
    max_batch_tokens: PositiveInt = 8192
    """Tokens that go through the model at once; a longer prompt takes several passes."""
    max_cached_tokens: PositiveInt = 32768
    """Tokens whose keys and values are held at once, prompts and answers together; what has no
    room waits. A 7B model in bfloat16 takes 0.5 MiB for each."""


class OpenAIFrozen(FrozenLimits):
    """The frozen LM is behind an OpenAI-compatible HTTP endpoint: a true black box."""

    backend: Literal["openai"]
    base_url: str
    """For example ``http://localhost:8000/v1``."""
    model: str
    """The model's name at that endpoint."""
    api_key_env: str = "OPENAI_API_KEY"
    """Name of the environment variable that holds the key; it is never written anywhere."""
    concurrency: PositiveInt = 8
    """Requests under way at once, per frozen-LM actor."""
    timeout_s: PositiveFloat = 60.0
    """Time limit of one request."""
    max_retries: NonNegativeInt = 4
    """How often a transient failure of one request is tried again, with growing pauses."""
    parameters: PositiveInt | None = None
    """Number of the model's parameters, if known: for the FLOP estimate in the report."""


Frozen = Annotated[TransformersFrozen | OpenAIFrozen, Field(discriminator="backend")]


class SupportingFactsTeacher(Settings):
    """Rationales made of the data set's own supporting facts, and the answer."""

    kind: Literal["supporting_facts"]


class FrozenTeacher(Settings):
    """Rationales that the frozen LM wrote; kept only where its answer is right (the paper's)."""

    kind: Literal["frozen"]
    min_f1: Fraction = 1.0
    """Kept if the prediction's F1 with the gold answer reaches this; 1.0 asks for exact match
    of the normalised words."""


Teacher = Annotated[SupportingFactsTeacher | FrozenTeacher, Field(discriminator="kind")]


class AspectSettings(Settings):
    """How one aspect of a rationale's quality is measured, and what it weighs."""

    source: Literal["metric", "judge", "off"]
    """``metric``: a measure without a reference; ``judge``: the frozen LM's probability of
    "yes" to one question; ``off``: not measured."""
    weight: NonNegativeFloat = 0.0
    """Share in the reward. Measured at weight 0, an aspect is only logged."""

    @model_validator(mode="after")
    def _weight_needs_source(self) -> AspectSettings:
        if self.source == "off" and self.weight > 0:
            raise ValueError("an aspect that is 'off' cannot have a weight: set weight to 0")
        return self


# Whether steps follow from each other and agree takes understanding: only a judge can say.
_JUDGE_ONLY: tuple[Aspect, ...] = ("logicality", "consistency")


def _default_aspects() -> dict[Aspect, AspectSettings]:
    metric = AspectSettings(source="metric")
    judge = AspectSettings(source="judge")
    return {
        "factuality": metric,
        "relevance": metric,
        "logicality": judge,
        "consistency": judge,
        "coherence": metric,
        "fluency": metric,
        "naturalness": metric,
        "readability": metric,
    }


class GuidanceRewards(Settings):
    """Task rewards from the frozen LM's answer, and rationale rewards by aspect."""

    kind: Literal["guidance"] = "guidance"
    em_weight: NonNegativeFloat = 0.5
    """Weight of exact match between the frozen LM's answer and the gold answer."""
    f1_weight: NonNegativeFloat = 0.5
    """Weight of the word F1 between them."""
    aspects: dict[Aspect, AspectSettings] = Field(default_factory=_default_aspects)
    """Quality aspects of the rationale, by name; an aspect that is not named is off. Unset: all
    are measured at weight 0, save fluency where the frozen LM is behind an endpoint, which gives
    no log-likelihoods."""

    @model_validator(mode="after")
    def _something_to_maximise(self) -> GuidanceRewards:
        if not any([self.em_weight, self.f1_weight, *(a.weight for a in self.aspects.values())]):
            raise ValueError("all weights are 0: give em_weight, f1_weight or an aspect a weight")
        return self

    @model_validator(mode="after")
    def _sources_exist(self) -> GuidanceRewards:
        for aspect in _JUDGE_ONLY:
            if aspect in self.aspects and self.aspects[aspect].source == "metric":
                raise ValueError(
                    f"aspects.{aspect}.source is 'metric', but there is no honest metric of "
                    f"{aspect}: set it to 'judge' or 'off'"
                )
        return self


class IncreasingRewards(Settings):
    """The toy task: the share of neighbouring numbers that increase; its optimum is 1."""

    kind: Literal["increasing"]
    length: Annotated[int, Field(ge=2)] = 8
    """How many numbers a perfect rationale has."""


Rewards = Annotated[GuidanceRewards | IncreasingRewards, Field(discriminator="kind")]
