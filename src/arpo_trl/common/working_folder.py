"""Keeps the working folder, on which relative paths such as `output_dir` depend. Pure."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from arpo_trl.visible import get_logger

logger = get_logger(__name__)


@contextmanager
def kept_working_folder() -> Iterator[None]:
    """A context after which the process is in the same working folder. A change is undone with a warning."""
    before = _current()
    try:
        yield
    finally:
        if before is not None and (now := _current()) != before:
            logger.warning(
                f"A tool, environment or reward function changed the working folder of the run to "
                f"{now or 'a folder that no longer exists'}. It is {before} again, so that relative paths such as "
                "output_dir stay the same. Give functions such as subprocess.run the folder as an argument (cwd=…) "
                "instead of calling os.chdir."
            )
            os.chdir(before)


def _current() -> str | None:
    """The working folder; None if it was removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None
