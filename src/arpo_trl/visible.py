"""Makes untrusted text safe to print: replaces control and invisible characters by symbols, and removes keys in URLs.

Text from models, tools, pages and services may contain escape sequences that change the title of a terminal, fill the
clipboard or overwrite earlier lines. It may also contain marks that reverse the reading direction, and invisible
characters. Code that prints such text, or puts it into a message, a log or a report, passes it through `visible`
first. Messages pass through `for_people`, which also removes possible secrets from URLs, and the secrets of the
environment. Errors and services quote what they received, so texts for the model lose those secrets as well.
"""

from __future__ import annotations

import json
import logging
import os
import re
import unicodedata
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import quote, quote_plus

if TYPE_CHECKING:
    from accelerate.logging import MultiProcessAdapter

_LAYOUT = "\n\t"
_HIDDEN_CATEGORIES = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Controls, format characters (bidirectional controls, joiners, tags), lone surrogates, line and paragraph
separators."""
_BLANKS = frozenset((0x034F, 0x115F, 0x1160, 0x17B4, 0x17B5, 0x2065, 0x3164, 0xFFA0))
"""Letters, marks and a reserved number without a visible glyph."""
_BLANK_RANGES = (range(0x180B, 0x1810), range(0xFE00, 0xFE0E), range(0xFFF0, 0xFFF9), range(0xE0000, 0xE1000))
"""Variation selectors (except those for text and emoji), tags, and the ranges reserved for more of them."""


WITHOUT_MEANING = dict.fromkeys(
    (0x00AD, 0x061C, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2060, *range(0x2066, 0x206A), 0xFEFF)
)
"""For `str.translate`: removes characters without width or meaning, which come from web pages and joined files: soft
hyphens, marks of direction, empty spaces and byte order marks. Joiners stay, because they change words."""


def encodable(text: str) -> str:
    """The text with ? in place of lone surrogates, which no encoding has."""
    return text.encode("utf-8", "replace").decode()


class _Symbols(dict[int, str]):
    """A table for `str.translate`: the text shown for each code point, computed at the first use."""

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
            shown = chr(0x2400 + code)  # ␀ to ␟, Unicode's control pictures
        else:
            shown = "␡" if code == 0x7F else f"‹U+{code:04X}›"
        self[code] = shown
        return shown


_SYMBOLS = _Symbols()


def visible(text: str) -> str:
    """Return `text` with a symbol for every control, format and invisible character, except newlines and tabs."""
    return text.translate(_SYMBOLS)


def visible_data(value: Any) -> Any:
    """Return `value` with `visible` applied to every string in it."""
    return with_texts(visible, value)


def with_texts(change: Callable[[str], str], value: Any) -> Any:
    """Return `value` with `change` applied to every string in it, in lists and in keys and values of mappings."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {with_texts(change, key): with_texts(change, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [with_texts(change, item) for item in value]
    return value


_USER = re.compile(r"(?<=:/)(/?)(?:(?:[^\s/?#@]*@)+|[^\s/?#@:\[]*:(?!\d+(?:[/?#]|$))[^\s@]{0,2000}@)")
"""User name and password. In the second form the password contains a slash, question mark or hash. A path that was
made from a URL has only one slash.

Lengths are bounded, because hostile text may contain many ://, and a search from each one to the end would be slow.
"""
_QUERY = re.compile(r"(?<=:/)([^\s?#'\"<>]{1,2000})\?[^\s#'\"<>]+")


def without_credentials(text: str) -> str:
    """Return `text` without the user name, password and query of each URL in it, even of malformed URLs."""
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text))


_ENDS_OF_SECRETS = ("KEY", "TOKEN", "SECRET", "PASSWORD")
SHORTEST_SECRET = 8


def secrets_of_environment() -> dict[str, str]:
    """The values of environment variables that are secrets by their names, by name. Shorter values are left out."""
    # Not `items()`: other threads may remove variables in between.
    found = {
        name: os.environ.get(name, "").strip() for name in list(os.environ) if name.upper().endswith(_ENDS_OF_SECRETS)
    }
    return {name: value for name, value in found.items() if len(value) >= SHORTEST_SECRET}


def without_secrets(text: str) -> str:
    """Return `text` with every secret of the environment replaced by a mark."""
    return with_marks(text, dict.fromkeys(secrets_of_environment().values(), "[key]")) if text else text


def with_marks(text: str, marks: Mapping[str, str]) -> str:
    """Return `text` with each of the secrets replaced by its mark.

    A secret is found in each of `forms_of`. Short values are left, and those that ordinary text may contain
    (`is_ordinary`).

    Args:
        marks: Secret → its mark.
    """
    secrets = [secret for secret in marks if len(secret) >= SHORTEST_SECRET and not is_ordinary(secret)]
    for secret in sorted(secrets, key=len, reverse=True):  # one may contain another
        for form in forms_of(secret):
            text = text.replace(form, marks[secret])
    return text


def forms_of(secret: str) -> set[str]:
    """Return the secret as it is, and as URLs, JSON and Python write it."""
    quoted = (of(secret, safe="", errors="surrogateescape") for of in (quote, quote_plus))
    written = (json.dumps(secret, ensure_ascii=is_ascii)[1:-1] for is_ascii in (False, True))
    return {secret, *written, repr(secret)[1:-1], *quoted}


def is_ordinary(secret: str) -> bool:
    """Whether ordinary text may contain the secret: words such as Europe/Paris, a number, or the path of a file."""
    is_word = all(part.isalpha() for part in secret.split("/"))
    return is_word or secret.isdigit() or (secret.startswith("/") and os.path.exists(secret))


def for_people(text: str) -> str:
    """Return the message `text` in a form that is safe to print and log."""
    return without_credentials(without_secrets(visible(text)))


def say(text: str, *, to: TextIO | None = None) -> None:
    """Print the message `text` in the form of `for_people`, and flush.

    Args:
        to: The stream. Default: standard output.
    """
    print(for_people(text), file=to, flush=True)


def get_logger(name: str) -> logging.Logger:
    """Return the logger `name`. Its messages pass through `for_people`, because many quote services, files or
    tools."""
    logger = logging.getLogger(name)
    logger.addFilter(_VISIBLE_MESSAGES)
    return logger


def get_rank_logger(name: str) -> MultiProcessAdapter:
    """Return accelerate's logger `name`, which by default logs on the main process only, with the filter of
    `get_logger`."""
    from accelerate import logging as of_ranks  # slow to import, and most modules that log need only `get_logger`

    get_logger(name)
    return of_ranks.get_logger(name)


class _VisibleMessages(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = for_people(record.getMessage()), ()
        return True


_VISIBLE_MESSAGES = _VisibleMessages()
