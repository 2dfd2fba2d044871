"""Each provider sends the requests of its service and parses the responses, over real HTTP to a fake server."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx
import pytest

from arpo_trl import Hit, Provider, register_provider
from arpo_trl.errors import ConfigError, ToolUnavailable
from arpo_trl.net.circuit_breaker import CircuitBreaker
from arpo_trl.tools.builtin import ToolArguments, build_tools
from arpo_trl.tools.search.cache import CacheMode, SearchCache
from arpo_trl.tools.search.index import search_tool
from arpo_trl.tools.search.providers import PROVIDERS, make_provider
from arpo_trl.tools.search.web import WebSearch
from loopback import Loopback, Reply

KEY = "k-3f9a1c"
QUERY = "melting point of iron & tin"

# In the layouts that the services document, with fields that are not read left in.
ANSWERS: dict[str, Any] = {
    "retrieve": {
        "result": [
            [
                {"document": {"id": "12", "contents": '"Iron"\nIron melts at 1538 °C.'}, "score": 9.1},
                {"document": {"contents": "Tin melts at 232 °C."}, "score": 3.0},
            ]
        ]
    },
    "serper": {
        "searchParameters": {"q": QUERY, "type": "search"},
        "organic": [
            {"title": "Iron", "link": "https://a.test/", "snippet": "Iron melts at 1538 °C.", "position": 1},
            {"title": "No snippet", "link": "https://b.test/", "position": 2},
        ],
        "credits": 1,
    },
    "brave": {
        "type": "search",
        "web": {
            "results": [
                {
                    "title": "Iron",
                    "url": "https://a.test/",
                    "description": "Iron melts at 1538 °C.",
                    "extra_snippets": ["It is a metal."],
                }
            ]
        },
    },
    "tavily": {
        "query": QUERY,
        "answer": None,
        "results": [
            {"title": "Iron", "url": "https://a.test/", "content": "Iron melts at 1538 °C.", "score": 0.9},
        ],
    },
    "exa": {
        "requestId": "1",
        "results": [
            {"title": "Iron", "url": "https://a.test/", "id": "https://a.test/", "text": "Iron melts at 1538 °C."}
        ],
    },
    "brightdata": {
        "general": {"search_engine": "bing"},
        "organic": [
            {"link": "https://a.test/", "title": "Iron", "description": "Iron melts at 1538 °C.", "rank": 1},
        ],
    },
    "searxng": {
        "query": QUERY,
        "results": [
            {"title": "Iron", "url": "https://a.test/", "content": "Iron melts at 1538 °C.", "engine": "bing"},
            {"title": "Tin", "url": "https://b.test/", "content": None},
        ],
    },
}
FIRST = "Iron (https://a.test/): Iron melts at 1538 °C."
TEXTS = {
    "retrieve": ["Iron: Iron melts at 1538 °C.", "Tin melts at 232 °C."],
    "serper": [FIRST, "No snippet (https://b.test/)"],
    "brave": [FIRST + " … It is a metal."],
    "tavily": [FIRST],
    "exa": [FIRST],
    "brightdata": [FIRST],
    "searxng": [FIRST, "Tin (https://b.test/)"],
}


def search(name: str, server: Loopback, folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> WebSearch:
    if variable := PROVIDERS.get(name).key_variable:
        monkeypatch.setenv(variable, KEY)
    provider = make_provider(name, url=server.url, zone="my_zone")
    return WebSearch(provider, SearchCache(folder / "cache.sqlite"), **settings)


@pytest.mark.parametrize("name", PROVIDERS.own)
def test_each_service_has_its_own_request_and_answer_format(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Loopback(lambda asked: Reply(ANSWERS[name])) as server:
        assert search(name, server, tmp_path, monkeypatch).search(QUERY, 5) == TEXTS[name]
    (asked,) = server.asked
    sent: dict[str, tuple[str, str, dict[str, str], Any]] = {
        "retrieve": ("POST", "/retrieve", {}, {"queries": [QUERY], "topk": 5, "return_scores": True}),
        "serper": ("POST", "/search", {"x-api-key": KEY}, {"q": QUERY, "num": 5}),
        "brave": ("GET", "/res/v1/web/search", {"x-subscription-token": KEY}, None),
        "tavily": ("POST", "/search", {"authorization": f"Bearer {KEY}"}, {"query": QUERY, "max_results": 5}),
        "exa": (
            *("POST", "/search", {"x-api-key": KEY}),
            {"query": QUERY, "numResults": 5, "contents": {"text": {"maxCharacters": 1000}}},
        ),
        "brightdata": ("POST", "/request", {"authorization": f"Bearer {KEY}"}, None),
        "searxng": ("GET", "/search", {}, None),
    }
    method, path, headers, body = sent[name]
    assert (asked.method, asked.path) == (method, path)
    assert headers.items() <= asked.headers.items()
    if body is not None:
        assert asked.json == body
    if name == "brave":
        assert asked.params == {"q": QUERY, "count": "5", "text_decorations": "false"}
    if name == "searxng":
        assert asked.params == {"q": QUERY, "format": "json"}
    if name == "brightdata":
        assert (asked.json["zone"], asked.json["format"]) == ("my_zone", "raw")
        page = urlsplit(asked.json["url"])
        assert page.hostname == "www.bing.com"
        assert parse_qs(page.query) == {"q": [QUERY], "count": ["5"], "brd_json": ["1"]}


@pytest.mark.parametrize("name", PROVIDERS.own)
def test_a_service_that_finds_nothing_gives_no_results(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = {
        "retrieve": {"result": [[]]},
        "serper": {"searchParameters": {"q": QUERY}},
        "brave": {"type": "search", "query": {"original": QUERY}},
        "brightdata": {"general": {"search_engine": "bing"}},
    }
    with Loopback(lambda asked: Reply(empty.get(name, {"results": []}))) as server:
        assert search(name, server, tmp_path, monkeypatch).search(QUERY, 5) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "answer", [{}, {"error": "no more credits"}, {"message": "Unauthorized.", "statusCode": 403}, {"results": None}]
)
@pytest.mark.parametrize("name", PROVIDERS.own)
def test_an_answer_without_results_is_not_no_results_and_is_not_kept(
    name: str, answer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Loopback(lambda asked: Reply(answer if len(server.asked) == 1 else ANSWERS[name])) as server:
        service = search(name, server, tmp_path, monkeypatch, mode=CacheMode.RECORD)
        with pytest.raises(ToolUnavailable, match="unavailable"):
            service.search(QUERY, 5)
        assert service.search(QUERY, 5) == TEXTS[name]


CASES = [
    json.loads(line)
    for line in (Path(__file__).parent / "cases" / "search_answers.jsonl").read_text("utf-8").splitlines()
]


@pytest.mark.parametrize("case", CASES, ids=[f"{i}-{case['kind']}" for i, case in enumerate(CASES, 1)])
def test_cases(
    case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    body = case["body"] if "body" in case else case["text"].encode(case.get("encoding", "utf-8"))
    reply = Reply(body, case.get("status", 200), {"Content-Type": case.get("content_type", "application/json")})
    with Loopback(lambda asked: reply) as server:
        service = search(case["provider"], server, tmp_path, monkeypatch, breaker=CircuitBreaker(failures=1))
        if "shown" in case:
            assert service.search(QUERY, 5) == case["shown"]
            return
        with pytest.raises(ToolUnavailable):
            service.search(QUERY, 5)
    assert case["told"] in caplog.text


def test_a_searxng_whose_engines_do_not_respond_has_not_found_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    down = {"results": [], "unresponsive_engines": [["google", "timeout"]]}
    with Loopback(lambda asked: Reply(down if len(server.asked) == 1 else ANSWERS["searxng"])) as server:
        # It may pass, so the same search asks again.
        assert search("searxng", server, tmp_path, monkeypatch).search(QUERY, 5) == TEXTS["searxng"]
    assert len(server.asked) == 2


@pytest.mark.parametrize("answer", ["[]", "null", '{"results": 5}', '{"results": [5]}', '{"results": {"a": 1}}', "5"])
def test_an_answer_of_another_layout_is_a_failed_search(
    answer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Loopback(lambda asked: Reply(answer)) as server, pytest.raises(ToolUnavailable, match="unavailable"):
        search("tavily", server, tmp_path, monkeypatch).search(QUERY, 5)


def test_requests_respect_a_services_limits_on_results_and_query_length(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Loopback(lambda asked: Reply(ANSWERS["brave"])) as server:
        search("brave", server, tmp_path, monkeypatch).search("word " * 200, 100)
    # 400 characters are 80 words of "word "; brave takes 50 of them.
    assert server.asked[0].params["count"] == "20"
    assert server.asked[0].params["q"] == " ".join(["word"] * 50)


def test_the_retrieval_server_may_be_named_with_its_path() -> None:
    provider = make_provider("retrieve", url="http://127.0.0.1:8000/retrieve")
    assert str(provider.request("q", 3, "").url) == "http://127.0.0.1:8000/retrieve"


def test_the_default_addresses_are_the_services_own() -> None:
    hosts = {
        name: make_provider(name, zone="z").request("q", 1, "k").url.host
        for name in PROVIDERS.own
        if name != "searxng"
    }
    assert hosts == {
        "retrieve": "127.0.0.1",
        "serper": "google.serper.dev",
        "brave": "api.search.brave.com",
        "tavily": "api.tavily.com",
        "exa": "api.exa.ai",
        "brightdata": "api.brightdata.com",
    }


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        (["title", "url", "text"], "T (u): x"),
        (["title", "text"], "T: x"),
        (["text"], "x"),
        (["url", "text"], "u: x"),
        (["title"], "T"),
    ],
)
def test_the_parts_of_a_hit_that_are_shown_can_be_chosen(fields: list[str], text: str) -> None:
    assert Hit(title="T", url="u", text="x").shown(fields) == text


def test_the_papers_format_is_ten_results_of_a_thousand_characters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = {"results": [{"title": "", "url": "", "content": f"{i} " + "x" * 2000} for i in range(15)]}
    with Loopback(lambda asked: Reply(many)) as server:
        tool = search_tool(search("tavily", server, tmp_path, monkeypatch), top_k=10, max_chars=1000)
        lines = tool(QUERY).split("\n")
    assert [len(line) for line in lines] == [len("Page 1: ") + 1000] * 9 + [len("Page 10: ") + 1000]


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("google", {}, "no search provider 'google'; expected one of"),
        ("searxng", {}, "Set search_url"),
        ("brightdata", {}, "needs search_zone"),
        (
            "serper",
            {"url": "ftp://x"},
            "search_url must be an address like .* in the environment variable SERPER_API_KEY",
        ),
        ("searxng", {"url": "https://"}, "search_url must be an address like .* and a host"),
    ],
)
def test_invalid_questions_are_errors_with_a_remedy(name: str, settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as error:
        make_provider(name, **settings)
    assert "hunter2" not in str(error.value)


@register_provider("wiki")
class Wiki(Provider):
    """A search service that the package does not know."""

    key_variable = "WIKI_API_KEY"

    def request(self, query: str, results: int, key: str) -> httpx.Request:
        url = f"{self.base_url}/find"
        return httpx.Request("GET", url, headers={"X-Key": key}, params={"q": query, "n": results})

    def read(self, answer: Any) -> list[Hit]:
        return [Hit(title=page["name"], url="", text=page["body"]) for page in answer["pages"]]


def test_the_settings_name_a_provider_from_outside_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WIKI_API_KEY", KEY)
    pages = [{"name": "Iron", "body": "Melts at 1538 °C."}, {"name": "Tin", "body": "Melts at 232 °C."}]
    with Loopback(lambda asked: Reply({"pages": pages})) as server:
        arguments = ToolArguments(
            tools=["search"],
            search_provider="wiki",
            search_url=server.url,
            search_top_k=2,
            search_cache=str(tmp_path / "cache.sqlite"),
        )
        (tool,) = build_tools(arguments)
        text = "Page 1: Iron: Melts at 1538 °C.\nPage 2: Tin: Melts at 232 °C."
        assert (tool(QUERY), tool(QUERY)) == (text, text)
    (asked,) = server.asked  # the cache answers the second search
    assert (asked.path, asked.params) == ("/find", {"q": QUERY, "n": "2"})
    assert asked.headers["x-key"] == KEY


def test_an_address_with_and_without_its_path_is_one_server() -> None:
    sources = {make_provider("retrieve", url=f"http://127.0.0.1:8000{path}").source for path in ("", "/retrieve")}
    assert sources == {"retrieve http://127.0.0.1:8000"}


def test_an_error_names_the_flag_of_the_address() -> None:
    with pytest.raises(ConfigError, match="Set --url to the address"):
        make_provider("searxng", setting="--url")
    with pytest.raises(ConfigError, match="--url must be an address"):
        make_provider("searxng", url="searx", setting="--url")


def test_a_provider_may_yield_its_results(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(provider: Wiki, answer: Any) -> Iterator[Hit]:
        for page in answer["pages"]:
            yield Hit(title=page["name"], url="", text=page["body"])

    monkeypatch.setattr(Wiki, "read", read)
    with Loopback(lambda asked: Reply({"pages": [{"name": "Iron", "body": "Melts at 1538 °C."}]})) as server:
        service = search("wiki", server, tmp_path, monkeypatch, mode=CacheMode.RECORD)
        assert service.search(QUERY, 5) == ["Iron: Melts at 1538 °C."]


@pytest.mark.parametrize("order", [1, -1])
def test_the_modules_of_all_tools_are_imported_before_the_search_tool_is_made(
    order: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = f"provider_of_tools{order}".replace("-", "_")
    (tmp_path / f"{module}.py").write_text(
        "from test_search_providers import Wiki, register_provider\n"
        f"@register_provider({module!r})\n"
        "class Own(Wiki):\n    default_url = 'http://127.0.0.1:1'\n"
        "def lookup(word: str) -> str:\n    return word\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WIKI_API_KEY", KEY)
    names = ["search", f"{module}:lookup"][::order]
    tools = build_tools(ToolArguments(tools=names, search_provider=module))
    assert [tool.__name__ for tool in tools] == ["search", "lookup"][::order]


def misspelt(provider: Wiki, answer: Any) -> Iterator[Hit]:
    for page in answer["pages"]:
        yield Hit(title=page["name"], url="", text=page["boddy"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("step", "broken", "told"),
    [
        ("read", misspelt, r"`read` raised KeyError \(test_search_providers.py, line LINE\)"),
        ("read", lambda *_: int(KEY), r"`read` raised ValueError \(test_search_providers.py, line \d+\)"),
        ("read", lambda *_: None, "`read` returned a NoneType; expected a list of Hit"),
        ("read", lambda *_: ["text"], "`read` returned a str in its list; expected a Hit"),
        ("read", lambda *_: "", "`read` returned a str; expected a list of Hit"),
        ("read", lambda *_: {}, "`read` returned a dict; expected a list of Hit"),
        ("read", lambda *_: [{"title": "Iron"}], "`read` returned a dict in its list; expected a Hit"),
        (
            *("read", lambda *_: [Hit(title="Iron", url="", text=None)]),
            "`read` returned a Hit whose text is a NoneType; expected a str",
        ),
        ("request", lambda *_: "http://127.0.0.1", "`request` returned a str; expected an httpx.Request"),
        ("request", lambda *_: 1 / 0, r"`request` raised ZeroDivisionError \(test_search_providers.py, line \d+\)"),
    ],
)
def test_a_faulty_provider_degrades_searches_and_is_not_kept_and_its_fault_is_logged(
    step: str,
    broken: Any,
    told: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pages = [{"name": "Iron", "body": "Melts at 1538 °C."}]
    line = misspelt.__code__.co_firstlineno + 2
    with Loopback(lambda asked: Reply({"pages": pages})) as server:
        breaker = CircuitBreaker(failures=1, rest_s=0)
        service = search("wiki", server, tmp_path, monkeypatch, mode=CacheMode.RECORD, breaker=breaker)
        with monkeypatch.context() as patch:
            patch.setattr(Wiki, step, broken)
            with pytest.raises(ToolUnavailable, match="unavailable"):
                service.search(QUERY, 5)
        assert service.search(QUERY, 5) == ["Iron: Melts at 1538 °C."]
    assert re.search(told.replace("LINE", str(line)), caplog.text) and KEY not in caplog.text


def test_an_unknown_provider_is_named_with_all_that_are_registered() -> None:
    message = r"search_provider is 'google'; expected one of \['local', .*'wiki'.*\]. A provider of your own is known"
    with pytest.raises(ConfigError, match=message):
        build_tools(ToolArguments(tools=["search"], search_provider="google"))
