"""Calls and inspects code that users wrote, such as tools, states and rewards. It may raise anything. Pure."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Awaitable, Mapping
from typing import Any


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


async def outcome_of(value: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """Return the result or the exception of `value`. An uncaught SystemExit would stop the event loop."""
    try:
        return await value, None
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        return None, error
