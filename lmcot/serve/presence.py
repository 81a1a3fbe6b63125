"""What may be told of the frozen LM: its name without its address, and whether it is there."""

from __future__ import annotations

import asyncio
import http.client
import re
import ssl
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from lmcot.config import OpenAIFrozen, TransformersFrozen
from lmcot.serve.access import is_loopback

_PROBE_S = 3.0
"""Longest a probe may take."""
_FRESH_S = {True: 5.0, False: 1.0}
"""How long what a probe found is believed, by whether the endpoint was there."""
_GATEWAY_FAULTS = (502, 503, 504)
_URL = re.compile(r"https?://[^\s'\"<>)\],]*")


def public_name(settings: TransformersFrozen | OpenAIFrozen) -> str:
    """Names the model for clients: no address, and no folder of the machine."""
    if isinstance(settings, OpenAIFrozen):
        return f"openai:{settings.model}"
    source = settings.source
    if "://" in source or Path(source).is_absolute() or source.startswith((".", "~")):
        source = source.rstrip("/").rpartition("/")[2]
    return f"transformers:{source}"


def without_address(reason: str, settings: TransformersFrozen | OpenAIFrozen) -> str:
    """A failure's reason as clients may read it."""
    if not isinstance(settings, OpenAIFrozen):
        return reason
    text = _URL.sub("its address", reason.replace(settings.base_url, "its address"))
    address = urlsplit(settings.base_url)
    for secret in (address.netloc, address.hostname):
        if secret:
            text = re.sub(rf"(?<![\w.]){re.escape(secret)}(:\d+)?(?![\w.])", "its address", text)
    return text


class Presence:
    """Whether the frozen LM is there: an endpoint is asked at most once in some seconds.

    No key is sent, and nothing is generated: any answer but a gateway's complaint will do.
    """

    def __init__(self, settings: TransformersFrozen | OpenAIFrozen) -> None:
        self._url = ""
        if isinstance(settings, OpenAIFrozen):
            self._url = f"{settings.base_url.rstrip('/')}/models"
        self._found, self._until = True, 0.0
        self._asking = asyncio.Lock()

    async def there(self) -> bool:
        """Whether it is; a model in this process always is."""
        if not self._url:
            return True
        async with self._asking:
            if time.monotonic() >= self._until:
                self._found = await self._probe()
                self._until = time.monotonic() + _FRESH_S[self._found]
        return self._found

    async def _probe(self) -> bool:
        try:
            async with asyncio.timeout(_PROBE_S):
                return await asyncio.to_thread(_answers, self._url)
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
