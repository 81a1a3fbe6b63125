"""How an endpoint is reached: proxies, certificates, and secrets that must not be told."""

from __future__ import annotations

from pathlib import Path

import pytest

from lmcot.config import OpenAIFrozen
from lmcot.errors import UserError
from lmcot.frozen.openai.access import Access
from lmcot.frozen.openai.backend import OpenAILM
from lmcot.network import is_loopback
from lmcot.records import Completion, Sampling
from tests.support.endpoint import Answer, Endpoint, ask, check, client

ELSEWHERE = OpenAIFrozen(backend="openai", base_url="https://api.example.com/v1", model="m")
PROXIES = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "NO_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


@pytest.fixture(autouse=True)
def _plain_surroundings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", "k")


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("ALL_PROXY", "socks5://me:pw@127.0.0.1:9", "SOCKS proxy .*pip install socksio"),
        ("HTTPS_PROXY", "foo://me:pw@host", "no connection to the endpoint can be prepared"),
        ("HTTPS_PROXY", "http://me:pw@host:pw", "no connection to the endpoint can be prepared"),
        ("SSL_CERT_FILE", "/nowhere/ca.pem", "SSL_CERT_FILE names '/nowhere/ca.pem'.*PEM"),
    ],
)
def test_what_keeps_a_client_from_being_made_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, said: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(UserError, match=said) as told:
        OpenAILM(ELSEWHERE)
    assert "me:pw" not in str(told.value)
    assert "\n" not in str(told.value)


def test_certificates_that_are_none(tmp_path: Path) -> None:
    bad = tmp_path / "ca.pem"
    bad.write_text("no certificate")
    for path, reason in ((bad, "no certificates in PEM form"), (tmp_path, "directory")):
        given = ELSEWHERE.model_copy(update={"ca_file": str(path)})
        with pytest.raises(UserError, match=rf"frozen\.ca_file names .*{reason}"):
            OpenAILM(given)
    OpenAILM(ELSEWHERE.model_copy(update={"verify_tls": False, "ca_file": str(bad)})).close()


@pytest.mark.parametrize("variable", ["ALL_PROXY", "HTTP_PROXY", "http_proxy"])
def test_an_endpoint_on_this_machine_is_reached_without_a_proxy(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    for proxy in ("socks5://127.0.0.1:9", "http://127.0.0.1:9"):
        monkeypatch.setenv(variable, proxy)
        with client(endpoint) as lm:
            found = lm.generate(ask("say a"), Sampling(max_new_tokens=5))
        assert isinstance(found[0], Completion)


@pytest.mark.parametrize(
    ("host", "here"),
    [
        ("localhost", True), ("127.0.0.1", True), ("127.8.0.1", True), ("::1", True),
        ("a.localhost", True), ("10.1.2.3", False), ("api.example.com", False),
        ("localhost.example.com", False),
    ],
)  # fmt: skip
def test_what_is_this_machine(host: str, here: bool) -> None:
    assert is_loopback(host) == here


def test_without_a_key_it_is_said_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(UserError, match=r"OPENAI_API_KEY is not set.*any value will do"):
        OpenAILM(ELSEWHERE)


def test_secrets_are_struck_out() -> None:
    access = Access("sk-1234567890", {}, ("sk-1234567890", "x"))
    assert "1234" not in repr(access)
    said = "the key sk-1234567890, or x, is expected; see http://me:pw@host/x"
    assert access.redacted(said) == ("the key ***, or ***, is expected; see http://***@host/***")


def test_secret_headers_do_not_follow_to_another_host(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AZURE_KEY", "azure-secret-1")
    other = endpoint.url.replace("127.0.0.1", "localhost")
    endpoint.respond = lambda call: Answer("{}", 307, {"location": f"{other}/moved"})
    with pytest.raises(UserError, match="307"):
        check(endpoint, headers={"api-key": "${AZURE_KEY}"})
    assert len({call.path for call in endpoint.calls}) == 1
