"""Answers as JSON objects of a schema."""

from __future__ import annotations

import time
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from lmcot.answering.structured import Form, form_in, objects_in, read_form


def form_of(**fields: Any) -> Form:
    made: Any = type("Made", (BaseModel,), {"__annotations__": fields})
    return read_form(made.model_json_schema())


class Reasoned(BaseModel):
    reasoning: str
    answer: str


class Graded(BaseModel):
    grade: Literal["Good", "Bad"] | None = Field(description="how it is")


class Inner(BaseModel):
    name: str


class Outer(BaseModel):
    inner: Inner


@pytest.mark.parametrize(
    ("form", "answer", "wanted"),
    [
        (form_of(answer=str), "Humboldt", {"answer": "Humboldt"}),
        (form_of(year=int), "in 1,868.", {"year": 1868}),
        (form_of(year=int), "1868.0", {"year": 1868.0}),
        (form_of(year=int), "between 1868 and 1870", None),
        (form_of(metres=float), "402 metres", {"metres": 402}),
        (form_of(metres=float), "-1.5", {"metres": -1.5}),
        (form_of(same=bool), "Yes", {"same": True}),
        (form_of(same=bool), "no.", {"same": False}),
        (form_of(same=bool), "Humboldt", None),
        (form_of(a=int | None), "5", {"a": 5}),
        (form_of(a=int | str), "five", {"a": "five"}),
        (form_of(a=list[str]), "five", None),
        (form_of(a=str, b=str), "five", None),
        (read_form(Reasoned.model_json_schema()), "x", {"reasoning": "why", "answer": "x"}),
        (read_form(Graded.model_json_schema()), "the good", {"grade": "Good"}),
        (read_form(Graded.model_json_schema()), "awful", None),
        (read_form(Outer.model_json_schema()), "x", None),
        (form_of(reasoning=str), "x", {"reasoning": "x"}),
        (read_form({"type": "object", "properties": {}}), "x", {}),
        (
            read_form({"type": "object", "properties": {"a": {"type": "string", "maxLength": 2}}}),
            "long", None,
        ),
        (
            read_form({"type": "object", "properties": {"a": {"pattern": "^[A-Z]+$"}}}),
            "ABC", {"a": "ABC"},
        ),
        (read_form({"type": "object", "properties": {"a": {"pattern": "^[A-Z]+$"}}}), "abc", None),
    ],
)  # fmt: skip
def test_the_answer_goes_where_the_schema_has_one_place_for_it(
    form: Form, answer: str, wanted: Any
) -> None:
    assert form.filled(answer, "why") == wanted


def test_the_first_object_that_fits_is_read() -> None:
    form = form_of(a=str, b=int)
    text = 'I think {"a": 1}. So: {"a": "x", "b": 2} and {"a": "y", "b": 3}.'
    assert form.read(text) == ({"a": "x", "b": 2}, "")
    assert form.read('{"a": "x"}')[1].startswith("the object: ")
    assert form.read("nothing")[1] == "it holds no JSON object"
    assert form.read('{"a": "x", "b": "2"}')[1].startswith("b: ")


def test_the_form_that_a_text_shows() -> None:
    assert form_in("no object") is None
    shown = form_in('As {"answer": "{answer}", "sure": "{sure}"}')
    assert shown is not None
    assert shown.schema["required"] == ["answer", "sure"]
    schema = form_in(f"{{}} {{'x'}} the schema: {form_of(river=str).text}, fill it")
    assert schema is not None
    assert schema.filled("x", "") == {"river": "x"}


@given(st.text(alphabet='{}[]":,\\ abc01', max_size=200))
def test_any_text_is_searched(text: str) -> None:
    assert all(isinstance(one, dict) for one in objects_in(text))


def test_hostile_schemas_cost_little() -> None:
    """Alternatives that multiply, references that go round, patterns that backtrack."""
    doubling = {
        "$defs": {
            f"n{n}": {"anyOf": [{"$ref": f"#/$defs/n{n + 1}"}, {"$ref": f"#/$defs/n{n + 1}"}]}
            for n in range(60)
        }
        | {"n60": {"type": "integer"}},
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/n0"}},
    }  # fmt: skip
    round_about = {
        "$defs": {"x": {"allOf": [{"$ref": "#/$defs/x"}]}},
        "type": "object",
        "properties": {"a": {"$ref": "#/$defs/x"}},
    }
    backtracking = {"type": "object", "properties": {"a": {"pattern": "^(a+)+$"}}}
    for schema in (doubling, round_about, backtracking):
        started = time.process_time()
        assert read_form(schema).filled("a" * 5000 + "!", "") is None
        assert time.process_time() - started < 5
