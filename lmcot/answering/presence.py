"""What a service tells of the frozen LM: failures without its address, and whether it is up."""

from __future__ import annotations

import asyncio
import http.client
import re
import ssl
import time
import urllib.error
import urllib.request
from urllib.parse import urlsplit

from lmcot.config import FrozenSettings
from lmcot.network import is_loopback

_PROBE_S = 3.0
"""Time limit of a probe."""
_FRESH_S = {True: 5.0, False: 1.0}
"""How long a probe's result is kept, by whether the endpoint answered."""
_GATEWAY_FAULTS = (502, 503, 504)
_URL = re.compile(r"https?://[^\s'\"<>)\],]*")


def without_address(reason: str, settings: FrozenSettings) -> str:
    """A failure's reason, without the endpoint's address."""
    if settings.address is None:
        return reason
    text = _URL.sub("its address", reason.replace(settings.address, "its address"))
    address = urlsplit(settings.address)
    for secret in (address.netloc, address.hostname):
        if secret:
            text = re.sub(rf"(?<![\w.]){re.escape(secret)}(:\d+)?(?![\w.])", "its address", text)
    return text


class Presence:
    """Tells whether the frozen LM can be reached; an endpoint is probed every few seconds at most.

    A probe sends no key and generates nothing; any answer but a gateway's error counts.
    """

    def __init__(self, settings: FrozenSettings) -> None:
        self._url = settings.probe_url
        self._found, self._until = True, 0.0
        self._asking = asyncio.Lock()

    async def there(self) -> bool:
        """Whether the frozen LM can be reached; a model in this process always can."""
        if self._url is None:
            return True
        async with self._asking:
            if time.monotonic() >= self._until:
                self._found = await self._probe(self._url)
                self._until = time.monotonic() + _FRESH_S[self._found]
        return self._found

    async def _probe(self, url: str) -> bool:
        try:
            async with asyncio.timeout(_PROBE_S):
                return await asyncio.to_thread(_answers, url)
        except TimeoutError:
            return False


def _answers(url: str) -> bool:
    # Neither key nor question is sent, so whose certificate it is does not matter.
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    handlers: list[urllib.request.BaseHandler] = [urllib.request.HTTPSHandler(context=context)]
    if is_loopback(urlsplit(url).hostname or ""):
        handlers.append(urllib.request.ProxyHandler({}))
    try:
        with urllib.request.build_opener(*handlers).open(url, timeout=_PROBE_S):
            return True
    except urllib.error.HTTPError as error:
        return error.code not in _GATEWAY_FAULTS
    except (OSError, http.client.HTTPException):
        return False
