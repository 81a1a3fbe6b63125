"""How an endpoint is reached: key, headers, certificates, proxy; and which values are secret."""

from __future__ import annotations

import os
import re
import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import openai

from lmcot.config import OpenAIFrozen
from lmcot.config.addresses import VARIABLE, check_base_url
from lmcot.errors import UserError
from lmcot.network import is_loopback

_SHORT_SECRET = 8
"""Shorter secrets are redacted as whole words only, since 'x' is in every sentence."""
_LOGIN = re.compile(r"(?<=://)[^/@\s]*@")


@dataclass(frozen=True, slots=True)
class Access:
    """What each request sends to be admitted.

    Attributes:
        key: empty where none is sent.
        headers: with the secrets that they name.
        secrets: all values that must not be told.
    """

    key: str
    headers: dict[str, str]
    secrets: tuple[str, ...]

    def __repr__(self) -> str:
        return "Access(***)"

    def redacted(self, text: str) -> str:
        """The text without secrets, which some endpoints repeat in their errors."""
        for secret in self.secrets:
            pattern = re.escape(secret)
            if len(secret) < _SHORT_SECRET:
                pattern = rf"(?<!\w){pattern}(?!\w)"
            text = re.sub(pattern, "***", text)
        return _LOGIN.sub("***@", text)


def open_access(settings: OpenAIFrozen) -> Access:
    """The key and the headers, with what the environment holds.

    Raises:
        UserError: if the address is none, a variable is not set, or there is no key for an
            endpoint elsewhere.
    """
    host = _host(settings)
    headers, secrets = {}, []
    for name, value in settings.headers.items():
        variables = VARIABLE.findall(value)
        secrets += [_from_environment(variable, f"the header '{name}'") for variable in variables]
        headers[name] = VARIABLE.sub(lambda found: os.environ[found[1]].strip(), value)
    key = _printable(settings.api_key_env, os.environ.get(settings.api_key_env, ""))
    if not key and not secrets and not is_loopback(host):
        raise UserError(
            f"the environment variable {settings.api_key_env} is not set: put the API key of "
            f"{host} into it; for a server that asks for no key, any value will do "
            f"(export {settings.api_key_env}=none)"
        )
    longest_first = sorted({*secrets, key} - {""}, key=len, reverse=True)
    return Access(key, headers, tuple(longest_first))


def open_client(settings: OpenAIFrozen, access: Access) -> openai.AsyncOpenAI:
    """The HTTP client, which sends nothing yet.

    Proxies that the environment names are not used for an endpoint on this machine.

    Raises:
        UserError: if certificates or a proxy cannot be used.
    """
    local = is_loopback(_host(settings))
    reply_s = settings.read_timeout_s
    timeout = openai.Timeout(
        connect=settings.connect_timeout_s, read=reply_s, write=reply_s, pool=None
    )
    try:
        http = openai.DefaultAsyncHttpxClient(
            verify=_tls(settings),
            trust_env=not local,
            timeout=timeout,
            # To another host, HTTP clients take the Authorization header off, but no other.
            follow_redirects=not access.headers,
        )
    except UserError:
        raise
    except Exception as error:  # of many types, but all from what the environment says of proxies
        raise UserError(_cannot_open(error, access)) from None
    return openai.AsyncOpenAI(
        base_url=settings.base_url,
        api_key=access.key or "none",
        default_headers=access.headers,
        default_query=settings.query,
        http_client=http,
        timeout=timeout,
        max_retries=0,
    )


def request_options(access: Access) -> dict[str, Any]:
    """The options of each request: without a key, no Authorization header is sent."""
    own = any(name.lower() == "authorization" for name in access.headers)
    return {} if access.key or own else {"headers": {"Authorization": openai.Omit()}}


def _host(settings: OpenAIFrozen) -> str:
    try:
        return urlsplit(check_base_url(settings.base_url)).hostname or ""
    except ValueError as error:
        raise UserError(f"frozen: {error}") from None


def _from_environment(variable: str, what: str) -> str:
    value = _printable(variable, os.environ.get(variable, ""))
    if not value:
        raise UserError(
            f"{what} in frozen.headers names the environment variable {variable}, which is not set"
        )
    return value


def _printable(variable: str, value: str) -> str:
    value = value.strip()
    if not (value.isascii() and value.isprintable()):
        raise UserError(
            f"the environment variable {variable} holds no API key: it has characters that no key "
            "has; set it again"
        )
    return value


def _tls(settings: OpenAIFrozen) -> ssl.SSLContext | bool:
    if not settings.verify_tls:
        return False
    # Read here: the HTTP client looks at no variable for an endpoint on this machine.
    named = settings.ca_file or os.environ.get("SSL_CERT_FILE")
    if not named:
        return True
    key = "frozen.ca_file" if settings.ca_file else "the environment variable SSL_CERT_FILE"
    try:
        return ssl.create_default_context(cafile=os.path.expanduser(named))
    except (OSError, ssl.SSLError) as error:
        lost = isinstance(error, FileNotFoundError | PermissionError | IsADirectoryError)
        reason = error.strerror if lost else "it holds no certificates in PEM form"
        raise UserError(
            f"{key} names '{named}', which cannot be used ({reason}): give a file of certificates "
            "in PEM form"
        ) from None


def _cannot_open(error: Exception, access: Access) -> str:
    reason = access.redacted(" ".join(str(error).split()))
    if isinstance(error, ImportError) and "socks" in reason.lower():
        return (
            "the environment names a SOCKS proxy (ALL_PROXY, HTTPS_PROXY or HTTP_PROXY), which "
            "needs the package socksio: run pip install socksio, unset the variable, or name the "
            "endpoint's host in NO_PROXY"
        )
    return (
        f"no connection to the endpoint can be prepared ({reason}): see the environment variables "
        "ALL_PROXY, HTTPS_PROXY, HTTP_PROXY, NO_PROXY, SSL_CERT_FILE and SSL_CERT_DIR"
    )
