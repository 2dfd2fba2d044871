"""An sqlite file that caches search results and stores the limits that all processes of a run share.

    results    (provider, query, parameters) ─▶ hits or error, and when the entry expires
    leases     queries that a process is currently requesting; other processes wait for the answer
    slots      the time of the next allowed request per provider
    spending   the requests made so far per run

It is safe for any number of threads and processes on one machine (write-ahead log, one statement per change). It does
not work on a network file system, which has no shared memory. Use one file per machine; limits then apply per machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any

from arpo_trl.common.files import write_whole
from arpo_trl.common.retries import retry
from arpo_trl.common.user_files import expect, parse_json, user_path
from arpo_trl.errors import DataError
from arpo_trl.tools.search.index import MAX_QUERY_CHARS, NearestQuery, as_text, normalised, pages_of, read_recorded
from arpo_trl.tools.search.providers import Hit
from arpo_trl.visible import encodable

FILE_VERSION = 1
EMPTY_TTL_S = 600.0
"""Seconds after which a result without hits expires."""
ERROR_TTL_S = 30.0
"""Seconds after which a failed query may be sent again."""

AHEAD_S = 600.0
"""A time in the file that is further ahead than a search waits, and this long, was written before the clock was set
back."""

_BUSY_TIMEOUT_S = 30.0
_BESIDE = ("-wal", "-shm", "-journal")
"""Ends of the names of the files that sqlite creates beside a database."""
_SCHEMA = """
CREATE TABLE IF NOT EXISTS results (
    provider TEXT, query TEXT, parameters TEXT, asked TEXT, hits TEXT, error TEXT, expires REAL,
    PRIMARY KEY (provider, query, parameters)
) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS leases (key TEXT PRIMARY KEY, owner TEXT, until REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS slots (provider TEXT PRIMARY KEY, next REAL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spending (run TEXT PRIMARY KEY, requests INTEGER) WITHOUT ROWID;
"""
_TABLES = frozenset(("results", "leases", "slots", "spending"))
_PUT = "INSERT OR REPLACE INTO results VALUES (?, ?, ?, ?, ?, NULL, ?)"


class CacheMode(StrEnum):
    """Whether searches read and write the file."""

    LIVE = "live"  # always send a request; the file stores only the limits
    CACHE = "cache"  # answer from the file; on a miss, send a request and write the answer
    RECORD = "record"  # always send a request, and overwrite the old answer
    REPLAY = "replay"  # answer only from the file; on a miss, with the results of the nearest query
    OFFLINE = "offline"  # answer only from the file; on a miss, the call fails

    @property
    def asks(self) -> bool:
        """Whether this mode sends requests to the provider."""
        return self not in (CacheMode.REPLAY, CacheMode.OFFLINE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """All values on which an answer depends.

    Example: `Key.of("serper", "melting point of iron", {"results": 10})`
    """

    provider: str
    """`Provider.source`."""
    query: str
    """The query after `normalised`."""
    parameters: str
    """JSON."""
    asked: str = field(compare=False)
    """The original query."""

    @classmethod
    def of(cls, provider: str, query: str, parameters: Mapping[str, Any]) -> Key:
        query = encodable(query)
        return cls(
            provider=provider,
            query=normalised(query),
            parameters=json.dumps(parameters, sort_keys=True),
            asked=query,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """The file's entry for a key: the hits, or the reason why the request failed.

    Example: `Entry(hits=[], error="answered 503")`
    """

    hits: list[Hit]
    error: str | None


def _can_write(*paths: Path) -> bool:
    return all(os.access(path, os.W_OK) for path in paths)


def _is_locked(error: Exception) -> bool:
    return isinstance(error, sqlite3.OperationalError) and "locked" in str(error)


class SearchCache:
    """The cache file at `path`.

    Args:
        writes: Whether methods that write will be called. If so, a missing file is created. If not, a file that can
            only be read is enough.

    All methods raise `sqlite3.Error` if the file is damaged or locked for too long, or if the disk is full.

    Raises:
        DataError: The file is not a search cache, has another version, or is missing and `writes` is False.
    """

    def __init__(self, path: str | Path, *, writes: bool = True) -> None:
        self.path = user_path(path, "search_cache")
        if not writes and not self.path.exists():
            raise DataError(
                f"There is no search cache {self.path}. Check the path, or fill a cache first: with search_cache_mode "
                "cache or record, or with arpo-trl cache import."
            )
        self._is_protected = not writes and self.path.is_file() and not _can_write(self.path, self.path.parent)
        self._lock = threading.Lock()
        self._pid = -1
        self._owner = uuid.uuid4().hex
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._lock:
                self._connect()
        except (OSError, sqlite3.Error) as error:
            raise self.unusable(error) from error

    def unusable(self, error: Exception) -> DataError:
        """Return a `DataError` with a remedy, for an `error` that a method raised."""
        return DataError(f"{self.path} cannot be used as a search cache: {error}. Name another file.")

    @retry(on=_is_locked, attempts=None, timeout=_BUSY_TIMEOUT_S, wait_initial=0.02, wait_max=0.5, wait_jitter=0.1)
    def _connect(self) -> None:
        # Many processes may create the file at once, and switching to the write-ahead log does not wait for the lock.
        file = self._address() if self._is_protected else self.path
        connection = sqlite3.connect(
            file,
            timeout=_BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
            cached_statements=32,
            uri=self._is_protected,
        )
        try:
            # One statement, so that another process cannot create the tables between two. Before the first change.
            version, names = connection.execute(
                "SELECT user_version, (SELECT group_concat(name) FROM sqlite_master WHERE type='table') "
                "FROM pragma_user_version"
            ).fetchone()
            tables = set(names.split(",") if names else ())
            if tables if version == 0 else version == FILE_VERSION and not tables >= _TABLES:
                raise DataError(f"{self.path} is a database of another program, no search cache. Name another file.")
            if version not in (0, FILE_VERSION):
                raise DataError(
                    f"{self.path} is a search cache of version {version}, expected {FILE_VERSION}. Export it with the "
                    f"release that wrote it (arpo-trl cache export), and import the export into a new file."
                )
            if not self._is_protected:
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=NORMAL")  # a power failure may lose only the last answers
            if version == 0:
                connection.executescript(f"BEGIN IMMEDIATE; {_SCHEMA} PRAGMA user_version={FILE_VERSION}; COMMIT;")
        except BaseException:
            connection.close()
            raise
        self._connection, self._pid = connection, os.getpid()

    def _address(self) -> str:
        """The file as a URI that sqlite opens only to read."""
        path = self.path.absolute()
        # Without its files beside the database sqlite cannot lock. Nobody writes who could not create them.
        alone = not _can_write(path.parent) and not Path(f"{path}-wal").exists()
        return f"{path.as_uri()}?mode=ro" + ("&immutable=1" if alone else "")

    def _run(self, statement: str, *values: Any) -> list[Any]:
        with self._connected() as connection:
            return connection.execute(statement, values).fetchall()

    @contextlib.contextmanager
    def _connected(self) -> Iterator[sqlite3.Connection]:
        with self._lock:
            if self._pid != os.getpid():  # after a fork: two processes must not share a connection
                self._connect()
            yield self._connection

    def close(self) -> None:
        """Close the file. May be called repeatedly. No other method may be called afterwards."""
        with self._lock:
            self._connection.close()

    def get(self, key: Key, *, expired: bool = False) -> Entry | None:
        """Return the entry for `key`, or None. With `expired`, return also expired hits, but never an error."""
        rows = self._run(
            "SELECT hits, error FROM results WHERE provider=? AND query=? AND parameters=? AND "
            + ("hits IS NOT NULL" if expired else "(expires IS NULL OR expires > ? AND expires <= ?)"),
            *(key.provider, key.query, key.parameters),
            *(() if expired else (now := time.time(), now + EMPTY_TTL_S)),
        )
        return Entry(hits=_hits(rows[0][0]) if rows[0][0] else [], error=rows[0][1]) if rows else None

    def put(self, key: Key, hits: Sequence[Hit]) -> None:
        """Write an answer. An empty one expires after `EMPTY_TTL_S`."""
        self._run(_PUT, *_row(key, hits))

    def put_error(self, key: Key, error: str) -> None:
        """Write that a request failed, for `ERROR_TTL_S`. This never overwrites an answer."""
        self._run(
            "INSERT INTO results VALUES (?, ?, ?, ?, NULL, ?, ?) ON CONFLICT DO UPDATE SET error=excluded.error, "
            "expires=excluded.expires WHERE hits IS NULL",
            *(key.provider, key.query, key.parameters, key.asked),
            encodable(error),
            time.time() + ERROR_TTL_S,
        )

    def nearest(self, provider: str, fields: Sequence[str]) -> NearestQuery:
        """Return the current answers of one provider, for all parameters; `fields` as in `Hit.shown`.

        Raises:
            DataError: None of the answers has a result.
        """
        rows = self._run("SELECT asked, hits FROM results WHERE provider=? AND hits IS NOT NULL", provider)
        if all(hits == "[]" for _, hits in rows):
            raise self._without_results(
                provider,
                "Set search_cache, search_provider and search_url to those of the recording, or record first: "
                "search_cache_mode cache.",
            )
        return NearestQuery((query, [hit.shown(fields) for hit in _hits(hits)]) for query, hits in rows)

    @contextlib.contextmanager
    def lease(self, key: Key, seconds: float) -> Iterator[bool]:
        """Yield whether the caller alone may request `key`, until the block ends or `seconds` have passed."""
        name = "\n".join((key.provider, key.query, key.parameters))
        owner = f"{self._owner}-{os.getpid()}-{threading.get_ident()}"
        now = time.time()
        granted = bool(
            self._run(
                "INSERT INTO leases VALUES (?, ?, ?) ON CONFLICT DO UPDATE SET owner=excluded.owner, "
                "until=excluded.until WHERE until < ? OR until > ? RETURNING 1",
                *(name, owner, now + seconds, now, now + seconds + AHEAD_S),
            )
        )
        try:
            yield granted
        finally:
            if granted:
                self._run("DELETE FROM leases WHERE key=? AND owner=?", name, owner)

    def reserve(self, provider: str, per_second: float, latest: float) -> float | None:
        """Return the `time.time` at which the caller may send a request, or None if it is after `latest`. Evenly
        spaced."""
        gap, now = 1 / per_second, time.time()
        rows = self._run(
            "INSERT INTO slots VALUES (?1, ?2 + ?3) ON CONFLICT DO UPDATE SET "
            "next = iif(next > ?5, ?2, max(next, ?2)) + ?3 "
            "WHERE max(next, ?2) <= ?4 OR next > ?5 RETURNING next - ?3",
            *(provider, now, gap, latest, max(now, latest) + gap + AHEAD_S),
        )
        return float(rows[0][0]) if rows else None

    def spend(self, run: str, most: int | None) -> bool:
        """Count one request of `run` and return True. Return False if the run has already made `most`."""
        rows = self._run(
            "INSERT INTO spending VALUES (?1, 1) ON CONFLICT DO UPDATE SET requests = requests + 1 "
            "WHERE ?2 IS NULL OR requests < ?2 RETURNING requests",
            *(run, most),
        )
        return bool(rows)

    def import_json(
        self, path: str | Path, provider: str, parameters: Mapping[str, Any], longest: int = MAX_QUERY_CHARS
    ) -> int:
        """Import a file {query: result text}, the format of the released code's `search_cache.json`.

        Imports all queries or, after an error, none. Returns their number. `longest` is the provider's
        `max_query_chars`: longer queries are cut, as in a search.
        """
        recorded = read_recorded(path, longest)
        rows = [
            _row(Key.of(provider, query, parameters), [Hit(title="", url="", text=page) for page in pages_of(text)])
            for query, text in recorded.items()
        ]
        with self._connected() as connection:
            connection.execute("BEGIN IMMEDIATE")
            try:
                connection.executemany(_PUT, rows)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:  # after some errors sqlite has ended it
                    connection.execute("ROLLBACK")
                raise
        return len(recorded)

    def export_json(self, path: str | Path, provider: str | None = None) -> int:
        """Write a file of that format with the results of one or all providers. Return the number of queries.

        Raises:
            DataError: The cache has no result of the provider, or `path` is its file or a name that sqlite uses beside
                it.
        """
        path = user_path(path, "file")
        if path.exists() and path.samefile(self.path):
            raise DataError(f"{path} is the search cache itself. Choose another file to write the results to.")
        if path.resolve() in [Path(f"{self.path.resolve()}{end}") for end in _BESIDE]:
            raise DataError(
                f"{path} has the name of a file in which sqlite keeps changes of the search cache. Choose another "
                "file to write the results to."
            )
        rows = self._run(
            "SELECT asked, hits FROM results WHERE hits IS NOT NULL AND (?1 IS NULL OR provider = ?1) "
            "ORDER BY query, provider, parameters",
            provider,
        )
        if provider is not None and not rows:
            raise self._without_results(provider, "Name one of these sources.")
        found = {query: as_text([hit.shown() for hit in _hits(hits)]) for query, hits in reversed(rows)}
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(dict(reversed(found.items())), ensure_ascii=False, indent=1))
        return len(found)

    def _without_results(self, provider: str, remedy: str) -> DataError:
        found = {name: counts["found"] for name, counts in self.stats()["results"].items()}
        return DataError(
            f"The search cache {self.path} has no results of {provider!r}. Its queries with results, by source: "
            f"{found or 'none'}. {remedy}"
        )

    def stats(self) -> dict[str, Any]:
        """Return the numbers of answers, empty answers and errors per provider, and of requests per run."""
        rows = self._run(
            "SELECT provider, sum(hits IS NOT NULL AND hits != '[]'), sum(hits = '[]'), sum(hits IS NULL) "
            "FROM results GROUP BY provider ORDER BY provider"
        )
        providers = {
            row[0]: dict(zip(("found", "empty", "failed"), (n or 0 for n in row[1:]), strict=True)) for row in rows
        }
        return {"results": providers, "requests": dict(self._run("SELECT run, requests FROM spending ORDER BY run"))}


def _row(key: Key, hits: Sequence[Hit]) -> tuple[Any, ...]:
    """Return the values of `_PUT`."""
    written = encodable(json.dumps([[hit.title, hit.url, hit.text] for hit in hits], ensure_ascii=False))
    expires = None if hits else time.time() + EMPTY_TTL_S
    return key.provider, key.query, key.parameters, key.asked, written, expires


def _hits(stored: str) -> list[Hit]:
    try:
        found = parse_json(stored, "an answer in it")
        expect(found, [[str]], "an answer in it")
        return [Hit(title=title, url=url, text=text) for title, url, text in found]
    except (DataError, TypeError, ValueError) as error:  # not three texts, or bytes
        raise sqlite3.DatabaseError(str(error)) from error
