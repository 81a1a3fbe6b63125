"""What of a model's text is its reply.

Hidden thinking is none of it, nor are special tokens that came as text. Stop strings hold for what
is left: a blank line within the thinking, or before the first word, ends no reply.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

PLAIN_STOP = ("\n\n",)
"""Where a reply ends if nothing else is said: a base model adds more after a blank line. A model
with a chat template ends its replies itself."""

NOT_SHOWN = "(not shown)"
"""In place of hidden thinking that an endpoint keeps to itself."""

_TAG = (
    "think|thinking|thoughts?|reason|reasoning|reflection|analysis|scratchpad|seed:think"
    "|longcat_think"
)
# Each alternative is of a bounded length, so a search takes linear time.
_MARKER = re.compile(
    rf"(?P<open><(?:{_TAG})(?:\s[^<>]{{0,80}})?>|\[think\]|\u25c1think\u25b7"
    r"|<\|begin_of_thought\|>|<\|start_thinking\|>|<\|think(?:ing)?\|>|<\|channel>thought\b"
    r"|<\|channel\|>\s{0,4}(?:analysis|commentary)[^<>]{0,80}(?:<\|[a-z]{1,20}\|>[^<>]{0,80})?"
    r"<\|message\|>"
    r"|\AHere(?:'s| is) my thought process:)"
    rf"|(?P<close></(?:{_TAG})\s{{0,4}}>|\[/think\]|\u25c1/think\u25b7"
    r"|<\|end_of_thought\|>|<\|end_thinking\|>|<\|/think(?:ing)?\|>|<channel\|>"
    r"|<\|channel\|>\s{0,4}final[^<>]{0,80}(?:<\|[a-z]{1,20}\|>[^<>]{0,80})?<\|message\|>"
    r"|Here(?:'s| is) my response:)",
    re.IGNORECASE,
)
# How the channels of gpt-oss read once a server has taken the special tokens out.
_BARE_ANALYSIS, _BARE_FINAL = "analysis", "assistantfinal"
# A box around an answer is no mere token: the answer is read out of it.
_SPECIAL = re.compile(
    r"(?P<turn></s>|<eos>|<\|(?:im_end|eot_id|eom_id|eot|eos|end|endoftext|end_of_text|end_of_turn"
    r"|endofturn|end_turn|end_of_sentence|end_of_turn_token|return|call|user|observation)\|>"
    r"|<end_of_turn>|<turn\|>|<end_of_utterance>|<EOD>"
    r"|<\uff5c(?:end\u2581of\u2581sentence|User)\uff5c>|\[INST\]"
    r"|(?:<\|(?:im_start|start|start_header_id|header_start|start_of_role|start_of_turn_token)\|>"
    r"|<start_of_turn>|<\|turn>)\s{0,4}(?:(?:assistant|model|user|system|developer|tool)\b)?)"
    r"|<\|(?!(?:begin|end)_of_box\|>)[^<>|\n]{1,40}\|>|<\uff5c[^<>\uff5c\n]{1,40}\uff5c>"
    r"|<s>|<(?:pad|unk|bos|mask|sep|cls)>|\[(?:/INST|PAD|EOS|BOS|UNK|CLS|SEP)\]|<</?SYS>>"
    # One that the limit of tokens cut in two.
    r"|<\|[^<>|\n]{0,40}\|?\Z"
    r"|<extra_id_\d{1,3}>|<0x(?!0A)[0-9A-F]{2}>",
    re.IGNORECASE,
)


# Some models repeat what they were asked.
_ECHOED_PROMPT = re.compile(r"\A\s*+(?:<s>\s*+)?\[INST\].*?\[/INST\]", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Visible:
    """A model's text, taken apart."""

    text: str
    """The reply, up to a stop string, without blank lines at its start."""
    thinking: str
    """What was written as hidden thinking."""
    stopped: bool
    """Whether a stop string ended the reply."""


def visible_reply(
    raw: str,
    stop: Sequence[str] = (),
    *,
    thinking: bool = False,
    special_tokens: Sequence[str] = (),
) -> Visible:
    """The reply in what a model wrote, in linear time.

    Thinking is what stands between the tags or in the channels that models use for it; all up to
    a closing tag whose opening the prompt held; all after an opening tag that is never closed.
    What follows the model's own end of turn does not count.

    Args:
        stop: the reply ends before the first of these.
        thinking: whether the prompt ends within thinking, so that the text begins there.
        special_tokens: of the model's tokenizer, beside those that are known by their form.
    """
    shown, hidden = _parted(raw.replace("\r\n", "\n").replace("\r", "\n"), thinking)
    for token in special_tokens:
        shown = shown.replace(token, "") if not _SPECIAL.fullmatch(token) else shown
    text = _without_blank_start(_without_special_tokens(shown))
    ends = [text.index(end) for end in stop if end and end in text]
    return Visible(text[: min(ends, default=len(text))], hidden.strip(), bool(ends))


def holds_thinking(text: str) -> bool:
    """Whether a text holds a mark that hidden thinking begins or ends with."""
    return _MARKER.search(text) is not None


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends within hidden thinking, which some chat templates open."""
    last = next(reversed([*_MARKER.finditer(prompt)]), None)
    return last is not None and last.lastgroup == "open" and not prompt[last.end() :].strip()


def _parted(text: str, inside: bool) -> tuple[str, str]:
    """What is shown and what is hidden."""
    if text.startswith(_BARE_ANALYSIS):
        before, final, after = text.rpartition(_BARE_FINAL)
        if final:
            return after, before.removeprefix(_BARE_ANALYSIS)
        if text[len(_BARE_ANALYSIS) :][:1].isupper():
            return "", text.removeprefix(_BARE_ANALYSIS)
    shown: list[str] = []
    hidden: list[str] = []
    place = 0
    for marker in _MARKER.finditer(text):
        (hidden if inside else shown).append(text[place : marker.start()])
        place = marker.end()
        if marker.lastgroup == "close" and not inside:
            # The prompt opened it.
            hidden += shown
            shown = []
        inside = marker.lastgroup == "open"
    (hidden if inside else shown).append(text[place:])
    return "".join(shown), "".join(hidden)


def _without_special_tokens(text: str) -> str:
    """The text of one turn, without the tokens that are about it."""
    text = _ECHOED_PROMPT.sub("", text, count=1)
    kept: list[str] = []
    place, said = 0, False
    for token in _SPECIAL.finditer(text):
        kept.append(text[place : token.start()])
        said = said or bool(kept[-1].strip())
        place = token.end()
        if said and token.lastgroup == "turn":
            return "".join(kept)
    return "".join([*kept, text[place:]])


def _without_blank_start(text: str) -> str:
    blank = len(text) - len(text.lstrip())
    return text[text.rfind("\n", 0, blank) + 1 :]
