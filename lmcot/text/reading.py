"""How the answer is read out of what a model wrote; one rule for all rows, rewards and requests.

Every pattern takes linear time: a run of white space is entered at its beginning only, and what
may repeat is bounded or possessive.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

from lmcot.records import Answer, Completion, Missing
from lmcot.text.markup import plain_characters, unwrapped, without_markup
from lmcot.text.sentences import split_sentences
from lmcot.text.visible import NOT_SHOWN, visible_reply

# A base model writes a question of its own next.
_QUESTION = re.compile(
    r"^[ \t*#]{0,20}(?:question|context|q)[ \t]{0,4}(?:\*\*)?:", re.IGNORECASE | re.MULTILINE
)
# Forms that a model was trained or told to put its answer into: LaTeX, JSON, a tag.
_FRAME = re.compile(
    r"\\boxed\{((?:[^{}]|\{[^{}]*\})*+)\}"
    r"|[\"'](?:\w{1,20}[_ ])?answer[\"']\s{0,20}:\s{0,20}\[?\s{0,20}"
    r"(?:\"((?:[^\"\\]|\\.){0,2000}+)\"|'((?:[^'\\]|\\.){0,2000}+)'|([^\s,}\]\"']+))",
    re.IGNORECASE | re.DOTALL,
)
_OPEN_FRAME = re.compile(r"(?:\\boxed\{|<answer>|\"answer\"\s{0,9}:)[^{}<]*\Z", re.IGNORECASE)
_TAG = re.compile(
    r"(?P<open><(?:(?:final[_ ]|short[_ ])?answer|ans|final)>|\[answer\]|<\|begin_of_box\|>)"
    r"|(?P<close></(?:(?:final[_ ]|short[_ ])?answer|ans|final)>|\[/answer\]|<\|end_of_box\|>)",
    re.IGNORECASE,
)
_IN_A_FEW_WORDS = r"(?:[ \t]{1,9}\(?in[ \t]{1,9}(?:\w{1,10}[ \t]{1,9}){0,3}words?\)?)?"
_CONCLUSION = re.compile(
    rf"\banswer{_IN_A_FEW_WORDS}"
    r"(?:\s{1,9}(?:to|for)\s{1,9}(?:the|this|that|your)\s{1,9}question)?"
    r"(?:\s{1,9}(?:is|was|would\s{1,9}be|must\s{1,9}be|should\s{1,9}be)\b"
    # That says where the answer stands, or that it does not, and not what it is.
    r"(?!\s{1,9}(?:not\s{1,9})?(?:explicitly\s{1,9}|directly\s{1,9})?"
    r"(?:found|given|stated|mentioned|provided|specified"
    r"|in\s{1,9}the\s{1,9}(?:context|text|passage))\b)"
    r"\s{0,9}[:\-\u2013\u2014]?|\s{0,9}[:=\uff1a])\s*+"
    # The same in other languages.
    r"|\b(?:antwort|r\u00e9ponse|respuesta|risposta|resposta)"
    r"(?:\s{1,9}(?:ist|lautet|est|es|\u00e8|\u00e9)\b\s{0,9}:?|\s{0,9}:)\s*+"
    r"|\u7b54\u6848(?:[\u662f\u4e3a]\s{0,9}[:\uff1a]?|\s{0,9}[:\uff1a])\s*+"
    # A line "Answer - X", or a heading "Answer" above it.
    r"|^[ \t#]{0,20}(?:the[ \t]{1,9})?(?:(?:final|short|correct)[ \t]{1,9})?answer"
    rf"{_IN_A_FEW_WORDS}(?:[ \t]{{1,9}}[-\u2013\u2014][ \t]{{1,9}}|[ \t]{{0,9}}$\s*+)",
    re.IGNORECASE | re.MULTILINE,
)
_EXPLANATION = re.compile(
    r"(?<=\S)\s++(?:explanation|justification|note)\s{0,9}:.*", re.IGNORECASE | re.DOTALL
)
# Lines that hold no answer: a label alone, a word of courtesy, or the question once more.
_EMPTY_LINE = re.compile(
    r"^[ \t#]{0,20}(?:(?:answer|reasoning|context)[ \t]{0,9}:[ \t]*+"
    r"|(?:the[ \t]{1,9})?(?:(?:final|short)[ \t]{1,9})?answer"
    r"[ \t]{1,9}in[ \t]{1,9}(?:\w{1,10}[ \t]{1,9}){0,3}words?[ \t]{0,9}[:.]?[ \t]*+"
    r"|(?:sure(?:[ \t]thing)?|certainly|of[ \t]course|absolutely|okay)[!.,]{0,3}[ \t]*+"
    r"|(?:question|q)[ \t]{0,9}:.*)$",
    re.IGNORECASE | re.MULTILINE,
)
# A bullet, a heading, or the label of a shortened "Answer:".
_LABEL = re.compile(
    r"\A\s*+(?:[-*\u2013\u2014\u00b7\u2022\u25cf\u2023][ \t]{1,9}|#{1,6}[ \t]{1,9})?"
    r"(?:(?:A|Ans|Assistant|Response|Output|Result)[ \t]{0,9}:[ \t]*+)?"
)
_NUMBERED = re.compile(r"\A\s*+(?:\(\d{1,2}\)|\d{1,2}[.)])(?:[ \t]{1,9}(?=\S)|(?=[^\W\d_]))")
_NEXT_ENTRY = re.compile(r"^[ \t]{0,20}\(?\d{1,2}[.)][ \t]", re.MULTILINE)
# A number with a full stop is an ordinal in some languages: "1. FC Köln", "2. Bundesliga".
_ORDINAL_OF = re.compile(
    r"(?:[\w-]{0,30}(?:liga|ligaen|league|division|divisjon|divisionen|deild|klasse|mannschaft"
    r"|weltkrieg|sinfonie|symphonie|kongress|bataillon|regiment|armee|hnl|snl)"
    r"|(?:FC|FFC|FCK|FCN|FCM|FSV|SC|SV|SK|TSV|TuS|VfB|VfL|VfR|BC|HC|HFC|KFC|TC|RC|BK|FK|IF|IK)"
    r"(?=[ \t]+\S)"
    r"|(?:januar|februar|märz|april|mai|maj|juni|juli|august|september|oktober|november|dezember"
    r"|december|januari|februari|marts|mars)(?=[ \t]*(?:\d|$|[.,])))\b",
    re.IGNORECASE,
)
# After a number, such a word begins the explanation of an answer that is that number.
_EXPLAINS = re.compile(
    r"(?:it|that|this|there|they|these|those|he|she|in|according|because|as|both|based|so)\b",
    re.IGNORECASE,
)
# What comes before an answer and says nothing of it.
_SOURCE = r"the (?:[a-z]{1,30} )?(?:context|reasoning|passages?|text|information|facts)\b"
_LEAD = re.compile(
    r"\A\s*+(?:(?:so|thus|therefore|hence),\s++"
    r"|(?:sure|certainly|of course|absolutely|okay|ok|alright)[,!.]\s++"
    r"|(?:in short|in a few words|here you go|here it is)[,:]\s++"
    rf"|(?:based on|according to) {_SOURCE}[\w ]{{0,100}},\s++)+",
    re.IGNORECASE,
)
_IS_THE_ANSWER = re.compile(
    r"(?<=\S)\s++(?:is|was) the (?:final |correct |right )?answer$", re.IGNORECASE
)
# What is said about the answer behind it. Titles have capitals there.
_ASIDE = re.compile(
    r"(?<=\S)(?:,\s{1,9}(?:which|who|whose|where|since|as (?:it|stated|mentioned))\b"
    rf"|,?\s{{1,9}}(?:according to|based on|as stated in) {_SOURCE}).*"
)
_LIFE_DATES = re.compile(
    r"(?<=\S)\s{0,9}\((?:(?:born\b|died\b|[bd]\.)[^()]{0,200}"
    r"|\d{4}\s{0,9}[-\u2013\u2014]\s{0,9}(?:\d{4})?)\)$"
)
_CITATION = re.compile(r"(?<=\S)\s{0,9}(?:\[\d{1,3}\]|\u3010[^\u3010\u3011]{0,40}\u3011)$")
_REASON = re.compile(r"(?<=\S),?\s{1,9}because\b.*", re.IGNORECASE | re.DOTALL)
_CLOSED_SENTENCE = re.compile(
    r"(yes|no)(?:\s{0,9}[,;:\u2013\u2014]\s*+|\s{1,9}-\s{1,9}"
    r"|\s{1,9}(?=(?:both|neither|they|it|he|she)\b))(.+)",
    re.IGNORECASE,
)
_VERB = re.compile(
    r"\b(?:is|are|was|were|isn't|aren't|wasn't|weren't|do|does|did|has|have|had|can)\b"
)
_STATEMENT = re.compile(rf"{_VERB.pattern}|\b(?:lies?|lived|[a-z]{{2,20}}ed)\b")
_STATEMENT_WORDS = 4
# How models begin that think aloud.
_THINKS_ALOUD = re.compile(
    r"(?:okay|ok|alright|hmm|wait|let me|let's|let us|we need|we have to|i need|i have to"
    r"|first(?:ly)?,|step (?:1|one)\b|to (?:answer|determine|find|solve)\b|the user\b)",
    re.IGNORECASE,
)
_REASONING_SENTENCES = 3
_CLOSING_WORDS = 8


@dataclass(frozen=True, slots=True)
class Reading:
    """The answer that a text holds."""

    answer: str
    missing: Missing
    """Why the text holds no answer; empty if it does."""
    stated: bool = False
    """Whether the text itself calls it its answer."""


def read_text(text: str, *, cut: bool) -> Reading:
    """The answer in any text.

    Args:
        cut: whether a limit of tokens ended the text.
    """
    plain = plain_text(text)
    concluded = _concluded(plain)
    answer, stated = concluded or _unstated(plain), bool(concluded)
    if not cut:
        return Reading(answer, "" if answer else "empty", stated)
    # A statement that the text was still going on from is a step towards an answer.
    if not answer or (not concluded and (_announces(plain) or _is_statement(answer))):
        return Reading(answer, "cut", stated)
    # What the text breaks off with may be half an answer; it may have been said before, too.
    before = not concluded and _goes_on(plain)
    whole = before or not plain.rstrip().endswith(answer)
    return Reading(answer, "" if whole else "cut", stated)


def read_answer(reply: Completion, read: Callable[..., Reading] = read_text) -> Answer:
    """The answer in a reply of the frozen LM.

    A reply lacks its answer because it ended without one (``empty``), or because its limit of
    tokens cut it before the answer was said, or within the answer (``cut``).

    Args:
        read: reads the text, as `read_text` does.
    """
    found = read(reply.text, cut=reply.finish_reason == "length")
    return Answer(
        reply.text,
        found.answer,
        reply.tokens_in,
        reply.tokens_out,
        found.missing,
        reply.estimated,
        _why_silent(reply),
    )


def _why_silent(reply: Completion) -> str:
    """Why a reply is nothing but hidden thinking, and what to do; empty for all other replies."""
    if reply.text.strip() or not reply.thinking:
        return ""
    remedy = (
        "raise frozen.max_thinking_tokens, or switch the model's thinking off (behind an endpoint "
        "by frozen.extra_body)"
    )
    if reply.thinking == NOT_SHOWN:
        return (
            "the frozen LM's reply was cut at its limit of tokens before it said a word, and its "
            f"endpoint shows no thinking: if the model thinks, {remedy}; else it writes nothing "
            "but special tokens, so that frozen.model, frozen.api or prompts.templates do not fit"
        )
    if reply.finish_reason == "length":
        return (
            "the frozen LM's reply was cut at its limit of tokens before it said a word, within "
            f"its hidden thinking: {remedy}"
        )
    return f"the frozen LM's reply is nothing but hidden thinking: {remedy}"


def extract_answer(text: str) -> str:
    """The short answer in a text; empty if there is none.

    It is what the text itself calls its answer (see `concluded_answer`), else the first sentence
    of the first line that says something. What is wrapped around it is taken off: markup, quotes,
    a number or bullet of a list, "Based on the context,", ", which is ..." and the final stop;
    "Yes, both are." is "Yes". A sentence is not searched for its answer: that takes knowing the
    question. Reasoning that never states its answer, several statements in a row, has none, unless
    a phrase stands by itself at its end.
    """
    plain = plain_text(text)
    return _concluded(plain) or _unstated(plain)


def concluded_answer(rationale: str) -> str:
    """The answer that a text states itself, for example "So the answer is X."; empty if none.

    ``\\boxed{X}``, ``<answer>X</answer>`` and ``"answer": "X"`` come first, then "the answer is X"
    and "Answer: X". Of several conclusions the last that says something counts, but none in an
    explanation that follows. Hidden thinking does not count, nor what follows on a new question
    ("Question: ...").
    """
    return _concluded(plain_text(rationale))


def without_conclusion(rationale: str) -> str:
    """The sentences that do not state the text's answer as `concluded_answer` reads it."""
    said = [
        one.span() for pattern in (_CONCLUSION, _FRAME, _TAG) for one in pattern.finditer(rationale)
    ]
    said.sort()
    kept, end, at = [], 0, 0
    for sentence in split_sentences(rationale):
        start = rationale.index(sentence, end)
        end = start + len(sentence)
        while at < len(said) and said[at][1] < start:
            at += 1
        if at == len(said) or said[at][0] >= end:
            kept.append(sentence)
    return " ".join(kept)


def conclusions(text: str) -> list[str]:
    """What stands behind each statement of the answer (see `concluded_answer`), at its whole
    length; the one that counts first."""
    return _conclusions(plain_text(text))


def plain_text(text: str) -> str:
    """The visible text, up to a question that the model asks itself."""
    shown = plain_characters(visible_reply(text).text)
    for question in _QUESTION.finditer(shown):
        if shown[: question.start()].strip():
            return shown[: question.start()].rstrip()
    return shown


def _concluded(plain: str) -> str:
    answers = map(_short_form, _conclusions(plain))
    return next((answer for answer in answers if answer), "")


def _conclusions(plain: str) -> list[str]:
    """What stands behind each statement of the answer, the last that counts first."""
    unmarked = without_markup(plain)
    conclusions = [
        _REASON.sub("", part)
        for whole in (unmarked, _EXPLANATION.sub("", unmarked))
        for part in _CONCLUSION.split(whole)[1:]
    ]
    # From the last on: the frames, what comes before an explanation, what the explanation says.
    return [*reversed([*conclusions, *_frames(plain)])]


def _frames(plain: str) -> list[str]:
    """What stands in LaTeX's box, in JSON or between tags, in the order of the text."""
    found = [(frame.start(), "".join(frame.groups(""))) for frame in _FRAME.finditer(plain)]
    begin = None
    for tag in _TAG.finditer(plain):
        if tag.lastgroup == "open":
            begin = tag.end()
        elif begin is not None:
            found.append((begin, plain[begin : tag.start()]))
            begin = None
    return [content for _, content in sorted(found)]


def _unstated(plain: str) -> str:
    """The answer of a text that does not call anything its answer."""
    lines = _telling(_lines(_EXPLANATION.sub("", plain)))
    return _short_form(_closing(lines) if _reasons(lines) else "\n".join(lines))


def _closing(lines: list[str]) -> str:
    """A phrase that stands by itself at the end of reasoning; empty if none does."""
    last, before = lines[-1].strip(), lines[-2:-1]
    alone = before == [""] and not last.endswith((":", "?", "!")) and not _NUMBERED.match(last)
    short = len(last.split(maxsplit=_CLOSING_WORDS)) <= _CLOSING_WORDS
    return last if alone and short and not _is_statement(last) else ""


def _lines(plain: str) -> list[str]:
    """The lines, those that hold no answer empty."""
    shown = _EMPTY_LINE.sub("", without_markup(plain))
    return [line.strip() for line in shown.strip().splitlines()]


def _telling(lines: list[str]) -> list[str]:
    """The text from the first line on that says something.

    A question or "as follows:" leads to the next line.
    """
    said = [at for at, line in enumerate(lines) if line]
    return lines[next((at for at in said if lines[at][-1] not in ":?"), said[0] if said else 0) :]


def _reasons(lines: list[str]) -> bool:
    """Whether a text is reasoning rather than an answer: statements in a row, or thought aloud."""
    bare = [_NUMBERED.sub("", line, count=1) for line in lines]
    # A model that repeats itself says one thing.
    sentences = list(dict.fromkeys(chain.from_iterable(map(split_sentences, bare))))
    if sentences and any(one.startswith(sentences[-1]) for one in sentences[:-1]):
        sentences.pop()
    if len(sentences) < 2:
        return False
    if _THINKS_ALOUD.match(sentences[0]):
        return True
    in_parts = "" in lines or bare != lines
    enough = 2 if in_parts else _REASONING_SENTENCES
    return len(sentences) >= enough and all(map(_is_statement, sentences[:2]))


def _announces(plain: str) -> bool:
    """Whether a text breaks off where it was about to say its answer."""
    _, *conclusions = _CONCLUSION.split(without_markup(plain))
    return bool(conclusions and not conclusions[-1].strip()) or bool(_OPEN_FRAME.search(plain))


def _is_statement(sentence: str) -> bool:
    long = len(sentence.split(maxsplit=_STATEMENT_WORDS)) >= _STATEMENT_WORDS
    return long and _STATEMENT.search(sentence) is not None


def _goes_on(plain: str) -> bool:
    """Whether the sentence that the answer is read from is followed by more."""
    first, *others = _telling(_lines(plain)) or [""]
    if _reasons([first, *others]):
        return False
    return any(others) or len(split_sentences(_LEAD.sub("", first))) > 1


def _short_form(text: str) -> str:
    """The first sentence, without what is wrapped around an answer."""
    ordinal, entry = _without_number(_LABEL.sub("", without_markup(text), count=1))
    sentences = split_sentences(_LEAD.sub("", entry))
    if not sentences:
        return ""
    answer = unwrapped(ordinal + sentences[0])
    closed = _CLOSED_SENTENCE.fullmatch(answer)
    # "No, No, Nanette" is a title: only a sentence's yes or no stands for itself.
    if closed and (closed[2][0].islower() or _VERB.search(closed[2])):
        return closed[1]
    for wrapping in (_CITATION, _IS_THE_ANSWER, _ASIDE, _LIFE_DATES):
        answer = unwrapped(wrapping.sub("", answer))
    return answer


def _without_number(text: str) -> tuple[str, str]:
    """An ordinal that a text begins with, and the text without the number of a list's entry.

    A number stays where the text then explains it ("3. There are three lakes.").
    """
    number = _NUMBERED.match(text)
    if number is None:
        return "", text
    entry = text[number.end() :]
    if _NEXT_ENTRY.search(entry):
        return "", entry
    if number[0].rstrip().endswith(".") and _ORDINAL_OF.match(entry):
        return number[0].lstrip(), entry
    first = entry.lstrip().split("\n", 1)[0].rstrip()
    explains = first.endswith(".") and _is_statement(first)
    # "2. The Beatles" is an entry, "2. The band had two drummers" explains a number.
    explains = explains or (entry[:4].lower() == "the " and _STATEMENT.search(first) is not None)
    return "", text if explains or _EXPLAINS.match(entry) else entry
