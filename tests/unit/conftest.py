"""What several of the unit tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.endpoint import Endpoint, running


@pytest.fixture(scope="module")
def server() -> Iterator[Endpoint]:
    """An OpenAI-compatible endpoint on loopback."""
    with running() as endpoint:
        yield endpoint


@pytest.fixture
def endpoint(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> Endpoint:
    """It as new, with no API key at hand."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server.reset()
    return server
