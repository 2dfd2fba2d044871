"""Search services over HTTP: the request and the answer format of each one. One service is one file.

Register a service from outside the package under a name with `register_provider`, and set `search_provider` to that
name. `Provider` has an example. `WebSearch` sends the requests. It adds the cache, the limits and the retries.
"""

from __future__ import annotations

from dataclasses import fields

from arpo_trl.common.registry import Registry
from arpo_trl.errors import ConfigError
from arpo_trl.net.addresses import check_server_url
from arpo_trl.tools.search.providers.base import FIELDS, Hit, Provider, Unanswered

__all__ = [
    "FIELDS",
    "LOCAL_SOURCES",
    "PROVIDERS",
    "Hit",
    "Provider",
    "Unanswered",
    "make_provider",
    "register_provider",
]

LOCAL_SOURCES = {"local": "search_index", "recorded": "search_recorded"}
"""The values of `search_provider` that are no services, each with the setting that it needs."""

PROVIDERS: Registry[type[Provider]] = Registry(
    "search provider", __name__, __path__, "Provider", reserved=LOCAL_SOURCES
)
register_provider = PROVIDERS.register


def make_provider(
    name: str, *, url: str | None = None, zone: str | None = None, setting: str = "search_url"
) -> Provider:
    """Return the provider called `name`.

    Args:
        url: The address of the service; None: the provider's `default_url`.
        zone: The value of the field `zone`, for a provider that has one, such as Bright Data.
        setting: The setting or flag of `url`, for errors.

    Raises:
        ConfigError: There is no such provider, its address is missing or malformed, or its zone is missing.
    """
    kind = PROVIDERS.get(name)
    base_url = (url or kind.default_url).rstrip("/")
    if not base_url:
        raise ConfigError(
            f"search_provider {name} has no default address. Set {setting} to the address of your server."
        )
    check_server_url(base_url, setting, kind.key_variable)
    settings = {"base_url": base_url}
    if "zone" in {field.name for field in fields(kind)}:
        if not zone:
            raise ConfigError(f"search_provider {name} needs search_zone: the name of your SERP API zone.")
        settings["zone"] = zone
    return kind(**settings)
