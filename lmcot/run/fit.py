"""Questions that do not fit into the models' windows are found before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from lmcot.config import Config, FrozenTeacher
from lmcot.config.rows import default_rows, find_row
from lmcot.data.prompts import PromptTemplates
from lmcot.data.render import Chat, encode, render
from lmcot.errors import UserError
from lmcot.models.limits import Limits, read_limits
from lmcot.models.sources import load_tokenizer
from lmcot.records import Example, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAIN: Final = "data.train"
VALIDATION: Final = "data.validation"
_SEAM = 32
"""Tokens by which a prompt may exceed the sum of its parts."""
_CONTEXT = "data.context.max_tokens"


@dataclass
class Need:
    """The room that one model needs for each question of some kinds."""

    kinds: tuple[str, ...]
    """The kinds of questions: ``data.train``, ``data.validation``."""
    limits: Limits
    tokenizer: PreTrainedTokenizerBase
    chat: Chat
    ask: Callable[[Example], Prompt]
    beside: int
    """Tokens of the prompt that are not known yet: a rationale's."""
    reply: int
    """Largest number of tokens of the reply."""
    settings: str
    """The settings to lower if there is no room."""
    _frame: tuple[int, int] = field(init=False)
    """Characters and tokens of the prompt around any question."""

    def __post_init__(self) -> None:
        empty = self.ask(Example("", "", "", ()))
        text = render(empty, self.tokenizer, self.chat)
        self._frame = len(text), len(encode(empty, self.tokenizer, self.chat))

    def lack(self, example: Example) -> str:
        """A sentence on what does not fit; empty if everything does."""
        if self.limits.window is None:
            return ""
        prompt = self.ask(example)
        text, (characters, tokens) = render(prompt, self.tokenizer, self.chat), self._frame
        # No token is shorter than a character: most questions need not be tokenised.
        most = tokens + len(text) - characters + _SEAM + self.beside
        if text.isascii() and self.limits.fit(most, self.reply):
            return ""
        length = len(encode(prompt, self.tokenizer, self.chat)) + self.beside
        if self.limits.fit(length, self.reply):
            return ""
        return (
            f"{length} tokens of the prompt and {self.reply} of the reply do not fit into the "
            f"{self.limits.window} positions of '{self.limits.source}': lower {self.settings}"
        )


def needs_of(
    config: Config, templates: PromptTemplates, tokenizer: PreTrainedTokenizerBase
) -> list[Need]:
    """The needs of the models that run here; an endpoint's window is not known.

    Args:
        tokenizer: the small LM's.

    Raises:
        UserError: if a model has no embedding for some token of its tokenizer, or a chat template
            refuses the prompt.
    """
    chat, length = config.prompts.chat, config.policy.max_new_tokens
    found = [
        Need(
            (TRAIN, VALIDATION), read_limits(source, tokenizer), tokenizer, chat,
            templates.rationale, 0, length, f"{_CONTEXT} or policy.max_new_tokens",
        )
        for source in _readers(config)
    ]  # fmt: skip
    frozen = config.frozen
    source = frozen.local_source if frozen is not None else None
    if frozen is None or source is None:
        return found
    own = tokenizer if source == config.policy.source else load_tokenizer(source)
    limits = read_limits(source, own)
    lower = f"{_CONTEXT}, prompts.demonstrations, frozen.max_thinking_tokens or"
    if config.rewards.kind == "guidance":
        found.append(
            Need(
                (TRAIN, VALIDATION), limits, own, chat,
                lambda example: templates.guided(example, ""),
                length, frozen.answer_limit, f"{lower} policy.max_new_tokens",
            )
        )  # fmt: skip
    kinds = _kinds_of_cot(config)
    if kinds:
        found.append(
            Need(
                kinds, limits, own, chat, templates.cot,
                0, frozen.rationale_limit, f"{lower} frozen.max_rationale_tokens",
            )
        )  # fmt: skip
    return found


def lack_of(example: Example, kind: str, needs: Sequence[Need]) -> str:
    """What does not fit at the first model without room; empty if the question fits all."""
    lacks = (need.lack(example) for need in needs if kind in need.kinds)
    return next((lack for lack in lacks if lack), "")


def left_out(lacks: Sequence[str], total: int, kind: str, share: float) -> str:
    """A sentence on the questions that are left out; empty if there are none.

    Args:
        lacks: what was lacking, of each of them.
        share: of all questions, that may be.

    Raises:
        UserError: if there are more.
    """
    if not lacks:
        return ""
    told = f"{len(lacks)} of {total} questions of {kind}: too long for the model"
    if len(lacks) > share * total:
        raise UserError(
            f"{told}, more than failures.max_data_share ({share:g}) allows to leave out; the "
            f"first, {lacks[0]}"
        )
    return f"{told}, left out; the first, {lacks[0]}"


def _readers(config: Config) -> list[str]:
    """The models that read the small LM's tokens."""
    baseline = config.refine.advantage.critic_baseline
    other = baseline.critic.source if baseline else None
    return [config.policy.source, *([other] if other else [])]


def _kinds_of_cot(config: Config) -> tuple[str, ...]:
    """The kinds of questions that the frozen LM reasons about by itself."""
    rows = config.evaluate.rows
    asked = any(
        find_row(name).prompt == "cot" for name in (default_rows() if rows is None else rows)
    )
    taught = isinstance(config.teacher, FrozenTeacher)
    return (*([TRAIN] if taught else []), *([VALIDATION] if asked else []))
