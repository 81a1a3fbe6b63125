"""Questions that do not fit into the models' windows are found before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, get_args

from lmcot.config import Config, FrozenTeacher, GuidanceRewards
from lmcot.config.prompts import GuidedKind, PromptKind
from lmcot.config.rows import default_rows, find_row
from lmcot.data.prompts import PromptTemplates
from lmcot.data.render import Chat, encode, render
from lmcot.data.row_requests import frozen_prompt, teacher_prompt
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
    fixed: bool = True
    """Whether the prompt around a question is the same for all questions."""
    _frame: tuple[int, int] = field(init=False)
    """Characters and tokens of the prompt around any question."""

    def __post_init__(self) -> None:
        empty = self.ask(Example("", "", "", ()))
        text = render(empty, self.tokenizer, self.chat)
        self._frame = len(text), len(encode(empty, self.tokenizer, self.chat))
        if self.fixed and not self.limits.fit(self._frame[1] + self.beside, self.reply):
            raise UserError(
                f"the prompt without any question has {self._frame[1] + self.beside} tokens, which "
                f"leaves no room for {self.reply} of the reply in the {self.limits.window} "
                f"positions of '{self.limits.source}': lower {self.settings}"
            )

    def lack(self, example: Example) -> str:
        """A sentence on what does not fit; empty if everything does."""
        if self.limits.window is None:
            return ""
        prompt = self.ask(example)
        text, (characters, tokens) = render(prompt, self.tokenizer, self.chat), self._frame
        # No token is shorter than a character: most questions need not be tokenised.
        most = tokens + len(text) - characters + _SEAM + self.beside
        if self.fixed and text.isascii() and self.limits.fit(most, self.reply):
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
            templates.rationale, _first_answer_tokens(config), length,
            f"{_CONTEXT} or policy.max_new_tokens",
        )
        for source in _readers(config)
    ]  # fmt: skip
    return [*found, *_needs_of_frozen(config, templates, tokenizer)]


def _needs_of_frozen(
    config: Config, templates: PromptTemplates, tokenizer: PreTrainedTokenizerBase
) -> list[Need]:
    """The needs of the frozen LM for the prompts that rewards, teacher and rows ask it."""
    frozen = config.frozen
    source = frozen.local_source if frozen is not None else None
    if frozen is None or source is None:
        return []
    own = tokenizer if source == config.policy.source else load_tokenizer(source)
    limits, chat = read_limits(source, own), frozen.chat_of(config.prompts)
    fixed = templates.nearest is None

    def asks(kind: PromptKind) -> Callable[[Example], Prompt]:
        return lambda example: frozen_prompt(kind, templates, example, "")

    found = []
    for kind, questions in _asked(config).items():
        guided = kind in get_args(GuidedKind)
        limit = frozen.rationale_limit if kind == "cot" else frozen.answer_limit
        written = config.policy.max_new_tokens + _first_answer_tokens(config)
        beside = written if guided else 0
        found.append(
            Need(
                questions, limits, own, chat, asks(kind), beside, limit, _to_lower(kind),
                fixed,
            )
        )  # fmt: skip
    teacher = config.teacher
    if isinstance(teacher, FrozenTeacher):
        ask = partial(teacher_prompt, teacher, templates, hinted=teacher.rationalise)
        limit, lower = frozen.rationale_limit, _to_lower("cot")
        fixed = fixed or not teacher.demonstrations
        found.append(Need((TRAIN,), limits, own, chat, ask, 0, limit, lower, fixed))
    return [*found, *_needs_of_judge(config, templates, limits, own, chat)]


def _asked(config: Config) -> dict[PromptKind, tuple[str, ...]]:
    """The kinds of prompts that the frozen LM is asked, with the kinds of questions of each."""
    rows = config.evaluate.rows
    measured = {find_row(one).prompt for one in (default_rows() if rows is None else rows)}
    trained: set[PromptKind] = set()
    if config.rewards.kind == "guidance":
        trained.add(config.prompts.guided_kind)
        if config.evaluate.during.every:
            measured.add(config.prompts.guided_kind)
    kinds: tuple[PromptKind, ...] = ("guided", "cot", "standard", "rationale_only")
    if config.prompts.advises:
        trained.add(config.prompts.first_answer)
        measured.add(config.prompts.first_answer)
    asked = {
        kind: (*([TRAIN] if kind in trained else []), *([VALIDATION] if kind in measured else []))
        for kind in kinds
    }
    return {kind: questions for kind, questions in asked.items() if questions}


def _first_answer_tokens(config: Config) -> int:
    """Most tokens of a first answer in a prompt, where the small LM advises."""
    if not config.prompts.advises or config.frozen is None:
        return 0
    reasons = config.prompts.first_answer == "cot"
    return config.frozen.rationale_limit if reasons else config.frozen.answer_limit


def _to_lower(kind: PromptKind) -> str:
    """The settings to lower if a kind of prompt does not fit the frozen LM."""
    context = "" if kind == "rationale_only" else f"{_CONTEXT}, "
    last = {"cot": "frozen.max_rationale_tokens", "standard": "frozen.max_answer_tokens"}
    return (
        f"{context}prompts.demonstrations, frozen.max_thinking_tokens or "
        f"{last.get(kind, 'policy.max_new_tokens')}"
    )


def _needs_of_judge(
    config: Config,
    templates: PromptTemplates,
    limits: Limits,
    tokenizer: PreTrainedTokenizerBase,
    chat: Chat,
) -> list[Need]:
    """The need of the longest judge's question that a reward depends on; it reads the context."""
    rewards = config.resolved().rewards
    if not isinstance(rewards, GuidanceRewards):
        return []
    judged = [a for a, one in rewards.aspects.items() if one.source == "judge" and one.weight > 0]
    if not judged:
        return []
    longest = max(judged, key=lambda aspect: len(templates.file.judge.aspects[aspect]))
    questions = (TRAIN, *([VALIDATION] if config.evaluate.aspect_questions else []))
    return [
        Need(
            questions, limits, tokenizer, chat,
            lambda example: templates.judge(example, "", longest),
            config.policy.max_new_tokens, 1, f"{_CONTEXT} or policy.max_new_tokens",
        )
    ]  # fmt: skip


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
