"""What the test Hubs have in common: a server on the loopback interface that answers in JSON."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class JsonHandler(BaseHTTPRequestHandler):
    """Says nothing of the requests it gets; `hub` is the state that `serving` was given."""

    hub: Any
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        pass

    def answer(self, status: int, body: Any = b"", headers: dict[str, Any] | None = None) -> None:
        """Sends `body`, bytes or what JSON can say."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        fixed = {"Content-Type": "application/json", "Content-Length": len(data)}
        for name, value in {**fixed, **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.send_body(data)

    def send_body(self, data: bytes) -> None:
        self.wfile.write(data)


@contextmanager
def serving(handler: type[JsonHandler], hub: Any) -> Iterator[str]:
    """A running server; yields its address."""
    bound = type("BoundHandler", (handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
