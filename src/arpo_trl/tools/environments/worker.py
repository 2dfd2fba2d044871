"""What runs the methods of environments: a thread for each object, and one event loop for all async methods.

Some objects must be used from one thread, and async objects may share a client, which works on one event loop only.
"""

from __future__ import annotations

import inspect
import os
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

from arpo_trl.common.per_process import one_per_process
from arpo_trl.common.user_code import outcome_of
from arpo_trl.net.background import LoopThread

T = TypeVar("T")

GRACE_S = 1.0
"""Seconds that an async method may take beyond the deadline of its call, so that the deadline passes first."""
_Work = tuple["Future[Any]", Callable[[], Any]]


class NoResult(Exception):
    """An async method did not end in time. (A TimeoutError may also be an error of the method.)"""


class Worker:
    """A daemon thread that runs functions one after another. It ends when there are no more references to this
    object, and when its running function has returned."""

    def __init__(self) -> None:
        self._work: queue.SimpleQueue[_Work | None] = queue.SimpleQueue()
        # The thread refers only to the queue. With a reference to this object, neither would ever be released.
        threading.Thread(target=_run, args=(self._work,), name="arpo-environment", daemon=True).start()
        weakref.finalize(self, self._work.put, None).atexit = False  # a daemon thread stops with its process

    def run(self, function: Callable[[], T]) -> T:
        """Return the result of `function`, which runs in the thread, or raise its exception."""
        return self.start(function).result()

    def start(self, function: Callable[[], T]) -> Future[T]:
        """Run `function` in the thread, and return its future."""
        future: Future[T] = Future()
        self._work.put((future, function))
        return future


def _run(work: queue.SimpleQueue[_Work | None]) -> None:
    while (item := work.get()) is not None:
        future, function = item
        try:
            future.set_result(function())
        except BaseException as error:  # also SystemExit: the thread also runs the object's later calls
            future.set_exception(error)
        del item, future, function  # the next item may be far away


def result_of(value: Any, timeout_s: float | None) -> Any:
    """Return `value`, or its result if it is awaitable. All awaitables of environments run on one event loop.

    Raises:
        NoResult: There was none in time. The awaitable is cancelled.
    """
    if not inspect.isawaitable(value):
        return value
    future = _loop().start(outcome_of(value))
    try:
        returned, error = future.result(timeout_s)
    except TimeoutError:
        future.cancel()
        raise NoResult from None
    if error is not None:
        raise error
    return returned


@one_per_process
def _loop() -> LoopThread:
    return LoopThread(f"arpo-environments-{os.getpid()}")
