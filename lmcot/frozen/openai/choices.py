"""Which option a reply chose, and with what probability."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence

from lmcot.frozen.openai.replies import Faulty, Reply
from lmcot.frozen.openai.scores import sound
from lmcot.records import Choice, Failure, FailureKind
from lmcot.text.visible import holds_thinking, visible_reply

_CONCLUDES = r"\b(?:answer|verdict|conclusion|response)\s(?:(?:to|of|for)\s(?:\w+\s){1,6}?)?"
_BETWEEN = r"(?:(?:is|are|would be|must be|should be|clearly|definitely|simply|therefore)\s)*"
_GIVEN_BOTH = ("or", "and")


def to_choice(reply: Reply, options: Sequence[str]) -> Choice | Failure:
    """Probabilities of the options: from the first word's alternatives, else from the text.

    The alternatives of a thinking token say nothing of the answer: where the model thought, the
    text after its thinking is read.

    Raises:
        Faulty: if there is neither, or a log-probability is invalid.
    """
    if reply.withheld:
        raise Faulty(reply.withheld, again=False)
    text, thought = _after_thinking(reply)
    found = None if thought else _from_alternatives(reply, options)
    found = found or _from_text(text, options)
    if found is not None:
        return Choice(found, reply.tokens_in, reply.tokens_out, estimated=reply.estimated)
    reason = f"the endpoint's reply is none of {', '.join(options)}"
    if thought and not text.strip():
        cut = "did not end within the tokens that it may write"
        more = f"its hidden thinking {cut if reply.cut else 'is all it holds'}"
        reason = (
            f"{reason}: {more}; raise frozen.max_thinking_tokens, or switch thinking off with "
            "frozen.extra_body"
        )
        return Failure(FailureKind.PERMANENT, reason)
    if not text.strip():
        raise Faulty(f"{reason}: it holds no text")
    start = " ".join(text.split())[:60]
    return Failure(FailureKind.PERMANENT, f"{reason}, but begins: {start}")


def has_alternatives(reply: Reply) -> bool:
    """Whether the endpoint gives log-probabilities of alternative tokens."""
    return reply.tokens is not None and any(top for _, top in reply.tokens.alternatives())


def _after_thinking(reply: Reply) -> tuple[str, bool]:
    """The text after any hidden thinking, and whether there was any."""
    seen = visible_reply(reply.text)
    return seen.text, bool(reply.thinking or seen.thinking) or holds_thinking(reply.text)


def _from_alternatives(reply: Reply, options: Sequence[str]) -> dict[str, float] | None:
    """The first word's probability mass by option, normalised; None if there is none.

    Tokens before the first word that are only punctuation or white space are skipped.
    """
    if reply.tokens is None:
        return None
    for token, alternatives in reply.tokens.alternatives():
        mass = _mass(alternatives, options)
        total = math.fsum(mass.values())
        if total > 0:
            return {option: share / total for option, share in mass.items()}
        if not token or any(map(str.isalnum, token)):
            return None
    return None


def _mass(
    alternatives: Iterable[tuple[str, float | None]], options: Sequence[str]
) -> dict[str, float]:
    mass = dict.fromkeys(options, 0.0)
    for token, logprob in alternatives:
        share = math.exp(sound(logprob))
        option = _begun_by(token, options)
        if option is not None:
            mass[option] += share
    return mass


def _begun_by(token: str, options: Iterable[str]) -> str | None:
    """The option that begins with the token, if there is exactly one."""
    start = token.strip(" \t\r\n▁Ġ").lower()
    begun = [option for option in options if start and option.lower().startswith(start)]
    return begun[0] if len(begun) == 1 else None


def _from_text(text: str, options: Sequence[str]) -> dict[str, float] | None:
    """Probability 1 for the option that the text begins with or concludes with."""
    words = " ".join("".join(c if c.isalnum() else " " for c in text.lower()).split())
    named = {option.lower(): option for option in options}
    either = "|".join(map(re.escape, named))
    begins = re.match(
        rf"({either})\b(?! (?:{'|'.join((*_GIVEN_BOTH, *map(re.escape, named)))})\b)", words
    )
    said = [begins[1]] if begins else []
    said += [] if begins else re.findall(rf"{_CONCLUDES}{_BETWEEN}({either})\b", words)
    if not said:
        return None
    return {option: float(option == named[said[-1]]) for option in options}
