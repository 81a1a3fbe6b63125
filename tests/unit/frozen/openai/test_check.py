"""What a first check learns of an endpoint, and that it holds for the requests after."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lmcot.answering.pair import Pair, learned
from lmcot.config import Config, GuidanceRewards, OpenAIFrozen, parse_config
from lmcot.data import load_templates
from lmcot.errors import UserError
from lmcot.frozen.needs import Needs
from lmcot.frozen.open import open_frozen_lm
from lmcot.frozen.openai import client as openai_client
from lmcot.frozen.openai.backend import OpenAILM
from lmcot.frozen.openai.check import check_endpoint
from lmcot.records import Choice, Completion, Failure, FailureKind, Sampling, Usage
from lmcot.rewards.first_check import check_frozen
from tests.support.endpoint import (
    Answer,
    Call,
    Endpoint,
    as_asked,
    ask,
    check,
    client,
    completion,
    failure,
    settings,
)

YES_NO = ("yes", "no")
PROMPT = ask("say a")[0]
GREEDY = Sampling(max_new_tokens=24, stop=("\n\n",))
VOTE = Sampling(max_new_tokens=24, temperature=0.7, seed=5, stop=("\n\n",))
NEEDS = Needs(((PROMPT, GREEDY), (PROMPT, VOTE)))


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openai_client, "backoff_s", lambda attempt: 0.001)


def _error(status: int, message: str, **more: Any) -> Answer:
    return Answer(json.dumps({"error": {"message": message, **more}}), status)


def _refuses(when: Callable[[dict[str, Any]], bool], answer: Answer) -> Callable[[Call], Answer]:
    return lambda call: answer if when(call.body) else as_asked(call)


NEW_LIMIT = _refuses(
    lambda body: "max_tokens" in body,
    _error(
        400,
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
        "'max_completion_tokens' instead.",
        param="max_tokens",
    ),
)
OWN_TEMPERATURE = _refuses(
    lambda body: body.get("temperature", 1) != 1,
    _error(400, "Unsupported value: 'temperature' does not support 0.0 with this model."),
)
DETAIL = [{"type": "extra_forbidden", "loc": ["body", "seed"], "msg": "Extra inputs are not"}]
NO_SEED = _refuses(
    lambda body: "seed" in body,
    Answer(json.dumps({"object": "error", "message": {"detail": DETAIL}}), 422),
)
# It repeats the request, which names all parameters.
ECHOED = [{"type": "missing", "loc": ["body", "stop"], "msg": "x", "input": {"temperature": 0}}]
NO_STOP = _refuses(lambda body: "stop" in body, Answer(json.dumps({"detail": ECHOED}), 422))
NO_ROUTE = _refuses(
    lambda body: "seed" in body, _error(404, "No endpoints found that support the parameter seed")
)
UNNAMED = _refuses(lambda body: "stop" in body, Answer("Bad Request", 400))
BROKEN = _refuses(lambda body: "stop" in body, _error(500, "unexpected keyword argument 'stop'"))
IN_200 = _refuses(
    lambda body: "stop" in body,
    Answer(json.dumps({"error": {"message": "'stop' is not supported", "code": 400}})),
)


@pytest.mark.parametrize(
    ("respond", "renamed", "dropped", "notice"),
    [
        (NEW_LIMIT, {"max_tokens": "max_completion_tokens"}, (), "sends 'max_completion_tokens'"),
        (OWN_TEMPERATURE, {}, ("temperature",), "own temperature applies.*does not repeat"),
        (NO_SEED, {}, ("seed",), "samples of a vote do not repeat, and are not kept"),
        (NO_ROUTE, {}, ("seed",), "samples of a vote do not repeat"),
        (NO_STOP, {}, ("stop",), "replies are cut here"),
        (UNNAMED, {}, ("stop",), "replies are cut here"),
        (BROKEN, {}, ("stop",), "replies are cut here"),
        (IN_200, {}, ("stop",), "replies are cut here"),
    ],
)
def test_what_is_refused_is_renamed_or_left_out(
    endpoint: Endpoint,
    respond: Callable[[Call], Answer],
    renamed: dict[str, str],
    dropped: tuple[str, ...],
    notice: str,
) -> None:
    endpoint.respond = respond
    found = check(endpoint, NEEDS, max_retries=2)
    (told,) = [one for one in found.notices if "ignore the temperature" not in one]
    assert re.search(notice, told)
    taken = found.settings
    assert isinstance(taken, OpenAIFrozen)
    assert taken.rename_parameters == renamed
    assert taken.drop_parameters == dropped
    # Whoever is given these settings, now or later, asks in a form that is taken.
    lm = OpenAILM(taken)
    asked = len(endpoint.calls)
    for sampling in (GREEDY, VOTE):
        assert lm.generate([PROMPT], sampling) == [Completion("a", 7, 3, "stop")]
    assert len(endpoint.calls) == asked + 2
    lm.close()


def test_several_are_learned_one_after_the_other(endpoint: Endpoint) -> None:
    refusals = (NEW_LIMIT, OWN_TEMPERATURE, NO_SEED, NO_STOP)

    def respond(call: Call) -> Answer:
        answers = [one(call) for one in refusals]
        return next((one for one in answers if one.status != 200), answers[0])

    endpoint.respond = respond
    found = check(endpoint, NEEDS).settings
    assert isinstance(found, OpenAIFrozen)
    assert set(found.drop_parameters) == {"temperature", "seed", "stop"}
    last = [one.body for one in endpoint.calls if "story" not in one.text][-1]
    assert last.keys() == {"model", "messages", "max_completion_tokens"}
    assert last["max_completion_tokens"] == 24


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (
            _error(400, "Invalid 'max_output_tokens': below minimum value. Expected >= 16"),
            r"length of replies .*frozen\.max_answer_tokens \(24\)",
        ),
        (_error(400, "max_tokens must be at least 50"), r"frozen\.max_answer_tokens \(24\)"),
        (_error(400, "System role not supported"), r"System role not supported.*rename_param"),
    ],
)
def test_what_no_other_form_mends_is_said(endpoint: Endpoint, answer: Answer, words: str) -> None:
    endpoint.respond = lambda call: answer
    with pytest.raises(UserError, match=words):
        check(endpoint, NEEDS)


def test_a_limit_that_is_not_kept_is_no_limit(endpoint: Endpoint) -> None:
    """A server that ignores what it does not know would write for ever under another name."""

    def respond(call: Call) -> Answer:
        if "max_tokens" in call.body:
            return Answer("no", 400)
        body = json.loads(as_asked(call).body)
        body["usage"]["completion_tokens"] = 4096
        return Answer(json.dumps(body))

    endpoint.respond = respond
    with pytest.raises(UserError, match="does not answer a first request"):
        check(endpoint, NEEDS)


@pytest.mark.parametrize(
    ("dropped", "kept"),
    [(["temperature", "seed"], 0), (["temperature"], 1), (["seed"], 1), ([], 2)],
)
def test_replies_that_do_not_repeat_are_not_kept(
    endpoint: Endpoint, tmp_path: Path, dropped: list[str], kept: int
) -> None:
    cache = {"folder": str(tmp_path)}
    found = check(endpoint, Needs(()), drop_parameters=dropped, cache=cache).settings
    lm = open_frozen_lm(found, parse_config(_config(endpoint)).prompts)
    for sampling in (GREEDY, VOTE):
        for _ in range(2):
            lm.generate([PROMPT], sampling)
    assert len(endpoint.calls) == 4 - kept


def test_what_is_sent_besides_is_part_of_the_identity(endpoint: Endpoint) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": False}}
    with client(endpoint) as plain, client(endpoint, extra_body=extra) as lm:
        assert lm.identity.startswith(plain.identity + ":")
        lm.generate([PROMPT], GREEDY)
    assert endpoint.requests[0]["chat_template_kwargs"] == {"enable_thinking": False}


def test_headers_and_query_are_sent_and_never_told(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_KEY", "azure-secret-1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    given = {"api-key": "${AZURE_KEY}"}
    endpoint.respond = lambda call: _error(403, "azure-secret-1 has no access")
    with client(endpoint, headers=given, query={"api-version": "1"}) as lm:
        (found,) = lm.generate([PROMPT], GREEDY)
    reason = failure(found, FailureKind.PERMANENT)
    assert "azure-secret-1" not in reason + repr(lm) + lm.identity
    assert "frozen.headers" in reason
    assert endpoint.calls[0].path == "/v1/chat/completions?api-version=1"
    assert endpoint.calls[0].headers["api-key"] == "azure-secret-1"
    assert endpoint.calls[0].authorization == ""
    monkeypatch.delenv("AZURE_KEY")
    with pytest.raises(UserError, match="AZURE_KEY, which is not set"):
        check(endpoint, headers=given)


def test_without_a_key_nobody_is_told_that_it_is_refused(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    endpoint.respond = lambda call: _error(401, "Unauthorized")
    with pytest.raises(UserError, match="no key was sent, for OPENAI_API_KEY is not set"):
        check(endpoint)
    assert endpoint.calls[0].authorization == ""


@pytest.mark.parametrize(
    ("message", "finish", "reason"),
    [
        ({"content": None, "refusal": "I cannot help."}, "stop", "refused, saying: I cannot help."),
        ({"content": None}, "content_filter", "content filter withheld"),
        ({"content": "The answer i"}, "content_filter", "content filter withheld"),
        ({"content": None, "tool_calls": [{"id": "1"}]}, "tool_calls", "called a tool"),
    ],
)
def test_a_reply_that_explains_itself_is_asked_once(
    endpoint: Endpoint, message: dict[str, Any], finish: str, reason: str
) -> None:
    choice = {"message": message, "finish_reason": finish}
    endpoint.respond = lambda call: Answer(json.dumps({"choices": [choice]}))
    with client(endpoint, max_retries=6) as lm:
        (found,) = lm.generate([PROMPT], Sampling(max_new_tokens=5))
    assert reason in failure(found, FailureKind.PERMANENT)
    assert len(endpoint.calls) == 1
    assert any(reason in notice for notice in check(endpoint).notices)


def test_an_empty_reply_is_not_asked_for_ever(endpoint: Endpoint) -> None:
    with client(endpoint, max_retries=6) as lm:
        (found,) = lm.generate(ask("empty"), Sampling(max_new_tokens=5))
    assert "no text" in failure(found, FailureKind.PERMANENT)
    assert len(endpoint.calls) == 3


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"error": {"message": "Provider returned error", "code": 502}}, "Provider returned error"),
        (
            {"error": {"message": "Provider error", "metadata": {"raw": "out of memory"}}},
            "out of memory",
        ),
        ({"error": "no such deployment"}, "no such deployment"),
        ({"detail": "please sign in"}, "please sign in"),
    ],
)
def test_an_error_under_the_status_of_a_success_is_told(
    endpoint: Endpoint, body: dict[str, Any], said: str
) -> None:
    endpoint.respond = lambda call: Answer(json.dumps(body))
    with client(endpoint) as lm:
        (found,) = lm.generate([PROMPT], GREEDY)
    assert said in failure(found, FailureKind.TRANSIENT)
    with pytest.raises(UserError, match=said):
        check(endpoint)


def test_a_long_pause_is_told_as_what_it_is(endpoint: Endpoint) -> None:
    endpoint.respond = lambda call: Answer("{}", 429, {"retry-after": "86400"})
    with pytest.raises(UserError, match="rate limited and asks to wait 86400 s") as told:
        check(endpoint, max_retries=6)
    assert "reached" not in str(told.value)


def test_a_spent_quota_is_not_asked_again(endpoint: Endpoint) -> None:
    endpoint.respond = lambda call: _error(
        429, "You exceeded your current quota", code="insufficient_quota"
    )
    with pytest.raises(UserError, match="exceeded your current quota"):
        check(endpoint, max_retries=6)
    assert len(endpoint.calls) == 1


def test_a_request_that_a_sound_server_cannot_answer_is_given_up(endpoint: Endpoint) -> None:
    """Else a bad prompt is taken for an outage, whenever it is asked."""

    def respond(call: Call) -> Answer:
        return _error(500, "CUDA error: index") if "bad" in call.text else as_asked(call)

    endpoint.respond = respond
    with client(endpoint, concurrency=2, max_retries=40) as lm:
        found = lm.generate(ask("say bad", *["say a"] * 20), GREEDY)
    assert "while it answered other requests" in failure(found[0], FailureKind.PERMANENT)
    assert all(isinstance(one, Completion) for one in found[1:])
    endpoint.reset()
    endpoint.respond = lambda call: _error(500, "CUDA error")
    with client(endpoint, max_retries=4) as lm:
        failure(lm.generate([PROMPT], GREEDY)[0], FailureKind.TRANSIENT)
    assert len(endpoint.calls) == 5


@pytest.mark.parametrize(
    "usage",
    [None, {}, {"prompt_tokens": None}, {"prompt_tokens": 0, "completion_tokens": 0}, "none"],
)
def test_tokens_that_are_not_counted_are_estimated(endpoint: Endpoint, usage: Any) -> None:
    def respond(call: Call) -> Answer:
        return Answer(json.dumps({**json.loads(as_asked(call).body), "usage": usage}))

    endpoint.respond = respond
    lm = open_frozen_lm(
        check(endpoint, Needs(()), cache={"enabled": False}).settings,
        parse_config(_config(endpoint)).prompts,
    )
    # 20 and 16 bytes: 5 and 4 tokens.
    replies = lm.replies("generate", ask("say " + "Velm" * 4), Sampling(max_new_tokens=24))
    assert replies.results == [Completion("Velm" * 4, 5, 4, "stop", estimated=True)]
    assert (replies.usage.tokens, replies.usage.estimated) == (9, 1)
    assert any("estimated by length" in notice for notice in check(endpoint).notices)


def test_counts_in_other_forms_are_read(endpoint: Endpoint) -> None:
    def respond(call: Call) -> Answer:
        usage = {"prompt_tokens": 10.5, "completion_tokens": "3"}
        return Answer(json.dumps({**json.loads(as_asked(call).body), "usage": usage}))

    endpoint.respond = respond
    with client(endpoint) as lm:
        assert lm.generate([PROMPT], GREEDY) == [Completion("a", 10, 3, "stop")]


def _config(endpoint: Endpoint, **rewards: Any) -> dict[str, Any]:
    return {
        "data": {
            "train": {"kind": "sample", "split": "train"},
            "validation": {"kind": "sample", "split": "validation"},
        },
        "policy": {"source": "random:llama"},
        "frozen": {"backend": "openai", "base_url": endpoint.url, "model": "m", "max_retries": 0},
        "teacher": {"kind": "supporting_facts"},
        "rewards": {"kind": "guidance", **rewards},
    }


def _checked(endpoint: Endpoint, api: str = "chat", **rewards: Any) -> tuple[Config, list[str]]:
    values = _config(endpoint, **rewards)
    values["frozen"]["api"] = api
    checked = check_frozen(parse_config(values), load_templates("default"))
    return checked.config, checked.notices


def _sources(config: Config) -> dict[str, str]:
    assert isinstance(config.rewards, GuidanceRewards)
    return {name: one.source for name, one in config.rewards.aspects.items()}


def test_a_service_learns_what_its_endpoint_takes(
    endpoint: Endpoint, capsys: pytest.CaptureFixture[str]
) -> None:
    endpoint.respond = lambda call: (
        NEW_LIMIT(call) if "max_tokens" in call.body else completion(call, "Velm")
    )
    pair = learned(Pair(parse_config(_config(endpoint)), "random:llama", "base"))
    assert isinstance(pair.config.frozen, OpenAIFrozen)
    assert pair.config.frozen.rename_parameters == {"max_tokens": "max_completion_tokens"}
    assert pair.source == "random:llama"
    asked = f"asked first: {len(endpoint.calls)} requests, {10 * (len(endpoint.calls) - 1)} tokens"
    assert asked in capsys.readouterr().err
    endpoint.respond = lambda call: _error(401, "who are you?")
    with pytest.raises(UserError, match="who are you"):
        learned(pair)


def test_components_without_a_weight_that_cannot_be_measured_are_left_out(
    endpoint: Endpoint,
) -> None:
    endpoint.respond = lambda call: completion(call, "Velm")
    config, notices = _checked(endpoint, "completions", likelihood_gain_weight=0)
    sources = _sources(config)
    assert {name for name, one in sources.items() if one == "off"} == {
        "logicality", "consistency", "fluency",
    }  # fmt: skip
    assert isinstance(config.rewards, GuidanceRewards)
    assert config.rewards.likelihood_gain_weight is None
    told = "\n".join(notices)
    for setting in ("aspects.logicality", "aspects.fluency", "likelihood_gain_weight"):
        assert f"rewards.{setting}" in told
    assert "none of yes, no, but begins: Velm" in told
    assert "no log-likelihoods of a given text" in told


@pytest.mark.parametrize(
    ("rewards", "setting"),
    [
        ({"aspects": {"logicality": {"source": "judge", "weight": 0.5}}}, "aspects.logicality"),
        ({"aspects": {"fluency": {"source": "metrics", "weight": 0.5}}}, "aspects.fluency"),
        ({"likelihood_gain_weight": 0.1}, "likelihood_gain_weight"),
    ],
)
def test_a_component_with_a_weight_that_cannot_be_measured_is_refused(
    endpoint: Endpoint, rewards: dict[str, Any], setting: str
) -> None:
    endpoint.respond = lambda call: completion(call, "Velm")
    with pytest.raises(UserError, match=rf"^rewards\.{setting} has the weight 0\..*use an endp"):
        _checked(endpoint, "completions", **rewards)


def test_a_judge_without_log_probabilities_is_told(endpoint: Endpoint) -> None:
    endpoint.respond = lambda call: completion(call, "The answer is no.")
    config, notices = _checked(endpoint)
    assert _sources(config)["logicality"] == "judge"
    assert any("1 or 0: a coarse measure" in one for one in notices)
    endpoint.respond = lambda call: completion(call, "No", {"No": -0.1, "Yes": -3.0})
    assert _checked(endpoint)[1] == []


def test_the_check_asks_what_the_run_will_ask(endpoint: Endpoint) -> None:
    values = _config(endpoint)
    values["evaluate"] = {"rows": ["standard", "standard+sc", "cot+sc"], "temperature": 0.9}
    values["prompts"] = {"templates": "base"}
    values["frozen"]["api"] = "completions"
    endpoint.respond = lambda call: completion(call, "No", {"No": -0.1, "Yes": -3.0})
    check_frozen(parse_config(values), load_templates("base"))
    forms = [
        (body["max_tokens"], body["temperature"], "seed" in body, body.get("stop"))
        for body in endpoint.requests
        if "logprobs" not in body and "story" not in body["prompt"]
    ]
    assert sorted(forms) == [
        (24, 0.0, False, ["\n\n"]),
        (24, 0.9, True, ["\n\n"]),
        (128, 0.9, True, ["\n\n"]),
    ]
    assert {body.get("max_tokens") for body in endpoint.requests if "echo" in body} <= {1}


def _asks_stories(endpoint: Endpoint, temperature: float) -> tuple[int, str]:
    """How often a first check asks an open question, and what it then says."""
    asked = len(endpoint.calls)
    vote = replace(VOTE, temperature=temperature)
    found = check(endpoint, Needs(((PROMPT, GREEDY), (PROMPT, vote))))
    stories = [one for one in endpoint.calls[asked:] if "story" in one.text]
    assert len({one.body["seed"] for one in stories}) == len(stories)
    return len(stories), "\n".join(found.notices)


def test_an_endpoint_that_never_samples_is_told(endpoint: Endpoint) -> None:
    stories, told = _asks_stories(endpoint, 0.7)
    assert stories == 5
    assert "the same reply 5 times to an open question, at temperature 0.7" in told
    assert "standard+sc, cot+sc" in told
    assert _asks_stories(endpoint, 0.1) == (0, "")

    def now_and_then(call: Call) -> Answer:
        return completion(call, "once" if call.body.get("seed", 0) < 3 else "upon")

    endpoint.respond = now_and_then
    assert _asks_stories(endpoint, 0.7) == (4, "")
    endpoint.respond = lambda call: completion(call, f"say {call.body.get('seed')}")
    assert _asks_stories(endpoint, 0.7) == (2, "")


def test_thinking_counts_among_what_differs(endpoint: Endpoint) -> None:
    def thinks(call: Call) -> Answer:
        message = {"content": "So be it.", "reasoning_content": f"Hm: {call.body.get('seed')}"}
        return Answer(json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]}))

    endpoint.respond = thinks
    assert _asks_stories(endpoint, 0.7)[0] == 2
    endpoint.respond = lambda call: (
        completion(call, "a") if "story" not in call.text else _error(400, "not that")
    )
    stories, told = _asks_stories(endpoint, 0.7)
    assert stories == 1
    assert "whether the endpoint samples could not be found out" in told
    assert "not that" in told
    endpoint.respond = lambda call: (
        completion(call, "a") if "story" not in call.text else Answer("", 503)
    )
    assert "could not be found out" in _asks_stories(endpoint, 0.7)[1], "that ends no run"


def test_an_open_question_takes_no_longer_than_what_the_run_asks(endpoint: Endpoint) -> None:
    for own, thinking, asked in ((8, 0, 24), (30, 0, 30), (500, 0, 48), (500, 100, 148)):
        endpoint.calls.clear()
        needs = Needs(((PROMPT, replace(VOTE, max_new_tokens=own)),))
        check(endpoint, needs, max_thinking_tokens=thinking)
        stories = [one.body["max_tokens"] for one in endpoint.calls if "story" in one.text]
        assert stories == [asked] * 5


def test_only_rows_in_which_the_endpoint_is_sampled_ask_for_samples(endpoint: Endpoint) -> None:
    for rows, told in ((["standard", "guided_base+sc"], False), (["cot+sc"], True)):
        values = _config(endpoint) | {"evaluate": {"rows": rows}}
        notices = check_frozen(parse_config(values), load_templates("default")).notices
        assert any("ignore the temperature" in one for one in notices) == told


def test_what_a_check_asks_is_counted(endpoint: Endpoint) -> None:
    spent: list[Usage] = []
    endpoint.respond = NEW_LIMIT
    needs = Needs(((PROMPT, GREEDY), (PROMPT, VOTE)), choices=(PROMPT,))
    found = check_endpoint(settings(endpoint), needs, spent.append)
    assert found.usage == sum(spent, Usage())
    assert found.usage.sent == len(endpoint.calls)
    assert found.usage.tokens == 10 * (len(endpoint.calls) - 1), "one was refused"

    def no_more(usage: Usage) -> None:
        raise UserError("the purse is empty")

    asked = len(endpoint.calls)
    with pytest.raises(UserError, match="purse"):
        check_endpoint(settings(endpoint), needs, no_more)
    assert len(endpoint.calls) == asked + 1


@pytest.mark.parametrize(
    ("said", "yes"),
    [
        ("The answer is no.", 0),
        ("**Yes**", 1),
        ("No, because it does not follow.", 0),
        ('{"answer": "yes"}', 1),
        ("Answer: No", 0),
        ("My answer to this question would be: yes.", 1),
        ("<think>\nNo, wait. No.\n</think>\n\nYes.", 1),
        ("No, wait. It does follow.\n</think>\nYes", 1),
        ("Yes or no? I cannot say.", None),
        ("There is no way to tell.", None),
        ("Nobody knows", None),
    ],
)
def test_a_choice_is_read_from_the_text(endpoint: Endpoint, said: str, yes: int | None) -> None:
    endpoint.respond = lambda call: completion(call, said)
    with client(endpoint) as lm:
        (found,) = lm.choose([PROMPT], YES_NO)
    if yes is None:
        assert isinstance(found, Failure)
    else:
        assert isinstance(found, Choice)
        assert found.probabilities == {"yes": yes, "no": 1 - yes}


CHAT_FORM = {
    "content": [
        {
            "token": "Yes",
            "logprob": -0.2877,
            "top_logprobs": [
                {"token": "Yes", "logprob": -0.287682},  # 0.75
                {"token": " no", "logprob": -1.386294},  # 0.25
            ],
        }
    ]
}
TEXT_FORM = {
    "tokens": [" **", "No"],
    "token_logprobs": [-0.1, -0.2],
    "text_offset": [0, 3],
    "top_logprobs": [{" **": -0.1}, {"Yes": -0.287682, "No": -1.386294}],
}
NEITHER = {"tokens": ["It"], "token_logprobs": [-0.1], "top_logprobs": [{"It": -0.1, "So": -2.0}]}


@pytest.mark.parametrize("api", ["chat", "completions"])
@pytest.mark.parametrize(
    ("logprobs", "text", "yes"),
    [
        (CHAT_FORM, "Yes", 0.75),
        # The first token is a mark: the next one is the first word.
        (TEXT_FORM, " **No**", 0.75),
        (NEITHER, "It is: the answer is no", 0.0),
        ({"content": [{"token": "a"}]}, "yes", 1.0),
    ],
)
def test_log_probabilities_are_read_in_both_forms(
    endpoint: Endpoint, api: str, logprobs: dict[str, Any], text: str, yes: float
) -> None:
    said = {"message": {"content": text}} if api == "chat" else {"text": text}
    body = {"choices": [{**said, "finish_reason": "stop", "logprobs": logprobs}]}
    endpoint.respond = lambda call: Answer(json.dumps(body))
    with client(endpoint, api=api) as lm:
        (found,) = lm.choose([PROMPT], YES_NO)
    assert isinstance(found, Choice)
    assert found.probabilities["yes"] == pytest.approx(yes, abs=1e-5)


@pytest.mark.parametrize(
    "message",
    [
        {"content": "No", "reasoning_content": "Yes, this follows."},
        {"content": "<think>Yes, this follows.</think>No"},
    ],
)
def test_a_thinking_token_is_no_choice(endpoint: Endpoint, message: dict[str, Any]) -> None:
    choice = {"message": message, "finish_reason": "stop", "logprobs": CHAT_FORM}
    endpoint.respond = lambda call: Answer(json.dumps({"choices": [choice]}))
    with client(endpoint) as lm:
        (found,) = lm.choose([PROMPT], YES_NO)
    assert isinstance(found, Choice)
    assert found.probabilities == {"yes": 0, "no": 1}
    choice |= {"message": {"content": "", "reasoning_content": "Yes"}, "finish_reason": "length"}
    with client(endpoint) as lm:
        (found,) = lm.choose([PROMPT], YES_NO)
    assert "thinking did not end" in failure(found, FailureKind.PERMANENT)


@pytest.mark.parametrize(
    ("message", "asked"),
    [
        ("logprobs must be less than or equal to 5", [20, 5]),
        ("top_logprobs: at most 8 are admitted, got 20", [20, 8]),
        ("This server has no logprobs", [20, 5, None]),
        ("Bad request", [20, 5, None]),
    ],
)
@pytest.mark.parametrize(("api", "key"), [("chat", "top_logprobs"), ("completions", "logprobs")])
def test_as_many_alternatives_are_asked_for_as_are_admitted(
    endpoint: Endpoint, api: str, key: str, message: str, asked: list[int | None]
) -> None:
    admitted = asked[-1] or 0

    def respond(call: Call) -> Answer:
        few = (call.body.get(key) or 0) <= admitted
        return completion(call, "Yes", {"Yes": -0.1}) if few else _error(400, message)

    endpoint.respond = respond
    with client(endpoint, api=api) as lm:
        for _ in range(2):
            assert isinstance(lm.choose([PROMPT], YES_NO)[0], Choice)
    assert [body.get(key) for body in endpoint.requests] == [*asked, asked[-1]]
