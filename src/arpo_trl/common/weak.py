"""References to methods that do not keep their objects alive. Pure."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def weakly(method: Callable[P, R]) -> Callable[P, R]:
    """Return a function that calls the bound `method`, for a part of the method's object.

    An object whose parts refer to it is freed only by the garbage collector. With this function `del trainer` frees
    model and optimizer at once, as with TRL's trainer.
    """
    reference = weakref.WeakMethod(method)

    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        bound = reference()
        assert bound is not None, "called after its object was freed"
        return bound(*args, **kwargs)

    return call
