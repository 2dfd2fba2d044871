"""A replacement for the semaphores of `multiprocessing`, built from thread locks, and for its shared memory.

The operating system's semaphores and shared memory are files in /dev/shm, which the sandbox hides. Code in the sandbox
cannot start processes, so a lock only has to synchronize threads, and memory is shared through files of the current
folder: `multiprocessing.pool.ThreadPool`, `multiprocessing.Lock`, `multiprocessing.Value` and
`multiprocessing.shared_memory` work with this replacement. `worker` loads this file by its path. The file imports only
the standard library.
"""

from __future__ import annotations

import os
import threading

RECURSIVE_MUTEX = 0  # the other kind, 1, is a semaphore


class SemLock:
    """Like `_multiprocessing.SemLock`."""

    SEM_VALUE_MAX = 2**31 - 1

    def __init__(self, kind: int, value: int, maxvalue: int, name: str, unlink: bool):
        self.kind, self.maxvalue = kind, maxvalue
        self.name = None  # there is no file, so there is nothing to remove
        self.handle = 0
        self._value = value
        self._changed = threading.Condition(threading.Lock())
        self._owner: int | None = None
        self._held = 0

    def acquire(self, block: bool = True, timeout: float | None = None) -> bool:
        with self._changed:
            if not (self.kind == RECURSIVE_MUTEX and self._is_mine()):
                if not self._changed.wait_for(lambda: self._value > 0, timeout if block else 0):
                    return False
                self._value -= 1
                self._owner = threading.get_ident()
            self._held += 1
            return True

    def release(self) -> None:
        with self._changed:
            if self.kind == RECURSIVE_MUTEX and not self._is_mine():
                raise AssertionError("attempt to release recursive lock not owned by thread")
            if self.kind != RECURSIVE_MUTEX and self._value >= self.maxvalue:
                raise ValueError("semaphore or lock released too many times")
            self._held -= 1
            if self.kind == RECURSIVE_MUTEX and self._held:
                return
            self._value += 1
            self._changed.notify()

    def __enter__(self) -> bool:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()

    def _count(self) -> int:
        return self._held

    def _is_mine(self) -> bool:
        return self._held > 0 and self._owner == threading.get_ident()

    def _get_value(self) -> int:
        return self._value

    def _is_zero(self) -> bool:
        return self._value == 0

    def _after_fork(self) -> None:
        """Does nothing, since there is no fork."""


def install() -> None:
    """Makes `multiprocessing` use this class, and store shared memory in files of the current folder."""
    import _multiprocessing
    import _posixshmem

    _multiprocessing.SemLock = SemLock
    _posixshmem.shm_open = _open_shared
    _posixshmem.shm_unlink = _unlink_shared
    import multiprocessing.heap
    import multiprocessing.resource_tracker as tracker

    tracker.register = tracker.unregister = _nothing  # type: ignore[assignment]  # these start a process
    multiprocessing.heap.Arena._dir_candidates = []  # type: ignore[attr-defined]


def _open_shared(path: str, flags: int, mode: int = 0o600) -> int:
    return os.open(_hidden(path), flags, mode)


def _unlink_shared(path: str) -> None:
    os.unlink(_hidden(path))


def _hidden(path: str) -> str:
    return f".{path.strip('/')}"


def _nothing(*_: object) -> None:
    pass
