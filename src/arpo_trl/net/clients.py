"""HTTP clients for many requests at once."""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx

AT_ONCE = 16


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

    async def aclose(self) -> None:
        for client in [*self._running]:  # one may be made meanwhile
            await client.aclose()
