"""Public names that load their module at first use (PEP 562).

So `import arpo_trl` and `arpo-trl --help` import neither torch nor the tools' dependencies.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def lazy_names(package: str, homes: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """The `__getattr__` and `__dir__` of `package`.

    Args:
        homes: Public name → the module that defines it.

    Example:
        __getattr__, __dir__ = lazy_names(__name__, {"ToolBox": "arpo_trl.tools.toolbox"})
    """

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(homes[name]), name)

    return get, lambda: sorted(homes)
