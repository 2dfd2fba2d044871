"""Turns from any server with OpenAI's `/v1/completions`, over HTTP: vLLM, SGLang, llama.cpp, a gateway.

    the sampler's thread    submit ─▶ ┐                              ┌ ─▶ poll
    background loop                   └ one stream per turn: Turn ───┘

If the server supports it, requests and answers contain token ids. Otherwise they contain text, which the engine
tokenizes. The engine streams the answers and cuts them at stop strings itself, since OpenAI's `stop` does not report
which string matched or whether the model ended the text. The engine has no logprobs and no entropies, so it is for
evaluation only.

The engine retries a lost connection until the server has been unreachable for `away_s`. Then the whole rollout fails.
If the server rejects a request, or fails to complete it several times, only that turn fails.
"""

from __future__ import annotations

import asyncio
import json
import math
import os
import queue
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from transformers import PreTrainedTokenizerBase

from arpo_trl.common.queues import drained
from arpo_trl.errors import ConfigError, EngineError
from arpo_trl.net import background
from arpo_trl.net.addresses import authorization, check_server_url, server_key
from arpo_trl.net.clients import HTTPClients
from arpo_trl.net.http_client import RequestFailed, fetch_json, without
from arpo_trl.rollout.engines.base import SamplingParams, Turn, TurnFailed, TurnRequest, TurnStop
from arpo_trl.rollout.engines.vllm.client import CANARY_TEXT, check_tokenizer
from arpo_trl.rollout.text import StopFinder, decode_exactly, decode_for_encoding

KEY_VARIABLE = "COMPLETIONS_API_KEY"
ATTEMPTS = 4
"""Attempts per turn before it counts as failed."""
RETRY_S = 0.5
"""Seconds before the first retry of a turn. The wait doubles with each failure."""
MAX_BYTES, MAX_LINE_BYTES = 64 << 20, 1 << 20
"""Size limits of one streamed answer and of one event in it."""
CUT = ("abort", "error", "content_filter")
"""The finish reasons of answers that the model has not finished."""
SEEDS = 1 << 31
"""Seeds are sent modulo this, since the largest allowed seed differs between servers."""


class _Incomplete(Exception):
    """The answer is incomplete; a retry may succeed."""


class _Refused(Exception):
    """The answer is an error that a retry does not change."""


@dataclass(slots=True)
class _PartialTurn:
    """The part of a turn received so far."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    finish: str | None = None


class CompletionsEngine:
    """An engine on a completions server.

    Args:
        url: The server's base URL, which usually ends in /v1. If the server requires a key, the environment variable
            `COMPLETIONS_API_KEY` contains it.
        model: The model's name on the server; None: the only one it lists.
        tokenizer: The model's tokenizer.
        settings: The distribution to sample from.
        timeout_s: The timeout of one turn, in seconds.
        away_s: The seconds for which the server may be unreachable.

    Raises:
        ConfigError: `url` is not a URL, the server denies access, it does not serve the model, or it takes token ids
            and has another tokenizer.
        EngineError: The server is unreachable, or its answers do not follow the completions API.
    """

    def __init__(
        self,
        url: str,
        model: str | None,
        tokenizer: PreTrainedTokenizerBase,
        settings: SamplingParams,
        *,
        timeout_s: float = 1800.0,
        away_s: float = 120.0,
    ):
        check_server_url(url, "base_url", KEY_VARIABLE)
        self.vocab_size = len(tokenizer)
        self.forward_s = 0.0
        self.has_logprobs = False
        self._url = url.rstrip("/")
        self._tokenizer, self._settings = tokenizer, settings
        self._timeout_s, self._away_s = timeout_s, away_s
        self._eos = decode_exactly(tokenizer, [settings.eos_ids[0]])
        self._stops = StopFinder(tokenizer, settings.stop_strings)
        self.model, self.max_length = self._served(model)
        self.speaks_ids = self._takes_ids()
        """Whether requests and answers contain token ids instead of text."""
        if self.speaks_ids:
            self._check_tokenizer()
        self._turns: dict[int, Future[None]] = {}
        self._events: queue.SimpleQueue[Turn | TurnFailed | EngineError] = queue.SimpleQueue()

    @contextmanager
    def session(self) -> Iterator[None]:
        self._events = queue.SimpleQueue()
        limits = httpx.Limits(max_connections=None)
        self._http = HTTPClients(
            lambda verify: httpx.AsyncClient(headers=_headers(), verify=verify, timeout=None, limits=limits)
        )
        try:
            yield
        finally:
            for future in self._turns.values():
                future.cancel()
            self._turns.clear()
            background.start(self._http.aclose()).result(10)

    def submit(self, request: TurnRequest) -> None:
        self._turns[request.id] = background.start(self._turn(request))

    def poll(self, timeout_s: float) -> list[Turn | TurnFailed]:
        start = time.perf_counter()
        events: list[Turn | TurnFailed] = []
        for event in drained(self._events, timeout_s):
            if isinstance(event, EngineError):
                raise event
            del self._turns[event.id]
            events.append(event)
        self.forward_s += time.perf_counter() - start
        return events

    # Requests --------------------------------------------------------------------------------------------------------

    async def _turn(self, request: TurnRequest) -> None:
        """Report the finished turn, the failure of this turn, or the failure of the server."""
        failures, lost_s = 0, None
        while True:
            try:
                written = await self._http.while_up(self._url + "/models", self._ask(request))
                self._events.put(self._as_turn(request, written))
                return
            except _Refused as error:
                self._events.put(TurnFailed(id=request.id, reason=f"The server {error}."))
                return
            except httpx.ConnectError:
                now = time.monotonic()
                lost_s = now if lost_s is None else lost_s
                if now - lost_s > self._away_s:
                    self._events.put(
                        EngineError(
                            "The completions server is unreachable and has not answered for "
                            f"{self._away_s:.0f} s. Restart it and resume."
                        )
                    )
                    return
            except TimeoutError:  # another attempt would take as long
                reason = f"The server has not completed an answer within {self._timeout_s:g} s. Check its log."
                self._events.put(TurnFailed(id=request.id, reason=reason))
                return
            except (_Incomplete, httpx.HTTPError, OSError) as error:
                failures, lost_s = failures + 1, None
                if failures == ATTEMPTS:
                    reason = str(error) if isinstance(error, _Incomplete) else f"failed ({type(error).__name__})"
                    self._events.put(TurnFailed(id=request.id, reason=f"The server {reason}, {ATTEMPTS} times."))
                    return
            except Exception as error:  # without an event for this error the sampler would wait forever
                self._events.put(
                    TurnFailed(id=request.id, reason=f"The answer could not be read ({type(error).__name__}).")
                )
                return
            await asyncio.sleep(RETRY_S * 2**failures)

    @asynccontextmanager
    async def _stream(self, body: dict[str, Any]) -> AsyncIterator[httpx.Response]:
        with self._http.one() as http:
            async with http.stream("POST", self._url + "/completions", json=body) as response:
                yield response

    async def _ask(self, request: TurnRequest) -> _PartialTurn:
        """Stream one answer, up to and including the token or text that completes a stop string."""
        body = self._body(request.ids, request.max_tokens) | {"stream": True, "seed": request.seed % SEEDS}
        written = _PartialTurn()
        async with (
            asyncio.timeout(self._timeout_s),
            self._stream(body) as response,
        ):
            if response.status_code != 200:
                raise _failure(response.status_code, f"answered {response.status_code}")
            async for data in _events_of(response):
                if data == "[DONE]":
                    break
                choice = _choice(json.loads(data))
                if choice is None:
                    continue
                before = len(written.ids) if self.speaks_ids else len(written.text)
                written.text += choice.get("text") or ""
                written.ids += choice.get("token_ids") or []
                written.finish = choice.get("finish_reason") or written.finish
                if self._cut(written, before):
                    return written
        if written.finish is None or written.finish in CUT:
            raise _Incomplete("sent an incomplete answer")
        return written

    def _cut(self, written: _PartialTurn, before: int) -> bool:
        """Cut the turn after the first complete stop string, and return whether there is one.

        `before` is the number of ids or characters before the newest chunk.
        """
        if self.speaks_ids:
            end = self._stops.end(written.ids, before)
            written.ids = written.ids[:end]
        else:
            starts = {
                stop: written.text.find(stop, max(0, before - len(stop))) for stop in self._settings.stop_strings
            }
            end = min((at + len(stop) for stop, at in starts.items() if at >= 0), default=None)
            written.text = written.text[:end]
        if end is None:
            return False
        written.finish = "stop_string"
        return True

    def _as_turn(self, request: TurnRequest, written: _PartialTurn) -> Turn:
        ids, eos_ids = written.ids, self._settings.eos_ids
        if not self.speaks_ids:
            ids = self._tokenizer.encode(written.text.removesuffix(self._eos), add_special_tokens=False)
        end = next((i for i, token in enumerate(ids) if token in eos_ids), None)
        match written.finish:
            case "stop_string":
                stop = TurnStop.STOP_STRING
            case "length" if end is None:
                stop = TurnStop.LENGTH
                if not ids:
                    raise _Refused("returned an empty answer")
            case _:
                stop = TurnStop.EOS
                ids = [*ids[:end], eos_ids[0] if end is None else ids[end]]
        return Turn(id=request.id, ids=ids, logprobs=[math.nan] * len(ids), entropies=[], stop=stop)

    def _body(self, ids: list[int], max_tokens: int) -> dict[str, Any]:
        settings = self._settings
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": ids if self.speaks_ids else self._as_text(ids),
            "max_tokens": max_tokens,
            "temperature": settings.temperature,
            "top_p": settings.top_p,
        }
        if self.speaks_ids:  # such a server has vLLM's extensions; others may reject unknown fields
            body |= settings.for_vllm
            body |= {"return_token_ids": True, "skip_special_tokens": False, "stop_token_ids": list(settings.eos_ids)}
        return body

    def _as_text(self, ids: list[int]) -> str:
        """The prompt as text, without the BOS that the server adds."""
        bos = self._tokenizer.bos_token_id
        adds_bos = bos is not None and self._tokenizer("")["input_ids"][:1] == [bos]
        return decode_for_encoding(self._tokenizer, ids[1:] if adds_bos and ids[:1] == [bos] else ids)

    # The server's properties -----------------------------------------------------------------------------------------

    def _served(self, model: str | None) -> tuple[str, int | None]:
        """The model's name on the server, and its context in tokens, None if the server does not state it."""
        try:
            listed = self._request("GET", "/models")["data"]
            lengths = {str(entry["id"]): entry.get("max_model_len") for entry in listed}
        except (LookupError, TypeError, AttributeError) as error:
            raise EngineError(
                "The completions server lists no models under /models. Check that base_url ends in /v1."
            ) from error
        if model is None and len(lengths) == 1:
            (model,) = lengths
        if model not in lengths:
            raise ConfigError(
                f"The completions server serves {sorted(lengths)}; served_model is {model!r}. Set it to one of these."
            )
        length = lengths[model]
        return model, length if isinstance(length, int) else None

    def _takes_ids(self) -> bool:
        """Whether the server accepts and returns token ids."""
        ids = self._tokenizer.encode("1", add_special_tokens=False)
        self.speaks_ids = True
        try:
            choice = _choice(self._request("POST", "/completions", self._body(ids, 1)))
        except _Refused:
            return False
        except (_Incomplete, RequestFailed) as error:
            if isinstance(error, _Incomplete) or error.may_pass:
                raise EngineError(f"The completions server {error} to the first request. Check its log.") from None
            return False
        return choice is not None and bool(choice.get("token_ids"))

    def _check_tokenizer(self) -> None:
        """Compare the server's tokenizer with ours, if the server has vLLM's /tokenize."""
        url = self._url.removesuffix("/v1") + "/tokenize"
        body = {"model": self.model, "prompt": CANARY_TEXT, "add_special_tokens": False}
        try:
            request = httpx.Request("POST", url, json=body, headers=_headers())
            answer = fetch_json(request, timeout_s=min(60.0, self._timeout_s))
        except RequestFailed:  # also a gateway that refuses all paths except those under /v1
            return
        theirs = answer.get("tokens") if isinstance(answer, dict) else None
        if isinstance(theirs, list):
            problem = f"The completions server's {self.model!r} has another tokenizer than model"
            check_tokenizer(
                self._tokenizer, theirs, problem, "Set model to the model that the server serves, or start that one."
            )

    def _request(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        request = httpx.Request(method, self._url + path, json=body, headers=_headers())
        try:
            return fetch_json(request, timeout_s=min(60.0, self._timeout_s))
        except RequestFailed as error:
            if error.status in (401, 403):
                raise ConfigError(
                    f"The completions server refuses access. Set the environment variable {KEY_VARIABLE} to its key."
                ) from None
            if body is not None:
                raise
            key = os.environ.get(KEY_VARIABLE, "").strip()
            raise EngineError(
                f"The completions server {without(key, self._url)} did not list its models: {error}. Start it, or "
                "correct base_url, which usually ends in /v1."
            ) from None


def _headers() -> dict[str, str]:
    return authorization(server_key(KEY_VARIABLE))


def _failure(status: object, message: str) -> _Incomplete | _Refused:
    """The error for a status, of a response or in an error event of a stream."""
    may_pass = isinstance(status, int) and (status in (408, 429) or status >= 500)
    return _Incomplete(message) if may_pass else _Refused(message)


def _choice(answer: Any) -> dict[str, Any] | None:
    """The choice of an answer or of a chunk; None if it has none, as a usage report does."""
    if not isinstance(answer, dict) or "error" in answer:
        error = answer["error"] if isinstance(answer, dict) else None
        raise _failure(error.get("code") if isinstance(error, dict) else None, "answered with an error")
    choices = answer.get("choices")
    if not choices:
        return None
    if not isinstance(choices, list) or not isinstance(choices[0], dict):
        raise _Refused("answered in an unexpected format")
    return choices[0]


async def _events_of(response: httpx.Response) -> AsyncIterator[str]:
    """Yield the data of each server-sent event in a stream, except empty ones, which keep the connection open."""
    received, rest = 0, b""
    async for chunk in response.aiter_bytes():
        received += len(chunk)
        *lines, rest = (rest + chunk).split(b"\n")
        if received > MAX_BYTES or len(rest) > MAX_LINE_BYTES:
            raise _Refused(f"answered with more than {MAX_BYTES:,} bytes, or {MAX_LINE_BYTES:,} in one event")
        for line in lines:
            if data := _data(line):
                yield data
    if (data := _data(rest)) and _is_json(data):  # some servers end the last event with the stream
        yield data


def _data(line: bytes) -> str:
    return line.removeprefix(b"data:").decode("utf-8", "replace").strip() if line.startswith(b"data:") else ""


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
