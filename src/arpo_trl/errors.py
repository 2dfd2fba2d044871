"""Errors of arpo-trl, as one class hierarchy.

    ArpoError
    ├── ConfigError     a setting, or a combination of settings, cannot work
    ├── DataError       a dataset, file, row or field is missing or invalid
    ├── ToolSpecError   a tool's definition is not usable
    ├── SandboxError    model-written code cannot be isolated on this machine
    ├── RewardError     a reward function broke its contract
    ├── CheckpointError a checkpoint cannot be written, or is incomplete
    ├── EngineError     an engine broke its contract or lost its server
    ├── HubError        a push to the Hub failed; the run itself is saved
    └── ToolError       raised *by* a tool: the model reads its message as the result of the call
        ├── ToolUnavailable     a service or budget of the tool is unavailable, for every call
        ├── ToolStopped         a limit or a crash ended the call
        └── ToolOverdue         the call missed its deadline

Every message names the subject, the actual value, the expected value and the remedy. A mistake of the model is never
raised: it becomes text that the model reads. Tools raise `ToolError` on purpose. `Interrupted` is not an error, so it
is not in the hierarchy.
"""

from __future__ import annotations

import signal
from typing import Any

from arpo_trl.visible import for_people


class ArpoError(Exception):
    """Base of every error that this package raises on purpose."""

    def __str__(self) -> str:
        """The message for users: its quotes of files, services and models are safe to print and contain no key."""
        return for_people(super().__str__())


class ConfigError(ArpoError, ValueError):
    """A setting, or a combination of settings, cannot work."""


class DataError(ArpoError, ValueError):
    """A dataset, file, row or field is missing or invalid."""


class ToolSpecError(ArpoError, ValueError):
    """A tool's definition is not usable: no types, no docstring, a name that is not a valid tag, a duplicate name."""


class SandboxError(ArpoError, RuntimeError):
    """Model-written code cannot be isolated on this machine."""


class RewardError(ArpoError, ValueError):
    """A reward function returned something other than one finite float, or None, per completion."""


class CheckpointError(ArpoError, RuntimeError):
    """A checkpoint cannot be written, or is incomplete."""


class EngineError(ArpoError, RuntimeError):
    """An engine broke its contract, or its process or server is lost."""


class HubError(ArpoError, RuntimeError):
    """A push to the Hub failed. The files are saved, and the message explains how to push them later."""


class ToolError(ArpoError):
    """Raised by a tool if a call fails for a reason that the model should read. The message is the call's result."""

    def __str__(self) -> str:
        """The message for the model: as the tool wrote it."""
        return Exception.__str__(self)


class ToolUnavailable(ToolError):
    """A service or budget that the tool needs is unavailable, so every call would fail. Counted as `degraded`."""


class ToolStopped(ToolError):
    """A limit or a crash ended the call, so its effects are incomplete. The message is the call's result."""


class ToolOverdue(ToolError):
    """A call missed its deadline, and may still be running. Counted as `timeout`."""

    @classmethod
    def of(cls, name: str, seconds: float) -> ToolOverdue:
        """The error of a call of the tool `name` that had this time."""
        return cls(f"Error: the {name} call took longer than {seconds:g} s.")


class Interrupted(KeyboardInterrupt):
    """The signal `signum` stopped training on all ranks. The message explains how to resume."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message or f"Interrupted by {signal.Signals(signum).name}.")
        self.signum = signum

    def __reduce__(self) -> Any:  # it is sent to other ranks
        return type(self), (self.signum, str(self))

    @property
    def exit_status(self) -> int:
        """The exit status that a shell reports for a process killed by this signal."""
        return 128 + self.signum
