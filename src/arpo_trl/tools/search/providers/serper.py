"""serper.dev: Google's results."""

from __future__ import annotations

from typing import Any

import httpx

from arpo_trl.tools.search.providers import register_provider
from arpo_trl.tools.search.providers.base import Hit, Provider, hits_of, results_in


@register_provider("serper")
class Serper(Provider):
    """Google's results from serper.dev."""

    default_url = "https://google.serper.dev"
    key_variable = "SERPER_API_KEY"

    def request(self, query: str, results: int, key: str) -> httpx.Request:
        headers = {"X-API-KEY": key}
        return httpx.Request("POST", f"{self.base_url}/search", headers=headers, json={"q": query, "num": results})

    def read(self, answer: Any) -> list[Hit]:
        found = hits_of(results_in(answer, "organic", beside="searchParameters"), "title", "link", "snippet")
        if found:
            return found
        # Google answers some queries itself, without results.
        boxes = hits_of([answer.get("answerBox")], "title", "link", "answer", "snippet")
        return boxes + hits_of([answer.get("knowledgeGraph")], "title", "descriptionLink", "type", "description")
