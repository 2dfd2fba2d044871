"""Exa: neural search."""

from __future__ import annotations

from typing import Any, ClassVar

import httpx

from arpo_trl.tools.search.providers import register_provider
from arpo_trl.tools.search.providers.base import Hit, Provider, hits_of


@register_provider("exa")
class Exa(Provider):
    """Results from Exa, with the beginning of each page's text."""

    default_url = "https://api.exa.ai"
    key_variable = "EXA_API_KEY"
    text_chars: ClassVar[int] = 1000

    @classmethod
    def parameters(cls, results: int) -> dict[str, Any]:
        return {**super().parameters(results), "text_chars": cls.text_chars}

    def request(self, query: str, results: int, key: str) -> httpx.Request:
        body = {"query": query, "numResults": results, "contents": {"text": {"maxCharacters": self.text_chars}}}
        return httpx.Request("POST", f"{self.base_url}/search", headers={"x-api-key": key}, json=body)

    def read(self, answer: Any) -> list[Hit]:
        return hits_of(answer["results"], "title", "url", "text")
