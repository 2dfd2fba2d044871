"""Classes that a setting selects: by name one per file of a package, and by name or import path those of users.

The names of the package's classes are its file names, so listing them imports nothing. `get` imports the file.
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Generic, TypeVar

from arpo_trl.common.flags import nearest
from arpo_trl.common.imports import is_import_path, load_callable
from arpo_trl.common.settings import check_fields
from arpo_trl.errors import ConfigError

BASE = "base"
"""A package's file for shared code. It defines no named class."""


T = TypeVar("T", bound=type[Any])


class Registry(Generic[T]):
    """The classes of one `kind`.

    Args:
        kind: The kind of the classes, for error messages, such as "branch rule".
        package: The package's `__name__`. The names of its modules except `base` are the names of its classes.
        paths: The package's `__path__`.
        base: The name of the classes' base class, in the package's file `base`.
        setting: The setting that selects a class, also by its import path. Their options are in the setting of that
            name and `_kwargs`. None: no import paths and no options.
        reserved: Names that no class can have.
    """

    def __init__(
        self,
        kind: str,
        package: str,
        paths: Iterable[str],
        base: str,
        setting: str | None = None,
        *,
        reserved: Collection[str] = (),
    ):
        self.kind = kind
        self._setting = setting
        self._reserved = reserved
        self._base = base
        self._package = package
        self.own = [module.name for module in pkgutil.iter_modules(paths) if module.name != BASE]
        """The names of the package's own classes, sorted."""
        self._classes: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """A class decorator that makes the class available under `name`, and sets its attribute `name`.

        A class may be registered again, for example when a notebook cell runs twice.

        Raises:
            ConfigError: `name` is no text or is reserved, or another class has it, or the class does not derive from
                the base class, lacks an abstract method, has other parameters in a method, or has an `__init__` that
                does not take its fields.
        """
        given: Any = name  # the class, if the decorator has no parentheses
        if not isinstance(given, str):
            decorator = f"register_{self.kind.split()[-1]}"
            raise ConfigError(f'@{decorator} has no name; expected one, such as @{decorator}("my_name").')
        if name in self._reserved:
            raise ConfigError(f"The {self.kind} {name!r} is built in and no class. Choose another name.")

        def add(made: T) -> T:
            self._check(made, name)
            home, known = f"{made.__module__}.{made.__qualname__}", self._classes.get(name)
            if known is None and name in self.own and made.__module__ != f"{self._package}.{name}":
                known = self.get(name)
            if known is not None and f"{known.__module__}.{known.__qualname__}" != home:
                # The program itself is __main__. Its import path makes a second module of the same file.
                is_program = known.__module__ == "__main__" and known.__qualname__ == made.__qualname__
                raise ConfigError(
                    f"{home} cannot be registered as the {self.kind} {name!r}: {known.__module__}."
                    f"{known.__qualname__} has that name. Choose another"
                    + (f", or select the class of the started program as {name!r}." if is_program else ".")
                )
            made.name = name
            self._classes[name] = made
            return made

        return add

    def _check(self, made: Any, name: str) -> None:
        base = self._base_class()
        home = f"{getattr(made, '__module__', '')}.{getattr(made, '__qualname__', made)}"
        subject = f"{home} cannot be registered as the {self.kind} {name!r}"
        if not (isinstance(made, type) and issubclass(made, base)):
            raise ConfigError(f"{subject}: expected a class that derives from {self._base}.")
        if missing := sorted(getattr(made, "__abstractmethods__", ())):
            raise ConfigError(f"{subject}: it does not define {missing}, which a {self._base} needs. Define them.")
        if is_dataclass(base):
            values = {field.name: None for field in fields(made) if field.init}
            try:
                inspect.signature(made).bind(**values)
            except TypeError as error:
                raise ConfigError(
                    f"{subject}: its own __init__ does not take the fields {[*values]} ({error}). Expected a frozen "
                    "dataclass: write its other parameters as fields under @dataclass(frozen=True, kw_only=True), "
                    "and remove __init__."
                ) from error
        for declaring in reversed(made.__mro__):
            ours = vars(declaring) if declaring.__module__.startswith(f"{self._package}.") else {}
            for method, function in ours.items():
                is_private = method.startswith("_") and not getattr(function, "__isabstractmethod__", False)
                if is_private or not inspect.isfunction(function):
                    continue
                has_no_self = isinstance(inspect.getattr_static(made, method), staticmethod | classmethod)
                parameters = list(inspect.signature(function).parameters)[has_no_self:]
                try:
                    inspect.signature(getattr(made, method)).bind(*parameters)
                except TypeError as error:
                    raise ConfigError(
                        f"{subject}: its {method} cannot be called with {parameters} ({error}). Correct its "
                        "parameters."
                    ) from error

    def _base_class(self) -> type[Any]:
        found: type[Any] = getattr(importlib.import_module(f"{self._package}.{BASE}"), self._base)
        return found

    @property
    def names(self) -> list[str]:
        """All names, sorted."""
        return sorted({*self.own, *self._classes})

    def get(self, name: str) -> T:
        """The class of that name, or at that import path, such as "my_module:MyClass".

        Raises:
            ConfigError: There is no such class, or it lacks what `register` requires.
        """
        if self._setting is not None and name not in self.names and is_import_path(name):
            # Not stored: the module may define the class anew, such as a notebook's cell that is edited and run again.
            made: T = load_callable(name, self._setting)
            self._check(made, name)
            made.name = name
            return made
        if name not in self.names:
            paths = "" if self._setting is None else ", or an import path such as my_module:MyClass"
            raise ConfigError(f"There is no {self.kind} {name!r}; expected one of {self.names}{paths}.")
        if name not in self._classes:
            importlib.import_module(f"{self._package}.{name}")
        return self._classes[name]

    def build(self, name: str, options: Mapping[str, Any], shared: Mapping[str, Any] | None = None) -> Any:
        """Create an object of the class that `get` returns. The fields of a dataclass are its options. Other classes
        have none.

        Args:
            options: Values for fields.
            shared: Values that several classes share. The class gets the values for which it has fields.

        Raises:
            ConfigError: The class does not exist, is no dataclass as its kind needs it, has no field for an option,
                has a required field without a value, or does not accept a value.
        """
        made, shared, setting = self.get(name), shared or {}, f"{self._setting}_kwargs"
        self._check_dataclass(made, name)
        known = {field.name: field for field in fields(made) if field.init} if is_dataclass(made) else {}
        own = [field for field in known if field not in shared]
        if unknown := [option for option in options if option not in own]:
            raise ConfigError(
                f"{setting} has {unknown}, but the {self.kind} {name!r} has {own or 'no options'}. "
                f"{_way_out(unknown, own, shared, is_dataclass(made) or name in self.own)}"
            )
        values = {field: value for field, value in shared.items() if field in known} | dict(options)
        needed = [
            field.name for field in known.values() if field.default is MISSING and field.default_factory is MISSING
        ]
        if missing := [field for field in needed if field not in values]:
            raise ConfigError(f"The {self.kind} {name!r} needs values for {missing}. Set them in {setting}.")
        try:
            built = made(**values)
            if known:
                check_fields(built)
        except ConfigError as error:
            raise ConfigError(f"{setting}: {error}" if options else str(error)) from error
        return built

    def _check_dataclass(self, made: type[Any], name: str) -> None:
        """Check that the annotated attributes of a rule are fields, and that those of a credit can be set."""
        if not is_dataclass(self._base_class()):
            # No public function of dataclasses tells whether a class is frozen.
            if is_dataclass(made) and made.__dataclass_params__.frozen:  # type: ignore[attr-defined]
                raise ConfigError(
                    f"The {self.kind} {name!r} is a frozen dataclass, but attributes of a {self._base} are set before "
                    "each call. Remove frozen=True."
                )
            return
        annotated = {of for of, kind in inspect.get_annotations(made).items() if "ClassVar" not in str(kind)}
        if ignored := sorted(annotated - {field.name for field in fields(made)}):
            raise ConfigError(
                f"The {self.kind} {name!r} has the attributes {ignored}, which are no options, since their class is "
                "no dataclass. Decorate it with @dataclass(frozen=True, kw_only=True)."
            )


def _way_out(unknown: Iterable[str], own: Iterable[str], shared: Iterable[str], has_fields: bool) -> str:
    """Advice on options that a class does not have. `has_fields`: whether it cannot have others."""
    if not has_fields:
        return "Decorate the class with @dataclass: its fields are its options."
    hints = []
    for option in unknown:
        if option in shared:
            hints.append(f"{option} is a separate setting: set it there if the class reads it.")
        elif near := nearest(str(option), list(own)):
            hints.append(f"Did you mean {near!r} instead of {option!r}?")
    return " ".join(hints) or "Remove or rename the others."
