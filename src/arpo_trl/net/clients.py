"""HTTP clients for many requests at once."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx

AT_ONCE = 16
PROBE_S = 10.0
"""Seconds between two checks of whether a server still accepts connections."""

T = TypeVar("T")


class HTTPClients:
    """HTTP clients of one event loop. Each runs at most `AT_ONCE` requests at once; a client is made when all others
    are busy.

    httpx looks at every connection of a client whenever one of its requests starts or ends. So with one client the CPU
    time per request grows with the number of running requests (`benchmarks/requests_at_once.py`).

        clients = HTTPClients(lambda verify: httpx.AsyncClient(verify=verify))
        with clients.one() as http:
            response = await http.get(url)
        await clients.aclose()

    Args:
        make: Makes a client with this TLS context. All clients share it, because it takes long to create.
    """

    def __init__(self, make: Callable[[ssl.SSLContext], httpx.AsyncClient]):
        self._make = make
        self._verify = httpx.create_ssl_context()
        self._running: dict[httpx.AsyncClient, int] = {}
        self._watches: dict[str, asyncio.Task[str]] = {}
        """The check of each address for which `while_up` runs requests."""
        self._watched: dict[str, set[asyncio.Task[Any]]] = {}
        """These requests."""

    @contextmanager
    def one(self) -> Iterator[httpx.AsyncClient]:
        """A client for one request, including the reading of its answer."""
        free = (client for client, running in self._running.items() if running < AT_ONCE)
        client = next(free, None) or self._make(self._verify)
        self._running[client] = self._running.get(client, 0) + 1
        try:
            yield client
        finally:
            self._running[client] -= 1

    async def while_up(self, url: str, request: Coroutine[Any, Any, T]) -> T:
        """The result of `request`, which is cancelled if the server of `url` no longer accepts connections.

        A server that gets SIGTERM may keep the connections of running requests open without ever answering them.

        Args:
            url: An address that the server answers without computation. All running requests share its checks, which
                end with the last of them.

        Raises:
            httpx.ConnectError: The server no longer accepts connections.
        """
        watch = self._watches.get(url)
        if watch is None or watch.done():
            watch = self._watches[url] = asyncio.create_task(self._refusal(url))
        running = asyncio.create_task(request)
        watched = self._watched.setdefault(url, set())
        watched.add(running)
        try:
            await asyncio.wait([running, watch], return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                raise httpx.ConnectError(f"no longer accepts connections: {watch.result()}")
            return running.result()
        finally:
            ended: list[asyncio.Task[Any]] = [running]
            watched.remove(running)
            if not watched:
                ended.append(self._watches.pop(url))
            for task in ended:
                task.cancel()
            await asyncio.gather(*ended, return_exceptions=True)

    async def _refusal(self, url: str) -> str:
        """Wait until a connection is refused, and return the error."""
        while True:
            await asyncio.sleep(PROBE_S)
            try:
                with self.one() as http:
                    await http.get(url, timeout=PROBE_S)
            except httpx.HTTPError as error:
                # Otherwise it is slow, or its name was not resolved, or no file descriptor is left here.
                if _is_refused(error):
                    return str(error)

    async def aclose(self) -> None:
        for client in [*self._running]:  # one may be made meanwhile
            await client.aclose()


def _is_refused(error: BaseException | None) -> bool:
    """Whether a closed port has caused this error of httpx, which wraps the socket's error several times."""
    while error is not None and not isinstance(error, ConnectionRefusedError):
        if isinstance(error, BaseExceptionGroup):  # one error for each address of the name
            return any(map(_is_refused, error.exceptions))
        error = error.__cause__ or error.__context__
    return error is not None
