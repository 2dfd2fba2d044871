"""A retrieval server with Search-R1's protocol."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from arpo_trl.tools.search.providers import register_provider
from arpo_trl.tools.search.providers.base import Hit, Provider

_TEXTS = ("text", "content", "passage")
"""The names that servers with this protocol give the field with a document's text."""


@register_provider("retrieve")
class Retrieve(Provider):
    """A retrieval server with Search-R1's protocol."""

    default_url = "http://127.0.0.1:8000"

    @property
    def source(self) -> str:
        return super().source.removesuffix("/retrieve")

    def request(self, query: str, results: int, key: str) -> httpx.Request:
        url = self.base_url.removesuffix("/retrieve") + "/retrieve"
        return httpx.Request("POST", url, json={"queries": [query], "topk": results, "return_scores": True})

    def read(self, answer: Any) -> list[Hit]:
        found = answer["result"]
        if isinstance(found, str):
            raise TypeError("the result is a text, not a list")
        if not (found and isinstance(found[0], Mapping | str)):  # else a server for one query, which returns its list
            found = found[0]
        return [_hit(document) for document in found]


def _hit(found: Any) -> Hit:
    document = found if isinstance(found, str) else found.get("document") or found
    if isinstance(document, str):
        document = {"contents": document}
    title, url = (value if isinstance(value, str) else "" for value in (document.get("title"), document.get("url")))
    if isinstance(contents := document.get("contents"), str):  # "title"\ntext
        first, _, rest = contents.partition("\n")
        return Hit(title=first.strip().strip('"') if rest else "", url=url, text=rest or first)
    texts = [document[field] for field in _TEXTS if isinstance(document.get(field), str)]
    return Hit(title=title, url=url, text=texts[0])
