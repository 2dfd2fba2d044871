"""Checks the server addresses in settings."""

from __future__ import annotations

import os
from typing import Any

from arpo_trl.errors import ConfigError
from arpo_trl.visible import visible


def check_server_url(url: Any, subject: str, key_variable: str | None, *, may_have_query: bool = False) -> None:
    """Check that `url` is the address of a server and contains no secret that could get into logs.

    Args:
        subject: The name of the setting, for the error message.
        key_variable: The environment variable with the server's key; None if the server needs no key.
        may_have_query: Whether the address may end in a query.

    Raises:
        ConfigError: The check fails. The message does not quote `url`.
    """
    if (fault := _fault(url, may_have_query)) is not None:
        without = "user name or password" if may_have_query else "user name, password or query"
        where = f" Put the key of the server, if it needs one, in the environment variable {key_variable}."
        raise ConfigError(
            f"{subject} must be an address like http://host:port/v1, without {without}. {fault}."
            + (where if key_variable else "")
        )


def server_key(variable: str) -> str:
    """Return the key in an environment variable; "" without one.

    Raises:
        ConfigError: It has characters that a key cannot have. The message does not quote it.
    """
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ConfigError(f"{variable} contains characters that are not allowed in a key. Set it to the key alone.")
    return key


def authorization(key: str) -> dict[str, str]:
    """Return the header of requests to a server with this key; none for ""."""
    return {"Authorization": f"Bearer {key}"} if key else {}


def _fault(url: Any, may_have_query: bool) -> str | None:
    import httpx  # slow to import, and commands that check settings must start fast

    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError, ValueError):
        return "It is not a valid URL"
    if visible(url) != url:
        return "It has an invisible character"
    if parsed.userinfo:
        return "It has a user name or password"
    if parsed.scheme not in ("http", "https") or not parsed.host or any(char.isspace() for char in url):
        return "It does not begin with http:// or https:// and a host"
    if parsed.port is not None and not 0 < parsed.port < 1 << 16:
        return f"Port {parsed.port} does not exist"
    if "#" in url or ("?" in url and not may_have_query):
        return "It has a query or fragment"
    return None
