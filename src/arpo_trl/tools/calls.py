"""A tool call: what the model asked for, how it failed, and where its result came from. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class ToolFailure(StrEnum):
    """Why a call did not return a result."""

    ERROR = "error"
    """The tool raised."""
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
    """The path had already made all calls that it may make, in total or to this tool."""


class CallSource(StrEnum):
    """Where the result of a call came from."""

    EXECUTED = "executed"
    """The call ran."""
    JOINED = "joined"
    """The call shared the execution of an identical call that was still running."""
    SHARED = "shared"
    """A path of the same group with the same history of calls made the call, and its result is used."""
    CACHED = "cached"
    """The cache held the result of an identical call."""
    REFUSED = "refused"
    """Nothing ran: the call was invalid or exceeded a limit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that the model wrote.

    Example: `ToolCall(name="search", arguments={"query": "melting point of iron"})`
    """

    name: str
    arguments: dict[str, Any]
