"""A circuit breaker: a service that keeps failing is left alone for a while."""

from __future__ import annotations

import threading
import time


class CircuitBreaker:
    """Lets a service rest for `rest_s` after `failures` failures in a row; then one call at a time finds out."""

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
            self._until = time.monotonic() + self.rest_s  # for the others, while this call tries
            return True

    def succeeded(self) -> None:
        with self._lock:
            self._in_a_row = 0

    def failed(self) -> bool:
        """Count a failure; whether the service rests from now on."""
        with self._lock:
            self._in_a_row += 1
            self._until = time.monotonic() + self.rest_s
            return self._in_a_row == self.failures
