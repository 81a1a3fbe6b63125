"""Settings of the small LM."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lmcot.config.base import Dtype, PositiveFloat, PositiveInt, Settings


def public_source(source: str) -> str:
    """A model source without the folders or the address that it lies at."""
    if "://" in source or Path(source).is_absolute() or source.startswith((".", "~")):
        return source.rstrip("/").rpartition("/")[2]
    return source


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
    """A hub id, a folder or a ``.gguf`` file or the URL of one, ``package:NAME/FILE.gguf`` or
    ``random:KIND``. A folder may hold a model or LoRA adapters, which are added to their base."""
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


VLLM_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""The ranks of adapters that vLLM makes room for; lower ones fit into the next."""


class VllmSettings(Settings):
    """What vLLM is told wherever a model runs on it."""

    cache_gib: PositiveFloat = 2.0
    """Memory for keys and values in GiB, beside the weights: on the GPU, or in RAM without one."""
    max_context: PositiveInt | None = None
    """Longest prompt with its reply, in tokens; unset: the model's window. ``cache_gib`` must hold
    the keys and values of one such text."""
    tensor_parallel: PositiveInt = 1
    """Number of GPUs that each layer is divided among (of processes, without GPUs), for a model
    that is too large for one; the actor or replica must reserve as many."""


class TransformersRollout(Settings):
    """Rollout actors sample with lmcot's own engine on transformers."""

    engine: Literal["transformers"] = "transformers"
    """The engine: exact repetition, and every architecture."""

    @property
    def calls_at_once(self) -> int:
        """How many work units one actor samples at the same time: a unit is a batch of its own."""
        return 1


class VllmRollout(VllmSettings):
    """Rollout actors sample with vLLM, which must be installed wherever they run."""

    engine: Literal["vllm"]
    """The engine: causal models only, without exact repetition."""
    units_at_once: PositiveInt = 4
    """Work units of one policy version that an actor samples at the same time, in one batch: where
    a sample ends, one of another unit takes its place."""

    @property
    def calls_at_once(self) -> int:
        """How many work units one actor samples at the same time, in threads."""
        return self.units_at_once


Rollout = Annotated[TransformersRollout | VllmRollout, Field(discriminator="engine")]
