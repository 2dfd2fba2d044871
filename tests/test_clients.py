"""Many requests at once are shared among several clients."""

import asyncio
import socket
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


def test_a_request_is_cancelled_when_its_server_refuses_connections_and_not_before(monkeypatch):
    """As vLLM does after SIGTERM: it keeps the connections of running requests, and answers nothing."""
    monkeypatch.setattr("arpo_trl.net.clients.PROBE_S", 0.05)
    checked, done = asyncio.Event(), asyncio.Event()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.readuntil(b"\r\n\r\n")
        if asked.startswith(b"GET /health"):
            checked.set()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        elif asked.startswith(b"GET /short"):
            writer.write(b"HTTP/1.1 204 No Content\r\nConnection: close\r\n\r\n")
        else:
            await done.wait()
        writer.close()

    async def ask() -> None:
        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        clients = HTTPClients(lambda verify: httpx.AsyncClient(verify=verify, timeout=60.0))
        with clients.one() as http:
            long = asyncio.create_task(clients.while_up(f"{url}/health", http.get(f"{url}/long")))
            await checked.wait()
            assert (await clients.while_up(f"{url}/health", http.get(f"{url}/short"))).status_code == 204
            assert not long.done()
            server.close()
            with pytest.raises(httpx.ConnectError, match="no longer accepts connections"):
                await long
        done.set()
        await clients.aclose()

    asyncio.run(ask())


def probing(monkeypatch, addresses) -> str:
    """The result of a request during which a server's port is checked at least twice, unless the first check cancels
    it. `addresses()` are those of the server's name."""
    monkeypatch.setattr("arpo_trl.net.clients.PROBE_S", 0.02)

    async def ask() -> str:
        checks: asyncio.Queue[None] = asyncio.Queue()

        async def resolved(*args: object, **options: object) -> list[tuple]:
            checks.put_nowait(None)
            return [(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (ip, 9)) for ip in addresses()]

        async def answer() -> str:
            for _ in range(2):
                await checks.get()
            return "an answer"

        monkeypatch.setattr(asyncio.get_running_loop(), "getaddrinfo", resolved)
        clients = HTTPClients(lambda verify: httpx.AsyncClient(verify=verify, trust_env=False))
        try:
            return await clients.while_up("http://server:9/health", answer())
        finally:
            assert asyncio.all_tasks() == {asyncio.current_task()}  # a server without running requests is not checked
            await clients.aclose()

    return asyncio.run(ask())


@pytest.mark.parametrize(
    "error", [socket.gaierror(-3, "Temporary failure in name resolution"), OSError(24, "Too many open files")]
)
def test_a_check_that_fails_before_it_reaches_the_server_cancels_no_request(monkeypatch, error):
    def fail():
        raise error

    assert probing(monkeypatch, fail) == "an answer"


@pytest.mark.parametrize("addresses", [["127.0.0.1"], ["127.0.0.1", "127.0.0.2"]])
def test_a_port_that_is_closed_at_all_addresses_of_a_name_cancels_its_requests(monkeypatch, addresses):
    with pytest.raises(httpx.ConnectError, match="no longer accepts connections"):
        probing(monkeypatch, lambda: addresses)


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
