"""Removes the locks of PyTorch builds that killed processes have left.

DeepSpeed compiles extensions at its first start, and creates a lock file each time it loads them. PyTorch waits until
such a file disappears (`torch.utils.file_baton`). If its process was killed, this wait is silent and never ends. The
locks of PyTorch 2.15 end with their process, and their files stay and block nothing.
"""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path

import psutil

from arpo_trl.errors import ConfigError
from arpo_trl.visible import get_logger

logger = get_logger(__name__)

QUIET_S = 120.0
"""If no process of this machine holds a build's lock, another machine that shares the folder may hold it. The lock
counts as abandoned if nothing in its folder has changed for this many seconds. Compiling one file takes about a
minute."""
POLL_S = 0.1


def remove_left_build_locks(deepspeed: object) -> None:
    """Removes abandoned locks for which DeepSpeed would wait. Call it before DeepSpeed starts.

    The first process of a machine removes the locks, and the other processes wait for it.

    Args:
        deepspeed: `TrainingArguments.deepspeed`. Without it and without accelerate's DeepSpeed nothing is built.

    Raises:
        ConfigError: A lock cannot be removed.
    """
    if deepspeed is None and os.environ.get("ACCELERATE_USE_DEEPSPEED", "false") != "true":
        return
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    for lock in locks():
        _remove_if_left(lock, is_first)


def locks() -> list[Path]:
    """The lock files in PyTorch's build folder, held or abandoned; none if PyTorch does not wait for their removal."""
    from torch.utils import cpp_extension  # the settings import nothing of torch

    if not hasattr(cpp_extension, "FileBaton"):
        return []
    return list(Path(os.environ.get("TORCH_EXTENSIONS_DIR") or cpp_extension.get_default_build_root()).rglob("lock"))


def _remove_if_left(lock: Path, is_first: bool) -> None:
    is_told = False
    while (wait_s := _seconds_until_left(lock)) is not None:
        if is_first and wait_s <= 0:
            _remove(lock)
            return
        if is_first and not is_told:
            is_told = True
            logger.warning(
                f"{lock} is the lock of a build, but no process of this machine holds it. It is removed in "
                f"{wait_s:.0f} s unless another machine continues the build. Delete it to start immediately."
            )
        time.sleep(POLL_S)  # a file of another process: nothing notifies this one


def _seconds_until_left(lock: Path) -> float | None:
    """None if the lock is gone or a process of this machine holds it."""
    times = []
    for file in (lock, *lock.parent.iterdir()):
        with suppress(FileNotFoundError):
            times.append(file.stat().st_mtime)
    if not lock.exists() or is_held(lock):
        return None
    return max(times) + QUIET_S - time.time()


def is_held(lock: Path) -> bool:
    """Whether a process of this machine has `lock` open, as PyTorch does until it has removed it."""
    path = str(lock.resolve())
    for process in psutil.process_iter():
        with suppress(psutil.Error):
            if any(file.path == path for file in process.open_files()):
                return True
    return False


def _remove(lock: Path) -> None:
    try:
        lock.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{lock} is the lock of a build that was killed, and cannot be removed ({error}). DeepSpeed would wait "
            f"for it forever. Delete it, or set TORCH_EXTENSIONS_DIR to your own folder."
        ) from error
    logger.warning(f"{lock} is the lock of a build that was killed. It is removed.")
