"""Wraps reward functions: selects their arguments, checks their results, makes them interruptible; sums rewards."""

from __future__ import annotations

import asyncio
import inspect
import json
import math
import os
import traceback
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import Any, SupportsFloat

import torch

from arpo_trl.common.per_process import one_per_process
from arpo_trl.common.user_code import outcome_of, parameters_of, place_in, text_of
from arpo_trl.errors import ArpoError, Interrupted, RewardError
from arpo_trl.net.background import LoopThread
from arpo_trl.rewards.hierarchical import HierarchicalReward
from arpo_trl.rollout.credit.base import LARGEST
from arpo_trl.runs.interrupts import Interrupts
from arpo_trl.trl_seam import get_callable_name, is_async_callable

REWARD_POLL_S = 0.2
"""Seconds between checks for an interrupt while an async reward function runs."""


def checked_reward(function: Any, interrupts: Interrupts, *, removes_columns: bool = False) -> Any:
    """Wraps a reward function for TRL. Returns reward models, and names of reward models, unchanged.

    - TRL passes all columns, and ARPO adds more. To a function without `**kwargs` the wrapper passes only the
      arguments that it names.
    - If an environment could not be created (None in `environments`), a function that names `environments` gives its
      completion no reward. The wrapper passes only the other completions.
    - The wrapper checks the rewards. TRL would silently treat NaN as "not applicable".
    - On an interrupt the wrapper returns zeros, so that this rank still reaches the point where all ranks stop. So it
      does if the function fails after a signal: Ctrl-C also ends a program that the function runs.

    The wrapper's `origin` is the file and the name of the function, and its `reward_settings` are those of a
    `HierarchicalReward`, else None: a run resumes only with the same. Errors name the function by the wrapper's
    `__name__`, which `named_apart` may change.

    Args:
        removes_columns: Whether TRL removes all columns but the prompt (`remove_unused_columns`), for the error.

    Raises:
        RewardError: Raised by the wrapper if a required argument is missing, if the function raises an error that is
            not an `ArpoError`, or if it does not return one finite number, or None, per completion.
    """
    if not callable(function) or isinstance(function, torch.nn.Module):
        return function
    name = get_callable_name(function)
    select = _selection(function, removes_columns)
    reads_environments = "environments" in (parameters_of(function) or ())

    if is_async_callable(function):

        async def checked_async(*, completions: Sequence[Any], **columns: Any) -> Any:
            given, rows = _with_environment({"completions": completions, **columns}, reads_environments)
            if not rows:
                return [None] * len(completions)
            logging = _checked_logs(given, wrapper.__name__, rows, len(completions))
            with _told(wrapper.__name__):
                made = function(**select({**given, **logging}, wrapper.__name__))
            # Not on TRL's loop, which a SystemExit in a task of the function would end.
            running = _loop().start(outcome_of(made))
            try:
                while not (await asyncio.wait([asyncio.wrap_future(running)], timeout=REWARD_POLL_S))[0]:
                    interrupts.check()
                with interrupts.over_errors():
                    with _told(wrapper.__name__):
                        rewards, error = running.result()
                        if error is not None:
                            raise error
                    return _spread(_checked(rewards, wrapper.__name__, len(rows)), rows, len(completions))
            except Interrupted:
                running.cancel()
                return [0.0] * len(completions)

        wrapper: Any = checked_async
    else:

        def checked(*, completions: Sequence[Any], **columns: Any) -> Any:
            given, rows = _with_environment({"completions": completions, **columns}, reads_environments)
            if not rows:
                return [None] * len(completions)
            logging = _checked_logs(given, wrapper.__name__, rows, len(completions))
            try:
                with interrupts.over_errors():
                    with _told(wrapper.__name__), interrupts.raising():
                        rewards = function(**select({**given, **logging}, wrapper.__name__))
                        if inspect.isawaitable(rewards):  # a sync decorator around an async function
                            rewards = _awaited(rewards)
                    return _spread(_checked(rewards, wrapper.__name__, len(rows)), rows, len(completions))
            except Interrupted:
                return [0.0] * len(completions)

        wrapper = checked
    wrapper.__name__ = name
    wrapper.origin = _origin(function, name)
    wrapper.reward_settings = function.settings if isinstance(function, HierarchicalReward) else None
    return wrapper


@one_per_process
def _loop() -> LoopThread:
    """The event loop of async reward functions."""
    return LoopThread(f"arpo-rewards-{os.getpid()}")


def _awaited(made: Awaitable[Any]) -> Any:
    """Returns the result of `made`, or raises its exception. An interrupt cancels it."""
    running = _loop().start(outcome_of(made))
    try:
        rewards, error = running.result()
    finally:
        running.cancel()
    if error is not None:
        raise error
    return rewards


@contextmanager
def kept_torch_modes() -> Iterator[None]:
    """A context after which torch has the same default dtype and the same gradient mode, whatever tools and reward
    functions set."""
    dtype, gradients = torch.get_default_dtype(), torch.is_grad_enabled()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_grad_enabled(gradients)


def named_apart(functions: Sequence[Any], names: Sequence[str]) -> list[str]:
    """The names of the reward functions, each once: a name that occurred before gets `_2`, `_3`, …

    TRL would log functions of the same name under one metric. Wrapped functions get their name for errors.
    """
    distinct: list[str] = []
    for name in names:
        if name in distinct:
            name = next(free for n in count(2) if (free := f"{name}_{n}") not in {*names, *distinct})
        distinct.append(name)
    for function, name in zip(functions, distinct, strict=True):
        if not isinstance(function, torch.nn.Module):
            function.__name__ = name
    return distinct


def total_rewards(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(B,) sums of (B, F) rewards, weighted by (F,). NaN rewards are skipped; a sum is NaN if all its rewards are."""
    total = (rewards * weights.to(rewards.device)).nansum(dim=1)
    return total.masked_fill(rewards.isnan().all(dim=1), math.nan)


def _selection(function: Any, removes_columns: bool) -> Callable[[Mapping[str, Any], str], Mapping[str, Any]]:
    """Returns a function that selects the arguments of `function` from all available arguments. It also takes the
    function's name for errors."""
    parameters = parameters_of(function)
    if parameters is None:
        return lambda given, name: given
    kinds = {parameter.kind for parameter in parameters.values()}
    named = [name for name, parameter in parameters.items() if parameter.kind not in (_VAR_KEYWORD, _VAR_POSITIONAL)]
    required = [name for name in named if parameters[name].default is _EMPTY]

    def select(given: Mapping[str, Any], name: str) -> Mapping[str, Any]:
        if missing := [needed for needed in required if needed not in given]:
            why, remedy = "the dataset has no such column", "Rename the argument or add the column"
            if removes_columns:
                why = "remove_unused_columns is true, which removes all columns but the prompt"
                remedy = "Set it to false"
            if "environments" in missing:
                why, remedy = "there is no environment_factory", "Pass one, or rename the argument"
            raise RewardError(
                f"The reward function {name!r} requires {missing}, but {why}. Available: {', '.join(sorted(given))}. "
                f"{remedy}."
            )
        return given if _VAR_KEYWORD in kinds else {key: given[key] for key in named if key in given}

    return select


@contextmanager
def _told(name: str) -> Iterator[None]:
    """A context in which an error of the user's function becomes a RewardError with the place of the error."""
    try:
        yield
    except (ArpoError, KeyboardInterrupt):
        raise
    except BaseException as error:  # also SystemExit: a library may call sys.exit
        place = place_in(traceback.extract_tb(error.__traceback__))
        raise RewardError(
            f"The reward function {name!r} raised {type(error).__name__}: {text_of(error)} ({place.filename}, line "
            f"{place.lineno}). Correct the function; for a completion that it cannot score it may return None."
        ) from error


def _origin(function: Any, name: str) -> str:
    """The file and the name of a function. The file is the same if the function's module runs as a program."""
    code = getattr(function, "__code__", None) or getattr(type(function).__call__, "__code__", None)
    file = "" if code is None else Path(code.co_filename).name
    return f"{file}:{name}" if file.endswith(".py") else name  # a cell of a notebook has another name each time


def _with_environment(columns: Mapping[str, Any], reads_environments: bool) -> tuple[Mapping[str, Any], list[int]]:
    """Returns the columns of the rows that the function rewards, and the indices of these rows.

    The lists are copies: a function that changes its arguments must not change those of the next one.
    """
    columns = {name: _copied(column) for name, column in columns.items()}
    count = len(columns["completions"])
    environments = columns.get("environments")
    if not reads_environments or environments is None or all(each is not None for each in environments):
        return columns, list(range(count))
    rows = [i for i, each in enumerate(environments) if each is not None]
    return {
        name: [column[i] for i in rows] if isinstance(column, list) and len(column) == count else column
        for name, column in columns.items()
    }, rows


def _copied(value: Any) -> Any:
    """A copy of nested lists and dicts. Other objects, such as environments, stay the same."""
    if type(value) is dict:
        return {key: _copied(item) for key, item in value.items()}
    if type(value) is not list:
        return value
    return [_copied(item) for item in value] if any(type(item) in (list, dict) for item in value) else list(value)


def _spread(rewards: Any, rows: Sequence[int], count: int) -> Any:
    """Returns `count` rewards: the given ones for `rows`, and None for the others."""
    of_rows = dict(zip(rows, rewards, strict=True))
    return [of_rows.get(i) for i in range(count)] if len(rows) < count else rewards


_VAR_KEYWORD, _VAR_POSITIONAL = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
_EMPTY = inspect.Parameter.empty


def _checked_logs(given: Mapping[str, Any], name: str, rows: Sequence[int], count: int) -> dict[str, Any]:
    """TRL's `log_metric` and `log_extra`, with checks that name the reward function `name`.

    Checkpoints and tables of completions contain the columns of `log_extra`, so their values become plain data.
    """

    def log_metric(metric: str, value: Any) -> None:
        if (number := _number(value)) is None:
            raise RewardError(
                f"The reward function {name!r} logged {repr(value)[:80]} as the metric {metric!r}; expected a number."
            )
        given["log_metric"](metric, number)

    def log_extra(column: str, values: Any) -> None:
        listed = (
            list(values) if isinstance(values, Iterable) and not isinstance(values, str | bytes | Mapping) else None
        )
        if listed is None or len(listed) != len(rows):
            got = repr(values)[:80] if listed is None else f"{len(listed)} values"
            raise RewardError(
                f"The reward function {name!r} passed {got} to log_extra for the column {column!r} and {len(rows)} "
                "completions; expected a list with one value per completion."
            )
        given["log_extra"](column, _spread(_plain_column(listed), rows, count))

    own = {"log_metric": log_metric, "log_extra": log_extra}
    return {key: function for key, function in own.items() if key in given}


def _plain_column(values: Sequence[Any]) -> list[Any]:
    """The values as plain data of one type and None; as texts if they are something else."""
    plain = [value.item() if getattr(value, "ndim", None) == 0 else value for value in values]
    known = [value for value in plain if value is not None]
    for kind in ((bool,), (int, float), (str,), (list,), (dict,)):
        if all(type(value) in kind for value in known):
            with suppress(TypeError, ValueError, RecursionError):  # not JSON
                json.dumps(known)
                return plain
    return [value if value is None else text_of(value) for value in plain]


def _checked(rewards: Any, name: str, count: int) -> Any:
    # A set has an order of its own.
    is_one = isinstance(rewards, str | bytes | Mapping | Set) or getattr(rewards, "ndim", None) == 0
    listed = list(rewards) if isinstance(rewards, Iterable) and not is_one else None
    if listed is None or len(listed) != count:
        got = repr(rewards)[:80] if listed is None else f"{len(listed)} rewards"
        raise RewardError(
            f"The reward function {name!r} returned {got} for {count} completions; expected a list with one number, "
            "or None, per completion."
        )
    numbers = [None if reward is None else _number(reward) for reward in listed]
    for i, (reward, number) in enumerate(zip(listed, numbers, strict=True)):
        if reward is not None and (number is None or not abs(number) <= LARGEST):
            raise RewardError(
                f"The reward function {name!r} returned {repr(reward)[:80]} for completion {i}; expected a finite "
                f"number of at most {LARGEST:.2g}, or None if it does not apply."
            )
    return numbers


def _number(reward: Any) -> float | None:
    """The reward as a number, also one in an array or a tensor; None if it is none."""
    if not isinstance(reward, SupportsFloat):
        return None
    try:
        return float(reward.item() if hasattr(reward, "item") else reward)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        return None
