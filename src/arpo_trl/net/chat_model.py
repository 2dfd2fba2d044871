"""A chat model behind an OpenAI-compatible server, asked one thing at a time: judges answers, sums up pages."""

from __future__ import annotations

import os
from dataclasses import dataclass

import httpx

from arpo_trl.net.addresses import check_server_url
from arpo_trl.net.http_client import RequestFailed, fetch_json, without


@dataclass(frozen=True)
class ChatModel:
    """The model `model` at `url`, which ends in /v1 as a rule.

    Its key, where it wants one, is read from the environment variable `key_variable` for each request, so that no
    object holds it.

    Raises:
        ConfigError: `url` is not the address of a server.
    """

    url: str
    model: str
    key_variable: str
    setting: str
    """The name of the setting that `url` comes from."""
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        check_server_url(self.url, self.setting, self.key_variable)

    def ask(self, prompt: str, timeout_s: float) -> str:
        """What the model says, at temperature 0; raises `RequestFailed` when it says nothing in time."""
        key = os.environ.get(self.key_variable, "").strip()
        request = httpx.Request(
            "POST",
            self.url.rstrip("/") + "/chat/completions",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            json={
                "model": self.model,
                "messages": [{"role": "user", "content": prompt}],
                "temperature": 0,
                "max_tokens": self.max_tokens,
            },
        )
        answer = fetch_json(request, timeout_s=timeout_s)
        try:
            content = answer["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            raise RequestFailed("answered in another layout than expected", status=200) from None
        if not isinstance(content, str) or not content.strip():
            raise RequestFailed("answered with nothing", status=200)
        return without(key, content.strip())
