"""Differences between two texts, for messages and logs. Pure."""

from __future__ import annotations

import difflib
from itertools import takewhile

_MAX_LINES = 500


def around_difference(first: str, second: str, width: int = 200) -> tuple[str, str]:
    """Return the parts of two texts around their first difference.

    Each part has at most `width` characters. An ellipsis marks where something was cut off.
    """
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
    start = max(0, same - width // 2) if max(len(first), len(second)) > width else 0
    end = start + width
    a, b = (f"{'…' * (start > 0)}{text[start:end]}{'…' * (len(text) > end)}" for text in (first, second))
    return a, b


def changed_lines(before: str, after: str) -> list[str]:
    """Return the lines that only one of the two texts contains, marked with - and +."""
    old, new = (text.splitlines()[:_MAX_LINES] for text in (before, after))
    lines = list(difflib.unified_diff(old, new, n=0, lineterm=""))[2:]  # the first two name files
    return [f"{line[0]} {line[1:]}" for line in lines if line[0] in "+-"]
