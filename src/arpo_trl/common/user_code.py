"""Calls and inspects code that users wrote, such as tools, states and rewards. It may raise anything. Pure."""

from __future__ import annotations

import asyncio
import inspect
import sysconfig
from collections.abc import Awaitable, Mapping, Sequence
from pathlib import Path
from traceback import FrameSummary
from typing import Any

_NOT_USERS = (Path(__file__).parents[1], Path(sysconfig.get_path("stdlib")))
_INSTALLED = {"site-packages", "dist-packages"}


def parameters_of(function: Any) -> Mapping[str, inspect.Parameter] | None:
    """Return the parameters of a function by name. None if it has no signature, as some functions written in C."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        return None


def text_of(value: object) -> str:
    """Return the text of an exception or another object. Its class may be the user's, and fail to make one."""
    try:
        return str.__str__(str(value))  # a class may also return a subclass of str
    except KeyboardInterrupt:
        raise
    except BaseException:
        return "(its text cannot be made)"


def place_in(frames: Sequence[FrameSummary]) -> FrameSummary:
    """Return the innermost frame of a traceback in the user's code, or the innermost one if all are of libraries."""
    return next((frame for frame in reversed(frames) if _is_users(frame.filename)), frames[-1])


def _is_users(filename: str) -> bool:
    """Whether a file belongs neither to this package, nor to the standard library or an installed package."""
    path = Path(filename)
    is_of_library = any(map(path.is_relative_to, _NOT_USERS)) or not _INSTALLED.isdisjoint(path.parts)
    return not is_of_library and not filename.startswith("<frozen ")


async def outcome_of(value: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """Return the result or the exception of `value`. An uncaught SystemExit would stop the event loop."""
    try:
        return await value, None
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        return None, error
