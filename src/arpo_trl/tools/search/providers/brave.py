"""Brave Search: results from the index of Brave."""

from __future__ import annotations

from typing import Any

import httpx

from arpo_trl.tools.search.providers import register_provider
from arpo_trl.tools.search.providers.base import Hit, Provider, hits_of, results_in


@register_provider("brave")
class Brave(Provider):
    """Results from Brave's index."""

    default_url = "https://api.search.brave.com"
    key_variable = "BRAVE_API_KEY"
    max_results = 20
    max_query_chars = 400

    def request(self, query: str, results: int, key: str) -> httpx.Request:
        return httpx.Request(
            "GET",
            f"{self.base_url}/res/v1/web/search",
            headers={"X-Subscription-Token": key, "Accept": "application/json"},
            # The service accepts 50 words. Without decorations the texts contain no HTML.
            params={"q": " ".join(query.split()[:50]), "count": results, "text_decorations": "false"},
        )

    def read(self, answer: Any) -> list[Hit]:
        web = results_in(answer, "web", beside="query") or {"results": []}
        return hits_of(web["results"] or [], "title", "url", "description", "extra_snippets")
