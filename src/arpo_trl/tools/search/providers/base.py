"""The common code of all search providers: their interface, and helpers that read hits from JSON.

API keys come from environment variables and are passed to each request, so no object here stores a key.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import httpx

FIELDS = ("title", "url", "text")


class Unanswered(Exception):
    """The service reported success but could not search. The message does not quote the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """One search result; an unknown part is empty.

    Example: `Hit(title="Iron", url="https://example.org/iron", text="Iron melts at 1538 °C.")`
    """

    title: str
    url: str
    text: str

    def shown(self, fields: Sequence[str] = FIELDS) -> str:
        """Return `title (url): text`, limited to the parts that are in `fields` and not empty."""
        title = self.title if "title" in fields else ""
        url = self.url if "url" in fields else ""
        head = f"{title} ({url})" if title and url else title or url
        text = self.text if "text" in fields else ""
        return f"{head}: {text}" if head and text else head or text


@dataclass(frozen=True, kw_only=True)
class Provider(ABC):
    """A search service at `base_url`, or a gateway with the same protocol.

    `arpo_trl.tools.search.providers` has an example.
    """

    base_url: str

    name: ClassVar[str]
    """The value of `search_provider` that selects this service; `register_provider` sets it."""
    default_url: ClassVar[str] = ""
    key_variable: ClassVar[str | None] = None
    """The environment variable that contains the API key; None: the service needs no key."""
    max_results: ClassVar[int] = 100
    max_query_chars: ClassVar[int] = 2000
    """Longer queries are cut to this length, because the service rejects them."""

    @classmethod
    def parameters(cls, results: int) -> dict[str, Any]:
        """Return the values on which an answer depends in addition to the query, as JSON values, for the cache key."""
        return {"results": min(results, cls.max_results)}

    @abstractmethod
    def request(self, query: str, results: int, key: str) -> httpx.Request:
        """Return the request for at most `results` results; `key` is empty if the service needs none."""

    @abstractmethod
    def read(self, answer: Any) -> list[Hit]:
        """Return the hits in `answer`, the decoded JSON of a response with status 200.

        Raises:
            ValueError, KeyError, TypeError: `answer` has another layout. An error object is not "no results".
            Unanswered: `answer` reports that the service did not search.
        """


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def results_in(answer: Any, field: str, *, beside: str) -> Any:
    """Return the value of `field`, or no results if `answer` has only the field `beside`.

    Some services omit `field` if they find nothing. Every valid answer from them has `beside`.
    """
    return answer[field] if field in answer or beside not in answer else []


def hits_of(items: Iterable[Any], title: str, url: str, *texts: str) -> list[Hit]:
    """Return a hit for each item that has a title or a text; the other arguments name the fields of an item."""
    hits = [hit_of(item, title, url, texts) for item in items]
    return [hit for hit in hits if hit.title or hit.text]


def hit_of(item: Any, title: str, url: str, texts: Sequence[str]) -> Hit:
    """Return the hit in the named fields. A missing or null field is empty; lists of texts are joined."""
    found = (item.get(field) for field in texts)
    parts = [part for value in found if value for part in (value if isinstance(value, list) else [value])]
    return Hit(title=str(item.get(title) or ""), url=str(item.get(url) or ""), text=" … ".join(map(str, parts)))
