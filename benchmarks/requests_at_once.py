"""The CPU time of HTTP requests that run at once: one httpx client for all, and `HTTPClients`.

    python benchmarks/requests_at_once.py            # 512 requests at once, three rounds

The server runs in another process and answers each request after 0.3 s.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import ssl
import time
from contextlib import nullcontext
from multiprocessing.connection import Connection

import httpx

from arpo_trl.net.clients import HTTPClients

ANSWER_S = 0.3
ROUNDS = 3


async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while not reader.at_eof():
        try:
            await reader.readuntil(b"\r\n\r\n")
        except asyncio.IncompleteReadError:
            break
        await asyncio.sleep(ANSWER_S)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")
        await writer.drain()
    writer.close()


async def serve(ready: Connection) -> None:
    server = await asyncio.start_server(answer, "127.0.0.1", 0, backlog=4096)
    ready.send(server.sockets[0].getsockname()[1])
    await server.serve_forever()


def run_server(ready: Connection) -> None:
    asyncio.run(serve(ready))


def client(verify: ssl.SSLContext) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(verify=verify, limits=limits, timeout=None)


async def cpu_s(url: str, at_once: int, *, shared: bool) -> float:
    """The CPU seconds of this process for `ROUNDS` requests of each of `at_once` tasks."""
    clients = HTTPClients(client)
    only = client(httpx.create_ssl_context())

    async def ask() -> None:
        for _ in range(ROUNDS):
            with clients.one() if shared else nullcontext(only) as http:
                (await http.get(url)).raise_for_status()

    start = time.process_time()
    await asyncio.gather(*(ask() for _ in range(at_once)))
    used = time.process_time() - start
    await clients.aclose()
    await only.aclose()
    return used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--at-once", type=int, default=512)
    at_once = parser.parse_args().at_once
    ready, send = multiprocessing.Pipe()
    server = multiprocessing.Process(target=run_server, args=(send,), daemon=True)
    server.start()
    url = f"http://127.0.0.1:{ready.recv()}/"
    one, several = (asyncio.run(cpu_s(url, at_once, shared=shared)) for shared in (False, True))
    server.terminate()
    print("requests at once | ms of CPU per request, one client | HTTPClients | ratio")
    requests = at_once * ROUNDS
    print(f"{at_once} | {1000 * one / requests:.1f} | {1000 * several / requests:.1f} | {one / several:.1f}")


if __name__ == "__main__":
    main()
