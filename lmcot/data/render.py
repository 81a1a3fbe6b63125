"""Renders a prompt as the text or the tokens that a model reads."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from lmcot.errors import UserError
from lmcot.records import Example, Message, Prompt

if TYPE_CHECKING:
    from lmcot.data.prompts import PromptTemplates

Chat = Literal["auto", "never"]
# Starts a text from which tokenizers merge nothing into what follows; see `encode_continuation`.
_ANCHOR = "\n"


_UNSEEN = "[\\u00ad\\u200b-\\u200f\\u2060\\ufeff]*"
"""Characters that some tokenizers drop before they search for special tokens."""
_LT, _GT, _BAR, _SLASH = "[<\uff1c\ufe64]", "[>\uff1e\ufe65]", "[|\uff5c]", "[/\uff0f]?"
_OPEN, _CLOSE = r"[\[\uff3b]", r"[\]\uff3d]"
"""Marks' characters, and what text normalisation makes of them."""
_WORDS = (
    "s|pad|unk|bos|eos|bod|eod|bot|eot|sop|eop|eoh|eoa|eom|cls|sep|mask|gmask|smask|image|img|audio|"
    "video|box|quad|ref|role|turn|channel|user|assistant|system|human|tool|think|thinking|thought|"
    "reponame|filename|endoftext|startoftext|start|end|0x[0-9a-f]{2}|unused[0-9]+|"
    # Fill-in-the-middle, turns, reserved places: names with an underscore or a colon.
    "[a-z0-9]{1,32}(?:[_:▁][a-z0-9]{1,32}){1,8}"
)
_BRACKETED = (
    "INST|SYS|BOS|EOS|BOT|EOT|CLS|SEP|MASK|PAD|UNK|gMASK|sMASK|IMG|THINK|ARGS|PREFIX|MIDDLE|SUFFIX|"
    "SYSTEM|USER|ASSISTANT|TOOL|unused[0-9]+|[A-Z]{2,16}(?:_[A-Z]{2,16}){1,4}"
)
_MARKS = re.compile(
    # <|im_end|>, <|turn>, <turn|>, [|user|]: each has one of these pairs.
    f"(?:{_LT}|{_OPEN})(?={_UNSEEN}{_BAR})|{_BAR}(?={_UNSEEN}(?:{_GT}|{_CLOSE}))"
    # <<SYS>>
    f"|{_LT}(?={_UNSEEN}{_LT}{_SLASH}SYS{_GT})"
    # <s>, </s>, <start_of_turn>
    f"|{_LT}(?={_UNSEEN}{_SLASH}(?i:{_WORDS}){_GT})"
    # [INST], [/INST], [AVAILABLE_TOOLS]
    f"|{_OPEN}(?={_UNSEEN}{_SLASH}(?:{_BRACKETED}){_CLOSE})"
    # ]~b] and [e~[
    "|\\](?=~!?b[\\[\\]])|\\[(?=e~\\[)"
)


def tame(text: str) -> str:
    """The text without marks that a chat template or a tokenizer gives a meaning.

    A space goes behind the first character of each: it stays readable, and no common tokenizer
    takes it for a special token. Whose model reads the text is often not known.
    """
    return _MARKS.sub(r"\g<0> ", text)


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that rendering needs."""

    @property
    def chat_template(self) -> Any:
        """The chat template; None if there is none."""
        ...

    def apply_chat_template(self, conversation: Any, /, **options: Any) -> Any:
        """The conversation as text, with ``tokenize=False``."""
        ...

    def encode(self, text: Any, /, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text."""
        ...

    def decode(self, token_ids: Any, /) -> Any:
        """Text of token ids."""
        ...


def render(prompt: Prompt, tokenizer: Tokenizer, chat: Chat = "auto") -> str:
    """The prompt as text: by the chat template where there is one and ``chat`` allows it.

    Without, plainly.

    Raises:
        UserError: if the chat template refuses the prompt.
    """
    return _render_chat(prompt, tokenizer) if uses_chat(tokenizer, chat) else render_plain(prompt)


def render_plain(prompt: Prompt) -> str:
    """The prompt as text without a chat template.

    The system line, then each user's text and the reply to it, with blank lines between. A reply
    follows a colon on the same line, any other text on the next one; the text ends where the reply
    begins, after a colon without the space, which is part of a reply's first token.
    """
    return "".join(message.content + _end(message) for message in prompt).removesuffix(" ")


def _end(message: Message) -> str:
    if message.role != "user":
        return "\n\n"
    return " " if message.content.endswith(":") else "\n"


def encode(prompt: Prompt, tokenizer: Tokenizer, chat: Chat = "auto") -> list[int]:
    """The prompt as token ids; special tokens come from the chat template or the tokenizer.

    Raises:
        UserError: if the chat template refuses the prompt.
    """
    # A chat template writes the special tokens itself: never twice.
    own_tokens = not uses_chat(tokenizer, chat)
    return tokenizer.encode(render(prompt, tokenizer, chat), add_special_tokens=own_tokens)


def rationale_ids(
    example: Example, templates: PromptTemplates, tokenizer: Tokenizer, chat: Chat
) -> tuple[int, ...]:
    """Token ids of the prompt that the small LM answers with a rationale.

    Teaching, sampling and serving all read it from here: the policy sees what it was trained on.
    """
    return tuple(encode(templates.rationale(example), tokenizer, chat))


def encode_continuation(
    prompt_ids: Sequence[int], text: str, tokenizer: Tokenizer, *, encoder_decoder: bool
) -> list[int]:
    """Tokens of a text that continues a prompt, without special tokens.

    For a causal model a space parts it from the prompt, unless there is white space already. It is
    tokenised behind a line break that is then cut off, since tokenizers in the manner of Llama 2
    put a space of their own before whatever stands first.
    """
    if encoder_decoder:
        return tokenizer.encode(text, add_special_tokens=False)
    text = parted(tokenizer.decode(prompt_ids[-1:]), text)
    anchor = tokenizer.encode(_ANCHOR, add_special_tokens=False)
    whole = tokenizer.encode(_ANCHOR + text, add_special_tokens=False)
    if whole[: len(anchor)] == anchor:
        return whole[len(anchor) :]
    return tokenizer.encode(text, add_special_tokens=False)


def parted(before: str, text: str) -> str:
    """The text, with a space before it if neither side has white space there."""
    joined = before and not before[-1].isspace() and not text[:1].isspace()
    return f" {text}" if joined else text


def uses_chat(tokenizer: Tokenizer, chat: Chat) -> bool:
    """Whether prompts are rendered by the tokenizer's chat template."""
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
