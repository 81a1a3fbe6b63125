"""What looks at users' and models' text takes time in proportion to its length.

Every function of the rewards and the service that reads text, on the texts that patterns find
hardest: one piece repeated without an end. Eight times the text may take some more than eight times
as long, but nothing like the 64 times of a quadratic pattern.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial

import pytest

from lmcot.answering.context import parse_context
from lmcot.answering.structured import form_in, objects_in
from lmcot.config.rows import masked
from lmcot.records import Completion, Example, Paragraph
from lmcot.rewards import metrics
from lmcot.rewards.combine import increasing_reward
from lmcot.serve.conversation import read_question
from lmcot.text.answers import contains_gold, exact_match, f1, inclusion, normalize_answer
from lmcot.text.copying import copied_share
from lmcot.text.reading import (
    concluded_answer,
    extract_answer,
    read_answer,
    read_text,
    without_conclusion,
)
from lmcot.text.sentences import split_sentences
from lmcot.text.visible import opens_thinking, visible_reply
from lmcot.text.vote import vote

EXAMPLE = Example("q", "Which river?", "Humboldt River", (Paragraph("Elko", ("It is a town.",)),))

READERS: dict[str, Callable[[str], object]] = {
    "visible_reply": lambda text: visible_reply(text, ("\n\n", "Q:")),
    "opens_thinking": opens_thinking,
    "extract_answer": extract_answer,
    "concluded_answer": concluded_answer,
    "without_conclusion": without_conclusion,
    "read_answer": lambda text: read_answer(Completion(text, 0, 0, "length")),
    "read_text": lambda text: read_text(text, cut=True),
    "split_sentences": split_sentences,
    "normalize_answer": normalize_answer,
    "exact_match": lambda text: exact_match(text, text),
    "f1": lambda text: f1(text, text),
    "inclusion": lambda text: inclusion(text, "the x y"),
    "contains_gold": lambda text: contains_gold(text, ("no", "x y", "A")),
    "copied_share": lambda text: copied_share(text, [text]),
    "vote": lambda text: vote([text, text]),
    "masked": lambda text: masked(text, ("a a", "x  y", "A")),
    "factuality": lambda text: metrics.factuality(EXAMPLE, text),
    "relevance": lambda text: metrics.relevance(EXAMPLE, text),
    "naturalness": lambda text: metrics.naturalness(EXAMPLE, text),
    "readability": lambda text: metrics.readability(EXAMPLE, text),
    "read_question": read_question,
    "parse_context": parse_context,
    "objects_in": lambda text: list(objects_in(text)),
    "form_in": form_in,
    "increasing_reward": lambda text: increasing_reward(text, 64),
}
# `coherence` compares each sentence with all before it: it is bounded by policy.max_new_tokens.

PIECES = [
    "\n", " ", "\t", "\r\n", "a", "A ", "a a ", "a\n", ".", ". ", "! ", "? ", ":", ": ", ", ",
    "-", "- ", "*", "**", "_", "__", "`", "#", "# ", '"', "'", "(", ")", "()", "[", "{", "}",
    "{}", "{a}", "\\", "|", "<", ">", "<b>", "<br>", "<b ", "<a b", "<answer>", "</answer>",
    "<think>", "</think>", "<|", "<|im_end|>", "<|begin_of_box|>", "<|channel|>analysis",
    "Mr. A. ", "Mr. ", "A. B. ", "U.S. ", "a.b.", "No. 5 ", "1. ", "1. a\n", "1) ", "(1) ", "12",
    "answer ", "answer", "answer:", "answer is ", "answer is", "answer\n",
    "answer  to  the  question", "Answer in a few words ", "the answer is not ",
    "the answer is a. ", "answer is a because ", '"answer": ', '"answer":"', '"answer":"\\',
    "'answer':'\\", '"a_answer', '"_"_', "\\boxed{", "\\boxed{{}", "\\boxed{}", "\\text{",
    "Question:", "Question:\n", "\nQuestion: ", "* * Question", "Explanation", " explanation ",
    "note : ", "because ", ", because", " because\n", "yes, ", "no - ", "yes it ", "so, ",
    "sure, ", "Sure!\n", "based on the context", "based on the context, ",
    "according to the text a ", ", which", ", which ", ", who is", " (born", "(born a", "(1900-",
    " is the answer", " was the final answer", "&amp;", "&amp", "a is b. ", "It is. ",
    "Let me see. ", "\u3002", "\u6771\u3002", "\u201c", "a\u2019", "'s", "a's ", "x\n\n", "- a\n",
    "\n\n\n- ", "1900 ", "-1 ", "the ", "an a the ",
    "Context:", "Context: a\nQuestion: ", "Question: a\n", "\nAnswer:", "**Question:** ",
    "[[ ## a ## ]]\n", "[[ ## ", "\n\nRespond with ", "`a` (must be formatted as a valid Python ",
    '{"a":', '{"a": 1}', '{"a": [', "[{",
]  # fmt: skip


def _seconds(read: Callable[[str], object], text: str) -> float:
    started = time.process_time()
    read(text)
    return time.process_time() - started


def _grows_linearly(read: Callable[[str], object], make: Callable[[int], str]) -> bool:
    """Whether time grows as the text does; a slow moment of the machine is given another chance."""
    for _ in range(4):
        short = min(_seconds(read, make(1_000)) for _ in range(2))
        if _seconds(read, make(8_000)) < 24 * max(short, 0.0004):
            return True
    return False


@pytest.mark.parametrize("name", READERS)
def test_one_piece_again_and_again(name: str) -> None:
    def made(piece: str, size: int) -> str:
        return piece * (size // len(piece))

    assert [one for one in PIECES if not _grows_linearly(READERS[name], partial(made, one))] == []


@pytest.mark.parametrize("name", ["visible_reply", "read_text"])
@pytest.mark.parametrize("blank", ["\t", "\n", "\n\n- "])
def test_much_white_space_between_two_pieces(name: str, blank: str) -> None:
    def made(piece: str, size: int) -> str:
        return piece + blank * (size // len(blank)) + piece

    assert [one for one in PIECES if not _grows_linearly(READERS[name], partial(made, one))] == []
