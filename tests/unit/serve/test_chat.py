"""OpenAI's chat completions: what is asked, in which form it is answered, what is refused."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmcot.serve.conversation import Asked, read_question
from lmcot.serve.dspy_form import FieldsWanted
from lmcot.serve.openai_schemas import ChatRequest
from tests.support.asgi import Answered
from tests.unit.serve.test_service import Stand

PLACE = {
    "type": "object",
    "properties": {"river": {"type": "string"}},
    "required": ["river"],
    "additionalProperties": False,
}


def chat(stand: Stand, *messages: tuple[str, Any], **options: Any) -> Answered:
    sent = [{"role": role, "content": content} for role, content in messages]
    return stand.ask("/v1/chat/completions", {"messages": sent, **options})


def ask(stand: Stand, **options: Any) -> Answered:
    return chat(stand, ("user", "Which river?"), **options)


def chunks(found: Answered) -> list[Any]:
    lines = [line for line in found.text.split("\n\n") if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_the_last_user_message_is_the_question() -> None:
    stand = Stand()
    got = chat(
        stand, ("system", "Be brief."), ("user", "Hello"), ("assistant", "Hi"),
        ("developer", "In English."), ("user", [{"type": "text", "text": "Which river?"}]),
        model="gpt-x",
    ).json  # fmt: skip
    assert got["choices"] == [
        {
            "index": 0, "finish_reason": "stop", "logprobs": None,
            "message": {
                "role": "assistant", "content": "Reno", "refusal": None,
                "reasoning_content": "The river is 0.",
            },
        }
    ]  # fmt: skip
    assert got["usage"] == {"prompt_tokens": 140, "completion_tokens": 6, "total_tokens": 146}
    assert got["model"] == "gpt-x"
    ((question, context, draw),) = stand.small.asked
    assert (question, [one.sentences[0] for one in context]) == ("Which river?", ["Hello", "Hi"])
    assert draw.max_tokens == 8, "as the settings have it"
    (wish,) = stand.frozen.wishes
    assert (wish.instruction, wish.max_tokens) == ("Be brief.\n\nIn English.", None)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("Which river?", Asked("Which river?")),
        (
            "Context: Elko lies there.\nIt does.\n\nQuestion: Which river?\n",
            Asked("Which river?", (("", "Elko lies there.\nIt does."),)),
        ),
        ("Elko lies there.\nQuestion: Which?", Asked("Which?", (("", "Elko lies there."),))),
        (
            "Use what follows.\n\nQuestion: Which river?\nContext: Elko lies there.\n\nAnswer:",
            Asked("Which river?", (("", "Elko lies there."),), ("Use what follows.",)),
        ),
        (
            "Use what follows.\n**Context:** Q: x\nQuestion: a?\nAnswer: b\n\n"
            "**Question:** Which river?\nAnswer: ",
            Asked(
                "Which river?", (("", "Q: x\nQuestion: a?\nAnswer: b"),), ("Use what follows.",)
            ),
        ),
        (
            "[[ ## context ## ]]\nElko lies there.\n\n[[ ## author ## ]]\nTwain\n\n"
            "[[ ## question ## ]]\nWhich river?\n\nRespond with a JSON object in the following "
            "order of fields: `reasoning`, then `a` (must be formatted as a valid Python int).",
            Asked(
                "Which river?", (("", "Elko lies there."), ("author", "Twain")),
                fields=FieldsWanted(
                    {"reasoning": {"type": "string"}, "a": {"type": "integer"}}, True
                ),
            ),
        ),
        ("[[ ## question ## ]]\nWhich river?", Asked("Which river?")),
        ("question: Which river?", Asked("Which river?")),
        ("Context: only\nQuestion:", Asked("", (("", "only"),))),
    ],
)  # fmt: skip
def test_questions_with_their_context(text: str, wanted: Asked) -> None:
    assert read_question(text) == wanted


LINES = st.sampled_from(
    ["Context:", "Question:", "Answer:", "[[ ## context ## ]]", "[[ ## question ## ]]", "\n",
     "\n\n", " ", "\t", "x", "Context: a", " **Question:** b", "\n\nRespond with "]
)  # fmt: skip


@given(st.lists(LINES, max_size=30).map("".join))
def test_every_text_is_read_and_nothing_is_made_up(text: str) -> None:
    found = read_question(text)
    for part in (found.question, *(one for _, one in found.context), *found.instructions):
        assert part.strip() in text


@pytest.mark.parametrize(
    "piece",
    ["\n", " ", "\t", "a\n", " \n", "Context:", "Context:\n", "Question:\n", "Question: \n\n",
     "\nAnswer:", "[[ ## a ## ]]\n", "[[ ## ", "**", "\n **context", "\n\nRespond with ", "{"],
)  # fmt: skip
def test_reading_takes_time_in_proportion_to_the_length(piece: str) -> None:
    """Ten times the text, not a hundred times the time."""

    def seconds(length: int) -> float:
        half = piece * (length // len(piece) // 2)
        text = f"Context:{half}a{half}b\nQuestion:{half}c"
        started = time.process_time()
        read_question(text)
        return time.process_time() - started

    # A slow moment of the machine is given another chance.
    assert any(seconds(300_000) < max(40 * seconds(30_000), 0.5) for _ in range(4))


@pytest.mark.parametrize(
    ("messages", "reason", "param"),
    [
        ([("system", "x")], "no user message", "messages"),
        ([("user", "  ")], "is empty", "messages.0.content"),
        ([("system", "x"), ("user", None)], "is empty", "messages.1.content"),
        ([("user", [{"type": "image_url"}])], "a part that is not text", "messages.0.content.0"),
        ([("user", [{"type": "text", "text": 3}])], "holds no text", "messages.0.content.0"),
        ([("user", "nul \x00")], "U+0000", "messages.0.content"),
        ([("robot", "x")], "'user'", "messages.0.role"),
        ([], "at least 1 item", "messages"),
        ([("system", "x" * 20_001), ("user", "x")], "more than 20000", "messages"),
    ],
)
def test_chats_that_ask_nothing(messages: list[tuple[str, Any]], reason: str, param: str) -> None:
    found = chat(Stand(), *messages)
    assert found.status == 400
    error = found.json["error"]
    assert reason in error["message"]
    assert (error["param"], error["type"]) == (param, "invalid_request_error")


def test_null_is_absent_everywhere() -> None:
    fields = {name: None for name in ChatRequest.model_fields if name not in ("messages", "audio")}
    assert ask(Stand(), **fields, audio=None).status == 200
    sent = {"role": "user", "content": "Which?", "name": None, "tool_calls": None, "audio": None}
    found = Stand().ask("/v1/chat/completions", {"messages": [sent]})
    assert found.status == 200
    for options in (
        {"stream_options": {"include_usage": None}, "stream": True},
        {"response_format": {"type": "text", "json_schema": None}},
    ):
        assert ask(Stand(), **options).status == 200, options


@pytest.mark.parametrize("value", [5, 1024, 4096, 10**6])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_bounds_the_answer_and_not_the_rationale(name: str, value: int) -> None:
    stand = Stand()
    assert ask(stand, **{name: value}).status == 200
    assert stand.small.asked[0][2].max_tokens == 8
    wish = stand.frozen.wishes[0]
    assert wish.max_tokens == value
    own = ask(stand, max_rationale_tokens=16, samples=3)
    assert own.json["choices"][0]["message"]["content"] == "Humboldt", "by two votes of three"
    assert (stand.small.asked[1][2].max_tokens, stand.small.asked[1][2].samples) == (16, 3)
    refused = ask(stand, max_rationale_tokens=17)
    assert refused.status == 400
    assert refused.json["error"]["param"] == "max_rationale_tokens"


def test_what_was_cut_ends_by_its_length() -> None:
    for cut_rationale, cut_answer in ((True, False), (False, True)):
        for stream in (False, True):
            stand = Stand()
            stand.small.cut = {0} if cut_rationale else set()
            stand.frozen.cut = cut_answer
            found = ask(stand, stream=stream)
            got = chunks(found)[-1] if stream else found.json
            assert got["choices"][0]["finish_reason"] == "length"


def test_a_stream_in_openais_form() -> None:
    deltas = [one["choices"][0] for one in chunks(ask(Stand(), stream=True))]
    assert "".join(d["delta"].get("reasoning_content", "") for d in deltas) == "The river is 0."
    assert "".join(d["delta"].get("content", "") for d in deltas) == "Reno"
    assert deltas[0]["delta"]["role"] == "assistant"
    assert [d["finish_reason"] for d in deltas] == [None] * (len(deltas) - 1) + ["stop"]
    voted = [one["choices"][0] for one in chunks(ask(Stand(), stream=True, samples=3))]
    reasons = [d["delta"]["reasoning_content"] for d in voted if "reasoning_content" in d["delta"]]
    assert reasons == ["The river is 1."], "the one that led to the answer"


def test_a_stream_tells_its_tokens_if_it_is_asked() -> None:
    *first, last = chunks(ask(Stand(), stream=True, stream_options={"include_usage": True}))
    assert last["choices"] == []
    assert last["usage"] == {"prompt_tokens": 140, "completion_tokens": 6, "total_tokens": 146}
    assert all(one["usage"] is None and one["choices"] for one in first)
    plain = chunks(ask(Stand(), stream=True))
    assert not any("usage" in one for one in plain)


NAMED = {"type": "function", "function": {"name": "tell", "parameters": PLACE}}
HARMLESS: list[dict[str, Any]] = [
    {"n": 1}, {"logprobs": False}, {"top_logprobs": 0}, {"tools": []}, {"tool_choice": "none"},
    {"tools": [], "tool_choice": "auto"}, {"tools": [NAMED], "tool_choice": "none"},
    {"functions": []}, {"function_call": "auto"},
    {"functions": [{"name": "f"}], "function_call": "none"}, {"logit_bias": {}},
    {"presence_penalty": 0},
    {"frequency_penalty": 0.0}, {"modalities": ["text"]}, {"response_format": {"type": "text"}},
    {"store": True}, {"metadata": {"a": "b"}}, {"user": "me"}, {"seed": -5},
    {"parallel_tool_calls": False}, {"reasoning_effort": "high"}, {"service_tier": "flex"},
    {"temperature": 1e-9}, {"temperature": 2}, {"top_p": 1}, {"top_p": 0.1, "temperature": 0},
    {"stop": []}, {"stop": ["\n\n"]}, {"stream_options": {"include_usage": True}},
    {"verbosity": "low"}, {"prediction": {"type": "content", "content": "x"}},
]  # fmt: skip


@pytest.mark.parametrize("options", HARMLESS, ids=[json.dumps(one)[:40] for one in HARMLESS])
def test_what_changes_nothing_passes(options: dict[str, Any]) -> None:
    found = ask(Stand(), **options)
    assert found.status == 200, found.text
    assert found.json["choices"][0]["message"]["content"] == "Reno"


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"n": 2}, "n"), ({"n": 0}, "n"), ({"logprobs": True}, "logprobs"),
    ({"logprobs": True, "top_logprobs": 5}, "logprobs"), ({"top_logprobs": 2}, "top_logprobs"),
    ({"tools": [NAMED]}, "tools"), ({"tools": [NAMED], "tool_choice": "auto"}, "tools"),
    ({"tools": [NAMED, NAMED], "tool_choice": "required"}, "tools"),
    ({"tool_choice": "required"}, "tool_choice"),
    ({"tools": [NAMED], "tool_choice": {"type": "function", "function": {"name": "x"}}},
     "tool_choice"),
    ({"functions": [{"name": "f"}]}, "functions"), ({"function_call": {"name": "f"}},
     "function_call"),
    ({"logit_bias": {"5": 1}}, "logit_bias"), ({"presence_penalty": 0.5}, "presence_penalty"),
    ({"frequency_penalty": -1}, "frequency_penalty"), ({"modalities": ["text", "audio"]},
     "modalities"),
    ({"audio": {"voice": "alloy"}}, "audio"), ({"web_search_options": {}}, "web_search_options"),
    ({"top_p": 0.5, "temperature": 1}, "top_p"), ({"temperature": -1}, "temperature"),
    ({"max_tokens": 0}, "max_tokens"), ({"max_completion_tokens": -5}, "max_completion_tokens"),
    ({"samples": 17}, "samples"), ({"samples": 0}, "samples"), ({"guided_json": {}}, "guided_json"),
    ({"response_format": {"type": "grammar"}}, "response_format.type"),
    ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
    ({"response_format": {"type": "json_object"}, "stop": "}"}, "stop"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "param"), REFUSED, ids=[json.dumps(one)[:40] for one, _ in REFUSED]
)
def test_what_is_not_offered_is_refused_by_its_name(options: dict[str, Any], param: str) -> None:
    stand = Stand()
    found = ask(stand, **options)
    assert found.status == 400, found.text
    assert found.json["error"]["param"] == param, found.text
    assert param.split(".")[0] in found.json["error"]["message"]
    assert stand.small.asked == []


def test_a_stop_ends_the_answer() -> None:
    assert ask(Stand(), stop="no").json["choices"][0]["message"]["content"] == "Re"
    got = ask(Stand(), stop=["x", "o", "e"]).json["choices"][0]
    assert (got["message"]["content"], got["finish_reason"]) == ("R", "stop")


def schema_of(schema: Any) -> dict[str, Any]:
    named = {"name": "reply", "schema": schema, "strict": True}
    return {"response_format": {"type": "json_schema", "json_schema": named}}


def test_the_answer_as_an_object_of_a_schema() -> None:
    stand = Stand()
    got = ask(stand, **schema_of(PLACE), samples=3, max_tokens=100).json["choices"][0]
    assert json.loads(got["message"]["content"]) == {"river": "Humboldt"}
    assert got["finish_reason"] == "stop"
    assert stand.frozen.objects == [], "it has one place: nobody is asked"
    deltas = [one["choices"][0] for one in chunks(ask(Stand(), **schema_of(PLACE), stream=True))]
    assert json.loads("".join(d["delta"].get("content", "") for d in deltas)) == {"river": "Reno"}


TWO = {
    "type": "object",
    "properties": {"river": {"type": "string"}, "year": {"type": "integer"}},
    "required": ["river", "year"],
}


def test_an_object_of_several_fields_is_written_by_the_frozen_lm() -> None:
    stand = Stand()
    stand.frozen.object = 'Here it is:\n```json\n{"river": "Reno", "year": 1868}\n```'
    found = ask(stand, **schema_of(TWO))
    message = found.json["choices"][0]["message"]
    assert json.loads(message["content"]) == {"river": "Reno", "year": 1868}
    assert stand.frozen.objects == [("Reno", TWO)]
    usage = {"prompt_tokens": 190, "completion_tokens": 15, "total_tokens": 205}
    assert found.json["usage"] == usage


@pytest.mark.parametrize(
    "written",
    ["The river is Reno.", "", '{"river": "Reno"}', '{"river": "Reno", "year": "1868"}',
     '{"river": "Reno", "year": 18', '["Reno", 1868]', '{"river": "Reno", "year": NaN}'],
)  # fmt: skip
def test_prose_is_never_passed_off_as_an_object(written: str) -> None:
    stand = Stand()
    stand.frozen.object = written
    found = ask(stand, **schema_of(TWO))
    assert found.status == 400
    assert "no JSON object that fits the schema" in found.json["error"]["message"]
    assert found.json["error"]["type"] == "unfit_answer_error"


BAD_SCHEMAS: list[tuple[Any, str]] = [
    ({"type": "array", "items": {}}, "one of an object"),
    ({"type": "object", "properties": {"a": {"type": "text"}}}, "not a JSON schema"),
    ({"type": "object", "properties": {"a": {"$ref": "http://10.0.0.1/x"}}}, "refers elsewhere"),
    ({"type": "object", "properties": {"a": {"$ref": "#/$defs/x"}}}, "what it does not hold"),
    ({"type": "object", "properties": {"a": {"pattern": "(?=a)"}}}, "pattern"),
    ({"type": "object", "properties": {"a" * 20_001: {}}}, "more than 20000"),
]


@pytest.mark.parametrize(("schema", "reason"), BAD_SCHEMAS, ids=[one for _, one in BAD_SCHEMAS])
def test_schemas_that_are_refused(schema: Any, reason: str) -> None:
    found = ask(Stand(), **schema_of(schema))
    assert found.status == 400
    assert reason in found.json["error"]["message"]
    assert found.json["error"]["param"] == "response_format.json_schema.schema"


def test_a_schema_without_fields_takes_any_object() -> None:
    stand = Stand()
    found = ask(stand, **schema_of({"type": "object"})).json["choices"][0]["message"]
    assert json.loads(found["content"]) == {"answer": "Reno"}
    stand.frozen.object = '{"river": "Reno"}'
    found = ask(stand, **schema_of({"type": "object"})).json["choices"][0]["message"]
    assert json.loads(found["content"]) == {"river": "Reno"}
    for none in ({"$ref": "#"}, {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}):
        refused = ask(stand, **schema_of(none))
        assert refused.status == 400
        assert "no JSON object that fits" in refused.json["error"]["message"]


def test_json_mode_has_the_form_that_the_instructions_show() -> None:
    mode = {"response_format": {"type": "json_object"}}
    stand = Stand()
    system = ("system", 'Reply in JSON like {"place": "..."}, please.')
    found = chat(stand, system, ("user", "Which river?"), **mode).json
    assert json.loads(found["choices"][0]["message"]["content"]) == {"place": "Reno"}
    found = chat(stand, ("user", f"Which river? Use {json.dumps(PLACE)}"), **mode).json
    assert json.loads(found["choices"][0]["message"]["content"]) == {"river": "Reno"}
    assert stand.frozen.objects == []
    stand.frozen.object = '{"town": "Reno", "state": "Nevada"}'
    found = ask(stand, **mode).json
    assert json.loads(found["choices"][0]["message"]["content"]) == json.loads(stand.frozen.object)
    stand.frozen.object = "It is Reno."
    found = ask(stand, **mode).json
    assert json.loads(found["choices"][0]["message"]["content"]) == {"answer": "Reno"}


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "tell"}}])
def test_a_tool_that_must_be_called_is_called_with_the_answer(choice: Any) -> None:
    got = ask(Stand(), tools=[NAMED], tool_choice=choice).json["choices"][0]
    assert got["finish_reason"] == "tool_calls"
    assert got["message"]["content"] is None
    (call,) = got["message"]["tool_calls"]
    assert (call["type"], call["function"]["name"]) == ("function", "tell")
    assert json.loads(call["function"]["arguments"]) == {"river": "Reno"}
    streamed = chunks(ask(Stand(), tools=[NAMED], tool_choice=choice, stream=True))
    deltas = [one["choices"][0]["delta"] for one in streamed]
    (told,) = next(one["tool_calls"] for one in deltas if "tool_calls" in one)
    assert (told["index"], json.loads(told["function"]["arguments"])) == (0, {"river": "Reno"})


def test_the_model_is_found_by_its_name() -> None:
    stand = Stand()
    (listed,) = stand.ask("/v1/models").json["data"]
    assert stand.ask("/v1/models/lmcot").json == listed
    missing = stand.ask("/v1/models/gpt-4")
    assert (missing.status, missing.json["error"]["param"]) == (404, "model")


def test_bodies_that_are_no_json_are_told_so() -> None:
    stand = Stand()
    found = stand.ask("/v1/chat/completions", b'{"messages": [')
    assert found.status == 400
    assert "the body is not valid JSON" in found.json["error"]["message"]
    assert found.json["error"]["param"] is None
    form = {"content-type": "application/x-www-form-urlencoded"}
    found = stand.ask("/v1/chat/completions", b'{"messages": []}', headers=form)
    assert found.status == 415
    assert "'content-type: application/json'" in found.json["error"]["message"]


def test_the_document_types_the_reply() -> None:
    schema = Stand().ask("/openapi.json").json
    reply = schema["paths"]["/v1/chat/completions"]["post"]["responses"]["200"]
    named = reply["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
    completion = schema["components"]["schemas"][named]
    assert set(completion["properties"]) >= {"id", "choices", "usage", "model", "created"}
