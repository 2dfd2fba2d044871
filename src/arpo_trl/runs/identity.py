"""Lists the differences between two run identities, for error messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any


def differences_between(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """Yields "name.of.key is … there and … here" for each value that differs, sorted by key."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            yield from differences_between(there.get(key), here.get(key), f"{name}.{key}" if name else key)
    elif there != here:
        yield f"{name} is {_short(there)} there and {_short(here)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"
