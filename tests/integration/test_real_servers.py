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
from lmcot.errors import UserError
from lmcot.frozen.cached import CachedLM
from lmcot.frozen.open import check_frozen_lm, open_frozen_lm
from lmcot.monitor.metrics import read_metrics
from lmcot.records import Choice, Completion, Failure, FailureKind, Message, Prompt, Sampling
from tests.integration.command import lmcot
from tests.integration.servers import (
    SMOLLM2,
    litellm_proxy,
    llama_cpp,
    needs_servers,
    transformers_serve,
)

pytestmark = [pytest.mark.e2e, needs_servers]

KEY = "a-key-of-this-test"
# As Qwen3's and DeepSeek's do, it opens the thinking itself unless that is switched off.
THINKING = """{% for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}
<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false -%}
<think>

</think>

{% else -%}
<think>
{% endif -%}"""
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
        backend="openai", base_url=url, model=model, max_retries=2, cache={"enabled": False}, **more
    )


def opened(request: pytest.FixtureRequest, server: str, **more: Any) -> CachedLM:
    return open_frozen_lm(settings(request, server, **more), PromptSettings())


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


@EVERY
@pytest.mark.usefixtures("key")
def test_an_answer_is_read_with_its_tokens(
    request: pytest.FixtureRequest, server: str, api: str
) -> None:
    check_frozen_lm(settings(request, server, api=api))
    lm = opened(request, server, api=api)
    [found] = lm.generate([RIVER], Sampling(16, 0.0, seed=1)).results
    assert isinstance(found, Completion)
    assert "Humboldt" in found.text
    assert 20 < found.tokens_in < 80
    assert 3 <= found.tokens_out <= 16
