"""Text of unknown origin for people: what steers a terminal or hides from a reader is a symbol, a key is left out.

What models, tools, pages and services write may hold escape sequences that retitle a window, fill the clipboard or
rewrite what stands above, marks that reverse the order of reading, and characters that nobody sees. Whatever prints
such text, or puts it into a message, a log or a report, passes it through `visible` first. Messages pass through
`for_people`, which also takes out of addresses what may be a secret.
"""

from __future__ import annotations

import logging
import re
import unicodedata
from collections.abc import Mapping
from typing import Any

_LAYOUT = "\n\t"
_HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Controls, format characters (bidirectional controls, joiners, tags), lone surrogates, two separators of lines."""
_BLANKS = frozenset((0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x3164, 0xFFA0))
"""Letters and marks without ink."""
_BLANK_RANGES = (range(0x180B, 0x1810), range(0xFE00, 0xFE0E), range(0xFFF0, 0xFFF9), range(0xE0000, 0xE1000))
"""Variation selectors (but for those of text and emoji), tags, and what is reserved for more of them."""


class _Symbols(dict[int, str]):
    """By code point, for `str.translate`: what is shown; found when it is first asked for."""

    def __missing__(self, code: int) -> str:
        char = chr(code)
        hidden = (
            unicodedata.category(char) in _HIDDEN_CATEGORIES
            or code in _BLANKS
            or any(code in blanks for blanks in _BLANK_RANGES)
        )
        if char in _LAYOUT or not hidden:
            shown = char
        elif code < 0x20:
            shown = chr(0x2400 + code)  # ␀ to ␟, Unicode's pictures of them
        else:
            shown = "␡" if code == 0x7F else f"‹U+{code:04X}›"
        self[code] = shown
        return shown


_SYMBOLS = _Symbols()


def visible(text: str) -> str:
    """`text` with every control, format and invisible character as a symbol; new lines and tabs stay."""
    return text.translate(_SYMBOLS)


def visible_data(value: Any) -> Any:
    """`value` with `visible` applied to every text in it, through lists and mappings, whose keys are texts too."""
    if isinstance(value, str):
        return visible(value)
    if isinstance(value, Mapping):
        return {visible_data(key): visible_data(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [visible_data(item) for item in value]
    return value


_USER = re.compile(r"(?<=://)(?:[^\s/?#@]*@)+|(?<=://)[^\s/?#@:\[]*:(?!\d+(?:[/?#]|$))[^\s@]{0,2000}@")
"""User name and password; in the second form the password holds a slash, question mark or hash.

Lengths are bounded: hostile text holds many ://, each of which could be followed to the end.
"""
_QUERY = re.compile(r"(?<=://)([^\s?#'\"<>]{1,2000})\?[^\s#'\"<>]+")


def without_credentials(text: str) -> str:
    """`text` with every URL in it without user name, password and query, however malformed."""
    return _QUERY.sub(r"\1", _USER.sub("", text))


def for_people(text: str) -> str:
    """A message as it may be printed and logged."""
    return without_credentials(visible(text))


def get_logger(name: str) -> logging.Logger:
    """The logger `name`, whose messages pass through `for_people`: many quote what a service, file or tool said."""
    logger = logging.getLogger(name)
    logger.addFilter(_VISIBLE_MESSAGES)
    return logger


class _VisibleMessages(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = for_people(record.getMessage()), ()
        return True


_VISIBLE_MESSAGES = _VisibleMessages()
