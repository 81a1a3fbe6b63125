"""What all frozen LMs that run in this process have in common: prompts as tokens, and an engine."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol

import torch
from torch import Tensor

from lmcot.data.render import encode, encode_continuation, uses_chat
from lmcot.frozen.backend import FrozenBackend
from lmcot.models.generation.engine import Scores
from lmcot.models.generation.requests import Generated, SampleRequest, ScoreRequest
from lmcot.models.generation.shared import SharedEngine
from lmcot.models.generation.stopping import StopStrings
from lmcot.records import Choice, Completion, Failure, Prompt, Sampling, Score
from lmcot.text.visible import (
    PLAIN_STOP,
    Visible,
    holds_thinking,
    opens_thinking,
    visible_reply,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_THINKING_TAIL = 32
"""Number of tokens at a prompt's end in which a chat template may open hidden thinking."""


class Engine(Protocol):
    """What samples from the model and scores with it."""

    @property
    def notice(self) -> str:
        """What the user should know of how it works; otherwise empty."""
        ...

    def sample(self, requests: Sequence[SampleRequest]) -> list[list[Generated] | Failure]:
        """All samples of each request, in order."""
        ...

    def score(self, requests: Sequence[ScoreRequest]) -> list[Scores | Failure]:
        """Log-probabilities of each token of each continuation of each request."""
        ...


class LocalLM(FrozenBackend):
    """A `FrozenLM` that renders and tokenises prompts itself, and asks an engine in this process.

    Args:
        identity: names the model and its arithmetic.
        chat: ``auto`` renders prompts with the tokenizer's chat template where it has one.
        parameters: number of the model's parameters.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        *,
        identity: str,
        chat: Literal["auto", "never"],
        eos_ids: frozenset[int],
        parameters: int,
        encoder_decoder: bool = False,
    ) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._identity = identity
        self._chat = chat
        self._eos_ids = eos_ids
        self._parameters = parameters
        self._encoder_decoder = encoder_decoder

    @property
    def identity(self) -> str:
        """Names the model and its arithmetic."""
        return self._identity

    @property
    def notice(self) -> str:
        """What the user should know of how it generates; empty for most models."""
        return self._engine.notice

    @property
    def parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return self._parameters

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion | Failure]:
        """One completion for each prompt: greedy at temperature 0, else sampled.

        Each prompt draws from a generator of its own that starts at ``sampling.seed``: the same
        prompt and seed give the same text in any company. Without a seed every draw is new.
        """
        encoded = [self._encode(prompt) for prompt in prompts]
        stop = sampling.stop
        if stop is None:
            stop = () if uses_chat(self._tokenizer, self._chat) else PLAIN_STOP
        readers = [_Reader(self._tokenizer, ids, stop) for ids in encoded]
        found = self._engine.sample(
            [
                SampleRequest(
                    prompt_ids=ids,
                    seeds=[
                        random.SystemRandom().getrandbits(63)
                        if sampling.seed is None
                        else sampling.seed
                    ],
                    max_new_tokens=sampling.max_new_tokens,
                    temperature=sampling.temperature,
                    eos_ids=self._eos_ids,
                    stop=StopStrings(self._tokenizer, stop, reader.stopped) if stop else None,
                )
                for ids, reader in zip(encoded, readers, strict=True)
            ]
        )
        return [
            one if isinstance(one, Failure) else reader.completion(one[0], len(ids))
            for ids, one, reader in zip(encoded, found, readers, strict=True)
        ]

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[Choice | Failure]:
        """Probabilities of the options: the softmax over their likelihoods as continuations.

        An option is the sum of its two spellings, with a small and with a capital first letter:
        which one a model writes is habit.
        """
        spelled = [(option, text) for option in options for text in _spellings(option)]
        encoded = [self._encode(prompt) for prompt in prompts]
        requests = [
            ScoreRequest(ids, [self._continuation_ids(ids, text) for _, text in spelled])
            for ids in encoded
        ]
        results: list[Choice | Failure] = []
        for request, found in zip(requests, self._engine.score(requests), strict=True):
            if isinstance(found, Failure):
                results.append(found)
                continue
            likelihoods = torch.tensor([math.fsum(one) for one in found], dtype=torch.float64)
            probabilities = dict.fromkeys(options, 0.0)
            shares = likelihoods.softmax(0).tolist()
            for (option, _), share in zip(spelled, shares, strict=True):
                probabilities[option] += share
            results.append(Choice(probabilities, tokens_in=_tokens_read(request), tokens_out=0))
        return results

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str]
    ) -> list[Score | Failure]:
        """Log-likelihood of each continuation after its prompt, summed over its tokens.

        Prompt and continuation are tokenised separately; no EOS is counted.
        """
        encoded = [self._encode(prompt) for prompt in prompts]
        requests = [
            ScoreRequest(ids, [self._continuation_ids(ids, text)])
            for ids, text in zip(encoded, continuations, strict=True)
        ]
        return [
            found
            if isinstance(found, Failure)
            # Summed exactly: long continuations would lose digits.
            else Score(math.fsum(found[0]), len(found[0]), len(ids) + len(found[0]))
            for ids, found in zip(encoded, self._engine.score(requests), strict=True)
        ]

    def check_alive(self) -> None:
        """Checks that the engine can take requests.

        Raises:
            RuntimeError: if it has ended.
        """
        if isinstance(self._engine, SharedEngine):
            self._engine.check_alive()

    def close(self) -> None:
        """Ends the engine and its thread, if it has one; the model is not asked again."""
        if isinstance(self._engine, SharedEngine):
            self._engine.close()

    def _encode(self, prompt: Prompt) -> list[int]:
        return encode(prompt, self._tokenizer, self._chat)

    def _continuation_ids(self, prompt_ids: Sequence[int], text: str) -> list[int]:
        return encode_continuation(
            prompt_ids, text, self._tokenizer, encoder_decoder=self._encoder_decoder
        )


def digest_of(
    tensors: Iterable[tuple[str, Tensor]], tokenizer: PreTrainedTokenizerBase, chat: str
) -> str:
    """A digest of weights and tokenizer, since folders are overwritten.

    It covers about a thousand elements of each weight: training changes all of them, and reading
    the whole of a large model would take longer than loading it.
    """
    digest = hashlib.sha256()
    for name, tensor in tensors:
        flat = tensor.detach().flatten()
        some = flat[:: max(1, flat.numel() // 1024)].float().cpu().numpy()
        digest.update(f"{name}:{tuple(tensor.shape)}".encode() + some.tobytes())
    vocabulary = sorted(tokenizer.get_vocab().items())
    digest.update(f"{vocabulary}:{tokenizer.chat_template}:{chat}".encode())
    return digest.hexdigest()[:16]


class _Reader:
    """Reads replies to one prompt.

    Args:
        stop: the reply ends before the first of these.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], stop: Sequence[str]
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        end = str(tokenizer.decode(prompt_ids[-_THINKING_TAIL:]))
        self._thinks = opens_thinking(end)
        """Whether the reply begins within hidden thinking."""

    def completion(self, one: Generated, tokens_in: int) -> Completion:
        """The completion of a sample."""
        seen = self._visible(one.response_ids)
        cut = one.finish_reason == "length" and not seen.stopped
        finish: Literal["stop", "length"] = "length" if cut else "stop"
        return Completion(seen.text, tokens_in, len(one.response_ids), finish, seen.thinking)

    def stopped(self, tokens: Sequence[int]) -> bool:
        """Whether a sample's visible reply contains a stop string."""
        return self._visible(tokens).stopped

    def _visible(self, tokens: Sequence[int]) -> Visible:
        # Models may mark their thinking with special tokens, so these are looked for first.
        marked = str(self._tokenizer.decode(tokens, skip_special_tokens=False))
        if not (self._thinks or holds_thinking(marked)):
            plain = str(self._tokenizer.decode(tokens, skip_special_tokens=True))
            return visible_reply(plain, self._stop)
        return visible_reply(
            marked,
            self._stop,
            thinking=self._thinks,
            special_tokens=self._tokenizer.all_special_tokens,
        )


def _spellings(option: str) -> list[str]:
    first, rest = option[:1], option[1:]
    return sorted({first.lower() + rest, first.upper() + rest})


def _tokens_read(request: ScoreRequest) -> int:
    """Counts the tokens of the prompt once, and all but the last of each continuation."""
    return len(request.prompt_ids) + sum(len(one) - 1 for one in request.continuations)
