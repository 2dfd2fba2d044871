"""A real HTTP server on 127.0.0.1 with responses that a test defines."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit


@dataclass(frozen=True)
class Asked:
    """One request that the server got."""

    method: str
    path: str
    params: dict[str, str]
    headers: dict[str, str]  # names in lower case
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class Reply:
    """The answer: bytes or text unchanged, other values as JSON."""

    body: Any = ""
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    stream: Callable[[Any], None] | None = None
    """Writes the body to the socket's file itself."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    """The system drops connections beyond it. Python's 5 are few for a client that opens a hundred at a time."""


class Loopback:
    """Use as a context manager; `asked` holds the requests so far."""

    def __init__(self, answer: Callable[[Asked], Reply]) -> None:
        self.answer = answer
        self.asked: list[Asked] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one(self) -> None:
                parts = urlsplit(self.path)
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                headers = {name.lower(): value for name, value in self.headers.items()}
                asked = Asked(self.command, parts.path, dict(parse_qsl(parts.query)), headers, body)
                outer.asked.append(asked)
                reply = outer.answer(asked)
                content = reply.body
                if not isinstance(content, bytes):
                    content = (content if isinstance(content, str) else json.dumps(content)).encode()
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                if reply.stream is None:
                    self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                try:
                    if self.command == "HEAD":
                        return
                    if reply.stream is None:
                        self.wfile.write(content)
                    else:
                        self.close_connection = True
                        reply.stream(self.wfile)
                except OSError:  # the client hung up, as it should when it has had enough
                    self.close_connection = True

            do_GET = do_HEAD = do_POST = do_PUT = handle_one

            def log_message(self, *_: Any) -> None:
                pass

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.port: int = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True)

    def __enter__(self) -> Loopback:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self._thread.join(10)
