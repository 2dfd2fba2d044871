"""The common code of all search providers: their interface, and helpers that read hits from JSON.

API keys come from environment variables and are passed to each request, so no object here stores a key.
"""

from __future__ import annotations

import html
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import httpx

from arpo_trl.tools.superscripts import is_power

FIELDS = ("title", "url", "text")
_TAG = re.compile(
    r"</?(?:a|b|br|code|div|em|font|i|mark|p|small|span|strong|sub|sup|u|wbr)(?:\s[^<>]*)?/?>", re.IGNORECASE
)
_BREAK = re.compile(r"<(?:br|p|div)\b", re.IGNORECASE)
_RAISED = re.compile(r"<sup\b", re.IGNORECASE)
_NEAR_CHARS = 40  # around a superscript, with tags
_ENTITY = re.compile(
    r"&(?:#\d{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z]\w{1,31});"
)  # with its semicolon: a=1&copy=2 is no ©


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

    @register_provider("wiki")
    class Wiki(Provider):
        default_url = "http://127.0.0.1:9000"

        def request(self, query, results, key):
            return httpx.Request("GET", f"{self.base_url}/find", params={"q": query, "n": results})

        def read(self, answer):
            return [Hit(title=page["name"], url=page["href"], text=page["body"]) for page in answer["pages"]]
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
    if_refused: ClassVar[str] = ""
    """What to check when a service without a key answers 403."""

    @classmethod
    def parameters(cls, results: int) -> dict[str, Any]:
        """Return the values on which an answer depends in addition to the query, as JSON values, for the cache key."""
        return {"results": min(results, cls.max_results)}

    @property
    def source(self) -> str:
        """The name under which the cache file stores the answers: the provider's; without a key also the address,
        because then each server answers from documents of its own."""
        return self.name if self.key_variable else f"{self.name} {self.base_url}"

    @abstractmethod
    def request(self, query: str, results: int, key: str) -> httpx.Request:
        """Return the request for at most `results` results; `key` is empty if the service needs none."""

    @abstractmethod
    def read(self, answer: Any) -> Iterable[Hit]:
        """Return or yield the hits in `answer`, the decoded JSON of a response with status 200.

        Raises:
            ValueError, KeyError, TypeError: `answer` has another layout. An error object is not "no results".
            Unanswered: `answer` reports that the service did not search.
        """


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def results_in(answer: Any, field: str, *, beside: str) -> Any:
    """Return the value of `field`, or no results if it is missing or null in an answer that has the field `beside`.

    Some services omit `field` if they find nothing. Every valid answer from them has `beside`.
    """
    found = answer.get(field) if beside in answer else answer[field]
    return [] if found is None and beside in answer else found


def hits_of(items: Iterable[Any], title: str, url: str, *texts: str) -> list[Hit]:
    """Return a hit for each item that has a title or a text; the other arguments name the fields of an item."""
    hits = [hit_of(item, title, url, texts) for item in items if item is not None]
    return [hit for hit in hits if hit.title or hit.text]


def hit_of(item: Any, title: str, url: str, texts: Sequence[str]) -> Hit:
    """Return the hit in the named fields, without HTML. A missing or null field is empty; lists of texts are joined.

    Services return parts of web pages, in which the matching words may be in bold, and characters escaped.
    """
    found = (item.get(field) for field in texts)
    parts = [part for value in found for part in (value if isinstance(value, list) else [value])]
    text = " … ".join(part for part in map(without_html, parts) if part)
    address = item.get(url)
    return Hit(
        title=without_html(item.get(title)),
        url=address.replace("&amp;", "&") if isinstance(address, str) else "",
        text=text,
    )


def without_html(value: Any) -> str:
    """Return a text or a number as text, without the tags and entities of HTML; any other value is empty."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    return _with_entities(_TAG.sub(_in_text, str(value)))


def _in_text(tag: re.Match[str]) -> str:
    """Return what a tag becomes in plain text."""
    if _BREAK.match(tag[0]):
        return " "
    if not _RAISED.match(tag[0]):
        return ""
    around = (
        tag.string[max(0, tag.start() - _NEAR_CHARS) : tag.start()],
        tag.string[tag.end() : tag.end() + _NEAR_CHARS],
    )
    before, raised = (_with_entities(_TAG.sub("", part)) for part in around)
    return "^" if is_power(before, raised) else ""


def _with_entities(text: str) -> str:
    return _ENTITY.sub(lambda entity: html.unescape(entity[0]), text)


def says_error(answer: Any) -> bool:
    """Whether an answer states an error. Then a list without results does not mean that there are none."""
    if not isinstance(answer, Mapping):
        return False
    if answer.get("success") is False or answer.get("ok") is False:
        return True
    states = [answer.get(field) for field in ("status", "statusCode", "code")]
    fails = any(state in ("error", "failed") or (isinstance(state, int) and state >= 400) for state in states)
    return fails or any(answer.get(field) for field in ("error", "errors", "detail"))
