"""Turns from native vLLM servers, over HTTP, with token ids in and out. Each rank sends its requests independently.

    trainer thread     submit ─▶ ┐                         ┌ ─▶ poll
    loop thread                  └ one task per turn: probe, Probe event, rest, Turn event

All turns of a tree go to the same server, so that they share its prefix cache. If the connection or the server fails
during a request, the engine sends the request again with the same seed as soon as the server is back.

A restarted server serves its initial weights. Another request can reach it before the restart is noticed. So the
engine uses an answer only if the server has the same mark (`weights.py`) after it as before the request. Otherwise the
engine sends the server the current weights, if `weight_sync` supports that, compares the logprobs again, and sends the
request again.

Within a session `sync` replaces the weights between two decode steps. All ranks delay their new requests and abort the
running ones, which keep their tokens. When the idle servers have the new weights, the turns continue with new
requests, which compute their prefix again. So every request uses one version of the weights, and no key or value of an
older version is read.
"""

from __future__ import annotations

import asyncio
import math
import queue
import socket
import ssl
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from arpo_trl.common.queues import drained
from arpo_trl.errors import EngineError, Interrupted
from arpo_trl.net.clients import HTTPClients
from arpo_trl.rollout.engines.base import Probe, SamplingParams, Turn, TurnRequest
from arpo_trl.rollout.engines.vllm.client import ATTEMPTS, ServerClient, ServerLost, headers
from arpo_trl.rollout.engines.vllm.turns import Draft, Segment, SegmentRequest, sampling_params
from arpo_trl.rollout.engines.vllm.weights import ServedWeights
from arpo_trl.rollout.text import StopFinder
from arpo_trl.visible import without_secrets

RETRY_S = 0.5
"""Seconds between two checks of whether a server is back."""
ANSWER_S = 10.0
"""The timeout of such a check, in seconds."""
ABORT_S = 0.02
"""Seconds between two attempts to abort the running requests: a request may reach the server after an attempt."""
KEEP_ALIVE = [
    # A machine that goes down may not close its connections: probe after 30 s of silence, fail after 4 lost probes.
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    *(
        (socket.IPPROTO_TCP, getattr(socket, name), value)
        for name, value in (("TCP_KEEPIDLE", 30), ("TCP_KEEPINTVL", 10), ("TCP_KEEPCNT", 4))
        if hasattr(socket, name)
    ),
]


@dataclass(slots=True)
class _Server:
    """The state of one server during a session."""

    client: ServerClient
    mark: str | None = None
    """The mark of the current weights on the server; None: no request may be sent until `restore` has returned it."""
    lock: asyncio.Lock = field(default_factory=asyncio.Lock)
    """The lock of the task that waits for the server and restores its weights."""


class VLLMServerEngine:
    """An engine on one or more vLLM servers whose weights `weights` updates.

    Args:
        tokenizer: Decodes turns to find stop strings that straddle two requests.
        settings: The distribution to sample from.
        weights: The servers, and their source of the trainer's weights at the start of each session.
        vocab_size: V, the number of tokens in the sampling distribution.
        top_logprobs: The number of logprobs requested for each of a turn's first k tokens, to estimate entropies.
        away_s: The seconds for which a server may be unreachable before the rollout fails.
        request_s: The timeout of one request, in seconds.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        settings: SamplingParams,
        weights: ServedWeights,
        *,
        vocab_size: int,
        top_logprobs: int,
        away_s: float,
        request_s: float,
    ):
        self.vocab_size = vocab_size
        self.max_length = min(facts.max_model_len for facts in weights.facts.values())
        self.forward_s = 0.0
        self.has_logprobs = True
        self._settings = settings
        self._stops = StopFinder(tokenizer, settings.stop_strings)
        self._params = sampling_params(settings) | {"return_token_ids": True, "return_tokens_as_token_ids": True}
        self._weights = weights
        self._top_logprobs = top_logprobs
        self._away_s, self._request_s = away_s, request_s
        self._pending = 0
        self._sent = 0
        """Requests that the servers have not answered yet."""
        self._events: queue.SimpleQueue[Probe | Turn | Exception] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None

    @contextmanager
    def session(self) -> Iterator[None]:
        self._weights.sync()
        self._servers = [_Server(client) for client in self._weights.clients]
        self._events = queue.SimpleQueue()
        self._sent = 0
        self._may_send = asyncio.Event()
        self._may_send.set()
        self._loop = asyncio.new_event_loop()
        thread = threading.Thread(target=self._loop.run_forever, name="vllm-server-engine", daemon=True)
        thread.start()
        self._http = HTTPClients(self._client)
        try:
            yield
        finally:
            asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            thread.join()
            self._loop.close()
            self._loop, self._pending = None, 0

    def _client(self, verify: ssl.SSLContext) -> httpx.AsyncClient:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        return httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(verify=verify, limits=limits, socket_options=KEEP_ALIVE),
            headers=headers(),
            timeout=httpx.Timeout(self._request_s, connect=10.0, pool=None),
        )

    def sync(self) -> None:
        if self._loop is None or self._weights.is_current:
            self._weights.sync()
            return
        with self._weights.lock, self._idle_servers(self._loop):
            self._weights.sync()
            for server in self._servers:
                server.mark = None

    @contextmanager
    def _idle_servers(self, loop: asyncio.AbstractEventLoop) -> Iterator[None]:
        """A context in which no rank has running requests. A collective."""
        loop.call_soon_threadsafe(self._may_send.clear)
        asyncio.run_coroutine_threadsafe(asyncio.sleep(0), loop).result()  # the event is cleared now
        try:
            self._weights.wait_for_ranks()
            with suppress(Interrupted):  # raised on all ranks together, by `ServedWeights.sync`
                while self._sent:
                    self._weights.check()
                    for client in self._weights.clients:
                        with suppress(EngineError):  # if a server is down, its requests fail without an abort
                            client.abort()
                    time.sleep(ABORT_S)
            self._weights.wait_for_ranks()
            yield
        finally:
            with suppress(RuntimeError):  # an error can end the session, and its loop, during this context
                loop.call_soon_threadsafe(self._may_send.set)

    def submit(self, request: TurnRequest) -> None:
        if self._loop is None:
            raise EngineError("submit() outside a session: wrap the rollout in `with engine.session():`.")
        draft = Draft(request, self._settings.eos_ids, self._stops, self.vocab_size, self._top_logprobs)
        server = self._servers[request.key[0] % len(self._servers)]
        self._pending += 1
        asyncio.run_coroutine_threadsafe(self._write(draft, server), self._loop)

    def poll(self, timeout_s: float = 0.0) -> list[Probe | Turn]:
        if not self._pending:
            return []
        start = time.perf_counter()
        events: list[Probe | Turn] = []
        for event in drained(self._events, timeout_s):
            if isinstance(event, Exception):
                raise event
            events.append(event)
            self._pending -= isinstance(event, Turn)
        self.forward_s += time.perf_counter() - start
        return events

    # In the loop's thread --------------------------------------------------------------------------------------------

    async def _write(self, draft: Draft, server: _Server) -> None:
        """Run one turn. `poll` raises its errors."""
        try:
            event: Probe | Turn | None = None
            while not isinstance(event, Turn):
                segment = await self._ask(server, draft.next_segment())
                if segment.ids and (event := draft.add(segment)) is not None:
                    self._events.put(event)
        except Exception as error:
            self._events.put(error)

    async def _ask(self, server: _Server, segment: SegmentRequest) -> Segment:
        url, problem = server.client.url, "no answer to /weight_info"
        for _ in range(ATTEMPTS):
            while (mark := server.mark) is None or not self._may_send.is_set():
                await (self._bring_back(server, problem) if mark is None else self._may_send.wait())
            version = self._weights.step
            body = self._params | {
                "model": self._weights.model(url),
                "cache_salt": self._weights.version,
                "prompt": segment.ids,
                "max_tokens": segment.max_tokens,
                "seed": segment.seed,
                "logprobs": segment.top_logprobs,
            }
            self._sent += 1
            try:
                with self._http.one() as http:
                    response = await self._while_up(server, http.post(f"{url}/v1/completions", json=body))
                if response.status_code == 200:
                    now = await self._mark(server, self._request_s)
                    if now == mark:
                        answer = _read(response, url, segment.top_logprobs, version)
                        if answer.ids or not self._may_send.is_set():  # aborted by `sync` before its first token
                            return answer
                        problem = "it was aborted before its first token, but not by this run"
                    else:
                        problem = "it no longer answers" if now is None else "it was restarted while it answered"
                else:
                    problem = f"{response.status_code}: {without_secrets(response.text)[:300]}"
                    # 404: the adapter was lost in a restart. Other errors below 500 are permanent.
                    if response.status_code < 500 and response.status_code != 404:
                        break
            except httpx.ReadTimeout as error:
                raise EngineError(
                    f"{url} has not answered a request for {segment.max_tokens} tokens within {self._request_s:.0f} "
                    "s. Check its log, or raise vllm_request_timeout_s."
                ) from error
            except httpx.RequestError as error:
                problem = f"{type(error).__name__}: {error}"
            finally:
                self._sent -= 1
            if server.mark == mark:  # no other turn has noticed the failure
                server.mark = None
        raise EngineError(f"{url} could not complete a request ({problem}). Check its log.")

    async def _bring_back(self, server: _Server, problem: str) -> None:
        """Wait until the server answers, restore its weights if it was restarted, and get its mark."""
        deadline = time.monotonic() + self._away_s
        async with server.lock:
            while server.mark is None:
                if await self._mark(server, ANSWER_S) is not None:
                    with suppress(ServerLost):  # killed again
                        server.mark = await asyncio.to_thread(self._weights.restore, server.client)
                        return
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"The vLLM server {server.client.url} was unreachable for {self._away_s:.0f} s ({problem}). "
                        "Restart it and resume from the last checkpoint, or raise vllm_server_timeout."
                    )
                await asyncio.sleep(RETRY_S)

    async def _mark(self, server: _Server, timeout_s: float) -> str | None:
        """The server's mark; None if it does not answer, "" if it refuses to tell: then `restore` raises the error."""
        try:
            with self._http.one() as http:
                response = await self._while_up(
                    server, http.get(f"{server.client.url}/weight_info", timeout=timeout_s)
                )
            return "" if response.status_code in (401, 403, 404) else str(response.json()["weight_version"])
        except (httpx.HTTPError, ValueError, KeyError, TypeError):
            return None

    async def _while_up(self, server: _Server, request: Coroutine[Any, Any, httpx.Response]) -> httpx.Response:
        return await self._http.while_up(f"{server.client.url}/health", request)

    async def _close(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._http.aclose()
        # The finalizers of cancelled responses close their connections one iteration of the loop later.
        await asyncio.get_running_loop().shutdown_asyncgens()
        await asyncio.sleep(0)


def _read(response: httpx.Response, url: str, top_logprobs: int, version: int | None) -> Segment:
    """Convert a server's answer to a segment, which has no ids if the request was aborted before its first token.

    Raises:
        EngineError: The answer has no ids, or lacks a logprob, or one is not a finite number of at most about 0.
    """
    try:
        choice: dict[str, Any] = response.json()["choices"][0]
        ids = choice["token_ids"]
        if choice["finish_reason"] == "abort" and not ids:
            return Segment(ids=[], logprobs=[])
        given = choice["logprobs"]
        logprobs = given["token_logprobs"]
        top = [list(place.values()) for place in given["top_logprobs"]] if top_logprobs else []
        if not ids or (top_logprobs and (len(top) != len(ids) or not all(top))):
            raise ValueError(f"{len(ids)} ids, and top logprobs for {sum(map(bool, top))}")
        # vLLM sends −9999 for −∞. Rounding may give a value just above 0.
        for value in chain(logprobs, *top):
            if not -math.inf < value < 1.0:
                raise ValueError(f"a logprob is {value}")
        return Segment(ids=ids, logprobs=logprobs, top_logprobs=top, version=version)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise EngineError(
            f"{url} answered /v1/completions without the expected token ids and logprobs ({error}). It must be a vLLM "
            "server, ≥ 0.31."
        ) from error
