"""SearXNG: a metasearch server that you run yourself."""

from __future__ import annotations

from typing import Any

import httpx

from arpo_trl.tools.search.providers import register_provider
from arpo_trl.tools.search.providers.base import Hit, Provider, Unanswered, hits_of


@register_provider("searxng")
class SearXNG(Provider):
    """A SearXNG server. Its settings must list json in search.formats."""

    def request(self, query: str, results: int, key: str) -> httpx.Request:
        return httpx.Request("GET", f"{self.base_url}/search", params={"q": query, "format": "json"})

    def read(self, answer: Any) -> list[Hit]:
        if not answer["results"] and answer.get("unresponsive_engines"):
            raise Unanswered("found nothing, because its engines do not respond")
        return hits_of(answer["results"], "title", "url", "content")
