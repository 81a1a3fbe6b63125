"""What a rollout actor samples with: the policy on transformers, or on vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Protocol

import torch

from lmcot.actors.weights import Weights, check_weights, checksum, load_weights, tensors_of
from lmcot.config import PolicySettings, Rollout, VllmRollout
from lmcot.models.adapters import add_adapters, save_adapters
from lmcot.models.generation.engine import GenerationEngine
from lmcot.models.generation.requests import Generated, SampleRequest, ScoreRequest
from lmcot.models.generation.shared import SharedEngine
from lmcot.models.sources import (
    device,
    eos_ids,
    eos_ids_of,
    load_model,
    load_tokenizer,
    model_without_weights,
)
from lmcot.records import Failure

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_PROBED_TOKENS = 16
_PROBE_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.3}
"""By how much the log-probability of a token may differ between vLLM and transformers."""


class Sampler(Protocol):
    """One copy of the policy, and the engine that samples from it."""

    tokenizer: PreTrainedTokenizerBase
    eos_ids: frozenset[int]
    """Tokens that end a rationale."""

    @property
    def notice(self) -> str:
        """What the user should know of how it samples; otherwise empty."""
        ...

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Generated] | Failure]:
        """All samples of each request, in order."""
        ...

    def load(self, weights: Weights) -> None:
        """Takes a version of the learner's up, in place.

        Raises:
            RuntimeError: if it is damaged, of another model, or not what is then sampled with.
        """
        ...

    def sleep(self) -> None:
        """Frees the GPU's memory until `wake`; without a GPU it does nothing."""
        ...

    def wake(self) -> None:
        """Takes the GPU's memory back, with the weights of before."""
        ...

    def checksum(self) -> int:
        """Checksum of the weights that it samples with, as the learner computes it."""
        ...

    def close(self) -> None:
        """Frees what it holds."""
        ...


def open_sampler(
    settings: Rollout,
    policy: PolicySettings,
    source: str,
    *,
    trains: bool,
    verify: bool,
    sleeps: bool,
) -> Sampler:
    """Loads the policy of a source.

    Args:
        trains: whether the learner's versions will come, in adapters where it has them.
        verify: whether to check of each version that what was loaded is what the learner sent.
        sleeps: whether it will be asked to free its memory of a GPU.

    Raises:
        UserError: if there is no model at the source, or the engine does not run it.
    """
    if isinstance(settings, VllmRollout):
        return VllmSampler(settings, policy, source, trains=trains, verify=verify, sleeps=sleeps)
    return TransformersSampler(policy, source, trains=trains, verify=verify)


class TransformersSampler:
    """The policy on transformers and lmcot's own engine; the same requests give the same bits."""

    def __init__(self, policy: PolicySettings, source: str, *, trains: bool, verify: bool) -> None:
        model, self.tokenizer = load_model(source, policy.dtype)
        self.eos_ids = eos_ids(model, self.tokenizer)
        if policy.lora is not None and trains:
            model = add_adapters(model, policy.lora, seed=0).eval()
        self.model: PreTrainedModel = model
        self._verify = verify
        # Units run one at a time, each a batch of its own: nothing of one is kept for the next.
        self._engine = GenerationEngine(model, pad_id=self.tokenizer.pad_token_id)

    @property
    def notice(self) -> str:
        """What the user should know of how it samples; otherwise empty."""
        return self._engine.notice

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Generated] | Failure]:
        """All samples of each request, in order."""
        return self._engine.sample(requests)

    def load(self, weights: Weights) -> None:
        """Takes a version of the learner's up, in place.

        Raises:
            RuntimeError: if it is damaged, of another model, or not what is then sampled with.
        """
        load_weights(self.model, weights)
        if self._verify and (own := self.checksum()) != weights.checksum:
            raise RuntimeError(
                f"this actor's weights have checksum {own} after loading version "
                f"{weights.version}, whose checksum is {weights.checksum}"
            )
        self._engine.weights_changed()

    def sleep(self) -> None:
        """Frees the GPU's memory until `wake`; without a GPU it does nothing."""
        self._engine.weights_changed()  # which drops the cache
        self.model.to("cpu")
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def wake(self) -> None:
        """Takes the GPU's memory back, with the weights of before."""
        self.model.to(device())

    def checksum(self) -> int:
        """Checksum of the weights that it samples with, as the learner computes it."""
        return checksum(self.model)

    def close(self) -> None:
        """Frees nothing: its memory goes with it."""
        return


class VllmSampler:
    """The policy on vLLM, in this process."""

    def __init__(
        self,
        settings: VllmRollout,
        policy: PolicySettings,
        source: str,
        *,
        trains: bool,
        verify: bool,
        sleeps: bool,
    ) -> None:
        from lmcot.models.generation.vllm_engine import VllmEngine

        self.tokenizer = load_tokenizer(source)
        self.eos_ids = eos_ids_of(source, self.tokenizer)
        self._source, self._dtype = source, policy.dtype
        self._lora = policy.lora if trains else None
        self._form = self._adapted(model_without_weights(source, policy.dtype))
        self._verify = verify
        self._plain: PreTrainedModel | None = None
        self._checksum: int | None = None
        self._engine = VllmEngine(source, policy.dtype, settings, self._lora, sleeps=sleeps)
        self._shared = SharedEngine(self._engine)

    @property
    def notice(self) -> str:
        """What the user should know of how it samples; otherwise empty."""
        return self._engine.notice

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Generated] | Failure]:
        """All samples of each request, in order."""
        return self._shared.sample(requests)

    def load(self, weights: Weights) -> None:
        """Takes a version of the learner's up, in place, between units.

        Raises:
            RuntimeError: if it is damaged, of another model, or not what is then sampled with.
        """
        check_weights(self._form, weights)
        self._checksum = None
        if self._lora is None:
            self._engine.load(tensors_of(weights))
        else:
            with TemporaryDirectory() as folder:
                adapters = Path(folder) / "adapters"
                save_adapters(self._form, dict(tensors_of(weights)), adapters)
                self._engine.load_adapters(adapters)
        if self._verify:
            self._probe(weights)
        self._checksum = weights.checksum

    def sleep(self) -> None:
        """Frees the GPU's memory until `wake`; without a GPU it does nothing."""
        self._engine.sleep()

    def wake(self) -> None:
        """Takes the GPU's memory back, with the weights of before."""
        self._engine.wake()

    def checksum(self) -> int:
        """Checksum of the version that was loaded last.

        Raises:
            RuntimeError: if none was: what vLLM packs of a source has no such checksum.
        """
        if self._checksum is None:
            raise RuntimeError("this actor has loaded no version of the learner's")
        return self._checksum

    def close(self) -> None:
        """Ends the engine."""
        self._shared.close()

    def _adapted(self, model: PreTrainedModel) -> PreTrainedModel:
        """The model with adapters, where the learner trains those."""
        return model if self._lora is None else add_adapters(model, self._lora, seed=0)

    def _probe(self, weights: Weights) -> None:
        """Compares vLLM's log-probabilities with those of the same weights on transformers.

        vLLM merges and packs weights, so that a checksum of what it holds says nothing.

        Raises:
            RuntimeError: if they differ.
        """
        if self._plain is None:
            self._plain = self._adapted(load_model(self._source, self._dtype)[0]).eval()
        load_weights(self._plain, weights)
        rows = int(self._plain.config.get_text_config().vocab_size)
        tokens = [place * rows // _PROBED_TOKENS for place in range(_PROBED_TOKENS)]
        with torch.inference_mode():
            ids = torch.tensor([tokens], device=self._plain.device)
            plain = self._plain(ids).logits[0, :-1].float().log_softmax(-1)
        (found,) = self._shared.score([ScoreRequest(tokens[:1], [tokens[1:]])])
        if isinstance(found, Failure):
            return  # weights that are not finite numbers: sampling says so, with the question
        wanted = plain.gather(1, ids[0, 1:].unsqueeze(1)).squeeze(1).cpu()
        difference = float((torch.tensor(found[0]) - wanted).abs().max())
        tolerance = _PROBE_TOLERANCE[str(self._plain.dtype).removeprefix("torch.")]
        if not difference <= tolerance:
            raise RuntimeError(
                f"vLLM's log-probabilities of version {weights.version} differ by {difference:.3g} "
                f"from those of the learner's weights on transformers, by more than {tolerance:g}"
            )
