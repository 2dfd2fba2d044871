"""Objects of which each process has one."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Generic, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class OnePerProcess(Generic[P, T]):
    """A decorator: the function returns the same object at each call with the same arguments.

    A forked process gets objects of its own: it inherits no threads, and would share the pipes and connections of its
    parent. Threads that call at the same time for the first time get the same object; another that was made at that
    time is dropped unused. With functools.lru_cache each would get its own, of which one is released while in use.
    """

    def __init__(self, make: Callable[P, T]):
        self._make = make
        self._made: dict[tuple[object, ...], T] = {}

    def __call__(self, *args: P.args, **kwargs: P.kwargs) -> T:
        key = (os.getpid(), *args, *kwargs.items())
        found = self._made.get(key)
        return self._made.setdefault(key, self._make(*args, **kwargs)) if found is None else found
