"""Measures the time of the parts of a step, in seconds by name: `with spans("reward"):`."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Spans:
    """Seconds spent in named spans. The time of an inner span does not count for the outer one.

    A span that ends with an exception is not counted.

        with spans("update"):           # 5 s in all
            with spans("generate"):     # 3 s of them
                ...
        spans.take("update")            # 2.0

    Args:
        clock: Returns seconds since any fixed time.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self._clock = clock
        self._seconds: dict[str, float] = defaultdict(float)
        self._inner: list[float] = []
        """For each open span, outermost first, the seconds of the spans inside it that have ended."""

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = self._clock()
        self._inner.append(0.0)
        try:
            yield
        finally:
            inner, whole = self._inner.pop(), self._clock() - start
            if self._inner:
                self._inner[-1] += whole
        self._seconds[name] += whole - inner

    def add(self, name: str, seconds: float) -> None:
        """Count seconds that were measured elsewhere."""
        self._seconds[name] += seconds

    def take(self, name: str) -> float:
        """The seconds spent in spans of that name since the last call; 0 if there were none."""
        return self._seconds.pop(name, 0.0)
