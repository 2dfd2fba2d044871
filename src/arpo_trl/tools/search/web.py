"""`WebSearch`: a search service with a cache, limits and a circuit breaker, which bound the time of each search.

    query ─▶ cache hit? ─▶ hits                                if the mode reads the cache (`CacheMode`)
             another process requests it? ─▶ wait for its answer
             circuit open? rate limit beyond the deadline? cap reached? ─▶ `ToolUnavailable`, immediately
             request, with retries ─▶ hits, written to the cache
                               ─▶ `ToolUnavailable`; several in a row open the circuit

A failing service does not stop a run, and the model cannot fix it. So the model reads that search is unavailable, and
the metric `arpo/tools/search/degraded` shows the share of such calls.
"""

from __future__ import annotations

import sqlite3
import time
import traceback
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx

from arpo_trl.common.user_code import place_in
from arpo_trl.errors import ConfigError, ToolError, ToolUnavailable
from arpo_trl.net.addresses import server_key
from arpo_trl.net.circuit_breaker import CircuitBreaker
from arpo_trl.net.http_client import RequestFailed, check_client, fetch_json, mentions_account, retried, without
from arpo_trl.tools.search.cache import CacheMode, Entry, Key, SearchCache
from arpo_trl.tools.search.index import NearestQuery, as_received
from arpo_trl.tools.search.providers import FIELDS, Hit, Provider, Unanswered
from arpo_trl.tools.search.providers.base import says_error
from arpo_trl.visible import get_logger

logger = get_logger(__name__)

_ACCOUNT_STATUSES = (401, 402, 403, 432, 433)  # the last two are Tavily's, for the limits of a plan
_QUERIES_REFUSED = 20  # in a row: then the fault is not the queries'
_ERROR_CHARS = 4096
_WAIT_S = 0.05  # between checks for an answer that another process is requesting
_UNAVAILABLE = "Error: search is unavailable at the moment. Continue without it, or try again later."


class WebSearch:
    """Searches with `provider` and stores the results in `cache`.

    Args:
        fields: The parts of a hit that the model sees: title, url, text.
        timeout_s: The maximum seconds of a search, including retries and waiting. It should be less than the deadline
            of the tool. Otherwise the model reads that the call timed out.
        per_second: The maximum number of requests per second to the provider, over all processes that share the file;
            None: no limit.
        max_requests: The maximum number of requests, including retries, over all processes that share this `run` and
            the file; None: no limit.
        run: The name under which the requests are counted.

    Raises:
        ConfigError: A setting is invalid, or the mode sends requests and the provider's key is not in the environment,
            or they cannot use a proxy or the certificates that it names.
        DataError: The mode is replay, and the file is damaged or has no results of the provider.
    """

    def __init__(
        self,
        provider: Provider,
        cache: SearchCache,
        mode: CacheMode = CacheMode.CACHE,
        *,
        fields: Sequence[str] = FIELDS,
        timeout_s: float = 15.0,
        per_second: float | None = None,
        max_requests: int | None = None,
        run: str = "default",
        breaker: CircuitBreaker | None = None,
    ) -> None:
        if not fields or not set(fields) <= set(FIELDS):
            raise ConfigError(f"search_fields is {list(fields)}; expected some of {list(FIELDS)}.")
        for name, value in (("search_timeout_s", timeout_s), ("search_rate", per_second)):
            if value is not None and not 0 < value < float("inf"):
                raise ConfigError(f"{name} is {value}; expected more than 0.")
        if max_requests is not None and max_requests < 1:
            raise ConfigError(
                f"search_max_calls is {max_requests}; expected at least 1. To send no requests, set "
                "search_cache_mode: offline."
            )
        if mode.asks:
            _check_key(provider)
            check_client()
        self._provider = provider
        self._cache = cache
        self._mode = mode
        self._fields = fields
        self._timeout_s = timeout_s
        self._per_second = per_second
        self._max_requests = max_requests
        self._run = run
        self._breaker = breaker or CircuitBreaker()
        self._recorded: NearestQuery | None = None
        if mode is CacheMode.REPLAY:
            try:
                self._recorded = cache.nearest(provider.source, fields)
            except sqlite3.Error as error:
                raise cache.unusable(error) from error
        self._capped = False
        self._limited = False
        self._queries_refused = 0

    def search(self, query: str, top_k: int) -> list[str]:
        """Return at most `top_k` texts for `query`, from the cache or the service, best first.

        Raises:
            ToolUnavailable: The service cannot answer now.
            ToolError: The mode is offline and the query is not in the cache.
        """
        if self._recorded is not None:
            return self._recorded.search(as_received(query, self._provider.max_query_chars), top_k)
        try:
            hits = self._search(query, top_k)
        except sqlite3.Error as error:  # such as a full disk; logged each time, because it persists
            logger.warning("Search is degraded: the cache file %s: %s", self._cache.path, error)
            raise ToolUnavailable(_UNAVAILABLE) from None
        return [hit.shown(self._fields) for hit in hits[:top_k]]

    def _search(self, query: str, top_k: int) -> list[Hit]:
        query = as_received(query, self._provider.max_query_chars)
        if not query:
            return []
        key = Key.of(self._provider.source, query, self._provider.parameters(top_k))
        deadline = time.time() + self._timeout_s
        match self._mode:
            case CacheMode.OFFLINE:
                entry = self._cache.get(key, expired=True)
                if entry is None:
                    raise ToolError("Error: this query was not recorded, and only recorded queries have results.")
                return entry.hits
            case CacheMode.LIVE:
                return self._ask(query, top_k, deadline)
            case CacheMode.RECORD:
                hits = self._ask(query, top_k, deadline)
                self._cache.put(key, hits)
                return hits
            case _:
                return self._known_or_asked(key, query, top_k, deadline)

    def _known_or_asked(self, key: Key, query: str, top_k: int, deadline: float) -> list[Hit]:
        while True:
            entry = self._cache.get(key)
            if entry is None:
                with self._cache.lease(key, self._timeout_s) as granted:
                    # Check again: another process may have written it before the lease was granted.
                    entry = self._cache.get(key) if granted else None
                    if granted and entry is None:
                        entry = self._asked(key, query, top_k, deadline)
            if entry is not None:
                if entry.error is not None:
                    raise ToolUnavailable(_UNAVAILABLE)
                return entry.hits
            if time.time() + _WAIT_S > deadline:
                raise ToolUnavailable(_UNAVAILABLE)
            time.sleep(_WAIT_S)

    def _asked(self, key: Key, query: str, top_k: int, deadline: float) -> Entry:
        try:
            hits = self._ask(query, top_k, deadline)
        except _Refused as error:
            self._cache.put_error(key, error.reason)
            raise
        self._cache.put(key, hits)
        return Entry(hits=hits, error=None)

    def _ask(self, query: str, top_k: int, deadline: float) -> list[Hit]:
        """Return the hits of the provider; raises `ToolUnavailable`."""
        if not self._breaker.lets_pass():
            raise ToolUnavailable(_UNAVAILABLE)
        try:
            hits = retried(
                lambda: self._request(query, min(top_k, self._provider.max_results), deadline),
                lambda: deadline - time.time(),
            )
        except RequestFailed as error:
            # These statuses blame the query, not the service. But some services also use them for a bad key or
            # account.
            at_query = error.status in (400, 414, 422) and not error.about_account
            if at_query:
                self._queries_refused += 1
                at_query = self._queries_refused < _QUERIES_REFUSED
            if not at_query and self._breaker.failed():
                logger.warning(
                    "Search is degraded: %s %s, %d times in a row%s. It gets no requests for %g s, and the model gets "
                    "a notice instead of results; see arpo/tools/search/degraded.",
                    *(self._provider.name, error, self._breaker.failures, self._hint(error), self._breaker.rest_s),
                )
            raise _Refused(str(error)) from None
        self._breaker.succeeded()
        self._queries_refused = 0
        return hits

    def _request(self, query: str, results: int, deadline: float) -> list[Hit]:
        """Return the hits of one request. It is sent as soon as the limits allow it."""
        if self._per_second is not None:
            start = self._cache.reserve(self._provider.source, self._per_second, deadline)
            if start is None:
                if not self._limited:
                    self._limited = True
                    logger.warning(
                        "Search is degraded: the next request that search_rate %g allows to %s is later than "
                        "search_timeout_s, %g s. The model gets a notice instead of results.",
                        *(self._per_second, self._provider.name, self._timeout_s),
                    )
                raise ToolUnavailable(_UNAVAILABLE)
            time.sleep(max(0.0, start - time.time()))
        if not self._cache.spend(self._run, self._max_requests):
            if not self._capped:
                self._capped = True
                logger.warning(
                    "Search is degraded: run %r has made the %s requests of search_max_calls. The model gets a notice "
                    "instead of results that are not in the cache. To continue, increase search_max_calls.",
                    *(self._run, self._max_requests),
                )
            raise ToolUnavailable("Error: the search budget is used up. Continue with what you know.")
        try:
            key = _key(self._provider)
        except ConfigError as error:  # the variable has changed
            raise RequestFailed(f"could not be asked: {error}", status=200) from None
        try:
            request = self._provider.request(query, results, key)
            if not isinstance(request, httpx.Request):
                raise _WrongResult(f"`request` returned a {type(request).__name__}; expected an httpx.Request")
        except Exception as error:  # a provider's own code can raise anything
            raise RequestFailed(f"could not be asked: {_fault('request', error)}", status=200) from None
        answer = fetch_json(request, timeout_s=max(0.1, deadline - time.time()), sent=query)
        try:
            hits = _checked_hits(self._provider.read(answer))
        except Unanswered as error:
            raise RequestFailed(str(error)) from None
        except Exception as error:  # a provider's own code, again
            about_account = mentions_account(str(answer)[:_ERROR_CHARS], query)
            reason = f"answered in an unexpected format: {_fault('read', error)}"
            raise RequestFailed(reason, status=200, about_account=about_account) from None
        if not hits and says_error(answer):
            about_account = mentions_account(str(answer)[:_ERROR_CHARS], query)
            raise RequestFailed("answered with an error", status=200, about_account=about_account)
        hits = [
            Hit(title=without(key, hit.title), url=without(key, hit.url), text=without(key, hit.text)) for hit in hits
        ]
        return list(dict.fromkeys(hits))[:results]

    def _hint(self, error: RequestFailed) -> str:
        if error.status == 403 and self._provider.if_refused:
            return f" ({self._provider.if_refused})"
        if (error.status in _ACCOUNT_STATUSES or error.about_account) and self._provider.key_variable:
            return f" (is the key in {self._provider.key_variable} valid, and does its account have credits left?)"
        return ""


class _WrongResult(Exception):
    """A method of a provider returned something else. The message quotes no value."""


def _checked_hits(read: Any) -> list[Hit]:
    """Return the hits that `read` of a provider returned or yields; raises `_WrongResult` if it has no hits."""
    if isinstance(read, str | Mapping) or not isinstance(read, Iterable):
        raise _WrongResult(f"`read` returned a {type(read).__name__}; expected a list of Hit")
    hits = list(read)
    for hit in hits:
        if not isinstance(hit, Hit):
            raise _WrongResult(f"`read` returned a {type(hit).__name__} in its list; expected a Hit")
        for name in FIELDS:
            if not isinstance(value := getattr(hit, name), str):
                raise _WrongResult(f"`read` returned a Hit whose {name} is a {type(value).__name__}; expected a str")
    return hits


def _fault(method: str, error: Exception) -> str:
    """Return what is wrong with a provider's method, without the message of its error, which could contain the key."""
    if isinstance(error, _WrongResult):
        return str(error)
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    raised = f"`{method}` raised {type(error).__name__}"
    if not frames:
        return raised
    place = place_in(frames)
    return f"{raised} ({Path(place.filename).name}, line {place.lineno})"


def _key(provider: Provider) -> str:
    """Return the API key. It is read at each use, so that no object or log contains it."""
    return server_key(provider.key_variable) if provider.key_variable else ""


def _check_key(provider: Provider) -> None:
    key = _key(provider)
    if provider.key_variable and not key:
        raise ConfigError(
            f"search_provider {provider.name} needs a key in the environment variable {provider.key_variable}, which "
            "is not set. Set it, or use only the cache: search_cache_mode offline or replay."
        )


class _Refused(ToolUnavailable):
    """A request to the service failed. The cache stores `reason`."""

    def __init__(self, reason: str) -> None:
        super().__init__(_UNAVAILABLE)
        self.reason = reason
