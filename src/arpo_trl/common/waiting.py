"""Messages and progress bars for waits of more than a few seconds. Only rank 0 shows messages and bars."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import TypeVar

from tqdm import tqdm

from arpo_trl.visible import say

T = TypeVar("T")

BAR_AFTER_S = 5.0
"""The seconds after which `bar` appears."""

SILENCE_S = 300.0
"""The seconds after which `Silence` warns first. A long turn on a CPU, or on a busy server, may take minutes."""


class Silence:
    """Says when a wait without any event is worth a warning: after `SILENCE_S`, then each time that it has doubled."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._told_s = 0.0

    def broken(self) -> None:
        """An event has arrived."""
        self.seconds = self._told_s = 0.0

    def goes_on(self, seconds: float) -> bool:
        """Add the seconds of another wait without an event. Return whether to warn now."""
        self.seconds += seconds
        if self.seconds < max(SILENCE_S, 2 * self._told_s):
            return False
        self._told_s = self.seconds
        return True


def say_loading(program: str) -> None:
    """Prints to standard error that `program` imports PyTorch and TRL."""
    if is_first_rank():
        say(f"{program}: loading PyTorch and TRL …", to=sys.stderr)


def bar(items: Iterable[T], what: str, unit: str) -> Iterable[T]:
    """Returns `items` with a progress bar that appears after `BAR_AFTER_S` and is removed at the end."""
    return tqdm(items, desc=what, unit=f" {unit}", delay=BAR_AFTER_S, leave=False, disable=not is_first_rank())


def is_first_rank() -> bool:
    """Whether this process is rank 0, or no rank."""
    return os.environ.get("RANK", "0") == "0"
