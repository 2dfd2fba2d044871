"""Any number of processes share the answers and the limits in one cache file."""

from __future__ import annotations

import contextlib
import json
import math
import multiprocessing
import os
import re
import sqlite3
import time
from pathlib import Path
from typing import Any

import pytest

from arpo_trl.errors import DataError, ToolUnavailable
from arpo_trl.tools.builtin import ToolArguments, build_tools
from arpo_trl.tools.search import cache as search_cache
from arpo_trl.tools.search.cache import Entry, Key, SearchCache
from arpo_trl.tools.search.providers import Hit, make_provider
from arpo_trl.tools.search.web import WebSearch
from loopback import Asked, Loopback, Reply
from support import run_command

HITS = [Hit(title="Iron", url="https://a.test/", text="melts at 1538 °C"), Hit(title="", url="", text="x\ny")]


@pytest.fixture
def cache(tmp_path: Path) -> SearchCache:
    return SearchCache(tmp_path / "cache.sqlite")


def key(query: str = "q", provider: str = "serper", **parameters: Any) -> Key:
    return Key.of(provider, query, parameters or {"results": 10})


def test_what_was_put_is_found_again_by_another_process_or_object(cache: SearchCache) -> None:
    cache.put(key(), HITS)
    assert SearchCache(cache.path).get(key()) == Entry(hits=HITS, error=None)


def test_a_key_is_the_provider_the_normalised_query_and_the_parameters(cache: SearchCache) -> None:
    cache.put(key("Melting  point "), HITS)
    assert cache.get(key("search query: melting point")) == Entry(hits=HITS, error=None)
    assert cache.get(key("melting point", provider="brave")) is None
    cache.put(key("Caf\u00e9 AB"), HITS)
    assert cache.get(key("cafe\u0301 \uff21\uff22")) == Entry(hits=HITS, error=None)  # other forms in Unicode
    assert cache.get(key("melting point", results=5)) is None


@pytest.mark.parametrize("text", ["", "\0", "\ud800", "'; DROP TABLE results; --", "数" * 10_000])
def test_any_text_can_be_kept(cache: SearchCache, text: str) -> None:
    cache.put(key(text), [Hit(title=text, url=text, text=text)])
    entry = cache.get(key(text))
    assert entry is not None
    assert entry.hits[0].text == text.replace("\ud800", "?")


def test_nothing_found_and_failures_are_believed_for_a_while_only(
    cache: SearchCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put(key("empty"), [])
    cache.put_error(key("failed"), "answered 503")
    assert cache.get(key("empty")) == Entry(hits=[], error=None)
    assert cache.get(key("failed")) == Entry(hits=[], error="answered 503")
    now = time.time()
    monkeypatch.setattr(search_cache.time, "time", lambda: now + search_cache.ERROR_TTL_S + 1)
    assert cache.get(key("failed")) is None
    assert cache.get(key("empty")) == Entry(hits=[], error=None)
    monkeypatch.setattr(search_cache.time, "time", lambda: now + search_cache.EMPTY_TTL_S + 1)
    assert cache.get(key("empty")) is None
    # Without asking, an old answer is better than none; an old failure is not one.
    assert cache.get(key("empty"), expired=True) == Entry(hits=[], error=None)
    assert cache.get(key("failed"), expired=True) is None


def test_a_failure_does_not_displace_an_answer_but_an_answer_a_failure(cache: SearchCache) -> None:
    cache.put(key(), HITS)
    cache.put_error(key(), "answered 503")
    assert cache.get(key()) == Entry(hits=HITS, error=None)
    cache.put_error(key("other"), "answered 503")
    cache.put(key("other"), HITS)
    assert cache.get(key("other")) == Entry(hits=HITS, error=None)


def test_one_asks_at_a_time_and_who_vanishes_is_not_waited_for(cache: SearchCache) -> None:
    other = SearchCache(cache.path)
    with cache.lease(key(), 60) as mine:
        with other.lease(key(), 60) as theirs, other.lease(key("another"), 60) as unrelated:
            assert (mine, theirs, unrelated) == (True, False, True)
        with other.lease(key(), 60) as theirs:
            assert not theirs  # leaving without the lease gave nobody's back
    with other.lease(key(), 60) as theirs:
        assert theirs
    with cache.lease(key(), -1) as mine, other.lease(key(), 60) as theirs:
        assert (mine, theirs) == (True, True)  # the first had run out


def test_requests_are_spaced_evenly_over_all_who_ask(cache: SearchCache) -> None:
    start = time.time()
    slots = [SearchCache(cache.path).reserve("serper", 0.01, start + 1000) for _ in range(5)]
    assert None not in slots
    gaps = [slot - slots[0] for slot in slots if slot is not None and slots[0] is not None]
    assert gaps == pytest.approx([0.0, 100.0, 200.0, 300.0, 400.0])
    assert cache.reserve("serper", 0.01, start + 100) is None  # the next place is after that
    assert cache.reserve("brave", 0.01, start + 1000) is not None  # each provider has its own


def test_a_clock_that_was_set_back_blocks_no_requests(cache: SearchCache, monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    with monkeypatch.context() as ahead:
        ahead.setattr(search_cache.time, "time", lambda: now + 7200)
        assert cache.reserve("serper", 5, now + 7220) == now + 7200
        cache.lease(key(), 20).__enter__()  # by a process that is killed
        cache.put_error(key("failed"), "answered 503")
    monkeypatch.setattr(search_cache.time, "time", lambda: now)
    assert [cache.reserve("serper", 5, now + 20) for _ in range(2)] == [now, pytest.approx(now + 0.2)]
    with cache.lease(key(), 20) as granted:
        assert granted
    assert cache.get(key("failed")) is None


@pytest.mark.parametrize("folder_mode", [0o555, 0o755])
def test_a_cache_that_can_only_be_read_is_read(
    cache: SearchCache, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, folder_mode: int
) -> None:
    cache.put(key(), HITS)
    cache.close()
    cache.path.chmod(0o444)
    cache.path.parent.chmod(folder_mode)
    try:
        if os.geteuid() == 0:  # who may write everything; the files stay as they are nevertheless
            monkeypatch.setattr(
                search_cache, "_can_write", lambda *paths: all(p.stat().st_mode & 0o200 for p in paths)
            )
        reader = SearchCache(cache.path, writes=False)
        assert reader.get(key()) == Entry(hits=HITS, error=None)
        with pytest.raises(sqlite3.OperationalError, match="readonly"):
            reader.put(key("other"), HITS)
        assert run_command(monkeypatch, "cache", "stats", cache.path) == 0
        assert '"found": 1' in capsys.readouterr().out
    finally:
        cache.path.parent.chmod(0o755)
    if folder_mode == 0o555:
        assert [path.name for path in cache.path.parent.iterdir()] == [cache.path.name]


def test_spending_is_counted_by_run_up_to_the_cap(cache: SearchCache) -> None:
    assert [cache.spend("a", 2) for _ in range(3)] == [True, True, False]
    assert cache.spend("b", 2)
    assert cache.spend("a", None)
    assert cache.stats()["requests"] == {"a": 3, "b": 1}


def test_the_released_codes_json_is_read_and_written(cache: SearchCache, tmp_path: Path) -> None:
    released = {"Capital of France": "Page 1: Paris.\nPage 2: In Europe.", "nowhere": "No search results found."}
    (tmp_path / "search_cache.json").write_text(json.dumps(released))
    assert cache.import_json(tmp_path / "search_cache.json", "brightdata", {"results": 10}) == 2
    assert cache.get(key("capital of france", "brightdata")) == Entry(
        hits=[Hit(title="", url="", text="Paris."), Hit(title="", url="", text="In Europe.")], error=None
    )
    cache.put(key("iron", "serper"), HITS)
    assert cache.export_json(tmp_path / "all.json") == 3
    assert json.loads((tmp_path / "all.json").read_text()) == {
        "Capital of France": "Page 1: Paris.\nPage 2: In Europe.",
        "iron": "Page 1: Iron (https://a.test/): melts at 1538 °C\nPage 2: x y",
        "nowhere": "No search results found.",
    }
    assert cache.export_json(tmp_path / "some.json", "serper") == 1
    has = re.escape("has no results of 'serpr'. Its queries with results, by source: {'brightdata': 1, 'serper': 1}.")
    with pytest.raises(DataError, match=has):
        cache.export_json(tmp_path / "none.json", "serpr")


@pytest.mark.parametrize("mode", ["offline", "replay"])
def test_a_mode_that_sends_no_requests_needs_an_existing_file(tmp_path: Path, mode: str) -> None:
    path = tmp_path / "runs" / "cache.sqlite"
    with pytest.raises(DataError, match=rf"There is no search cache {path}\. Check the path, or fill a cache first"):
        build_tools(
            ToolArguments(["search"], search_provider="serper", search_cache=str(path), search_cache_mode=mode)
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("provider", "url", "source"), [("brave", None, "brave"), ("searxng", "http://new:1", "searxng http://new:1")]
)
def test_a_replay_without_results_of_its_source_names_those_of_the_file(
    cache: SearchCache, provider: str, url: str | None, source: str
) -> None:
    cache.put(key("iron", "serper"), HITS)
    cache.put(key("iron", "searxng http://old:1"), HITS)
    cache.put(key("iron", "brave"), [])  # it was asked, but found nothing
    of_file = {"brave": 0, "searxng http://old:1": 1, "serper": 1}
    message = f"{cache.path} has no results of {source!r}. Its queries with results, by source: {of_file}. Set search_"
    with pytest.raises(DataError, match=re.escape(message)):
        build_tools(
            ToolArguments(
                ["search"],
                search_provider=provider,
                search_url=url,
                search_cache=str(cache.path),
                search_cache_mode="replay",
            )
        )


@pytest.mark.parametrize("mode", [search_cache.CacheMode.OFFLINE, search_cache.CacheMode.REPLAY])
def test_an_imported_query_is_found_as_a_search_asks_for_it(
    tmp_path: Path, mode: search_cache.CacheMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    queries = ["Iron  ", "search query: gold", "query: query: tin", "long " * 200]  # Brave's are cut to 400 characters
    (tmp_path / "in.json").write_text(json.dumps({query: f"about {query[:20]}" for query in queries}))
    path = tmp_path / "cache.sqlite"
    assert run_command(monkeypatch, "cache", "import", path, tmp_path / "in.json", "--provider", "brave") == 0
    web = WebSearch(make_provider("brave"), SearchCache(path), mode)
    for query in queries:
        for asked in (query, f" {query.upper()}"):
            assert web.search(asked, 10) == [f"about {query[:20]}".strip()]


def test_servers_without_a_key_share_a_file_but_no_answers(cache: SearchCache) -> None:
    def searching(mode: search_cache.CacheMode) -> list[list[str]]:
        services = [make_provider("retrieve", url=server.url) for server in (wiki, patents)]
        return [WebSearch(service, cache, mode).search("iron", 5) for service in services]

    with (
        Loopback(lambda asked: Reply({"result": [["of the wiki"]]})) as wiki,
        Loopback(lambda asked: Reply({"result": [["of the patents"]]})) as patents,
    ):
        for mode in (search_cache.CacheMode.CACHE, search_cache.CacheMode.OFFLINE, search_cache.CacheMode.REPLAY):
            assert searching(mode) == [["of the wiki"], ["of the patents"]]
        assert list(cache.stats()["results"]) == sorted(f"retrieve {server.url}" for server in (wiki, patents))


def test_answers_are_imported_for_the_address_of_a_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "in.json").write_text(json.dumps({"iron": "1538 °C"}))
    path, url = tmp_path / "cache.sqlite", "http://127.0.0.1:1"
    arguments = ["cache", "import", str(path), str(tmp_path / "in.json"), "--provider", "retrieve", "--url", url + "/"]
    assert run_command(monkeypatch, *arguments) == 0
    replay = search_cache.CacheMode.REPLAY
    web = WebSearch(make_provider("retrieve", url=url), SearchCache(path), replay)
    assert web.search("iron", 10) == ["1538 °C"]
    with pytest.raises(DataError, match=r"has no results of 'retrieve http://127\.0\.0\.1:8000'\."):
        WebSearch(make_provider("retrieve"), SearchCache(path), replay)


def test_of_imported_queries_that_are_the_same_the_first_counts(
    cache: SearchCache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "in.json").write_text(json.dumps({"Iron": "first", "iron ": "second"}))
    assert cache.import_json(tmp_path / "in.json", "serper", {"results": 10}) == 1
    entry = cache.get(key("IRON"))
    assert entry is not None and entry.hits[0].text == "first"
    assert "has queries that differ from an earlier one" in caplog.text


def test_an_import_that_fails_changes_nothing(cache: SearchCache, tmp_path: Path) -> None:
    (tmp_path / "in.json").write_text(json.dumps({"iron": "new", "gold": "new", "tin": "new"}))
    cache.put(key("iron"), HITS)
    with sqlite3.connect(cache.path) as connection:
        connection.execute(
            "CREATE TRIGGER full BEFORE INSERT ON results WHEN NEW.query = 'tin' "
            "BEGIN SELECT RAISE(ABORT, 'database or disk is full'); END"
        )
    with pytest.raises(sqlite3.Error, match="disk is full"):
        cache.import_json(tmp_path / "in.json", "serper", {"results": 10})
    assert [cache.get(key(query)) for query in ("iron", "gold", "tin")] == [Entry(hits=HITS, error=None), None, None]
    cache.put(key("gold"), HITS)  # the file is not locked
    assert SearchCache(cache.path).get(key("gold")) == Entry(hits=HITS, error=None)


def test_an_export_that_fails_keeps_the_earlier_file(
    cache: SearchCache, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.put(key(), HITS)
    cache.export_json(tmp_path / "out.json")
    before = (tmp_path / "out.json").read_text("utf-8")
    write = Path.write_text

    def full(self: Path, text: str, *arguments: Any, **named: Any) -> int:
        write(self, text[:5], *arguments, **named)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space"):
        cache.export_json(tmp_path / "out.json")
    assert (tmp_path / "out.json").read_text("utf-8") == before


def test_a_cache_is_not_exported_over_itself(cache: SearchCache) -> None:
    with pytest.raises(DataError, match=r"is the search cache itself\. Choose another file"):
        cache.export_json(cache.path)
    cache.stats()


@pytest.mark.parametrize("end", ["-wal", "-shm", "-journal"])
def test_a_cache_is_not_exported_over_a_file_of_sqlite(cache: SearchCache, end: str) -> None:
    cache.put(key(), HITS)
    with pytest.raises(DataError, match=rf"{end} has the name of a file in which sqlite keeps changes"):
        cache.export_json(f"{cache.path}{end}")
    assert SearchCache(cache.path).get(key()) == cache.get(key())


def test_an_exported_cache_comes_back_the_same(cache: SearchCache, tmp_path: Path) -> None:
    cache.put(key(), HITS)
    cache.export_json(tmp_path / "first.json")
    again = SearchCache(tmp_path / "again.sqlite")
    again.import_json(tmp_path / "first.json", "serper", {"results": 10})
    again.export_json(tmp_path / "second.json")
    assert (tmp_path / "first.json").read_bytes() == (tmp_path / "second.json").read_bytes()


def test_stats_count_by_provider(cache: SearchCache) -> None:
    cache.put(key("a"), HITS)
    cache.put(key("b"), [])
    cache.put_error(key("c", "brave"), "answered 503")
    assert cache.stats()["results"] == {
        "brave": {"found": 0, "empty": 0, "failed": 1},
        "serper": {"found": 1, "empty": 1, "failed": 0},
    }


def test_a_file_that_is_not_a_cache_or_has_another_version_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("these are my notes, and not a database " * 50)
    with pytest.raises(DataError, match="cannot be used as a search cache"):
        SearchCache(tmp_path / "notes.txt")
    with pytest.raises(DataError, match="cannot be used as a search cache"):
        SearchCache(tmp_path)
    with sqlite3.connect(tmp_path / "new.sqlite") as connection:
        connection.execute("PRAGMA user_version=9")
    connection.close()
    with pytest.raises(DataError, match="version 9, expected 1"):
        SearchCache(tmp_path / "new.sqlite")


@pytest.mark.parametrize("version", [0, search_cache.FILE_VERSION])
def test_a_database_of_another_program_is_refused_and_not_changed(tmp_path: Path, version: int) -> None:
    path = tmp_path / "own.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE results (run TEXT, score REAL)")
        connection.execute(f"PRAGMA user_version={version}")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"own\.sqlite is a database of another program"):
        SearchCache(path)
    assert path.read_bytes() == before


def _search_all(path: str, url: str, worker: int) -> None:
    """40 queries common to all processes, and 20 queries of this process alone."""
    search = WebSearch(make_provider("searxng", url=url), SearchCache(path), timeout_s=60, run="run")
    for step in range(60):
        query = f"shared {step}" if step < 40 else f"own {worker} {step}"
        assert search.search(query, 5) == [query * 20]


@pytest.mark.distributed
def test_eight_processes_share_a_file_without_loss_or_double_requests(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["arpo_trl.tools.search.web"])
    path = str(tmp_path / "cache.sqlite")
    with Loopback(lambda asked: Reply({"results": [{"content": asked.params["q"] * 20}]})) as server:
        workers = [context.Process(target=_search_all, args=(path, server.url, number)) for number in range(8)]
        for worker in workers:
            worker.start()  # the file does not exist yet: they race to make it
        for worker in workers:
            worker.join(240)
        assert [worker.exitcode for worker in workers] == [0] * 8
    asked = [request.params["q"] for request in server.asked]
    assert len(asked) == len(set(asked)) == 40 + 8 * 20  # every distinct query once
    cache = SearchCache(path)
    assert cache.stats() == {
        "results": {f"searxng {server.url}": {"found": 200, "empty": 0, "failed": 0}},
        "requests": {"run": 200},
    }
    for query in asked:
        entry = cache.get(key(query, f"searxng {server.url}", results=5))
        assert entry == Entry(hits=[Hit(title="", url="", text=query * 20)], error=None)
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert connection.execute("SELECT count(*) FROM leases").fetchone() == (0,)
    connection.close()


def _spend_all(path: str, url: str, worker: int) -> None:
    service = make_provider("searxng", url=url)
    search = WebSearch(service, SearchCache(path), timeout_s=120, max_requests=25, per_second=50.0)
    for step in range(10):
        with contextlib.suppress(ToolUnavailable):
            search.search(f"own {worker} {step}", 5)


@pytest.mark.distributed
def test_processes_share_the_cap_and_the_rate(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["arpo_trl.tools.search.web"])
    times: list[float] = []

    def answer(asked: Asked) -> Reply:
        times.append(time.time())
        return Reply({"results": []})

    with Loopback(answer) as server:
        path = str(tmp_path / "cache.sqlite")
        now = SearchCache(path).reserve(
            f"searxng {server.url}", 1.0, math.inf
        )  # the next place is in a second, when all are ready
        assert now is not None
        workers = [context.Process(target=_spend_all, args=(path, server.url, number)) for number in range(4)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(240)
        assert [worker.exitcode for worker in workers] == [0] * 4
    assert len(times) == 25  # of 40 searches
    # None comes before its place. Places are 0.02 s apart, and sleeping may end a few milliseconds early.
    assert all(at >= now + 1.0 + 0.02 * place - 0.005 for place, at in enumerate(sorted(times)))


@pytest.mark.parametrize("stored", ["{", "5", "[[1, 2, 3]]", '[["one"]]', "[" * 5000, b"\xff"])
def test_a_damaged_answer_degrades_a_search_and_is_named_by_the_command(
    cache: SearchCache, stored: str | bytes, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    provider = make_provider("searxng", url="http://127.0.0.1:1")
    cache.put(Key.of(provider.source, "q", {"results": 1}), HITS)
    with sqlite3.connect(cache.path) as connection:
        connection.execute("UPDATE results SET hits = ?", (stored,))
    connection.close()
    with pytest.raises(ToolUnavailable):
        WebSearch(provider, cache, search_cache.CacheMode.OFFLINE).search("q", 1)
    with pytest.raises(DataError, match=r"cache\.sqlite cannot be used as a search cache: "):
        WebSearch(provider, cache, search_cache.CacheMode.REPLAY)
    assert run_command(monkeypatch, "cache", "export", cache.path, f"{cache.path}.json") == 2
    assert "cache.sqlite cannot be used as a search cache: " in capsys.readouterr().err
