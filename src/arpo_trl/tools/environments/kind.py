"""What the class of an environment offers: its tools, how it forks, and which optional methods it has."""

from __future__ import annotations

import asyncio
import functools
import inspect
import threading
import typing
from collections.abc import Awaitable, Callable, Collection
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from arpo_trl.errors import ConfigError, ToolSpecError

NOT_TOOLS = ("reset", "get_reward", "fork", "close", "digest", "describe")
"""Public methods with a meaning of their own. The model does not see them."""


class Forking(StrEnum):
    """How a branch gets the state that its prefix had. The first that the class offers is used."""

    FORK = "fork"
    """The class has a method `fork`, which returns an independent copy."""
    COPY = "copy"
    """The class declares `copyable = True`: `copy.deepcopy` makes an independent copy."""
    REPLAY = "replay"
    """A new instance is reset with the same row, and the path's calls run again."""
    NONE = "none"
    """The class declares `replayable = False` and offers nothing else."""


@dataclass(frozen=True, kw_only=True)
class EnvironmentKind:
    """A class of environments, as `environment_kind` found it."""

    factory: Callable[[], Any]
    type: type
    methods: dict[str, Callable[..., Any]]
    """For each tool a function with the name, the signature without `self`, and the docstring of the method."""
    forking: Forking
    replayable: bool

    @property
    def name(self) -> str:
        return self.type.__name__

    def offers(self, method: str) -> bool:
        return callable(getattr(self.type, method, None))

    def check_row(self, columns: Collection[str]) -> None:
        """Return if `reset` accepts the columns of a row as keyword arguments, as TRL passes them.

        Raises:
            ConfigError: It does not.
        """
        try:
            inspect.signature(self.type.reset).bind(None, **dict.fromkeys(columns))  # type: ignore[attr-defined]
        except TypeError as error:
            raise ConfigError(
                f"reset() of the environment {self.name} does not accept the columns of a row, {sorted(columns)}: "
                f"{error}. Define it as `def reset(self, **row)`, or name the columns that it needs before `**row`."
            ) from error


def environment_kind(factory: Callable[[], Any], timeout_s: float) -> EnvironmentKind:
    """Return what the environments that `factory` makes offer. This makes two of them and closes them.

    Args:
        timeout_s: Longest time of each call of the factory.

    Raises:
        ConfigError: The factory raises, hangs, or returns the same object twice.
        ToolSpecError: The class has no `reset`, or no method that can be a tool.
    """
    if not callable(factory):
        raise ConfigError(
            f"environment_factory is a {type(factory).__name__}; expected a class, or a function that returns a new "
            "environment at each call."
        )
    first, second = (_made(factory, timeout_s) for _ in range(2))
    for instance in {id(first): first, id(second): second}.values():
        if callable(close := getattr(instance, "close", None)):
            _in_time(close, timeout_s, f"close() of {type(instance).__name__}")
    if first is second:
        raise ConfigError(
            f"environment_factory returned the same {type(first).__name__} twice, and paths would share its state. "
            "Return a new object at each call: pass the class itself, or a function that creates one."
        )
    return _kind_of(factory, first)


def _kind_of(factory: Callable[[], Any], instance: Any) -> EnvironmentKind:
    kind = type(instance)
    functions = dict(inspect.getmembers(kind, predicate=inspect.isfunction))  # as TRL finds the methods
    if "reset" not in functions:
        raise ToolSpecError(
            f"The environment {kind.__name__} has no method reset. Define `def reset(self, **row)`, which puts it "
            "into the state in which a path starts, and returns a text for the prompt or None."
        )
    methods = {
        name: as_function(getattr(instance, name))
        for name in functions
        if name not in NOT_TOOLS and not name.startswith("_")
    }
    for flag in ("copyable", "replayable"):
        if not isinstance(getattr(kind, flag, False), bool):
            raise ToolSpecError(
                f"The environment {kind.__name__} has {flag} = {getattr(kind, flag)!r}; expected True or False."
            )
    replayable = getattr(kind, "replayable", True)
    if callable(getattr(kind, "fork", None)):
        forking = Forking.FORK
    elif getattr(kind, "copyable", False):
        forking = Forking.COPY
    else:
        forking = Forking.REPLAY if replayable else Forking.NONE
    return EnvironmentKind(factory=factory, type=kind, methods=methods, forking=forking, replayable=replayable)


def as_function(method: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function with the name, signature, types and docstring of a bound method, without its object."""

    @functools.wraps(method)
    def function(**arguments: Any) -> Any:
        raise AssertionError("the state of the path binds the method of its own instance")

    del function.__wrapped__  # it holds the object
    function.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    try:
        function.__annotations__ = typing.get_type_hints(method)  # resolved where the method was defined
    except Exception:  # types that cannot be resolved: the tool's specification says what is wrong
        function.__annotations__ = dict(getattr(method, "__annotations__", {}))
    return function


def _made(factory: Callable[[], Any], timeout_s: float) -> Any:
    return _in_time(factory, timeout_s, "environment_factory")


def _in_time(call: Callable[[], Any], timeout_s: float, name: str) -> Any:
    """Return the value of `call`, which runs in a thread.

    Raises:
        ConfigError: It raised, or did not return in time.
    """
    outcome: list[tuple[Any, BaseException | None]] = []

    def run() -> None:
        try:
            value = call()
            outcome.append((asyncio.run(_awaited(value)) if inspect.isawaitable(value) else value, None))
        except BaseException as error:
            outcome.append((None, error))

    thread = threading.Thread(target=run, name="arpo-environment", daemon=True)
    thread.start()
    thread.join(timeout_s)
    if not outcome:
        raise ConfigError(
            f"{name} did not return within {timeout_s:g} s. Check what it waits for, or raise tool_timeout_s."
        )
    value, error = outcome[0]
    if error is not None:
        raise ConfigError(f"{name} raised {type(error).__name__}: {error}. Correct it before training.") from error
    return value


async def _awaited(value: Awaitable[Any]) -> Any:
    return await value
