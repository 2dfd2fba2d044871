"""The event loop on which this process's tools do their network work: one daemon thread, started at first use."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from functools import lru_cache
from typing import Any, TypeVar

T = TypeVar("T")


def start(coroutine: Coroutine[Any, Any, T]) -> Future[T]:
    """The future of `coroutine`, which begins to run; cancelling it cancels the coroutine."""
    return asyncio.run_coroutine_threadsafe(coroutine, _loop_of(os.getpid()))


@lru_cache
def _loop_of(pid: int) -> asyncio.AbstractEventLoop:
    """The loop of process `pid`: a fork inherits the loop but not the thread that runs it."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=f"arpo-tools-network-{pid}", daemon=True).start()
    return loop
