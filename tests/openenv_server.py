"""A server with OpenEnv's protocol (openenv-core 0.3): a WebSocket at /ws is a session, with JSON messages.

    → {"type": "reset", "data": {"seed": 3}}       ← {"type": "observation", "data": {"observation": …, "done": …}}
    → {"type": "step", "data": {"item": "tea"}}    ← the same, or {"type": "error", "data": {"message": …, "code": …}}
    → {"type": "state"}                            ← {"type": "state", "data": …}, here the number of other sessions
    → {"type": "close"}

python openenv_server.py     prints its port
"""

from __future__ import annotations

import itertools
import json
from typing import Any

from websockets.sync.server import ServerConnection, serve

OPEN: set[int] = set()
NUMBERS = itertools.count()


def observed(text: str) -> dict[str, Any]:
    data = {"observation": {"text": text}, "reward": None, "done": False}
    return {"type": "observation", "data": data}


def session(connection: ServerConnection) -> None:
    number = next(NUMBERS)
    items: list[str] = []
    OPEN.add(number)
    try:
        for raw in connection:
            message = json.loads(raw)
            given = message.get("data", {})
            if message["type"] == "close":
                return
            if message["type"] == "reset":
                items = [f"seed {given['seed']}"]
                answer = observed(f" with {items[0]}")
            elif message["type"] == "step" and given["item"] == "nothing":
                answer = {"type": "error", "data": {"message": "not sold", "code": "EXECUTION_ERROR"}}
            elif message["type"] == "step":
                items.append(given["item"])
                answer = observed(", ".join(items))
            else:
                answer = {"type": "state", "data": {"episode_id": None, "step_count": len(OPEN) - 1}}
            connection.send(json.dumps(answer))
    finally:
        OPEN.discard(number)


if __name__ == "__main__":
    with serve(session, "127.0.0.1", 0) as server:
        print(server.socket.getsockname()[1], flush=True)
        server.serve_forever()
