"""Event loops in threads: that on which this process's tools do their network work, and those of a `ToolBox`."""

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
        """The future of `coroutine`, which begins to run; cancelling it cancels the coroutine."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self) -> None:
        """Cancel what runs and end the thread; one that a tool blocks is left behind."""
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
    """`LoopThread.start` on this process's own loop, which starts at first use and is never stopped."""
    return _network_of(os.getpid()).start(coroutine)


@lru_cache
def _network_of(pid: int) -> LoopThread:
    """The loop of process `pid`: a fork inherits the loop but not the thread that runs it."""
    return LoopThread(f"arpo-tools-network-{pid}")
