"""SearXNG: a metasearch server that you run yourself."""

from __future__ import annotations

from typing import Any

import httpx

from arpo_trl.tools.search.providers import register_provider
from arpo_trl.tools.search.providers.base import Hit, Provider, Unanswered, hits_of


@register_provider("searxng")
class SearXNG(Provider):
    """A SearXNG server. Its settings must list json in search.formats."""

    if_refused = "do its settings list json in search.formats, and does its limiter let you pass?"

    def request(self, query: str, results: int, key: str) -> httpx.Request:
        return httpx.Request("GET", f"{self.base_url}/search", params={"q": query, "format": "json"})

    def read(self, answer: Any) -> list[Hit]:
        found = hits_of(answer["results"], "title", "url", "content")
        if found:
            return found
        answers = [{"answer": said} if isinstance(said, str) else said for said in answer.get("answers") or []]
        found = hits_of(answers, "title", "url", "answer")
        found += hits_of(answer.get("infoboxes") or [], "infobox", "id", "content")
        if not found and answer.get("unresponsive_engines"):
            raise Unanswered("found nothing, because its engines do not respond")
        return found
