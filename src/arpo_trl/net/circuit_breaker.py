"""A circuit breaker: stops calls to a failing service for a while."""

from __future__ import annotations

import threading
import time


class CircuitBreaker:
    """Blocks calls for `rest_s` seconds after `failures` failures in a row, then lets single calls through as trials.

    A successful trial ends the blocking. A failed one blocks calls for another `rest_s` seconds.
    """

    def __init__(self, failures: int = 5, rest_s: float = 60.0) -> None:
        self.failures = failures
        self.rest_s = rest_s
        self._lock = threading.Lock()
        self._in_a_row = 0
        self._until = 0.0

    def lets_pass(self) -> bool:
        with self._lock:
            if self._in_a_row < self.failures:
                return True
            if time.monotonic() < self._until:
                return False
            self._until = time.monotonic() + self.rest_s  # block the other calls during this trial
            return True

    def succeeded(self) -> None:
        with self._lock:
            self._in_a_row = 0

    def failed(self) -> bool:
        """Count a failure. Return whether this one starts the blocking."""
        with self._lock:
            self._in_a_row += 1
            self._until = time.monotonic() + self.rest_s
            return self._in_a_row == self.failures
