"""Event loops in threads: one for the network work of this process's tools, and those of each `ToolBox`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

from arpo_trl.common.per_process import one_per_process

T = TypeVar("T")

_STOP_TIMEOUT_S = 1.0
_THREADS = 32


class LoopThread:
    """An event loop in a daemon thread. It ends with `stop`, or when there are no more references to this object.

    A coroutine cannot end it: not with `loop.stop()`, and not with `sys.exit()`.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.new_event_loop()
        end: asyncio.Future[None] = self._loop.create_future()
        # The thread refers only to the loop. With a reference to this object, neither would ever be released.
        self._thread = threading.Thread(target=_run, args=(self._loop, end), name=name, daemon=True)
        self._thread.start()
        self._end = weakref.finalize(self, self._loop.call_soon_threadsafe, end.set_result, None)
        self._end.atexit = False  # a daemon thread stops with its process

    def start(self, coroutine: Coroutine[Any, Any, T]) -> Future[T]:
        """Start `coroutine` and return its future. Cancelling the future cancels the coroutine."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def stop(self) -> None:
        """Cancel all running coroutines and stop the thread. If a tool blocks the loop, the thread keeps running."""
        self._end()
        self._thread.join(_STOP_TIMEOUT_S)


def _run(loop: asyncio.AbstractEventLoop, end: asyncio.Future[None]) -> None:
    """Run `loop` until `end` is done. Then cancel its remaining coroutines, and close it."""
    _run_until(end)
    tasks = asyncio.all_tasks(loop)
    for task in tasks:
        task.cancel()
    if tasks:
        _run_until(loop.create_task(asyncio.wait(tasks, timeout=_STOP_TIMEOUT_S / 2)))
    loop.close()


def _run_until(end: asyncio.Future[Any]) -> None:
    """Run the loop of `end` until `end` is done.

    A coroutine that calls `loop.stop()` interrupts the loop. So does a task that raises SystemExit or
    KeyboardInterrupt: asyncio tells those who await the task, then raises the exception out of the loop. The loop
    continues with its next callback.
    """
    loop = end.get_loop()
    end.add_done_callback(lambda _: loop.stop())
    while not end.done():
        with contextlib.suppress(SystemExit, KeyboardInterrupt):
            loop.run_forever()


def start(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """Run `LoopThread.start` on the shared loop of this process, which starts at the first use and never stops."""
    return _network().start(coroutine)


def in_thread(work: Callable[..., T], *arguments: Any, timeout_s: float) -> T:
    """Return the result of `work`, which blocks and cannot be interrupted, such as a name resolution.

    It runs in one of a few threads, which are not those in which the shared loop resolves names. If it misses the
    deadline, it keeps its thread until it returns.

    Raises:
        TimeoutError: There was no result in time, or no free thread.
    """

    async def result() -> T:
        async with asyncio.timeout(timeout_s):
            return await asyncio.get_running_loop().run_in_executor(_threads(), work, *arguments)

    return start(result()).result()


@one_per_process
def _threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_THREADS, thread_name_prefix="arpo-tools-blocking")


@one_per_process
def _network() -> LoopThread:
    return LoopThread(f"arpo-tools-network-{os.getpid()}")
