"""Measures and removes the working folder of model-written code, which may contain anything.

Code may nest folders deeper than the limits of paths and of open files, and remove its own access rights from them. So
no function here recurses, and the removal uses at most two descriptors at a time.
"""

from __future__ import annotations

import contextlib
import os
import time
import warnings
from pathlib import Path

_REMOVAL_ATTEMPTS = 50
_REMOVAL_WAIT_S = 0.02  # a killed process may still write for a moment

_BLOCK_BYTES = 512  # of `st_blocks`, on every file system


def holds_more(folder: Path, *, files: int, size: int) -> bool:
    """Return whether `folder` contains more than `files` files and folders, or uses more than `size` bytes on disk.

    Its content may change at the same time. A folder that cannot be read counts as over the limit.
    """
    folders = [str(folder)]
    for path in folders:
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    files -= 1
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
                    else:
                        size -= _bytes_on_disk(entry)
                    if files < 0 or size < 0:
                        return True
        except FileNotFoundError:
            continue
        except OSError:
            return True
    return False


def _bytes_on_disk(entry: os.DirEntry[str]) -> int:
    """Return the size of a file on disk; 0 if it has been removed since it was listed."""
    try:
        return entry.stat(follow_symlinks=False).st_blocks * _BLOCK_BYTES
    except FileNotFoundError:
        return 0


def empty(folder: Path) -> None:
    """Remove the content of `folder`. Raises OSError on failure."""
    folder.chmod(0o700)
    here = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    way: list[tuple[str, tuple[int, int]]] = []  # the folders from `folder` to `here`: name, identity of parent
    try:
        while True:
            name = _remove_files(here)
            if name is not None:  # a folder: descend
                os.chmod(name, 0o700, dir_fd=here)
                way.append((name, _identity(here)))
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
                below = os.open(name, flags, dir_fd=here)
            elif way:  # empty: ascend and remove it
                below = os.open("..", os.O_RDONLY | os.O_DIRECTORY, dir_fd=here)
            else:
                return
            os.close(here)
            here = below
            if name is None:
                name, parent = way.pop()
                if _identity(here) != parent:
                    raise OSError(f"{folder}: a process moves its folders while they are removed")
                os.rmdir(name, dir_fd=here)
    finally:
        os.close(here)


def _identity(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino


def _remove_files(fd: int) -> str | None:
    """Remove files in the folder `fd` up to its first folder, and return the name of that folder; None if there is no
    folder."""
    with os.scandir(fd) as entries:
        for entry in entries:
            if entry.is_dir(follow_symlinks=False):
                return entry.name
            os.unlink(entry.name, dir_fd=fd)
    return None


def remove(folder: Path) -> None:
    """Remove `folder` and its content. On failure it warns instead of raising, because it also runs at exit."""
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
