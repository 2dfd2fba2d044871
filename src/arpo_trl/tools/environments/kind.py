"""The properties of an environment's class: its tools, the way to fork it, and its optional methods."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Collection, Hashable, Mapping
from concurrent.futures import wait
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from arpo_trl.common.columns import shown_columns
from arpo_trl.common.user_code import text_of
from arpo_trl.errors import ConfigError, DataError, ToolSpecError
from arpo_trl.tools.environments.worker import GRACE_S, Worker, result_of
from arpo_trl.tools.spec import hints_of, tool_spec

if TYPE_CHECKING:
    from datasets import Dataset

COLUMN = "environment"
"""The column in which a row selects one of several classes, as in TRL."""
NOT_TOOLS = ("reset", "get_reward", "fork", "close", "digest", "describe")
"""Public methods with a special meaning. The model does not see them."""


class Forking(StrEnum):
    """The way a branch gets the state of its prefix. The first one that the class supports is used."""

    FORK = "fork"
    """The class has a method `fork`, which returns an independent copy."""
    COPY = "copy"
    """The class declares `copyable = True`: `copy.deepcopy` makes an independent copy."""
    REPLAY = "replay"
    """A new instance is reset with the same row, and the path's calls run again."""
    NONE = "none"
    """The class declares `replayable = False` and supports nothing else."""


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

    @property
    def copies(self) -> bool:
        """Whether an instance can be forked or copied, without a replay."""
        return self.forking in (Forking.FORK, Forking.COPY)

    def made(self, value: Any) -> bool:
        """Whether an object is an environment of exactly this class."""
        return type(value) is self.type

    def offers(self, method: str) -> bool:
        return callable(getattr(self.type, method, None))

    def check_row(self, columns: Collection[str]) -> None:
        """Check that `reset` accepts the columns of a row as keyword arguments, as TRL passes them.

        Raises:
            ConfigError: `reset` does not accept them.
        """
        try:
            inspect.signature(self.type.reset).bind(None, **dict.fromkeys(columns))  # type: ignore[attr-defined]
        except TypeError as error:
            raise ConfigError(
                f"reset() of the environment {self.name} does not accept the columns of a row, {sorted(columns)}: "
                f"{error}. Define it as `def reset(self, **row)`, or name the columns that it needs before `**row`."
            ) from error


class Kinds:
    """The environment classes of a run: one for all rows, or several, one of which each row names, as in TRL.

    Args:
        kinds: One class, or several by their names in the column `environment`.
    """

    def __init__(self, kinds: EnvironmentKind | Mapping[Any, EnvironmentKind]):
        self.several = not isinstance(kinds, EnvironmentKind)
        self.by_name: dict[Any, EnvironmentKind] = {None: kinds} if isinstance(kinds, EnvironmentKind) else {**kinds}

    def name_of(self, row: Mapping[str, Any]) -> Any:
        """Return the name of the row's class; None if there is one class for all rows.

        Raises:
            DataError: There are several classes, and the row names none of them.
        """
        if not self.several:
            return None
        name = row.get(COLUMN)
        if not isinstance(name, Hashable) or name not in self.by_name:
            raise DataError(
                f"A row has {COLUMN} = {name!r}, which is not among the environments of environment_factory, "
                f"{list(self.by_name)}. Give each row one of these names in the column {COLUMN!r}."
            )
        return name

    def of(self, row: Mapping[str, Any]) -> EnvironmentKind:
        """Return the row's class. Raises what `name_of` raises."""
        return self.by_name[self.name_of(row)]

    def given(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Return the columns that `reset` receives: all except the one that selects the class."""
        return {name: value for name, value in row.items() if not (self.several and name == COLUMN)}

    def check_rows(self, dataset: Dataset) -> None:
        """Check that each row names its class, and that each class accepts the columns.

        Raises:
            DataError: A row names no class.
            ConfigError: `reset` of a class does not accept the columns.
        """
        if self.several:
            if COLUMN not in dataset.column_names:
                raise DataError(
                    f"environment_factory is a dict of {list(self.by_name)}, but the dataset has only the columns "
                    f"{shown_columns(dataset)}. Add a column {COLUMN!r} with one of these names in each row."
                )
            for name in dataset[COLUMN]:
                self.name_of({COLUMN: name})
        for kind in self.by_name.values():
            kind.check_row(self.given(dict.fromkeys(dataset.column_names)))


def environment_kind(factory: Callable[[], Any], timeout_s: float) -> EnvironmentKind:
    """Return the properties of the environments that `factory` creates. This creates two of them and closes them.

    Args:
        timeout_s: Longest time of each call of the factory.

    Raises:
        ConfigError: The factory raises, hangs, or returns None or the same object twice.
        ToolSpecError: The class has no `reset`, or a public method that cannot be a tool.
    """
    if not callable(factory):
        raise ConfigError(
            f"environment_factory is a {type(factory).__name__}; expected a class, or a function that returns a new "
            "environment at each call."
        )
    workers = [Worker() for _ in range(3)]  # each object has a thread, as in a run
    first, second = (_in_time(worker, factory, timeout_s, "environment_factory") for worker in workers[:2])
    made = [first, second, *_copied(workers[0], first, timeout_s)]
    for worker, instance in {id(each): (worker, each) for worker, each in zip(workers, made, strict=False)}.values():
        if callable(close := getattr(instance, "close", None)):
            _in_time(worker, close, timeout_s, f"close() of {type(instance).__name__}")
    if first is None:
        raise ConfigError(
            "environment_factory returned None; expected an environment. Add the missing `return`, or pass the class "
            "itself."
        )
    if first is second:
        raise ConfigError(
            f"environment_factory returned the same {type(first).__name__} twice, so paths would share its state. "
            "Return a new object at each call: pass the class itself, or a function that creates one."
        )
    return _kind_of(factory, first)


def _kind_of(factory: Callable[[], Any], instance: Any) -> EnvironmentKind:
    kind = type(instance)
    functions = dict(inspect.getmembers(kind, predicate=inspect.isfunction))  # as TRL finds the methods
    if "reset" not in functions:
        raise ToolSpecError(
            f"The environment {kind.__name__} has no method reset. Define `def reset(self, **row)`, which sets the "
            f"start state of a path, and returns a text for the prompt or None."
        )
    methods = {}
    for name in functions:
        if name in NOT_TOOLS or name.startswith("_"):
            continue
        if not callable(method := getattr(instance, name)):
            raise ToolSpecError(
                f"The environment {kind.__name__} has a method {name} and an attribute {name}, a "
                f"{type(method).__name__}, that hides it. Rename one of them, or let its name start with _."
            )
        methods[name] = as_function(method)
        try:
            tool_spec(methods[name])
        except ToolSpecError as error:
            why = str(error).removeprefix(f"tool {name!r}: ")
            raise ToolSpecError(
                f"The environment {kind.__name__} has the public method {name}, which is therefore a tool: {why} If "
                f"the model must not call it, rename it to _{name}."
            ) from error
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

    del function.__wrapped__  # it refers to the object
    function.__doc__ = inspect.getdoc(method)  # also that of the method that it overrides
    function.__signature__ = inspect.signature(method)  # type: ignore[attr-defined]
    try:
        function.__annotations__ = hints_of(method)  # resolved where the method was defined
    except Exception:  # types that cannot be resolved: the tool's specification reports the error
        function.__annotations__ = dict(getattr(method, "__annotations__", {}))
    return function


def _copied(worker: Worker, instance: Any, timeout_s: float) -> list[Any]:
    """Return a list with a deepcopy of an instance whose class declares `copyable = True`; empty for other classes.

    Raises:
        ConfigError: The instance contains an object that cannot be copied.
    """
    if getattr(type(instance), "copyable", False) is not True:
        return []
    try:
        return [_in_time(worker, lambda: copy.deepcopy(instance), timeout_s, "deepcopy")]
    except ConfigError as error:
        if isinstance(error.__cause__, TypeError):  # copy raises it for locks, generators, sockets and similar objects
            raise ConfigError(
                f"The environment {type(instance).__name__} declares copyable = True, but copy.deepcopy of it raised "
                f"TypeError: {error.__cause__}. Define fork() or __deepcopy__(), or remove copyable: its branches are "
                "replayed then."
            ) from error
        return []  # it may need a reset first


def _in_time(worker: Worker, call: Callable[[], Any], timeout_s: float, name: str) -> Any:
    """Return the value of `call`. The worker runs it.

    Raises:
        ConfigError: The call raised, or did not return in time.
    """

    future = worker.start(lambda: result_of(call(), timeout_s + GRACE_S))
    if not wait([future], timeout_s).done:
        raise ConfigError(
            f"{name} did not return within {timeout_s:g} s. Find the cause of the wait, or raise tool_timeout_s."
        )
    if (error := future.exception()) is not None:
        raised = f"{type(error).__name__}: {text_of(error)}"
        raise ConfigError(f"{name} raised {raised}. Correct it before training.") from error
    return future.result()
