"""Errors of a full disk, or of a file over a limit: recognizes them, whichever package raises them, and describes them
in one line."""

from __future__ import annotations

import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from arpo_trl.errors import ArpoError

_NUMBERS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_TEXTS = re.compile(
    "No space left on device"  # Rust, as in safetensors and tokenizers
    "|Disk quota exceeded"
    r"|File too large \(os error \d+\)"
    "|database or disk is full"  # sqlite
    r"|^\d+ requested and \d+ written$"  # numpy
    "|iostream error"  # torch
)
"""Texts of errors without a number."""


def is_full_disk(error: BaseException) -> bool:
    """Whether the error, or one that led to it, is about a full disk, an exhausted quota or a limit of a file."""
    return _number(error) is not None


def free_bytes(path: str | Path) -> int:
    """The free space of the file system of `path`, which need not exist."""
    place = Path(path).absolute()
    return shutil.disk_usage(next(each for each in (place, *place.parents) if each.exists())).free


def cause_and_remedy(error: BaseException, path: str | Path) -> tuple[str, str]:
    """Why something of this size could not be written to `path`, and what to do, both without a full stop."""
    if _number(error) == errno.EFBIG:
        return (
            "it exceeds the size of a file that ulimit -f or the file system allows",
            "Raise the limit (ulimit -f unlimited), or write to another file system",
        )
    return as_free_space(path), "Free some space"


def as_free_space(path: str | Path) -> str:
    """Text such as "12 MB are free there", about the file system of `path`, which need not exist."""
    return f"{free_bytes(path) / 1e6:,.0f} MB are free there"


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """A context in which an error of a full disk that names no file becomes an OSError that names `path`, which is
    being written."""
    try:
        yield
    except Exception as error:
        number = _number(error)
        if number is None or isinstance(error, ArpoError) or getattr(error, "filename", None) is not None:
            raise
        raise OSError(number, os.strerror(number), str(path)) from error


def full_disk_message(error: BaseException) -> str:
    """One line about an error of a full disk, with the file and the free space if the error names a file."""
    what = "A file is too large" if _number(error) == errno.EFBIG else "The disk is full"
    named = next((each for each in chain(error) if isinstance(each, OSError) and each.filename is not None), None)
    if named is None:
        return f"{what} ({error}). {cause_and_remedy(error, '.')[1]}."
    file = os.fsdecode(named.filename2 or named.filename)  # of a copy, the second is the one that is written
    cause, remedy = cause_and_remedy(error, file)
    return f"{what}: {file} cannot be written ({named.strerror}); {cause}. {remedy}."


def _number(error: BaseException) -> int | None:
    for each in chain(error):
        if isinstance(each, OSError) and each.errno is not None:
            if each.errno in _NUMBERS:
                return each.errno
        elif isinstance(each, Exception) and (found := _TEXTS.search(str(each))):
            numbers = {"Disk": errno.EDQUOT, "File": errno.EFBIG}
            return numbers.get(found[0].split()[0], errno.ENOSPC)
    return None


def chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those that led to it, the last first."""
    seen: set[int] = set()
    now: BaseException | None = error
    while now is not None and id(now) not in seen:
        seen.add(id(now))
        yield now
        now = now.__cause__ or (None if now.__suppress_context__ else now.__context__)
