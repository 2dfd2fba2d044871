"""Search services over HTTP: how each is asked and how its answer is read, as pure functions.

Keys come from the environment only and are handed in per request, so that no object here holds one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar
from urllib.parse import urlencode

import httpx

from arpo_trl.errors import ConfigError
from arpo_trl.net.addresses import check_server_url

FIELDS = ("title", "url", "text")


class Unanswered(Exception):
    """A successful answer that says that the service could not search. The message quotes nothing of it."""


@dataclass(frozen=True, slots=True)
class Hit:
    """One result of a search; a part that is not known is empty."""

    title: str
    url: str
    text: str

    def shown(self, fields: Sequence[str] = FIELDS) -> str:
        """`title (url): text`, of the parts in `fields` that there are."""
        title = self.title if "title" in fields else ""
        url = self.url if "url" in fields else ""
        head = f"{title} ({url})" if title and url else title or url
        text = self.text if "text" in fields else ""
        return f"{head}: {text}" if head and text else head or text


@dataclass(frozen=True)
class Provider(ABC):
    """A search service at `base_url`, which may be a gateway that speaks the same protocol."""

    base_url: str

    name: ClassVar[str]
    default_url: ClassVar[str] = ""
    key_variable: ClassVar[str | None] = None
    """The environment variable with the key, where the service wants one."""
    max_results: ClassVar[int] = 100
    max_query_chars: ClassVar[int] = 2000
    """A longer query is refused by the service, so it is cut."""

    @classmethod
    def parameters(cls, results: int) -> dict[str, Any]:
        """What an answer depends on besides the query."""
        return {"results": min(results, cls.max_results)}

    @abstractmethod
    def request(self, query: str, results: int, key: str) -> httpx.Request:
        """The request for at most `results` results."""

    @abstractmethod
    def read(self, answer: Any) -> list[Hit]:
        """The hits in the JSON of a successful answer.

        Raises:
            ValueError, KeyError, TypeError: It has another layout; an error object, say, is not "no results".
            Unanswered: It says that nothing was searched.
        """


class Retrieve(Provider):
    """A retrieval server with Search-R1's protocol."""

    name = "retrieve"
    default_url = "http://127.0.0.1:8000"

    def request(self, query: str, results: int, key: str) -> httpx.Request:
        url = self.base_url.removesuffix("/retrieve") + "/retrieve"
        return httpx.Request("POST", url, json={"queries": [query], "topk": results, "return_scores": True})

    def read(self, answer: Any) -> list[Hit]:
        hits = []
        for found in answer["result"][0]:
            document = found.get("document", found)
            if "contents" in document:  # "title"\ntext
                title, _, text = str(document["contents"]).partition("\n")
                hits.append(Hit(title.strip().strip('"'), "", text) if text else Hit("", "", title))
            else:
                hits.append(_hit(document, "title", "url", ("text",)))
        return hits


class Serper(Provider):
    """Google's results by serper.dev."""

    name, default_url, key_variable = "serper", "https://google.serper.dev", "SERPER_API_KEY"

    def request(self, query: str, results: int, key: str) -> httpx.Request:
        headers = {"X-API-KEY": key}
        return httpx.Request("POST", f"{self.base_url}/search", headers=headers, json={"q": query, "num": results})

    def read(self, answer: Any) -> list[Hit]:
        return _read(_results(answer, "organic", beside="searchParameters"), "title", "link", "snippet")


class Brave(Provider):
    """Brave's own index."""

    name, default_url, key_variable = "brave", "https://api.search.brave.com", "BRAVE_API_KEY"
    max_results = 20
    max_query_chars = 400

    def request(self, query: str, results: int, key: str) -> httpx.Request:
        return httpx.Request(
            "GET",
            f"{self.base_url}/res/v1/web/search",
            headers={"X-Subscription-Token": key, "Accept": "application/json"},
            # At most 50 words; no HTML in the texts.
            params={"q": " ".join(query.split()[:50]), "count": results, "text_decorations": "false"},
        )

    def read(self, answer: Any) -> list[Hit]:
        web = answer["web"] if "web" in answer or "query" not in answer else {"results": []}
        return _read(web["results"], "title", "url", "description", "extra_snippets")


class Tavily(Provider):
    """Tavily's search for language models."""

    name, default_url, key_variable = "tavily", "https://api.tavily.com", "TAVILY_API_KEY"
    max_results = 20
    max_query_chars = 400

    def request(self, query: str, results: int, key: str) -> httpx.Request:
        body = {"query": query, "max_results": results}
        return httpx.Request("POST", f"{self.base_url}/search", headers=_bearer(key), json=body)

    def read(self, answer: Any) -> list[Hit]:
        return _read(answer["results"], "title", "url", "content")


class Exa(Provider):
    """Exa's neural search, with the beginning of each page's text."""

    name, default_url, key_variable = "exa", "https://api.exa.ai", "EXA_API_KEY"
    text_chars: ClassVar[int] = 1000

    @classmethod
    def parameters(cls, results: int) -> dict[str, Any]:
        return {**super().parameters(results), "text_chars": cls.text_chars}

    def request(self, query: str, results: int, key: str) -> httpx.Request:
        body = {"query": query, "numResults": results, "contents": {"text": {"maxCharacters": self.text_chars}}}
        return httpx.Request("POST", f"{self.base_url}/search", headers={"x-api-key": key}, json=body)

    def read(self, answer: Any) -> list[Hit]:
        return _read(answer["results"], "title", "url", "text")


@dataclass(frozen=True)
class BrightData(Provider):
    """Bing's results by Bright Data, the paper's source; `zone` is the name of a SERP API zone of the account."""

    zone: str

    name = "brightdata"
    default_url = "https://api.brightdata.com"
    key_variable = "BRIGHTDATA_API_KEY"
    max_results = 50

    def request(self, query: str, results: int, key: str) -> httpx.Request:
        page = "https://www.bing.com/search?" + urlencode({"q": query, "count": results, "brd_json": 1})
        body = {"zone": self.zone, "url": page, "format": "raw"}
        return httpx.Request("POST", f"{self.base_url}/request", headers=_bearer(key), json=body)

    def read(self, answer: Any) -> list[Hit]:
        return _read(_results(answer, "organic", beside="general"), "title", "link", "description")


class SearXNG(Provider):
    """A SearXNG instance of one's own; its settings have to list json among search.formats."""

    name = "searxng"

    def request(self, query: str, results: int, key: str) -> httpx.Request:
        return httpx.Request("GET", f"{self.base_url}/search", params={"q": query, "format": "json"})

    def read(self, answer: Any) -> list[Hit]:
        if not answer["results"] and answer.get("unresponsive_engines"):
            raise Unanswered("found nothing, since its engines do not respond")
        return _read(answer["results"], "title", "url", "content")


PROVIDERS: dict[str, type[Provider]] = {
    provider.name: provider for provider in (Retrieve, Serper, Brave, Tavily, Exa, BrightData, SearXNG)
}


def provider_kind(name: str) -> type[Provider]:
    """The class of the provider called `name`; `ConfigError` when there is none."""
    if name not in PROVIDERS:
        raise ConfigError(f"There is no search provider {name!r}; expected one of {sorted(PROVIDERS)}.")
    return PROVIDERS[name]


def make_provider(name: str, *, url: str | None = None, zone: str | None = None) -> Provider:
    """The provider called `name`; `url` takes the place of its own address, `zone` is Bright Data's.

    Raises `ConfigError` for an unknown name, a missing or malformed address, or a missing zone.
    """
    kind = provider_kind(name)
    base_url = (url or kind.default_url).rstrip("/")
    if not base_url:
        raise ConfigError(f"search_provider {name} has no address of its own. Set search_url to your server's.")
    check_server_url(base_url, "search_url", kind.key_variable)
    if kind is BrightData:
        if not zone:
            raise ConfigError("search_provider brightdata needs search_zone: the name of your SERP API zone.")
        return BrightData(base_url, zone)
    return kind(base_url)


def _bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def _results(answer: Any, field: str, *, beside: str) -> Any:
    """What `field` holds. A service may leave it out where it found nothing, but not what stands `beside` it."""
    return answer[field] if field in answer or beside not in answer else []


def _read(items: Iterable[Any], title: str, url: str, *texts: str) -> list[Hit]:
    hits = [_hit(item, title, url, texts) for item in items]
    return [hit for hit in hits if hit.title or hit.text]


def _hit(item: Any, title: str, url: str, texts: Sequence[str]) -> Hit:
    """A hit from the named fields; null and absent ones are empty, a list of texts is joined."""
    found = (item.get(field) for field in texts)
    parts = [part for value in found if value for part in (value if isinstance(value, list) else [value])]
    return Hit(str(item.get(title) or ""), str(item.get(url) or ""), " … ".join(map(str, parts)))
