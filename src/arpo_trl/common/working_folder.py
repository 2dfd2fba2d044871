"""Keeps the working folder, on which relative paths such as `output_dir` depend."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from arpo_trl.visible import get_logger

logger = get_logger(__name__)


@contextmanager
def kept_working_folder(folder: str | None = None) -> Iterator[None]:
    """A context in which the process starts and ends in `folder`, by default the current one. A change is undone with
    a warning."""
    folder = folder or working_folder()
    return_to(folder)
    try:
        yield
    finally:
        return_to(folder)


def return_to(folder: str | None) -> None:
    """Make `folder` the working folder, with a warning if it is not. None: do nothing."""
    if folder is not None and (now := working_folder()) != folder:
        logger.warning(
            f"A tool, environment or reward function changed the working folder of the run to "
            f"{now or 'a folder that no longer exists'}. It is {folder} again, so that relative paths such as "
            "output_dir stay the same. Give functions such as subprocess.run the folder as an argument (cwd=…) "
            "instead of calling os.chdir."
        )
        os.chdir(folder)


def working_folder() -> str | None:
    """The working folder; None if it was removed."""
    try:
        return os.getcwd()
    except FileNotFoundError:
        return None
