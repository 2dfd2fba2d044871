"""A server of environments in a separate process: sessions over HTTP, like OpenEnv's servers.

python environment_server.py     prints its port; GET / returns the number of open sessions
"""

from __future__ import annotations

import itertools
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, ClassVar


class Handler(BaseHTTPRequestHandler):
    sessions: ClassVar[dict[str, list[str]]] = {}
    numbers = itertools.count()

    def do_GET(self) -> None:
        self.answer({"open": len(self.sessions)})

    def do_POST(self) -> None:
        given = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/reset":
            session = str(next(self.numbers))
            self.sessions[session] = [given["name"]]
            self.answer({"session": session, "text": f" in {given['name']}"})
        elif self.path == "/step":
            entries = self.sessions[given["session"]]
            entries.append(given["item"])
            self.answer({"text": " ".join(entries)})
        else:
            self.answer({"closed": self.sessions.pop(given["session"], None) is not None})

    def answer(self, value: dict[str, Any]) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    print(server.server_port, flush=True)
    server.serve_forever()
