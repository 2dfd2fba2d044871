"""Serves the page of a run on this machine, and sends the page the run's updates."""

from __future__ import annotations

import http.server
import json
import sys
import urllib.parse
from threading import Lock
from typing import Any

from arpo_trl.errors import ArpoError, ConfigError
from arpo_trl.viewing.page import changes, page
from arpo_trl.viewing.page_tree import as_json
from arpo_trl.viewing.run import RunReader

HOST = "127.0.0.1"


class ViewServer(http.server.ThreadingHTTPServer):
    """An HTTP server for one run on 127.0.0.1. `port` 0 selects a free port; `url` contains it.

    Raises:
        ConfigError: The port cannot be used.
    """

    daemon_threads = True

    def __init__(self, reader: RunReader, port: int):
        self.reader = reader
        self.lock = Lock()
        """Locked while the reader reads, because each request runs in its own thread."""
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"Port {port} of {HOST} cannot be used: {str(error).rstrip('.')}. Choose another --port."
            ) from error

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.server_address[1]}/"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints the traceback of an error, unless the page was closed before its answer."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class _Handler(http.server.BaseHTTPRequestHandler):
    server: ViewServer
    timeout = 30
    """Seconds after which a client that does not read its answer is left."""

    def do_GET(self) -> None:
        # A page of another site whose name resolves to 127.0.0.1 must not read the run. Its requests name that site.
        if self.headers.get("Host", "").partition(":")[0] not in (HOST, "localhost"):
            return self._answer(403, "text/plain", "Open this server as 127.0.0.1.")
        url = urllib.parse.urlsplit(self.path)
        try:
            with self.server.lock:
                self.server.reader.refresh()
                answer = self._content(url)
        except (ArpoError, ValueError, OverflowError, OSError) as error:  # a broken file; the run may replace it
            answer = 500, "application/json", json.dumps({"error": str(error)})
        self._answer(*answer)  # without the lock: a client may read slowly

    def _content(self, url: urllib.parse.SplitResult) -> tuple[int, str, str]:
        reader = self.server.reader
        if url.path == "/":
            return 200, "text/html; charset=utf-8", page(reader, live=True)
        if url.path == "/changes":
            asked = urllib.parse.parse_qs(url.query).get("after", ["0"])[0]
            after = int(asked) if asked.isdecimal() and len(asked) < 20 else 0
            return 200, "application/json", as_json(changes(reader, after))
        return 404, "text/plain", "There is nothing here."

    def _answer(self, status: int, kind: str, text: str) -> None:
        body = text.encode("utf-8")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing, since the page sends a request every two seconds."""
