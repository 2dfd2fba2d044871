"""Event loops in threads: one for the network work of this process's tools, and those of each `ToolBox`."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from functools import lru_cache
from typing import Any, TypeVar

T = TypeVar("T")

_STOP_TIMEOUT_S = 1.0


class LoopThread:
    """An event loop in a daemon thread."""

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `coroutine` and return its future. Cancelling the future cancels the coroutine."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self) -> None:
        """Cancel all running coroutines and end the thread. If a tool blocks the loop, the thread is left running."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(_STOP_TIMEOUT_S)

    def _run(self) -> None:
        self._loop.run_forever()
        tasks = asyncio.all_tasks(self._loop)
        for task in tasks:
            task.cancel()
        if tasks:
            self._loop.run_until_complete(asyncio.wait(tasks, timeout=_STOP_TIMEOUT_S / 2))
        self._loop.close()


def start(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Run `LoopThread.start` on the shared loop of this process, which starts at the first use and never stops."""
    return _network_of(os.getpid()).start(coroutine)


@lru_cache
def _network_of(pid: int) -> LoopThread:
    """Return the loop of process `pid`. It is per process, because a fork inherits the loop but not its thread."""
    return LoopThread(f"arpo-tools-network-{pid}")
