"""A thread that runs the methods of an object, for objects that must be used from one thread."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

T = TypeVar("T")

_Work = tuple["Future[Any]", Callable[[], Any]]


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
