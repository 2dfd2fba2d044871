"""A tool call: the model's request, the kind of failure, and the source of the result. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class ToolFailure(StrEnum):
    """Why a call did not return a result."""

    ERROR = "error"
    """The tool raised an exception."""
    DEGRADED = "degraded"
    """The tool raised `ToolUnavailable`: a service that it needs is down. Any other call would fail too."""
    TIMEOUT = "timeout"
    """The call missed its deadline."""
    STOPPED = "stopped"
    """The tool raised `ToolStopped`: the call hit a limit of the tool, or crashed."""
    NOT_TEXT = "not_text"
    """The tool returned a value that cannot be written as text."""
    BAD_CALL = "bad_call"
    """The call is invalid: unknown tool, wrong arguments, or text that does not parse as a call."""
    CALL_LIMIT = "call_limit"
    """The path had already made the maximum number of calls, in total or to this tool."""


class CallSource(StrEnum):
    """The source of a call's result."""

    EXECUTED = "executed"
    """The call ran."""
    JOINED = "joined"
    """The call shared the execution of an identical call that was still running."""
    SHARED = "shared"
    """The result comes from a path of the same group with the same history of calls."""
    CACHED = "cached"
    """The cache contained the result of an identical call."""
    REFUSED = "refused"
    """Nothing ran: the call was invalid or exceeded a limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the model wrote.

    Example: `ToolCall(name="search", arguments={"query": "melting point of iron"})`
    """

    name: str
    arguments: dict[str, Any]
