"""Who may send requests: bearer tokens, known by their digests, and accepted Host headers."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
from collections.abc import Sequence

from lmcot.config import ServeSettings
from lmcot.errors import UserError
from lmcot.network import is_loopback


def token_digests(settings: ServeSettings) -> tuple[str, ...]:
    """SHA-256 digests of the tokens in this process's environment; empty if it has none.

    The digests are part of the deployment, because replicas run in other processes, on other
    machines, whose environment may lack the variable.

    Raises:
        UserError: if the variable is set, but holds no token.
    """
    given = os.environ.get(settings.tokens_env, "")
    tokens = [one.strip() for one in given.split(",") if one.strip()]
    if given and not tokens:
        raise UserError(
            f"{settings.tokens_env} is set, but holds no token: put tokens into it, separated by "
            "commas, or unset it"
        )
    return tuple(digest(one) for one in tokens)


def digest(token: str) -> str:
    """A token's SHA-256 digest in hexadecimal, as `sha256sum` prints it."""
    return hashlib.sha256(token.encode()).hexdigest()


class Access:
    """Accepts or refuses a request by its headers."""

    def __init__(self, settings: ServeSettings, digests: Sequence[str]) -> None:
        self._digests = tuple(digests)
        self._hosts = tuple(one.lower() for one in settings.allowed_hosts)
        # A page of any site can make its own name resolve to this machine; a token stops it.
        self._local_only = not digests and is_loopback(settings.host)

    def admits(self, authorization: bytes) -> bool:
        """Whether the header holds one of the tokens; the time it takes does not tell which."""
        if not self._digests:
            return True
        scheme, _, token = authorization.partition(b" ")
        given = hashlib.sha256(token.strip()).hexdigest()
        found = [hmac.compare_digest(one, given) for one in self._digests]
        return scheme.lower() == b"bearer" and any(found)

    def answers_to(self, header: bytes | None) -> bool:
        """Whether the service answers to the name in a Host header; old clients send none."""
        if header is None:
            return True
        host = host_of(header.decode("latin-1"))
        if self._hosts:
            return any(_matches(host, one) for one in self._hosts)
        return not self._local_only or _is_name_of_this_machine(host)


def host_of(header: str) -> str:
    """The name or address in a Host header, without the port."""
    text = header.strip().lower()
    if text.startswith("["):
        return text[1:].partition("]")[0]
    return text.partition(":")[0] if text.count(":") == 1 else text


def _is_name_of_this_machine(host: str) -> bool:
    # Unlike a name, an address cannot be made to resolve to this machine by another site.
    try:
        ipaddress.ip_address(host)
    except ValueError:
        name = host.rstrip(".")
        return name == "localhost" or name.endswith(".localhost")
    return True


def _matches(host: str, allowed: str) -> bool:
    if allowed.startswith("*."):
        return host.endswith(allowed[1:])
    return allowed in ("*", host)
