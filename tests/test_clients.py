"""Many requests at once are shared among several clients."""

import asyncio
from contextlib import ExitStack

import httpx
import pytest

from arpo_trl.net.clients import AT_ONCE, HTTPClients


class Clients(HTTPClients):
    def __init__(self) -> None:
        self.contexts: list[object] = []
        super().__init__(self.made)

    def made(self, verify: object) -> httpx.AsyncClient:
        self.contexts.append(verify)
        return httpx.AsyncClient(transport=httpx.MockTransport(lambda request: httpx.Response(200)))


def test_a_client_is_made_when_all_others_are_busy():
    clients = Clients()
    with ExitStack() as running:
        found = [running.enter_context(clients.one()) for _ in range(2 * AT_ONCE + 1)]
        assert [len({id(client) for client in found[:n]}) for n in (1, AT_ONCE, AT_ONCE + 1)] == [1, 1, 2]
        assert found[-1] is not found[AT_ONCE]
    with clients.one() as client:
        assert client is found[0]
    assert len(clients.contexts) == 3
    assert len({id(context) for context in clients.contexts}) == 1


def test_a_failed_request_leaves_its_place_to_another():
    clients = Clients()
    for _ in range(AT_ONCE + 1):
        with pytest.raises(httpx.ReadTimeout), clients.one():
            raise httpx.ReadTimeout("late")
    assert len(clients.contexts) == 1


def test_all_clients_are_closed():
    clients = Clients()

    async def ask() -> list[httpx.AsyncClient]:
        with ExitStack() as running:
            found = [running.enter_context(clients.one()) for _ in range(AT_ONCE + 1)]
            assert (await found[-1].get("http://127.0.0.1/")).status_code == 200
        await clients.aclose()
        return found

    found = asyncio.run(ask())
    assert all(client.is_closed for client in found)
