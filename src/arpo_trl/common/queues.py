"""Reading what a queue holds. Pure."""

from __future__ import annotations

import contextlib
import queue
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


def drained(items: queue.SimpleQueue[T], timeout_s: float = 0.0) -> Iterator[T]:
    """What `items` holds, one after the other; waits at most `timeout_s` for the first.

    Each item is taken when it is asked for, so a reader that stops early leaves the rest in the queue.
    """
    with contextlib.suppress(queue.Empty):
        item = items.get(timeout=timeout_s) if timeout_s > 0 else items.get_nowait()
        while True:
            yield item
            item = items.get_nowait()
