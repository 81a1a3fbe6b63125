"""A user's context is read as training reads a data set's, over HTTP and in a program."""

from __future__ import annotations

from typing import Any

import pytest

from lmcot.answering.admission import Admission
from lmcot.answering.context import parse_context
from lmcot.answering.refused import Refused
from lmcot.answering.schemas import AnswerRequest
from lmcot.config import Config, SampleData, parse_config
from lmcot.data.formats import parse_record
from lmcot.data.loaders import load_examples
from lmcot.records import Paragraph

TEXT = "Elko is in Nevada. It lies\non the Humboldt.\n \n\r\nReno is far. Cafe\u0301s are open."
READ = (
    Paragraph("", ("Elko is in Nevada.", "It lies on the Humboldt.")),
    Paragraph("", ("Reno is far.", "Caf\u00e9s are open.")),
)


@pytest.fixture(scope="module")
def config() -> Config:
    return parse_config(
        {
            "data": {"train": {"kind": "counting"}, "validation": {"kind": "counting"}},
            "policy": {"source": "random:llama"},
            "frozen": {"backend": "transformers", "source": "random:llama"},
            "refine": {"start_from": "base"},
        }
    )


def test_a_text_is_read_as_training_reads_it(config: Config) -> None:
    record = {"question": "Which?", "answer": "Elko", "context": TEXT}
    assert parse_record(record).context == parse_context(TEXT) == READ
    request = AnswerRequest(question="Which?", context=TEXT)
    assert Admission(config).answer(request, "one", context=TEXT).context == READ


def test_a_passage_is_read_the_same_in_every_form(config: Config) -> None:
    admission = Admission(config)
    title, text = " Elko ", "They met in Jan. 2005 in St. Louis. It rained."
    read = (Paragraph("Elko", ("They met in Jan. 2005 in St. Louis.", "It rained.")),)
    body = AnswerRequest.model_validate(
        {"question": "Which?", "context": [{"title": title, "text": text}]}
    )
    forms: list[Any] = [body.context, [(title, text)], [{"title": title, "text": text}]]
    for given in forms:
        assert admission.answer(body, "one", context=given).context == read


def test_paragraphs_of_a_data_set_keep_their_sentences(config: Config) -> None:
    """HotpotQA's sentences, some of which no splitter would find, are what the budget cuts."""
    data = SampleData(kind="sample", split="validation")
    for example in load_examples(data, limit=20).examples:
        request = AnswerRequest(question=example.question)
        asked = Admission(config).answer(request, "one", context=example.context)
        assert asked.context == example.context


@pytest.mark.parametrize(
    ("context", "reason"),
    [
        ([("Elko", "Nevada."), ("", " \n")], "passage 2 has neither title nor text"),
        ([{"title": "", "text": ""}], "passage 1 has neither title nor text"),
        ([Paragraph(" ", ())], "passage 1 has neither title nor text"),
        ([{"title": "Elko"}], "passage 1 needs a 'text'"),
        (["Elko"], "passage 1 is neither a mapping"),
        ([("Elko", None)], "passage 1 holds something that is not a text"),
        (7, "neither a text nor a list"),
        ("Elko\x00", "character U.0000"),
        ([("half \ud800", "of a pair")], "surrogate"),
    ],
)
def test_what_is_no_context_is_refused(config: Config, context: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_context(context)
    with pytest.raises(Refused, match=reason) as caught:
        Admission(config).context("Which?", context)
    assert caught.value.param == "context"


def test_a_title_alone_is_a_passage() -> None:
    assert parse_context([("Elko", "")]) == (Paragraph("Elko", ()),)
