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
    before = os.getcwd()
    try:
        yield
    finally:
        if (now := _current()) != before:
            logger.warning(
                f"A tool, environment or reward function changed the working folder of the run to {now}. It is "
                f"{before} again, so that relative paths such as output_dir stay the same. Give functions such as "
                "subprocess.run the folder as an argument (cwd=…) instead of calling os.chdir."
            )
            os.chdir(before)


def _current() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return "a folder that no longer exists"
