"""Decides which superscripts of HTML are powers, which plain text writes with ^: 10^24, not 1024. Has few imports,
because the worker that reads a page imports it."""

from __future__ import annotations

import re

LOOK_BACK = 4
"""The characters before a superscript that `is_power` looks at."""

_SIGN = r"[+\-\u2212\u2013]"
_SIGNED = re.compile(rf"\s*{_SIGN}\s?[^\W_]")
_UNSIGNED = re.compile(r"\s*(?:\d|[knxy](?![^\W\d_]))")  # of letters only these, because of ordinals: 1st, 2e, n.º
_BASE = re.compile(r"[^\W_]$|[)\]}]$")
# A number after a longer word is that of a footnote.
_BASE_OR_UNIT = re.compile(r"[\d)\]}]$|(?<![^\W\d_])[^\W\d_]{1,3}$")


def is_power(before: str, raised: str) -> bool:
    """Return whether the superscript `raised` is a power of the end of `before`: of a number, a bracket, or a word of
    at most three letters (a unit, a variable); with a sign, of any word."""
    before = before[-LOOK_BACK:]
    if _SIGNED.match(raised):
        return _BASE.search(before) is not None
    return _UNSIGNED.match(raised) is not None and _BASE_OR_UNIT.search(before) is not None
