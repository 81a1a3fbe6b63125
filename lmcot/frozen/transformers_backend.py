"""The frozen LM on transformers: causal and encoder-decoder models, in this process."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel

from lmcot.data.render import encode
from lmcot.models.batches import pad_left, pad_right
from lmcot.models.generation import Generated, generate_unit
from lmcot.models.sources import count_parameters, eos_ids
from lmcot.records import Choice, Completion, Failure, FailureKind, Prompt, Sampling, Score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Starts a text from which tokenizers merge nothing into what follows; see `_continuation_ids`.
_ANCHOR = "\n"
T = TypeVar("T")


class TransformersLM:
    """A `FrozenLM` that runs a model and tokenizer that are already loaded.

    Batches are packed by length and hold at most ``max_batch_tokens`` tokens, padding included
    (a longer prompt goes alone). What a prompt gets does not depend on who shares its batch, up
    to the rounding of the arithmetic; the same calls give the same batches.

    Args:
        identity: names the model and its arithmetic.
        chat: ``auto`` renders prompts with the tokenizer's chat template where it has one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        identity: str,
        chat: Literal["auto", "never"],
        max_batch_tokens: int,
    ) -> None:
        self._model = model.eval()
        self._tokenizer = tokenizer
        self._identity = identity
        self._chat = chat
        self._max_batch_tokens = max_batch_tokens
        self._encoder_decoder = bool(model.config.is_encoder_decoder)
        self._eos_ids = eos_ids(model, tokenizer)
        self._pad_id = tokenizer.pad_token_id or 0
        # T5 has none: its positions are relative.
        self._max_positions: int | None = getattr(
            model.config.get_text_config(), "max_position_embeddings", None
        )
        # Models with ALiBi take no position ids.
        self._takes_positions = "position_ids" in inspect.signature(model.forward).parameters

    @property
    def identity(self) -> str:
        """Names the model and its arithmetic."""
        return self._identity

    @property
    def parameters(self) -> int:
        """Number of parameters; tied ones count once."""
        return count_parameters(self._model)

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Completion | Failure]:
        """One completion for each prompt: greedy at temperature 0, else sampled.

        Each prompt draws from a generator of its own that starts at ``sampling.seed``: the same
        prompt and seed give the same text in any company. Without a seed every draw is new.
        """
        encoded = [self._encode(prompt) for prompt in prompts]
        seeds = [
            random.SystemRandom().getrandbits(63) if sampling.seed is None else sampling.seed
            for _ in prompts
        ]
        results: list[Completion | Failure | None] = [
            self._unfit(ids, sampling.max_new_tokens) for ids in encoded
        ]
        for batch in self._batches([len(ids) for ids in encoded], results):
            generated = generate_unit(
                self._model,
                [encoded[index] for index in batch],
                seeds=[seeds[index] for index in batch],
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                eos_ids=self._eos_ids,
                pad_id=self._pad_id,
                stop=self._stops(sampling.stop),
            )
            for index, one in zip(batch, generated, strict=True):
                results[index] = self._completion(one, len(encoded[index]), sampling.stop)
        return _complete(results)

    def choose(self, prompts: Sequence[Prompt], options: Sequence[str]) -> list[Choice | Failure]:
        """Probabilities of the options: the softmax over their likelihoods as continuations.

        An option is the sum of its two spellings, with a small and with a capital first letter:
        which one a model writes is habit. Where every spelling is one token, one forward pass
        over the prompt tells them all.
        """
        spelled = [(option, text) for option in options for text in _spellings(option)]
        encoded = [self._encode(prompt) for prompt in prompts]
        rows = [(ids, self._continuation_ids(ids, text)) for ids in encoded for _, text in spelled]
        likelihoods: list[list[float] | Failure]
        if all(len(continuation) == 1 for _, continuation in rows):
            tokens = [continuation[0] for _, continuation in rows]
            likelihoods = self._next_token_loglikelihoods(encoded, _groups(tokens, len(spelled)))
            forwards = 1
        else:
            flat = self._loglikelihoods(rows)
            likelihoods = [_all_or_failure(group) for group in _groups(flat, len(spelled))]
            forwards = len(spelled)
        results: list[Choice | Failure] = []
        for ids, found in zip(encoded, likelihoods, strict=True):
            if isinstance(found, Failure):
                results.append(found)
                continue
            probabilities = dict.fromkeys(options, 0.0)
            shares = torch.tensor(found, dtype=torch.float64).softmax(0).tolist()
            for (option, _), share in zip(spelled, shares, strict=True):
                probabilities[option] += share
            results.append(Choice(probabilities, tokens_in=forwards * len(ids), tokens_out=0))
        return results

    def score(
        self, prompts: Sequence[Prompt], continuations: Sequence[str]
    ) -> list[Score | Failure]:
        """Log-likelihood of each continuation after its prompt, summed over its tokens.

        Prompt and continuation are tokenised apart; no EOS is counted.
        """
        encoded = [self._encode(prompt) for prompt in prompts]
        rows = [
            (ids, self._continuation_ids(ids, text))
            for ids, text in zip(encoded, continuations, strict=True)
        ]
        return [
            found
            if isinstance(found, Failure)
            else Score(found, len(continuation), len(ids) + len(continuation))
            for found, (ids, continuation) in zip(self._loglikelihoods(rows), rows, strict=True)
        ]

    def _encode(self, prompt: Prompt) -> list[int]:
        return encode(prompt, self._tokenizer, self._chat)

    def _continuation_ids(self, prompt_ids: Sequence[int], text: str) -> list[int]:
        """Tokens of a text as it goes on after a prompt, without special tokens.

        For a causal model a space parts it from the prompt, unless there is white space already.
        It is tokenised behind a line break that is then cut off, since tokenizers in the manner
        of Llama 2 put a space of their own before whatever stands first.
        """
        plain: list[int] = self._tokenizer.encode(text, add_special_tokens=False)
        if self._encoder_decoder:
            return plain
        before = self._tokenizer.decode(prompt_ids[-1:])
        if before and not before[-1].isspace() and not text[:1].isspace():
            text = " " + text
        anchor: list[int] = self._tokenizer.encode(_ANCHOR, add_special_tokens=False)
        whole: list[int] = self._tokenizer.encode(_ANCHOR + text, add_special_tokens=False)
        if whole[: len(anchor)] == anchor:
            return whole[len(anchor) :]
        return self._tokenizer.encode(text, add_special_tokens=False)

    def _unfit(self, prompt_ids: Sequence[int], more: int) -> Failure | None:
        """Why a prompt, with so many tokens after it, cannot go through; None if it can."""
        if not prompt_ids:
            return Failure(FailureKind.PERMANENT, "the prompt is empty")
        if self._max_positions is None:
            return None
        # An encoder-decoder counts positions anew in its decoder.
        needed = max(len(prompt_ids), more) if self._encoder_decoder else len(prompt_ids) + more
        if needed <= self._max_positions:
            return None
        return Failure(
            FailureKind.PERMANENT,
            f"a prompt of {len(prompt_ids)} tokens and {more} tokens after it do not fit into the "
            f"frozen LM's {self._max_positions} positions",
        )

    def _batches(self, lengths: Sequence[int], results: Sequence[object]) -> Iterator[list[int]]:
        """Indices of what has no result yet, packed by length within the token budget."""
        waiting = [index for index, result in enumerate(results) if result is None]
        batch: list[int] = []
        for index in sorted(waiting, key=lambda index: lengths[index]):
            if batch and lengths[index] * (len(batch) + 1) > self._max_batch_tokens:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def _stops(self, stop: Sequence[str]) -> Callable[[list[int]], bool] | None:
        if not stop:
            return None
        return lambda ids: any(end in self._decode(ids) for end in stop)

    def _decode(self, ids: Sequence[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _completion(self, one: Generated, tokens_in: int, stop: Sequence[str]) -> Completion:
        text = self._decode(one.response_ids)
        ends = [text.index(end) for end in stop if end in text]
        return Completion(
            text=text[: min(ends, default=len(text))],
            tokens_in=tokens_in,
            tokens_out=len(one.response_ids),
            finish_reason="length" if one.finish_reason == "length" and not ends else "stop",
        )

    def _loglikelihoods(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[float | Failure]:
        """Of each (prompt, continuation), both as ids; natural log, summed over tokens."""
        results: list[float | Failure | None] = [
            self._unfit(prompt, len(continuation)) for prompt, continuation in rows
        ]
        lengths = [len(prompt) + len(continuation) for prompt, continuation in rows]
        for batch in self._batches(lengths, results):
            logits = self._continuation_logits([rows[index] for index in batch])
            for index, row_logits in zip(batch, logits, strict=True):
                target = torch.tensor(rows[index][1], device=row_logits.device)
                logprobs = row_logits.float().log_softmax(-1)
                # Summed in float64: long continuations would lose digits.
                picked = logprobs.gather(-1, target.unsqueeze(-1)).double()
                results[index] = float(picked.sum())
        return _complete(results)

    def _next_token_loglikelihoods(
        self, encoded: Sequence[list[int]], candidates: Sequence[Sequence[int]]
    ) -> list[list[float] | Failure]:
        """For each prompt the log-likelihood of each candidate as its next token."""
        results: list[list[float] | Failure | None] = [self._unfit(ids, 1) for ids in encoded]
        for batch in self._batches([len(ids) for ids in encoded], results):
            # Logits are those before the token, so the token that stands there does not matter.
            rows = [(encoded[index], [candidates[index][0]]) for index in batch]
            for index, logits in zip(batch, self._continuation_logits(rows), strict=True):
                results[index] = logits[0].float().log_softmax(-1)[[*candidates[index]]].tolist()
        return _complete(results)

    @torch.inference_mode()
    def _continuation_logits(self, rows: Sequence[tuple[list[int], list[int]]]) -> list[Tensor]:
        """For each (prompt, continuation) the logits that predict the continuation's tokens.

        Each is [continuation length, vocabulary]. The last token is never put in: it predicts
        nothing that is asked for.
        """
        device = self._model.device
        inputs: dict[str, Any]
        if self._encoder_decoder:
            ids, mask = pad_right([prompt for prompt, _ in rows], self._pad_id)
            start: int = self._model.config.decoder_start_token_id
            shifted, _ = pad_right([[start, *tail[:-1]] for _, tail in rows], self._pad_id)
            # Padding follows the decoder's tokens, where causal attention does not look.
            inputs = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": shifted}
            logits = self._model(**{name: t.to(device) for name, t in inputs.items()}).logits
            return [logits[row, : len(tail)] for row, (_, tail) in enumerate(rows)]
        ids, mask = pad_left([[*prompt, *tail[:-1]] for prompt, tail in rows], self._pad_id)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if self._takes_positions:
            inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp_min(0)
        inputs = {name: t.to(device) for name, t in inputs.items()}
        # With the padding in front all continuations end at the right: only there logits are made.
        longest = max(len(tail) for _, tail in rows)
        logits = self._model(**inputs, logits_to_keep=max(longest, 1), use_cache=False).logits
        return [logits[row, logits.shape[1] - len(tail) :] for row, (_, tail) in enumerate(rows)]


def _spellings(option: str) -> list[str]:
    first, rest = option[:1], option[1:]
    return sorted({first.lower() + rest, first.upper() + rest})


def _complete(results: Sequence[T | None]) -> list[T]:
    assert all(result is not None for result in results), "a prompt was left without a result"
    return [result for result in results if result is not None]


def _groups(items: Sequence[T], size: int) -> list[Sequence[T]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _all_or_failure(found: Sequence[float | Failure]) -> list[float] | Failure:
    values: list[float] = []
    for one in found:
        if isinstance(one, Failure):
            return one
        values.append(one)
    return values
