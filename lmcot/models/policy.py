"""The small LM as the learner trains it: response logits and values, for both architectures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcot.models.batches import pad_left, pad_right


@dataclass(frozen=True, slots=True)
class SequenceBatch:
    """Prompts and responses as padded tensors, all int64 on the CPU.

    A decoder-only model has its prompts padded on the left and its responses on the right, so
    that all responses begin in the same column; an encoder-decoder has both on the right.
    """

    prompt_ids: Tensor
    """[rows, prompt]"""
    prompt_mask: Tensor
    """[rows, prompt]"""
    response_ids: Tensor
    """[rows, response]"""
    response_mask: Tensor
    """[rows, response]; 1 at every token of the response, EOS included"""


def make_batch(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    pad_id: int,
    encoder_decoder: bool,
) -> SequenceBatch:
    """Pads prompts and responses for one forward pass."""
    pad_prompts = pad_right if encoder_decoder else pad_left
    return SequenceBatch(*pad_prompts(prompts, pad_id), *pad_right(responses, pad_id))


class Policy(nn.Module):
    """A language model with a value head on its trunk.

    The head reads the last hidden state from which a token is predicted. It starts near zero
    (Huang et al. 2024, "The N implementation details of RLHF with PPO", detail 6), so that early
    values do not disturb the advantages.
    """

    def __init__(self, lm: PreTrainedModel, *, seed: int) -> None:
        super().__init__()
        self.lm = lm
        hidden = _hidden_size(lm)
        self.value_head = nn.Linear(hidden, 1, dtype=lm.dtype, device=lm.device)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            weight = torch.randn(1, hidden, generator=generator) * (1.0 / (hidden + 1))
            self.value_head.weight.copy_(weight)
            self.value_head.bias.zero_()

    @property
    def encoder_decoder(self) -> bool:
        """Whether the model has an encoder of its own for the prompt."""
        return bool(self.lm.config.is_encoder_decoder)

    def forward(
        self, batch: SequenceBatch, *, values: bool, head_only: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Logits and, if asked for, values at each response position.

        Position t holds the logits that predict response token t, and the value of the state
        before that token.

        Args:
            head_only: the values' gradient ends at the value head, and does not reach the trunk.

        Returns:
            logits [rows, response, vocabulary] in the model's dtype, values [rows, response] in
            float32 or None.
        """
        logits, hidden = response_logits(self.lm, batch, hidden=values)
        if hidden is None:
            return logits, None
        if head_only:
            hidden = hidden.detach()
        return logits, self.value_head(hidden).squeeze(-1).float()


def response_logits(
    lm: PreTrainedModel, batch: SequenceBatch, *, hidden: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Logits that predict the response tokens, and the last hidden states behind them.

    Returns:
        logits [rows, response, vocabulary]; hidden states [rows, response, width] or None.
    """
    if lm.config.is_encoder_decoder:
        return _seq2seq_logits(lm, batch, hidden)
    return _causal_logits(lm, batch, hidden)


def _causal_logits(
    lm: PreTrainedModel, batch: SequenceBatch, hidden: bool
) -> tuple[Tensor, Tensor | None]:
    length = batch.response_ids.shape[1]
    ids = torch.cat([batch.prompt_ids, batch.response_ids], dim=1).to(lm.device)
    mask = torch.cat([batch.prompt_mask, batch.response_mask], dim=1).to(lm.device)
    output = lm(
        input_ids=ids,
        attention_mask=mask,
        position_ids=(mask.cumsum(-1) - 1).clamp_min(0),
        logits_to_keep=length + 1,
        output_hidden_states=hidden,
        use_cache=False,
    )
    states = output.hidden_states[-1][:, -length - 1 : -1] if hidden else None
    return output.logits[:, -length - 1 : -1], states


def _seq2seq_logits(
    lm: PreTrainedModel, batch: SequenceBatch, hidden: bool
) -> tuple[Tensor, Tensor | None]:
    start = torch.full_like(batch.response_ids[:, :1], lm.config.decoder_start_token_id)
    shifted = torch.cat([start, batch.response_ids[:, :-1]], dim=1)
    # Position 0 is the start token, which for T5 is the pad token: causal attention alone keeps
    # later padding away from earlier positions, so no decoder mask is needed.
    output = lm(
        input_ids=batch.prompt_ids.to(lm.device),
        attention_mask=batch.prompt_mask.to(lm.device),
        decoder_input_ids=shifted.to(lm.device),
        output_hidden_states=hidden,
        use_cache=False,
    )
    return output.logits, output.decoder_hidden_states[-1] if hidden else None


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout to p = 0.

    Not by ``eval()``: gradient checkpointing needs train mode. The model's config keeps its own
    values, so that a saved model trains as before elsewhere.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def _hidden_size(lm: PreTrainedModel) -> int:
    config = lm.config.get_text_config(decoder=True)
    return int(config.hidden_size)
