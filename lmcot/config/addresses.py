"""Checks of an endpoint's address, key and headers: settings must not hold secrets.

Settings are written to a run's config.yaml, to TensorBoard and to messages. So what may be a
secret is refused, and no sentence here repeats the value that it is about.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlsplit

_UPPER_NAME = re.compile(r"(?=.{1,64}\Z)(?=.{1,19}\Z|.*_)[A-Z_][A-Z0-9_]*", re.ASCII)
"""Long names have underscores; keys made of capitals and digits have none."""
_LOWER_NAME = re.compile(r"(?=.{1,40}\Z)_?[a-z]+(_[a-z]+)*_?[0-9]{0,2}", re.ASCII)
_SECRET_NAME = re.compile(
    r"authorization|cookie|passw(or)?d|secret|credential|api[-_]?key|(^|[-_])key$"
    r"|(^|[-_])(access|auth|bearer|api|subscription|id|session)[-_]?token$|^token$",
    re.IGNORECASE,
)
_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+")
_SECRET_HEADER = re.compile(r"token|auth|" + _SECRET_NAME.pattern, re.IGNORECASE)
VARIABLE = re.compile(r"\$\{(\w+)\}")
"""Syntax by which a header names an environment variable."""
_OWN_HEADERS = ("content-type", "content-length", "host", "transfer-encoding", "connection")
MAY_HOLD_SECRETS = ("base_url", "api_key_env", "headers", "query", "extra_body")
"""Settings whose values no message repeats, whatever is wrong with them."""
_CALLS = ("/chat/completions", "/completions")


def check_variable_name(value: Any) -> str:
    """The value, if it looks like the name of an environment variable and not like a key.

    Raises:
        ValueError: if it does not; the value is not repeated.
    """
    name = value if isinstance(value, str) else ""
    if _UPPER_NAME.fullmatch(name) or _LOWER_NAME.fullmatch(name):
        return name
    raise ValueError(
        "api_key_env must be the name of an environment variable, such as EXAMPLE_API_KEY "
        "(capitals, digits and underscores). If it is the key itself: put the key into such a "
        "variable, and name the variable here; settings are written to files"
    )


def check_base_url(value: Any) -> str:
    """The value, if it is an http(s) address that holds nothing secret.

    Raises:
        ValueError: if it is not; what may be secret is not repeated.
    """
    wanted = "base_url is not an http(s) address: give one like http://localhost:8000/v1"
    try:
        address = urlsplit(value.strip()) if isinstance(value, str) else urlsplit("")
        host, _ = address.hostname, address.port  # raises if the port is not a number
    except ValueError:
        raise ValueError(wanted) from None
    if "@" in address.netloc or (not address.netloc and "@" in str(value)):
        raise ValueError(
            "base_url holds a user name or password, which reports would show: leave them out, "
            "and put an API key into the environment variable that api_key_env names"
        )
    if not isinstance(value, str):
        raise ValueError(wanted)
    if "?" in value or "#" in value:
        raise ValueError(
            "base_url holds a query or a fragment ('?' or '#'): leave it out; put an API key into "
            "the environment variable that api_key_env names, and anything else into query"
        )
    if not host or address.scheme not in ("http", "https") or re.search(r"[\s\x00-\x1f]", value):
        raise ValueError(wanted)
    for call in _CALLS:
        if address.path.rstrip("/").endswith(call):
            raise ValueError(
                f"base_url ends in '{call}', which each call adds itself: leave that out"
            )
    return str(value)


def check_no_secrets(values: Mapping[str, Any]) -> Mapping[str, Any]:
    """The values, if no name at any level looks like a secret's.

    Raises:
        ValueError: naming the key, never the value.
    """
    for name, value in values.items():
        if isinstance(value, Mapping):
            check_no_secrets(value)
        elif isinstance(value, str) and value and _SECRET_NAME.search(name):
            raise ValueError(
                f"the key '{name}' looks like a secret, and settings are written to files: leave "
                "it out, and give the secret as a header that names an environment variable, such "
                'as headers: {api-key: "${EXAMPLE_KEY}"}'
            )
    return values


def check_headers(headers: dict[str, str]) -> dict[str, str]:
    """The headers, if they can be sent and name secrets by their environment variables.

    Raises:
        ValueError: naming the header, never its value.
    """
    for name, value in headers.items():
        if not _HEADER_NAME.fullmatch(name) or not value.isprintable() or not value.isascii():
            raise ValueError("headers holds a name or a value that HTTP does not allow")
        if name.lower() in _OWN_HEADERS:
            raise ValueError(f"headers holds '{name}', which lmcot sets itself: leave it out")
        rest = VARIABLE.sub("", value)
        if "${" in rest:
            raise ValueError(
                f"the header '{name}' holds '${{' without the name of a variable and '}}' after it"
            )
        spoken = re.fullmatch(r"\s*(bearer|basic|token|api-?key)?:?\s*", rest, re.IGNORECASE)
        if _SECRET_HEADER.search(name) and not spoken:
            raise ValueError(
                f"the header '{name}' looks like a secret, and settings are written to files: put "
                f'it into an environment variable, and give {name}: "${{ITS_NAME}}"'
            )
    return headers
