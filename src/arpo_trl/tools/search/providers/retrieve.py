"""A retrieval server with Search-R1's protocol."""

from __future__ import annotations

from typing import Any

import httpx

from arpo_trl.tools.search.providers import register_provider
from arpo_trl.tools.search.providers.base import Hit, Provider, hit_of


@register_provider("retrieve")
class Retrieve(Provider):
    """A retrieval server with Search-R1's protocol."""

    default_url = "http://127.0.0.1:8000"

    def request(self, query: str, results: int, key: str) -> httpx.Request:
        url = self.base_url.removesuffix("/retrieve") + "/retrieve"
        return httpx.Request("POST", url, json={"queries": [query], "topk": results, "return_scores": True})

    def read(self, answer: Any) -> list[Hit]:
        hits = []
        for found in answer["result"][0]:
            document = found.get("document", found)
            if "contents" in document:  # "title"\ntext
                title, _, text = str(document["contents"]).partition("\n")
                title, text = (title.strip().strip('"'), text) if text else ("", title)
                hits.append(Hit(title=title, url="", text=text))
            else:
                hits.append(hit_of(document, "title", "url", ("text",)))
        return hits
