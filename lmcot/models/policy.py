"""The small LM as the learner trains it: response logits and values, for both architectures."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcot.models.output_layer import output_at
from lmcot.models.sequences import Row, SequenceBatch, make_batch


class Policy(nn.Module):
    """A language model, with a critic where one is needed.

    The critic is either a linear head on the model's own last hidden state, or a model of its
    own. Its output starts near zero (Huang et al. 2024, "The N implementation details of RLHF
    with PPO", detail 6), so that early values do not disturb the advantages.
    """

    def __init__(self, lm: PreTrainedModel, critic: nn.Module | None = None) -> None:
        """Args: critic: a `value_head`, a `critic_model`, or None."""
        super().__init__()
        self.lm = lm
        self.critic = critic

    @property
    def start_id(self) -> int | None:
        """The token that the decoder starts with, if the model has an encoder for the prompt."""
        config = self.lm.config
        return int(config.decoder_start_token_id) if config.is_encoder_decoder else None

    def forward(
        self, batch: SequenceBatch, *, values: bool, head_only: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Logits and, if asked for, values at each response token.

        Those of a token are the logits that predict it, and the value of the state before it.

        Args:
            head_only: the values' gradient ends at the value head, and does not reach the trunk.

        Returns:
            logits [tokens, vocabulary] in the model's dtype, values [tokens] in float32 or None.
        """
        logits, hidden = response_logits(self.lm, batch)
        if not values or self.critic is None:
            return logits, None
        if isinstance(self.critic, nn.Linear):
            value = self.critic(hidden.detach() if head_only else hidden)
        else:
            value, _ = response_logits(self.critic, batch)
        return logits, value.squeeze(-1).float()


def value_head(lm: PreTrainedModel, seed: int) -> nn.Linear:
    """A linear layer from the last hidden state to one value, near zero."""
    hidden = int(lm.config.get_text_config(decoder=True).hidden_size)
    head = nn.Linear(hidden, 1, dtype=lm.dtype, device=lm.device)
    weight = torch.randn(1, hidden, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        head.weight.copy_(weight / (hidden + 1))
        head.bias.zero_()
    return head


def critic_model(lm: PreTrainedModel, seed: int) -> PreTrainedModel:
    """A copy of a language model with a value head in place of its output layer."""
    critic = copy.deepcopy(lm)
    critic.set_output_embeddings(value_head(lm, seed))
    return critic


def response_logits(lm: nn.Module, batch: SequenceBatch) -> tuple[Tensor, Tensor]:
    """Logits that predict the response tokens, and the hidden states that they come from.

    The output layer is given those positions alone: its product is the largest of a small
    model, and its result the largest tensor.

    Returns:
        logits [tokens, vocabulary]; hidden states [tokens, width].
    """
    model: Any = lm
    device = model.device
    where = batch.where.to(device)
    shared = batch.attention_mask().to(device) if batch.shared else None
    arguments: dict[str, Tensor | None]
    if batch.encoder_ids is None:
        arguments = {
            "input_ids": batch.ids,
            "attention_mask": (batch.segments >= 0).long() if shared is None else shared,
            "position_ids": batch.positions,
        }
    else:
        # A decoder alone with its response needs no mask: later padding is hidden by causality,
        # and the start token, for T5 the pad token, must stay visible.
        arguments = {
            "input_ids": batch.encoder_ids,
            "attention_mask": batch.encoder_mask,
            "decoder_input_ids": batch.ids,
            "decoder_attention_mask": shared,
        }
    with output_at(model.get_output_embeddings(), where) as seen:
        placed = {k: v if v is None else v.to(device) for k, v in arguments.items()}
        logits = model(**placed, use_cache=False).logits
    return logits.squeeze(0), seen[0]


@torch.no_grad()
def shares_prompts(lm: nn.Module, start_id: int | None) -> bool:
    """Whether responses behind one prompt get the logits that each would get alone.

    Asked of the model itself, with made-up tokens: an architecture may see positions or
    attention in ways of its own (sliding windows, recurrence, biases by distance). It is asked in
    float32: in 16 bits the rounding of a deep model hides what would be seen.
    """
    model: Any = lm
    if model.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    text = model.config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(text, "sliding_window", None):
        return False  # a window shows only behind prompts longer than it
    generator = torch.Generator().manual_seed(0)

    def made_up(length: int) -> list[int]:
        return torch.randint(text.vocab_size, (length,), generator=generator).tolist()

    rows = [Row(made_up(n), [made_up(m) for m in lengths]) for n, lengths in _TRIAL.items()]
    alone = [Row(row.prompt, [response]) for row in rows for response in row.responses]
    try:
        together, _ = response_logits(model, make_batch(rows, pad_id=0, start_id=start_id))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False  # it does not take a mask of this form
    apart, _ = response_logits(model, make_batch(alone, pad_id=0, start_id=start_id))
    return float((together - apart).abs().max()) < _ROUNDING * float(apart.std())


_ROUNDING = 1e-4
"""What the order of sums may change of the trial's logits, in parts of their spread."""
_TRIAL = {9: (5, 3, 6), 4: (2, 7)}
"""Length of a prompt, and of its responses."""


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
