"""Addresses of servers that a user gives: one check for every setting that takes one."""

from __future__ import annotations

from typing import Any

from arpo_trl.errors import ConfigError


def check_server_url(url: Any, subject: str, key_variable: str | None, *, may_have_query: bool = False) -> None:
    """Returns if `url` is the address of a server, in which no key stands that would get into logs.

    Args:
        subject: The setting, for the error.
        key_variable: The environment variable with the server's key; None where it wants none.
        may_have_query: Whether it may end in a query.

    Raises:
        ConfigError: it is not; the message repeats nothing of it.
    """
    if (fault := _fault(url, may_have_query)) is not None:
        without = "user name or password" if may_have_query else "user name, password or query"
        where = f" Its key, if it wants one, belongs in the environment variable {key_variable}."
        raise ConfigError(
            f"{subject} is no address like http://host:port/v1, without {without}. {fault}."
            + (where if key_variable else "")
        )


def _fault(url: Any, may_have_query: bool) -> str | None:
    import httpx  # here, as settings are checked by what has to start fast

    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError, ValueError):
        return "It cannot be read"
    if parsed.userinfo:
        return "It has a user name or password"
    if parsed.scheme not in ("http", "https") or not parsed.host or any(char.isspace() for char in url):
        return "It does not begin with http:// or https:// and a host"
    if parsed.port is not None and not 0 < parsed.port < 1 << 16:
        return f"There is no port {parsed.port}"
    if "#" in url or ("?" in url and not may_have_query):
        return "It has a query or fragment"
    return None
