"""A call of a tool: what the model asked for, how it failed, and where its result came from. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any


class ToolFailure(StrEnum):
    """Why a call did not return a result."""

    ERROR = "error"
    """The tool raised."""
    DEGRADED = "degraded"
    """The tool raised `ToolUnavailable`: a service that it needs is away, whatever the call."""
    TIMEOUT = "timeout"
    """The call missed its deadline."""
    STOPPED = "stopped"
    """The tool raised `ToolStopped`: a limit of its own, or a crash."""
    NOT_TEXT = "not_text"
    """The tool returned something that has no text."""
    BAD_CALL = "bad_call"
    """The model wrote no valid call: no such tool, wrong arguments, or not readable as a call."""
    CALL_LIMIT = "call_limit"
    """The path had used up its calls, of all tools or of this one."""


class CallSource(StrEnum):
    """Where the result of a call came from."""

    EXECUTED = "executed"
    """The call ran."""
    JOINED = "joined"
    """The call shared the execution of an identical call in flight."""
    CACHED = "cached"
    """The cache held the result of an identical call."""
    REFUSED = "refused"
    """Nothing ran: a bad call, or one beyond a limit."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """What the model asked for."""

    name: str
    arguments: dict[str, Any]
