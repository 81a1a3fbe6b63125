"""A prompt as the text or the tokens that one tokenizer's model reads."""

from __future__ import annotations

from typing import Any, Literal, Protocol

from lmcot.errors import UserError
from lmcot.records import Message, Prompt

Chat = Literal["auto", "never"]


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    @property
    def chat_template(self) -> Any:
        """The chat template; None if there is none."""
        ...

    def apply_chat_template(self, conversation: Any, /, **options: Any) -> Any:
        """The conversation as text, with ``tokenize=False``."""
        ...

    def encode(self, text: Any, /, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids."""
        ...


def render(prompt: Prompt, tokenizer: Tokenizer, chat: Chat = "auto") -> str:
    """The prompt as text: by the chat template where there is one and ``chat`` allows it.

    Without, plainly.

    Raises:
        UserError: if the chat template refuses the prompt.
    """
    return _render_chat(prompt, tokenizer) if _uses_chat(tokenizer, chat) else render_plain(prompt)


def render_plain(prompt: Prompt) -> str:
    """The prompt as text without a chat template.

    The system line, then each user's text and the reply to it, with blank lines between; the text
    ends where the reply begins.
    """
    ends = {"system": "\n\n", "user": "\n", "assistant": "\n\n"}
    return "".join(message.content + ends[message.role] for message in prompt)


def encode(prompt: Prompt, tokenizer: Tokenizer, chat: Chat = "auto") -> list[int]:
    """The prompt as token ids; special tokens come from the chat template or the tokenizer.

    Raises:
        UserError: if the chat template refuses the prompt.
    """
    # A chat template writes the special tokens itself: never twice.
    own_tokens = not _uses_chat(tokenizer, chat)
    return tokenizer.encode(render(prompt, tokenizer, chat), add_special_tokens=own_tokens)


def _uses_chat(tokenizer: Tokenizer, chat: Chat) -> bool:
    return chat == "auto" and bool(tokenizer.chat_template)


def _render_chat(prompt: Prompt, tokenizer: Tokenizer) -> str:
    from jinja2 import TemplateError  # comes with transformers' chat templates

    try:
        return _apply(prompt, tokenizer)
    except TemplateError:
        pass  # some templates (Gemma 2, Mistral) know no system role
    try:
        return _apply(_without_system(prompt), tokenizer)
    except TemplateError as error:
        raise UserError(
            f"the tokenizer's chat template refuses the prompt ({error}): set prompts.chat to "
            "'never'"
        ) from None


def _apply(prompt: Prompt, tokenizer: Tokenizer) -> str:
    conversation = [{"role": message.role, "content": message.content} for message in prompt]
    # Templates that know hidden thinking are told not to: the rationale is the thinking here.
    text = tokenizer.apply_chat_template(
        conversation, tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return str(text)


def _without_system(prompt: Prompt) -> Prompt:
    """The prompt with its system line put before the first user's text."""
    if not prompt or prompt[0].role != "system":
        return prompt
    system, user, *rest = prompt
    return (Message("user", f"{system.content}\n\n{user.content}"), *rest)
