"""A client of a chat model on an OpenAI-compatible server. It judges answers and summarises pages."""

from __future__ import annotations

from dataclasses import dataclass

import httpx

from arpo_trl.errors import ConfigError
from arpo_trl.net.addresses import authorization, check_server_url, server_key
from arpo_trl.net.http_client import RequestFailed, check_client, fetch_json, without
from arpo_trl.visible import encodable


@dataclass(frozen=True, kw_only=True)
class Reply:
    """The text of a reply, and whether it ended at `max_tokens`."""

    text: str
    is_cut: bool


@dataclass(frozen=True, kw_only=True)
class ChatModel:
    """The model `model` on the server at `url`.

    Each request reads the API key from the environment variable `key_variable`, which may be unset. So no object
    stores the key.

    Example: `ChatModel(url="http://127.0.0.1:8000/v1", model="m", key_variable="KEY", setting="visit_summary_url")`

    Raises:
        ConfigError: `url` is not the address of a server, the key has characters that a key cannot have, or requests
            cannot use a proxy or the certificates that the environment names.
    """

    url: str
    """Usually ends in /v1."""
    model: str
    key_variable: str
    setting: str
    """The name of the setting that contains `url`."""
    max_tokens: int = 1024

    def __post_init__(self) -> None:
        check_server_url(self.url, self.setting, self.key_variable)
        server_key(self.key_variable)
        check_client()

    def ask(self, prompt: str, timeout_s: float) -> Reply:
        """Return the model's reply to `prompt`, sampled at temperature 0.

        Raises:
            RequestFailed: There is no reply, or an empty one, within `timeout_s`.
        """
        try:
            key = server_key(self.key_variable)
        except ConfigError as error:  # the variable has changed
            raise RequestFailed(str(error)) from None
        request = httpx.Request(
            "POST",
            self.url.rstrip("/") + "/chat/completions",
            headers=authorization(key),
            json={
                "model": self.model,
                "messages": [{"role": "user", "content": encodable(prompt)}],
                "temperature": 0,
                "max_tokens": self.max_tokens,
            },
        )
        answer = fetch_json(request, timeout_s=timeout_s)
        try:
            choice = answer["choices"][0]
            content, is_cut = choice["message"]["content"], choice.get("finish_reason") == "length"
        except (KeyError, IndexError, TypeError):
            raise RequestFailed("answered in another layout than expected", status=200) from None
        if not isinstance(content, str) or not content.strip():
            cut = f" in its {self.max_tokens} tokens, which it may have used for thinking" if is_cut else ""
            raise RequestFailed(f"answered with no text{cut}", status=200)
        return Reply(text=without(key, content.strip()), is_cut=is_cut)
