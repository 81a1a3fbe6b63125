"""A proxy in front of a store's server, which fails in the ways that stores and networks do."""

from __future__ import annotations

import http.client
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

Fault = Callable[["Request"], str]
"""What becomes of a request: "" nothing, "500" or "503" an answer instead of the store's, "cut"
half an upload and no answer, "lost" no answer, "slow" an answer after a second, "deaf" what is said
and done, without an answer."""


class Request:
    """What a fault is chosen by."""

    def __init__(self, method: str, path: str) -> None:
        self.method = method
        self.path = path

    def writes(self, name: str) -> bool:
        """Whether it writes a file whose path holds ``name``."""
        return self.method in ("PUT", "POST") and name in self.path


class FaultyStore:
    """The proxy's address, and the fault that the next requests meet."""

    def __init__(self, upstream: str) -> None:
        self.fault: Fault = lambda request: ""
        self.met: list[str] = []
        self.received = 0
        """Bytes of what was uploaded."""
        self._upstream = urlsplit(upstream).netloc
        self._conditional = threading.Lock()
        store = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def handle_any(self) -> None:
                try:
                    store.handle(self)
                except ConnectionError:
                    self.close_connection = True  # the client has given up

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = handle_any

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the proxy."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def handle(self, client: BaseHTTPRequestHandler) -> None:
        """Passes one request on, or lets it fail."""
        fault = self.fault(Request(client.command, client.path))
        if fault:
            self.met.append(fault)
        if fault in ("lost", "cut"):
            if fault == "cut":
                client.rfile.read(int(client.headers.get("Content-Length", 0)) // 2)
            client.close_connection = True
            return
        length = int(client.headers.get("Content-Length", 0))
        body = client.rfile.read(length) if length else b""
        self.received += length
        if fault in ("500", "503"):
            code = "InternalError" if fault == "500" else "SlowDown"
            text = f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode()
            _answer(client, int(fault), {"Content-Type": "application/xml"}, text)
            return
        if fault == "slow":
            time.sleep(1)
        # moto looks and writes in two steps; a real store does both in one.
        conditional = client.headers.get("If-None-Match") is not None
        if conditional:
            with self._conditional:
                answer = self._ask(client, body)
        else:
            answer = self._ask(client, body)
        if fault == "deaf":
            client.close_connection = True
            return
        _answer(client, *answer)

    def _ask(
        self, client: BaseHTTPRequestHandler, body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        upstream = http.client.HTTPConnection(self._upstream, timeout=60)
        try:
            headers = {k: v for k, v in client.headers.items() if k.lower() != "expect"}
            upstream.request(client.command, client.path, body, headers)
            answer = upstream.getresponse()
            return answer.status, dict(answer.getheaders()), answer.read()
        finally:
            upstream.close()


def _answer(
    client: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes
) -> None:
    client.send_response(status)
    dropped = ("transfer-encoding", "connection", "server", "date")
    for name, value in headers.items():
        if name.lower() not in (*dropped, *(["content-length"] if body else [])):
            client.send_header(name, value)
    if body or not any(name.lower() == "content-length" for name in headers):
        client.send_header("Content-Length", str(len(body)))
    client.end_headers()
    client.wfile.write(body)


@contextmanager
def faulty(upstream: str) -> Iterator[FaultyStore]:
    """A proxy in front of a server."""
    store = FaultyStore(upstream)
    try:
        yield store
    finally:
        store.close()
