"""The folder in which model-written code works: how much it holds, and its removal, whatever the code has made of it.

Code may nest folders deeper than a path can name and more than a process can open, and take its own rights from them.
So nothing here recurses, and removal holds two descriptors at a time.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from pathlib import Path

_REMOVAL_ATTEMPTS = 50
_REMOVAL_WAIT_S = 0.02  # a process that was killed may write for a moment yet

_BLOCK_BYTES = 512  # of `st_blocks`, on every file system


def holds_more(folder: Path, *, files: int, size: int) -> bool:
    """Whether `folder` holds more than `files` files and folders, or they take more than `size` bytes on the disk.

    Whoever made them may go on meanwhile. A folder that cannot be looked into counts as too much.
    """
    folders = [str(folder)]
    for place in folders:
        try:
            with os.scandir(place) as entries:
                for entry in entries:
                    files -= 1
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        size -= entry.stat(follow_symlinks=False).st_blocks * _BLOCK_BYTES
                    if files < 0 or size < 0:
                        return True
        except FileNotFoundError:
            continue
        except OSError:
            return True
    return False


def empty(folder: Path) -> None:
    """Remove what is in `folder`. Raises OSError where that fails."""
    folder.chmod(0o700)
    here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    way: list[tuple[str, tuple[int, int]]] = []  # the folders below `folder` down to `here`: name, identity of parent
    try:
        while True:
            name = _remove_files(here)
            if name is not None:  # a folder: go down
                os.chmod(name, 0o700, dir_fd=here)
                way.append((name, _identity(here)))
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                below = os.open(name, flags, dir_fd=here)
            elif way:  # empty: go up and remove it
                below = os.open("..", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
            else:
                return
            os.close(here)
            here = below
            if name is None:
                name, parent = way.pop()
                if _identity(here) != parent:
                    raise OSError(f"{folder}: somebody moves its folders while they are removed")
                os.rmdir(name, dir_fd=here)
    finally:
        os.close(here)


def _identity(fd: int) -> tuple[int, int]:
    of = os.fstat(fd)
    return of.st_dev, of.st_ino


def _remove_files(fd: int) -> str | None:
    """The name of a folder in the folder `fd`, before which the files are removed; None where it has no folder."""
    with os.scandir(fd) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                return entry.name
            os.unlink(entry.name, dir_fd=fd)
    return None


def remove(folder: Path) -> None:
    """Remove `folder` and what is in it. Warns where that fails, since it is called at exit, too."""
    fault: OSError | None = None
    for _ in range(_REMOVAL_ATTEMPTS):
        try:
            with contextlib.suppress(FileNotFoundError):
                empty(folder)
                folder.rmdir()
            return
        except OSError as error:
            fault = error
            time.sleep(_REMOVAL_WAIT_S)
    warnings.warn(f"The folder {folder} of a Python worker cannot be removed ({fault}). Remove it.", stacklevel=2)
