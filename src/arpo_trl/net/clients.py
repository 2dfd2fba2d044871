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
        trust_env: Whether SSL_CERT_FILE and SSL_CERT_DIR set the trusted certificates.
    """

    def __init__(self, make: Callable[[ssl.SSLContext], httpx.AsyncClient], *, trust_env: bool = True):
        self._make = make
        self._verify = httpx.create_ssl_context(trust_env=trust_env)
        self._clients: list[httpx.AsyncClient] = []
        self._running: list[int] = []

    @contextmanager
    def one(self) -> Iterator[httpx.AsyncClient]:
        """A client for one request, including the reading of its answer."""
        place = next((i for i, running in enumerate(self._running) if running < AT_ONCE), len(self._clients))
        if place == len(self._clients):
            self._clients.append(self._make(self._verify))
            self._running.append(0)
        self._running[place] += 1
        try:
            yield self._clients[place]
        finally:
            self._running[place] -= 1

    async def aclose(self) -> None:
        for client in self._clients:
            await client.aclose()
