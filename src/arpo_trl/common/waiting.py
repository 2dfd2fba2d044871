"""Messages and progress bars for waits of more than a few seconds. Only rank 0 shows them."""

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
