"""Calls that the sandbox rejects do nothing, or raise an error that states the reason.

`worker` loads this file by its path; standard library only.
"""

from __future__ import annotations

import _socket
import dbm.dumb
import errno
import os
import shutil
from typing import Any

MEANING = "code here cannot start processes or use the network"
"""The text for a system call that failed with EPERM."""


def install() -> None:
    """Make `shutil.copy` work, which also copies modes and times, and `shelve`, which sets the mode of its files. Let
    `os.system` and name resolution raise an error with the reason.

    Otherwise `os.system` returns a number, and the C library reports a temporary failure, so that the model retries.
    """
    shutil.copymode = shutil.copystat = _nothing
    dbm.dumb._Database._chmod = _nothing  # type: ignore[attr-defined]
    os.system = _socket.getaddrinfo = _socket.gethostbyname = _refused


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _refused(*_: Any, **__: Any) -> Any:
    raise PermissionError(errno.EPERM, f"Operation not permitted: {MEANING}")
