"""OpenEnv's `GenericEnvClient`: that of its package, and the part of it that docs/environments.md uses.

The part works without a package registry. The package itself installs 450 MB of others.
"""

from __future__ import annotations

import importlib
import json
import sys
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

from fetch_packages import folder


@cache
def packaged_client() -> Any:
    """The class of the package that tests/fetch_packages.py fetched, loaded without the server's part of the package.

    That part is imported by the packages' `__init__`, so modules without it take their places.
    """
    for name in ("openenv", "openenv.core"):
        package = ModuleType(name)
        package.__path__ = [str(folder("openenv").joinpath(*name.split(".")))]
        sys.modules[name] = package
    return importlib.import_module("openenv.core.generic_client").GenericEnvClient


class GenericEnvClient:
    """A session of a server with OpenEnv's protocol (openenv-core 0.3, env_client.py and generic_client.py)."""

    def __init__(self, base_url: str):
        self._url = base_url.replace("http", "ws", 1) + "/ws"
        self._socket: ClientConnection | None = None

    async def connect(self) -> GenericEnvClient:
        self._socket = await connect(self._url, proxy=None)
        return self

    async def reset(self, **given: Any) -> Any:
        return await self._asked({"type": "reset", "data": given})

    async def step(self, action: dict[str, Any]) -> Any:
        return await self._asked({"type": "step", "data": action})

    async def state(self) -> Any:
        return (await self._answer({"type": "state"}))["data"]

    async def close(self) -> None:
        if self._socket is not None:
            await self._socket.send(json.dumps({"type": "close"}))
            await self._socket.close()
            self._socket = None

    async def _asked(self, message: dict[str, Any]) -> Any:
        data = (await self._answer(message))["data"]
        return SimpleNamespace(observation=data["observation"], reward=data["reward"], done=data["done"])

    async def _answer(self, message: dict[str, Any]) -> Any:
        assert self._socket is not None
        await self._socket.send(json.dumps(message))
        answer = json.loads(await self._socket.recv())
        if answer["type"] == "error":
            data = answer["data"]
            raise RuntimeError(f"Server error: {data['message']} (code: {data['code']})")
        return answer
