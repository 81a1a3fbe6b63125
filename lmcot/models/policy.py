"""The small LM that the learner trains: response logits and values for both architectures."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmcot.models.attention import cut_up, in_parts, kernel_of
from lmcot.models.output_layer import output_at
from lmcot.models.sequences import Row, SequenceBatch, make_batch


class Policy(nn.Module):
    """A language model with an optional critic.

    The critic is either a linear head on the model's last hidden state or a separate model.
    Its output starts near zero (Huang et al. 2024, "The N implementation details of RLHF
    with PPO", detail 6), so that early values do not disturb the advantages.
    """

    def __init__(self, lm: PreTrainedModel, critic: nn.Module | None = None) -> None:
        """Args: critic: a `value_head`, a `critic_model`, or None."""
        super().__init__()
        self.lm = lm
        self.critic = critic

    @property
    def start_id(self) -> int | None:
        """The decoder's start token; None for a decoder-only model."""
        config = self.lm.config
        return int(config.decoder_start_token_id) if config.is_encoder_decoder else None

    def forward(
        self, batch: SequenceBatch, *, values: bool, head_only: bool = False
    ) -> tuple[Tensor, Tensor | None]:
        """Logits and optionally values at each response token.

        A token gets the logits that predict it and the value of the state before it.

        Args:
            head_only: whether the gradient of the values stops at the value head.

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
    """A linear layer from the last hidden state to one value, initialised near zero."""
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
    """Logits that predict the response tokens, and their hidden states.

    The output layer runs only at these positions: it is a small model's largest product, and
    its result the largest tensor.

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
        # With one response per row the decoder needs no mask: causality hides the padding at the
        # end, and the start token, which is T5's pad token, must stay visible.
        arguments = {
            "input_ids": batch.encoder_ids,
            "attention_mask": batch.encoder_mask,
            "decoder_input_ids": batch.ids,
            "decoder_attention_mask": shared,
        }
    with ExitStack() as inside:
        if shared is not None and kernel_of(model) != "model":
            inside.enter_context(in_parts(cut_up(batch, shared, model.dtype)))
        seen = inside.enter_context(output_at(model.get_output_embeddings(), where))
        placed = {k: v if v is None else v.to(device) for k, v in arguments.items()}
        logits = model(**placed, use_cache=False).logits
    return logits.squeeze(0), seen[0]


@torch.no_grad()
def shares_prompts(lm: nn.Module, start_id: int | None) -> bool:
    """Whether responses that share one prompt get the same logits as each alone.

    This runs the model on made-up tokens, since an architecture may treat positions or attention
    in its own way (sliding windows, recurrence, biases by distance). It runs in float32, since
    16-bit rounding in a deep model would hide the difference.
    """
    model: Any = lm
    if model.dtype != torch.float32:
        model = copy.deepcopy(model).float()
    text = model.config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"} or getattr(text, "sliding_window", None):
        return False  # a window only shows with prompts longer than it
    generator = torch.Generator().manual_seed(0)

    def made_up(length: int) -> list[int]:
        return torch.randint(text.vocab_size, (length,), generator=generator).tolist()

    rows = [Row(made_up(n), [made_up(m) for m in lengths]) for n, lengths in _TRIAL.items()]
    alone = [Row(row.prompt, [response]) for row in rows for response in row.responses]
    try:
        together, _ = response_logits(model, make_batch(rows, pad_id=0, start_id=start_id))
    except (RuntimeError, ValueError, TypeError, IndexError):
        return False  # the model does not accept a mask of this shape
    apart, _ = response_logits(model, make_batch(alone, pad_id=0, start_id=start_id))
    return float((together - apart).abs().max()) < _ROUNDING * float(apart.std())


_ROUNDING = 1e-4
"""Tolerated difference of the trial's logits from rounding, as a share of their spread."""
_TRIAL = {9: (5, 3, 6), 4: (2, 7)}
"""Length of each prompt in the trial, and the lengths of its responses."""


def disable_dropout(model: nn.Module) -> None:
    """Sets every dropout to p = 0.

    ``eval()`` would not do, since gradient checkpointing needs train mode. The model's config
    keeps its values, so that a saved model trains elsewhere as before.
    """
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("dropout", "attention_dropout", "activation_dropout", "dropout_rate"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
