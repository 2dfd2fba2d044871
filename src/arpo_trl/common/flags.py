"""The parser of a command's own flags: a flag has one name, and an error suggests the nearest name. Pure: no torch."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from arpo_trl.common.user_files import user_path
from arpo_trl.errors import DataError
from arpo_trl.visible import for_people

NUMBERS = {"int": "an integer", "float": "a number"}
"""The name of a type in argparse's messages → the expected value."""
NEAR = 0.8
"""Names with at least this similarity (difflib) count as misspellings of each other."""


class VisibleParser(argparse.ArgumentParser):
    """argparse's parser. Its errors, which quote the words of the command, are safe to print."""

    def error(self, message: str) -> NoReturn:
        """Like argparse's, with symbols for control characters and without credentials."""
        super().error(for_people(message))


class CommandParser(VisibleParser):
    """argparse's parser without abbreviated flags. Its error for an unknown flag names the nearest flag.

    An abbreviation would change its meaning, or lose it, as soon as another flag begins in the same way.
    """

    def __init__(self, **settings: Any):
        super().__init__(**settings, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Like argparse's, but prints an error and exits with status 2 if a word remains."""
        known, left = super().parse_known_args(args, namespace)
        if not left:
            return known, left
        if not left[0].startswith("-"):
            self.error(f"{left[0]!r} is one word too many. Put words with spaces between them in quotes")
        flags = [flag for flag in self._option_string_actions if flag.startswith("--")]
        word = left[0].partition("=")[0]
        near = nearest(word, flags)
        self.error(
            f"there is no flag {word}; " + (f"did you mean {near}?" if near else f"expected {' or '.join(flags)}")
        )

    def error(self, message: str) -> NoReturn:
        """Like argparse's, but describes the expected kind of number in words."""
        super().error(in_words(message))


def in_words(message: str) -> str:
    """A message of argparse, with the expected kind of number in words."""
    wrong = re.fullmatch(r"(argument \S+: )invalid (int|float) value: (.+)", message, re.DOTALL)
    return message if wrong is None else f"{wrong[1]}{wrong[3]}; expected {NUMBERS[wrong[2]]}"


def path_in_flag(text: str) -> Path:
    """The path in a flag, with ~ for a home directory, which a shell does not replace after --flag=. argparse prints
    the error."""
    try:
        return user_path(text, "the path")
    except DataError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def nearest(name: str, names: Sequence[str], cutoff: float = 0.6) -> str | None:
    """The one of `names` that begins with `name` or, without one, the most similar one; None if none is similar."""
    longer = [other for other in names if other.startswith(name)]
    return next(iter(longer or difflib.get_close_matches(name, names, n=1, cutoff=cutoff)), None)
