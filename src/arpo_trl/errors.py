"""Errors of arpo-trl, one tree.

    ArpoError
    ├── ConfigError     a setting, or two together, cannot work
    ├── DataError       a dataset, file, row or field is not what was asked for
    ├── ToolSpecError   a tool cannot be offered to a model as it is
    ├── SandboxError    model-written code cannot be isolated here
    ├── RewardError     a reward function broke its contract
    ├── CheckpointError a checkpoint cannot be written, or is not all there
    ├── EngineError     an engine broke its contract or lost its server
    ├── HubError        a push to the Hub failed; the run itself is saved
    └── ToolError       raised *by* a tool: its message is shown to the model as the result of the call
        ├── ToolUnavailable     what the tool stands on is away, whatever the call
        └── ToolStopped         a limit or a crash cut the call short

Every message names the subject, what it got, what it expected and the way out. A model's mistake is never raised: it
becomes text the model sees. `ToolError` is what a tool raises on purpose. `Interrupted` is no error, so not in it.
"""

import signal

from arpo_trl.visible import for_people


class ArpoError(Exception):
    """Base of every error that this package raises on purpose."""

    def __str__(self) -> str:
        """The message for people: what it quotes of files, services and models is safe to print and holds no key."""
        return for_people(super().__str__())


class ConfigError(ArpoError, ValueError):
    """A setting, or two settings together, cannot work."""


class DataError(ArpoError, ValueError):
    """A dataset, file, row or field is not what was asked for."""


class ToolSpecError(ArpoError, ValueError):
    """A tool cannot be offered to a model: no types, no docstring, a name that is not a tag, a name taken twice."""


class SandboxError(ArpoError, RuntimeError):
    """Model-written code cannot be isolated on this machine."""


class RewardError(ArpoError, ValueError):
    """A reward function returned something other than one finite float, or None, per completion."""


class CheckpointError(ArpoError, RuntimeError):
    """A checkpoint cannot be written, or is not all there."""


class EngineError(ArpoError, RuntimeError):
    """An engine broke its contract, or the process behind it is gone."""


class HubError(ArpoError, RuntimeError):
    """A push to the Hub failed; what it was to send is saved, and the message says how to push it later."""


class ToolError(ArpoError):
    """Raised by a tool when a call fails for a reason that the model should read; the message is its result."""

    def __str__(self) -> str:
        """The message for the model: as the tool wrote it."""
        return Exception.__str__(self)


class ToolUnavailable(ToolError):
    """What a tool stands on (a service, a budget) is away: no call would do better. Counted as `degraded`."""


class ToolStopped(ToolError):
    """A limit or a crash cut the call short, so that nothing of it can be built on; the message is its result."""


class Interrupted(KeyboardInterrupt):
    """Training was told to stop by the signal `signum`, and did, on all ranks; the message says how to go on."""

    def __init__(self, signum: int, message: str = ""):
        super().__init__(message or f"Interrupted by {signal.Signals(signum).name}.")
        self.signum = signum

    @property
    def exit_status(self) -> int:
        """What a shell expects of a process that this signal ended."""
        return 128 + self.signum
