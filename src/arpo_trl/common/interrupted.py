"""One line instead of a traceback for Ctrl-C."""

from __future__ import annotations

import sys
from types import TracebackType

from arpo_trl.common.waiting import is_first_rank
from arpo_trl.visible import say


def say_interrupted() -> None:
    """Prints to standard error that Ctrl-C has ended the program."""
    if is_first_rank():
        say("Interrupted.", to=sys.stderr)


def hide_interrupt_tracebacks() -> None:
    """From now on Ctrl-C prints one line where `report_errors` does not apply, such as during imports.

    Python then ends the process by SIGINT, for which a shell reports the exit status 130.
    """
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if issubclass(kind, KeyboardInterrupt):
            say_interrupted()
        else:
            before(kind, error, traceback)

    sys.excepthook = hook
