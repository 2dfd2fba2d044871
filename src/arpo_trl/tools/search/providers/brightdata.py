"""Bright Data: Bing's results."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from urllib.parse import urlencode

import httpx

from arpo_trl.tools.search.providers import register_provider
from arpo_trl.tools.search.providers.base import Hit, Provider, bearer, hits_of, results_in


@register_provider("brightdata")
@dataclass(frozen=True, kw_only=True)
class BrightData(Provider):
    """Bing's results from Bright Data, the search service of the paper."""

    zone: str
    """The name of a SERP API zone of the account."""

    default_url = "https://api.brightdata.com"
    key_variable = "BRIGHTDATA_API_KEY"
    max_results = 50

    def request(self, query: str, results: int, key: str) -> httpx.Request:
        page = "https://www.bing.com/search?" + urlencode({"q": query, "count": results, "brd_json": 1})
        body = {"zone": self.zone, "url": page, "format": "raw"}
        return httpx.Request("POST", f"{self.base_url}/request", headers=bearer(key), json=body)

    def read(self, answer: Any) -> list[Hit]:
        return hits_of(results_in(answer, "organic", beside="general"), "title", "link", "description")
