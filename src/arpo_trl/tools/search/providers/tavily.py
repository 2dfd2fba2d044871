"""Tavily: search for language models."""

from __future__ import annotations

from typing import Any

import httpx

from arpo_trl.tools.search.providers import register_provider
from arpo_trl.tools.search.providers.base import Hit, Provider, bearer, hits_of


@register_provider("tavily")
class Tavily(Provider):
    """Results from Tavily, a search service for language models."""

    default_url = "https://api.tavily.com"
    key_variable = "TAVILY_API_KEY"
    max_results = 20
    max_query_chars = 400

    def request(self, query: str, results: int, key: str) -> httpx.Request:
        body = {"query": query, "max_results": results}
        return httpx.Request("POST", f"{self.base_url}/search", headers=bearer(key), json=body)

    def read(self, answer: Any) -> list[Hit]:
        return hits_of(answer["results"], "title", "url", "content")
