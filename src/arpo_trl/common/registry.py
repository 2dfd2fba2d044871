"""Classes that a setting selects by name: one per file of a package, and those that users register.

The names of the package's classes are its file names, so listing them imports nothing. `get` imports the file.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

from arpo_trl.errors import ConfigError

BASE = "base"
"""The file of a package for code that the others share. It defines no class with a name."""


T = TypeVar("T", bound=type[Any])


class Registry(Generic[T]):
    """The classes of one `kind`.

    Args:
        kind: What the classes are, for error messages, such as "branch rule".
        package: The package's `__name__`. The names of its modules except `base` are the names of its classes.
        paths: The package's `__path__`.
    """

    def __init__(self, kind: str, package: str, paths: Iterable[str]):
        self.kind = kind
        self._package = package
        self.own = [module.name for module in pkgutil.iter_modules(paths) if module.name != BASE]
        """The names of the package's own classes, sorted."""
        self._classes: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A class decorator that makes the class available under `name`, and sets its attribute `name`.

        A class may be registered again, for example when a notebook cell runs twice.

        Raises:
            ConfigError: Another class has that name.
        """

        def add(made: T) -> T:
            home, known = f"{made.__module__}.{made.__qualname__}", self._classes.get(name)
            if known is None and name in self.own and made.__module__ != f"{self._package}.{name}":
                known = self.get(name)
            if known is not None and f"{known.__module__}.{known.__qualname__}" != home:
                raise ConfigError(
                    f"{home} cannot be registered as the {self.kind} {name!r}: {known.__module__}."
                    f"{known.__qualname__} has that name. Choose another."
                )
            made.name = name
            self._classes[name] = made
            return made

        return add

    @property
    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({*self.own, *self._classes})

    def get(self, name: str) -> T:
        """The class of that name.

        Raises:
            ConfigError: There is none.
        """
        if name not in self.names:
            raise ConfigError(f"There is no {self.kind} {name!r}; expected one of {self.names}.")
        if name not in self._classes:
            importlib.import_module(f"{self._package}.{name}")
        return self._classes[name]
