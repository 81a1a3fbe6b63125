"""Every backend that the settings name can be opened, and says what it can do."""

from __future__ import annotations

import inspect
from typing import get_args

import pytest

from lmcot.config import FrozenSettings, OpenAIFrozen, TransformersFrozen
from lmcot.config.frozen import Frozen
from lmcot.frozen.open import BACKENDS

KINDS: tuple[type[FrozenSettings], ...] = get_args(get_args(Frozen)[0])
LOCAL = TransformersFrozen(backend="transformers", source="some/model")
ENDPOINT = OpenAIFrozen(backend="openai", base_url="http://localhost:1/v1", model="m", parameters=5)


def test_each_kind_of_settings_has_its_backend() -> None:
    assert set(KINDS) == set(BACKENDS)
    assert {TransformersFrozen, OpenAIFrozen} <= set(KINDS)
    for kind in KINDS:
        assert not inspect.isabstract(BACKENDS[kind]()), kind
        assert kind.public_name is not FrozenSettings.public_name, "clients must be told some name"


def test_a_local_model_computes_here_and_isolates_its_calls_by_default() -> None:
    assert (LOCAL.local_source, LOCAL.known_parameters) == ("some/model", None)
    assert (LOCAL.isolates_calls, LOCAL.calls_at_once) == (True, 1)
    assert LOCAL.lacks_likelihoods == ""
    assert (LOCAL.request_limit, LOCAL.address, LOCAL.probe_url) == (None, None, None)
    served = LOCAL.for_service()
    assert (served.isolates_calls, served.calls_at_once) == (False, 32)
    assert LOCAL.isolates_calls, "the run's own settings stay as they are"


def test_an_endpoint_waits_for_another_machine() -> None:
    assert (ENDPOINT.local_source, ENDPOINT.known_parameters) == (None, 5)
    assert (ENDPOINT.isolates_calls, ENDPOINT.calls_at_once) == (False, 32)
    assert ENDPOINT.request_limit == ("frozen.total_timeout_s", 300)
    assert ENDPOINT.probe_url == "http://localhost:1/v1/models"
    assert ENDPOINT.for_service() is ENDPOINT


@pytest.mark.parametrize(
    ("api", "lacks"), [("chat", "frozen.backend 'openai' with api 'chat'"), ("completions", "")]
)
def test_only_the_completions_api_may_give_likelihoods(api: str, lacks: str) -> None:
    assert ENDPOINT.model_copy(update={"api": api}).lacks_likelihoods == lacks
