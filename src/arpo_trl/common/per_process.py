"""Objects of which each process has one."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def one_per_process(make: Callable[P, T]) -> Callable[P, T]:
    """A decorator: the function returns the same object at each call with the same arguments.

    A forked process gets objects of its own: it inherits no threads, and would share the pipes and connections of its
    parent. If several threads make the first call at the same time, all get the same object; other objects that were
    made are dropped unused. With functools.lru_cache each thread would get its own object, and one of them would be
    released while it is in use.
    """
    made: dict[tuple[object, ...], T] = {}

    @functools.wraps(make)
    def get(*args: P.args, **kwargs: P.kwargs) -> T:
        key = (os.getpid(), *args, *kwargs.items())
        found = made.get(key)
        return made.setdefault(key, make(*args, **kwargs)) if found is None else found

    return get
