"""Servers that the project did not write, as the frozen LM: what they give is read, or refused."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmcot.config import OpenAIFrozen, PromptSettings
from lmcot.config.frozen import CacheSettings
from lmcot.errors import UserError
from lmcot.frozen.cached import CachedLM
from lmcot.frozen.needs import Found, Needs
from lmcot.frozen.open import check_frozen_lm, open_frozen_lm
from lmcot.monitor.metrics import read_metrics
from lmcot.records import Choice, Completion, Failure, FailureKind, Message, Prompt, Sampling
from tests.integration.command import lmcot
from tests.integration.servers import (
    litellm_proxy,
    llama_cpp,
    needs_servers,
    transformers_serve,
)

pytestmark = [pytest.mark.e2e, needs_servers]

KEY = "a-key-of-this-test"
# Like Qwen3's: it opens the thinking itself, unless the request switches that off.
THINKING = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and message.reasoning_content %}<think>
{{ message.reasoning_content }}
</think>

{% endif %}{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% else %}<think>
{% endif %}{% endif %}"""
RIVER: Prompt = (
    Message(
        "user",
        "Elko is a city in Nevada. It straddles the Humboldt River.\n"
        "Which river does Elko straddle? Answer with the name of the river.",
    ),
)
YES_OR_NO: Prompt = (
    Message("user", "Elko straddles the Humboldt River.\nIs Elko a city? Answer Yes or No."),
)


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="module")
def llama(logs: Path) -> Iterator[str]:
    with llama_cpp(logs / "llama.log") as url:
        yield url


@pytest.fixture(scope="module")
def thinking(logs: Path) -> Iterator[str]:
    template = logs / "thinking.jinja"
    template.write_text(THINKING, encoding="utf-8")
    with llama_cpp(logs / "thinking.log", "--template", str(template), "--key", KEY) as url:
        yield url


@pytest.fixture(scope="module")
def transformers(logs: Path) -> Iterator[tuple[str, str]]:
    with transformers_serve(logs / "transformers.log") as found:
        yield found


@pytest.fixture(scope="module")
def proxy(logs: Path, llama: str) -> Iterator[str]:
    with litellm_proxy(logs / "litellm.log", llama, KEY) as url:
        yield url


def settings(request: pytest.FixtureRequest, server: str, **more: Any) -> OpenAIFrozen:
    """Of a server by the name of its fixture."""
    found = request.getfixturevalue(server)
    url, model = found if isinstance(found, tuple) else (found, "smol")
    return OpenAIFrozen(
        backend="openai",
        base_url=url,
        model=model,
        max_retries=2,
        cache=CacheSettings(enabled=False),
        **more,
    )


def opened(request: pytest.FixtureRequest, server: str, **more: Any) -> CachedLM:
    return open_frozen_lm(settings(request, server, **more), PromptSettings())


def check(endpoint: OpenAIFrozen, *, scores: bool = False) -> Found:
    """The first check of a run that asks for an answer and a judgement."""
    asked = ((RIVER, Sampling(8, 0.0, seed=1)),)
    return check_frozen_lm(endpoint, Needs(asked, choices=(YES_OR_NO,), scores=scores))


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)


EVERY = pytest.mark.parametrize(
    ("server", "api"),
    [
        ("llama", "chat"),
        ("llama", "completions"),
        ("proxy", "chat"),
        ("transformers", "chat"),
        ("transformers", "completions"),
    ],
)


@pytest.mark.parametrize(
    ("server", "api"), [("llama", "chat"), ("llama", "completions"), ("transformers", "chat")]
)
@pytest.mark.usefixtures("key")
def test_a_server_that_never_samples_is_told(
    request: pytest.FixtureRequest, server: str, api: str
) -> None:
    vote = Sampling(12, 0.7, seed=1)
    endpoint = settings(request, server, api=api, read_timeout_s=240, total_timeout_s=300)
    found = check_frozen_lm(endpoint, Needs(((RIVER, vote),)))
    told = any("ignore the temperature" in one for one in found.notices)
    assert told == (server == "transformers")
    assert found.usage.sent >= (6 if told else 3)


@EVERY
@pytest.mark.usefixtures("key")
def test_an_answer_is_read_with_its_tokens(
    request: pytest.FixtureRequest, server: str, api: str
) -> None:
    check(settings(request, server, api=api))
    [found] = opened(request, server, api=api).generate([RIVER], Sampling(12, 0.0, seed=1))
    assert isinstance(found, Completion)
    assert found.text.strip()
    assert 20 < found.tokens_in < 80
    assert 1 <= found.tokens_out <= 12


@EVERY
@pytest.mark.usefixtures("key")
def test_a_choice_is_of_the_options_or_a_typed_failure(
    request: pytest.FixtureRequest, server: str, api: str
) -> None:
    [found] = opened(request, server, api=api).choose([YES_OR_NO], ["yes", "no"])
    if isinstance(found, Failure):  # this model's reply may well be neither
        assert server == "transformers"
        assert "none of yes, no" in found.reason
        return
    assert isinstance(found, Choice)
    assert math.isclose(sum(found.probabilities.values()), 1)
    measured = 0 < found.probabilities["yes"] < 1
    assert measured == (server != "transformers"), "its server gives no log-probabilities"


@pytest.mark.parametrize("server", ["llama", "transformers"])
def test_what_cannot_be_scored_is_refused_for_good(
    request: pytest.FixtureRequest, server: str
) -> None:
    """llama.cpp's server ignores ``echo``; transformers' does, and fails at 0 new tokens."""
    lm = opened(request, server, api="completions")
    [found] = lm.score([(Message("user", "Elko straddles"),)], [" the Humboldt River."])
    assert isinstance(found, Failure)
    assert found.kind is FailureKind.PERMANENT
    assert "log-likelihoods" in found.reason
    lacking = check(settings(request, server, api="completions"), scores=True).lacks
    assert "log-likelihoods" in lacking["score"]


@pytest.mark.usefixtures("key")
def test_hidden_thinking_is_no_answer(request: pytest.FixtureRequest) -> None:
    [found] = opened(request, "thinking").generate([RIVER], Sampling(8, 0.0, seed=1))
    assert isinstance(found, Completion)
    assert (found.text, found.finish_reason) == ("", "length")
    assert found.thinking.strip()
    [chosen] = opened(request, "thinking").choose([YES_OR_NO], ["yes", "no"])
    assert isinstance(chosen, Failure), "of a token of the thinking"


@pytest.mark.usefixtures("key")
def test_thinking_is_switched_off_by_what_requests_carry_besides(
    request: pytest.FixtureRequest,
) -> None:
    asked = {"chat_template_kwargs": {"enable_thinking": False}}
    lm = opened(request, "thinking", extra_body=asked)
    [found] = lm.generate([RIVER], Sampling(24, 0.0, seed=1))
    assert isinstance(found, Completion)
    assert "Elko" in found.text
    assert not found.thinking
    [chosen] = lm.choose([YES_OR_NO], ["yes", "no"])
    assert isinstance(chosen, Choice)
    assert 0 < chosen.probabilities["yes"] < 1


def test_a_wrong_key_ends_in_a_sentence(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "wrong")
    with pytest.raises(UserError, match="OPENAI_API_KEY"):
        check(settings(request, "thinking"))


@pytest.mark.usefixtures("key")
def test_a_wrong_model_ends_in_a_sentence(request: pytest.FixtureRequest) -> None:
    """llama.cpp's server takes any name for its only model's; the proxy knows its own."""
    wrong = settings(request, "proxy").model_copy(update={"model": "other"})
    with pytest.raises(UserError, match=r"frozen\.model"):
        check(wrong)


RUN: dict[str, Any] = {
    "data": {
        "train": {"kind": "sample", "split": "train"},
        "validation": {"kind": "sample", "split": "validation"},
        "max_train": 2,
        "max_validation": 1,
        "context": {"distractors": 0, "max_tokens": 120},
    },
    "prompts": {"demonstrations": 0},
    "policy": {"source": "random:llama", "dtype": "float32", "max_new_tokens": 80},
    "frozen": {"backend": "openai", "max_answer_tokens": 4, "max_rationale_tokens": 16},
    # Whatever so small a model replies is kept, so that the next stages have something to do.
    "teacher": {
        "kind": "frozen",
        "min_f1": 0,
        "filters": {
            "min_words": 0,
            "repeats_question": False,
            "prompt_words": 0,
            "near_duplicates": None,
        },
    },
    "refine": {"steps": 1, "prompts_per_step": 1, "samples_per_prompt": 2},
    "learner": {"zero_stage": 0},
    "evaluate": {"rows": ["standard", "cot", "guided_refined"], "aspect_questions": 0},
}


def written(request: pytest.FixtureRequest, folder: Path) -> str:
    """The path of the settings of a run whose frozen LM is on a server."""
    endpoint = settings(request, "llama")
    frozen = {**RUN["frozen"], "base_url": endpoint.base_url, "model": endpoint.model}
    config = folder / "config.yaml"
    config.write_text(
        yaml.safe_dump({**RUN, "frozen": {**frozen, "cache": {"folder": str(folder)}}}),
        encoding="utf-8",
    )
    return str(config)


@pytest.mark.usefixtures("cluster", "one_thread")
def test_all_stages(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The teacher's rationales, a step with all aspects as they are by default, the report."""
    config = written(request, tmp_path)
    assert lmcot("doctor", "--config", config).returncode == 0
    assert "all is well" in capsys.readouterr().out

    done = lmcot("train", "--config", config, "--run-dir", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    step = next(
        m for m in read_metrics(tmp_path / "run" / "metrics.jsonl") if m["stage"] == "refine"
    )
    assert step["batch/judged_share"] == 1
    assert 0 <= step["component/aspect/consistency"] <= 1
    assert "component/aspect/fluency" not in step, "its server gives no log-likelihoods"
    kept = [json.loads(line) for line in (tmp_path / "run" / "rationales.jsonl").open()]
    assert len(kept) == 2
    report = json.loads((tmp_path / "run" / "report.json").read_text(encoding="utf-8"))
    assert list(report["rows"]) == RUN["evaluate"]["rows"]
    for row in report["rows"].values():
        assert row["large_lm_tokens_in"] > 50
        assert row["large_lm_tokens_out"] > 0
