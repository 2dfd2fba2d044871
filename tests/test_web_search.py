"""A slow, broken, closed or expensive search service gives an error text to the model and never stops the run."""

from __future__ import annotations

import json
import logging
import pickle
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from arpo_trl.errors import ConfigError, ToolError, ToolUnavailable
from arpo_trl.net import circuit_breaker
from arpo_trl.net.circuit_breaker import CircuitBreaker
from arpo_trl.tools.builtin import ToolArguments, build_tools
from arpo_trl.tools.calls import ToolCall, ToolFailure
from arpo_trl.tools.search.cache import CacheMode, SearchCache
from arpo_trl.tools.search.index import search_tool
from arpo_trl.tools.search.providers import make_provider
from arpo_trl.tools.search.web import WebSearch
from arpo_trl.tools.toolbox import ToolBox
from loopback import Asked, Loopback, Reply

KEY = "sk-PLANTED-9d1f77"


@pytest.fixture(autouse=True)
def planted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TAVILY_API_KEY", KEY)


def found(asked: Asked) -> Reply:
    return Reply({"results": [{"title": "", "url": "", "content": f"facts about {asked.json['query']}"}]})


@pytest.fixture
def server() -> Iterator[Loopback]:
    with Loopback(found) as server:
        yield server


class Service:
    """Searches with one cache file and one server."""

    def __init__(self, server: Loopback, folder: Path) -> None:
        self.server = server
        self.path = folder / "cache.sqlite"

    def search(self, mode: CacheMode = CacheMode.CACHE, **settings: Any) -> WebSearch:
        return WebSearch(make_provider("tavily", url=self.server.url), SearchCache(self.path), mode, **settings)


@pytest.fixture
def service(server: Loopback, tmp_path: Path) -> Service:
    return Service(server, tmp_path)


# What each mode asks and writes


def test_cache_sends_one_request_for_a_missing_answer(service: Service) -> None:
    for _ in range(2):
        assert service.search().search("Iron  ore", 5) == ["facts about Iron ore"]
    assert service.search().search("iron ore", 5) == ["facts about Iron ore"]  # the same query to the cache
    assert len(service.server.asked) == 1


def test_live_asks_every_time_and_leaves_the_file_alone(service: Service) -> None:
    live = service.search(CacheMode.LIVE)
    assert [live.search("iron", 5) for _ in range(2)] == [["facts about iron"]] * 2
    assert len(service.server.asked) == 2
    assert SearchCache(service.path).stats()["results"] == {}


def test_record_asks_every_time_and_keeps_the_last_answer(service: Service) -> None:
    service.search().search("iron", 5)
    service.server.answer = lambda asked: Reply({"results": [{"content": "newer facts"}]})
    assert service.search(CacheMode.RECORD).search("iron", 5) == ["newer facts"]
    assert service.search().search("iron", 5) == ["newer facts"]
    service.server.answer = lambda asked: Reply("", 404)
    with pytest.raises(ToolUnavailable):
        service.search(CacheMode.RECORD).search("iron", 5)
    assert service.search().search("iron", 5) == ["newer facts"]  # a failure takes nothing away


def test_replay_answers_with_the_nearest_recorded_query_and_sends_no_request(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.search().search("melting point of iron", 5)
    monkeypatch.delenv("TAVILY_API_KEY")  # who asks nobody needs no key
    replay = service.search(CacheMode.REPLAY, fields=["text"])
    assert replay.search("iron melts at which point", 5) == ["facts about melting point of iron"]
    assert search_tool(replay)("something else") == "No search results found."
    assert len(service.server.asked) == 1


def test_offline_reports_an_unrecorded_query_and_sends_no_request(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    service.search().search("iron", 5)
    monkeypatch.delenv("TAVILY_API_KEY")
    offline = service.search(CacheMode.OFFLINE)
    assert offline.search("IRON", 5) == ["facts about iron"]
    with pytest.raises(ToolError, match="not recorded") as error:
        offline.search("iron ore", 5)
    assert not isinstance(error.value, ToolUnavailable)  # it is the mode's doing, nothing is degraded
    assert len(service.server.asked) == 1


def test_an_empty_query_sends_no_request(service: Service) -> None:
    assert service.search().search("  ", 5) == []
    assert service.search().search("\ud800", 5) == ["facts about ?"]
    assert len(service.server.asked) == 1


def test_identical_calls_in_flight_share_one_request(service: Service) -> None:
    def slowly(asked: Asked) -> Reply:
        time.sleep(0.3)
        return found(asked)

    service.server.answer = slowly
    searches = [service.search() for _ in range(6)]  # each with a connection of its own, as processes have
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda search: search.search("iron", 5), searches)) == [["facts about iron"]] * 6
    assert len(service.server.asked) == 1


def test_a_failure_is_shared_by_those_who_waited_and_soon_forgotten(service: Service) -> None:
    service.server.answer = lambda asked: Reply("", 404)
    for _ in range(3):
        with pytest.raises(ToolUnavailable):
            service.search().search("iron", 5)
    assert len(service.server.asked) == 1


# Retries


def failing(times: int, reply: Reply) -> Any:
    left = [times]

    def answer(asked: Asked) -> Reply:
        left[0] -= 1
        return reply if left[0] >= 0 else found(asked)

    return answer


@pytest.mark.slow
@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_trouble_that_may_pass_is_tried_again(service: Service, status: int) -> None:
    service.server.answer = failing(1, Reply("busy", status))
    assert service.search().search("iron", 5) == ["facts about iron"]
    assert len(service.server.asked) == 2


@pytest.mark.parametrize("status", [301, 400, 401, 403, 404, 422])
def test_trouble_that_stays_is_not(service: Service, status: int) -> None:
    service.server.answer = failing(1, Reply("no", status, {"Location": "/elsewhere"}))
    with pytest.raises(ToolUnavailable):
        service.search().search("iron", 5)
    assert len(service.server.asked) == 1


@pytest.mark.slow
def test_retry_after_is_honoured(service: Service) -> None:
    service.server.answer = failing(1, Reply("", 429, {"Retry-After": "1"}))
    start = time.monotonic()
    assert service.search().search("iron", 5) == ["facts about iron"]
    assert time.monotonic() - start >= 1.0


def test_a_retry_after_beyond_the_deadline_is_not_waited_for(service: Service) -> None:
    service.server.answer = failing(1, Reply("", 429, {"Retry-After": "3600"}))
    start = time.monotonic()
    with pytest.raises(ToolUnavailable):
        service.search(timeout_s=120).search("iron", 5)
    assert time.monotonic() - start < 60
    assert len(service.server.asked) == 1


def test_a_service_that_drips_is_left_at_the_deadline(service: Service) -> None:
    left = threading.Event()

    def drip(file: Any) -> None:
        for _ in range(2400):  # two minutes
            file.write(b" ")
            file.flush()
            if left.wait(0.05):
                return

    service.server.answer = lambda asked: Reply(stream=drip)
    start = time.monotonic()
    with pytest.raises(ToolUnavailable):
        service.search(timeout_s=0.5).search("iron", 5)
    left.set()
    assert time.monotonic() - start < 60


def test_an_answer_of_any_size_is_cut_off(service: Service) -> None:
    sent = [0]

    def flood(file: Any) -> None:
        for _ in range(1000):
            file.write(b" " * 100_000)
            sent[0] += 100_000

    service.server.answer = lambda asked: Reply(stream=flood)
    with pytest.raises(ToolUnavailable):
        service.search(timeout_s=60).search("iron", 5)
    assert sent[0] < 30_000_000  # 8 MiB and what was on its way in buffers, of 100 MB
    assert len(service.server.asked) == 1


@pytest.mark.parametrize("body", [b"\xff\xfe\x00broken", b"", b"[" * 100_000, b"<html>"])
def test_invalid_json_is_a_failed_search(service: Service, body: bytes) -> None:
    service.server.answer = lambda asked: Reply(body)
    with pytest.raises(ToolUnavailable):
        service.search(timeout_s=0.9).search("iron", 5)


# Limits


def test_requests_are_spaced_across_searches_of_one_file(service: Service) -> None:
    searches = [service.search(per_second=10.0) for _ in range(5)]
    start = time.monotonic()
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda number: searches[number].search(f"iron {number}", 5), range(5)))
    assert time.monotonic() - start >= 0.4  # 5 requests, 4 gaps of 0.1 s


def test_a_search_without_a_place_before_its_deadline_fails_at_once(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    search = service.search(per_second=0.001, timeout_s=120)
    search.search("iron", 5)
    start = time.monotonic()
    for _ in range(2):
        with pytest.raises(ToolUnavailable, match="unavailable"):
            search.search("tin", 5)
    assert time.monotonic() - start < 60
    told = "Search is degraded: the next request that search_rate 0.001 allows to tavily is later than"
    assert [record.getMessage()[: len(told)] for record in caplog.records] == [told]


def test_the_spending_cap_counts_all_searches_of_a_run_and_ends_in_a_text(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    searches = [service.search(max_requests=3, run="run/a") for _ in range(2)]
    answers = []
    with ToolBox([search_tool(searches[0])]) as box:
        for number in range(5):
            searches[1].search("known", 5)  # costs one request, then comes from the file
            box.submit(ToolCall(name="search", arguments={"query": f"iron {number}"}))
            answers += [result for _, result in box.poll(60)]
    assert [answer.failure for answer in answers] == [None, None] + [ToolFailure.DEGRADED] * 3
    assert answers[-1].text == "Error: the search budget is used up. Continue with what you know."
    assert len(service.server.asked) == 3
    assert service.search(max_requests=3, run="run/b").search("tin", 5) == ["facts about tin"]
    assert caplog.text.count("Search is degraded") == 1


@pytest.mark.slow
def test_retries_are_paid_for(service: Service) -> None:
    service.server.answer = lambda asked: Reply("", 503)
    with pytest.raises(ToolUnavailable):
        service.search(max_requests=2).search("iron", 5)
    assert len(service.server.asked) == 2


class Clock:
    """The clock of circuit breakers."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr(circuit_breaker, "time", made)
    return made


def test_after_failures_in_a_row_the_service_rests_and_is_found_well_again(
    service: Service, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    service.server.answer = lambda asked: Reply("", 404)
    search = service.search(breaker=CircuitBreaker(failures=3, rest_s=0.5))
    for number in range(10):
        with pytest.raises(ToolUnavailable):
            search.search(f"iron {number}", 5)
    assert len(service.server.asked) == 3
    warning = "Search is degraded: tavily answered 404, 3 times in a row. It gets no requests for 0.5 s"
    assert caplog.text.count(warning) == 1
    service.server.answer = found
    clock.now_s += 0.6
    assert search.search("tin", 5) == ["facts about tin"]
    assert search.search("lead", 5) == ["facts about lead"]


def test_a_resting_service_is_tried_by_one_call_at_a_time(clock: Clock) -> None:
    breaker = CircuitBreaker(failures=2, rest_s=1.0)
    assert [breaker.failed(), breaker.failed(), breaker.failed()] == [False, True, False]  # said once
    clock.now_s += 0.99
    assert not breaker.lets_pass()
    clock.now_s += 0.02
    assert [breaker.lets_pass(), breaker.lets_pass()] == [True, False]
    breaker.succeeded()
    assert [breaker.lets_pass(), breaker.lets_pass()] == [True, True]


def test_a_rejected_query_does_not_open_the_circuit(service: Service) -> None:
    service.server.answer = lambda asked: Reply("", 422)
    search = service.search(breaker=CircuitBreaker(failures=2, rest_s=60))
    for number in range(4):
        with pytest.raises(ToolUnavailable):
            search.search(f"iron {number}", 5)
    assert len(service.server.asked) == 4


def test_a_service_that_refuses_every_query_rests(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    service.server.answer = lambda asked: Reply({"detail": "field required"}, 422)
    search = service.search(breaker=CircuitBreaker(failures=2, rest_s=60))
    for number in range(25):
        with pytest.raises(ToolUnavailable):
            search.search(f"iron {number}", 5)
    # The 20th refusal in a row and each later one count as failures of the service; after two of them it rests.
    assert len(service.server.asked) == 21
    assert [record.getMessage()[:40] for record in caplog.records] == ["Search is degraded: tavily answered 422,"]


REFUSALS = [
    json.loads(line) for line in (Path(__file__).parent / "cases" / "search_refusals.jsonl").read_text().splitlines()
]


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSALS, ids=[f"{i}-{case['kind']}" for i, case in enumerate(REFUSALS, 1)])
def test_a_rejected_account_is_not_a_bad_query_and_is_logged_once(
    service: Service, caplog: pytest.LogCaptureFixture, case: dict[str, Any]
) -> None:
    service.server.answer = lambda asked: Reply(case["body"], case["status"])
    search = service.search(breaker=CircuitBreaker(failures=2, rest_s=60))
    for number in range(4):
        with pytest.raises(ToolUnavailable):
            search.search(f"iron {number}", 5)
    told = [record.getMessage() for record in caplog.records if "degraded" in record.getMessage()]
    if case["is_the_query"]:
        assert (len(service.server.asked), told) == (4, [])
    else:
        assert len(service.server.asked) == 2  # then the service rests
        assert len(told) == 1
        assert "TAVILY_API_KEY valid" in told[0]


def test_a_query_about_keys_that_an_error_repeats_is_still_a_bad_query(service: Service) -> None:
    service.server.answer = lambda asked: Reply({"error": f"cannot parse {asked.json['query']}"}, 422)
    search = service.search(breaker=CircuitBreaker(failures=1, rest_s=60))
    for number in range(3):
        with pytest.raises(ToolUnavailable):
            search.search(f"token quota of key {number}", 5)
    assert len(service.server.asked) == 3


# Keys


def test_a_missing_key_is_named_at_start_up(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    for value in (None, "  "):
        if value is None:
            monkeypatch.delenv("TAVILY_API_KEY")
        else:
            monkeypatch.setenv("TAVILY_API_KEY", value)
        with pytest.raises(ConfigError, match="environment variable TAVILY_API_KEY, which is not set"):
            service.search()


def test_a_line_end_is_removed_from_a_key_and_other_invalid_characters_are_refused(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TAVILY_API_KEY", KEY + "\n")
    service.search().search("iron", 5)
    assert service.server.asked[0].headers["authorization"] == f"Bearer {KEY}"
    monkeypatch.setenv("TAVILY_API_KEY", KEY + "\u2028ö")
    with pytest.raises(ConfigError) as error:
        service.search()
    assert KEY not in str(error.value)


def echoing(status: int) -> Any:
    def answer(asked: Asked) -> Reply:
        said = asked.headers["authorization"]
        return Reply({"results": [{"content": f"you sent {said}"}], "error": said}, status, {"X-Echo": said})

    return answer


def echoing_escaped(asked: Asked) -> Reply:
    escaped = "".join(f"\\u{ord(character):04x}" for character in KEY)
    return Reply('{"results": [{"title": "' + escaped + '", "content": "' + escaped + '"}]}')


def hang_up(asked: Asked) -> Reply:
    def stream(file: Any) -> None:
        file.write(KEY.encode() + b" and then nothing")

    return Reply(stream=stream, headers={"Content-Length": "5000"})


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer", [echoing(401), echoing(400), echoing(503), echoing(302), echoing(200), echoing_escaped, hang_up]
)
def test_no_key_gets_out_however_the_service_fails(
    answer: Any, service: Service, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    caplog.set_level(logging.INFO)
    service.server.answer = answer
    search = service.search(timeout_s=60, breaker=CircuitBreaker(failures=1))
    texts = [repr(search), repr(vars(search)), repr(pickle.dumps(vars(search)["_provider"]))]
    try:
        texts += search.search("iron", 5)
    except ToolError as error:
        chain: BaseException | None = error
        while chain is not None:
            texts += [str(chain), repr(chain), repr(vars(chain)), repr(chain.args)]
            chain = chain.__cause__ or (None if chain.__suppress_context__ else chain.__context__)
    texts += [caplog.text, *(repr(vars(record)) for record in caplog.records), *capfd.readouterr()]
    for file in service.path.parent.iterdir():
        texts.append(file.read_bytes().decode("latin-1"))
    assert KEY in service.server.asked[0].headers["authorization"]  # it was in use
    assert not [text for text in texts if KEY in text]


def test_no_key_is_in_the_error_of_an_unreachable_server(
    service: Service, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("arpo_trl.net.http_client._ATTEMPTS", 1)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    provider = make_provider("tavily", url=f"http://127.0.0.1:{port}")
    search = WebSearch(provider, SearchCache(service.path), timeout_s=60, breaker=CircuitBreaker(failures=1))
    with pytest.raises(ToolUnavailable) as error:
        search.search("iron", 5)
    assert KEY not in caplog.text + str(error.value) + service.path.read_bytes().decode("latin-1")
    assert "tavily the connection failed (ConnectError)" in caplog.text


# From a configuration


def test_a_configuration_names_the_service(server: Loopback, tmp_path: Path) -> None:
    (search,) = build_tools(
        ToolArguments(
            ["search"],
            search_provider="tavily",
            search_url=server.url,
            search_cache=str(tmp_path / "folder" / "cache.sqlite"),
            search_max_calls=1,
        ),
        run="runs/x",
    )
    assert search("iron") == "Page 1: facts about iron"
    assert SearchCache(tmp_path / "folder" / "cache.sqlite").stats()["requests"] == {"runs/x": 1}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "expected exactly one of them"),
        ({"search_index": "a", "search_recorded": "b"}, "expected exactly one of them"),
        ({"search_provider": "tavily", "search_index": "a.jsonl"}, "expected exactly one of them"),
        ({"search_provider": "local"}, "expected exactly one of them"),
        ({"search_provider": "google"}, "'google'; expected one of .*'serper'"),
        ({"search_provider": "tavily", "search_cache_mode": "always"}, "'always'; expected one of"),
        ({"search_provider": "tavily", "search_fields": ["snippet"]}, "search_fields is"),
        ({"search_provider": "tavily", "search_max_calls": 0}, "search_max_calls is 0"),
        ({"search_provider": "tavily", "search_rate": 0.0}, "search_rate is 0.0"),
        ({"search_provider": "tavily", "search_timeout_s": float("nan")}, "search_timeout_s is nan"),
        ({"search_provider": "serper"}, "SERPER_API_KEY"),
        ({"search_recorded": "b", "search_top_k": 0}, "search_top_k is 0"),
    ],
)
def test_a_configuration_that_cannot_work_is_an_error(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        build_tools(ToolArguments(["search"], search_cache=str(tmp_path / "cache.sqlite"), **settings))


@pytest.mark.slow
def test_a_process_that_searched_ends_by_itself(server: Loopback, tmp_path: Path) -> None:
    code = (
        "from arpo_trl.tools import WebSearch, SearchCache, make_provider\n"
        f"provider = make_provider('tavily', url={server.url!r})\n"
        f"print(WebSearch(provider, SearchCache({str(tmp_path / 'c.sqlite')!r})).search('iron', 5))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "['facts about iron']\n", "")


def test_a_cache_file_that_fails_costs_a_text(service: Service, caplog: pytest.LogCaptureFixture) -> None:
    cache = SearchCache(service.path)
    search = WebSearch(make_provider("tavily", url=service.server.url), cache)
    cache.close()
    with pytest.raises(ToolUnavailable, match="unavailable"):
        search.search("iron", 5)
    assert "Search is degraded: the cache file" in caplog.text


def test_many_threads_search_at_once(service: Service) -> None:
    search = service.search()
    barrier = threading.Barrier(16)

    def ask(number: int) -> list[str]:
        barrier.wait()
        return search.search(f"iron {number % 4}", 5)

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(ask, range(16)))
    assert answers == [[f"facts about iron {number % 4}"] for number in range(16)]
    assert len(service.server.asked) == 4
