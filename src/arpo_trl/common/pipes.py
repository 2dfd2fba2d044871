"""Output to a pipe or a terminal whose reader may end."""

from __future__ import annotations

import contextlib
import os
import select
from typing import Any


def is_unread(stream: Any) -> bool:
    """Whether the stream is a pipe without a reader, or a closed terminal."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not a file, closed, or a system without poll
        poller = select.poll()
        poller.register(stream.fileno(), 0)
        return any(events & (select.POLLERR | select.POLLHUP) for _, events in poller.poll(0))
    return False


def discard(stream: Any) -> None:
    """Redirects the file of the stream, which may still hold text that Python flushes at its exit."""
    with contextlib.suppress(AttributeError, OSError, ValueError):  # not a file, or closed
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)
