"""What the sandbox refuses, made harmless or named. `worker` loads this file by its path; standard library only."""

from __future__ import annotations

import _socket
import errno
import os
import shutil
from typing import Any

MEANING = "code here cannot start processes or use the network"
"""Of a system call that failed with EPERM."""


def install() -> None:
    """Make `shutil.copy` work, which also copies modes and times, and let shells and name resolution say the cause.

    Without it `os.system` returns a number, and the C library reports a temporary failure, which asks for another try.
    """
    shutil.copymode = shutil.copystat = _nothing
    os.system = _socket.getaddrinfo = _socket.gethostbyname = _refused


def _nothing(*_: Any, **__: Any) -> None:
    pass


def _refused(*_: Any, **__: Any) -> Any:
    raise PermissionError(errno.EPERM, f"Operation not permitted: {MEANING}")
