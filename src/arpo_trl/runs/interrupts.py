"""SIGTERM and Ctrl-C as a request to stop at the next safe place; a second Ctrl-C as an order to stop at once.

A signal may come anywhere: between two collectives, or in the middle of writing a checkpoint. Its handler only takes
note of it. Whatever waits (a rollout between two events, a reward function) looks at the note through `check`, and the
trainer at the places that all ranks pass, where they decide together.

    SIGTERM, Ctrl-C ─▶ told ─┬─▶ check()      ends a wait of this rank: `Interrupted`
                             └─▶ the trainer  asks all ranks, and all raise `Interrupted` at the same place
    Ctrl-C again ──────────────▶ this process and its children are killed
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, NoReturn

import psutil
from torch import distributed

from arpo_trl.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_END = b"\0"
"""No signal's number: ends the thread that reads them."""
SAME_S = 1.0
"""A second SIGINT within this many seconds is the first one again: a terminal and a launcher both send it."""
EXIT_S = 3.0
"""How long an interrupted process may take to close what it opened."""
LAUNCHED = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}
"""Variables by which `accelerate launch` and torchrun are known."""
_PR_SET_PDEATHSIG = 1
ASK_EVERY_S = 0.5
"""How often a rank looks whether another one was told to stop."""


class Interrupts:
    """What this process was told while `listening`."""

    stopped = False
    """Whether training was ended by a signal, in this process."""
    exit_status: int | None = None
    """What this process leaves with, once that is decided."""

    def __init__(self) -> None:
        self.active = False
        self.told: int | None = None
        """The signal that asked to stop, None while there was none."""
        self._told_at = 0.0
        self._raises = False
        self._board: _Board | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Takes the signals over until it closes; outside the main thread, where Python forbids it, nothing."""
        if threading.current_thread() is not threading.main_thread() or self.active:
            yield
            return
        self.told, self.active, self._board = None, True, _Board.of_this_run()
        # Python's handlers wait for the main thread to come back from whatever library it is in. The second Ctrl-C
        # must not, so a thread reads of it where the interpreter's own handler writes.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(reader,), name="arpo-interrupts", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            signal.set_wakeup_fd(wakeup)
            for number, handler in before.items():
                signal.signal(number, handler)
            os.write(writer, _END)  # closing alone does not end it: a forked child may hold the pipe open
            watcher.join()
            os.close(writer)
            os.close(reader)
            self.active = False

    def check(self) -> None:
        """Raises `Interrupted` once this rank was told to stop, or has heard that another one was."""
        if self.active and self.told is not None:
            raise Interrupted(self.told)

    @contextmanager
    def raising(self) -> Iterator[None]:
        """Within it a signal raises `Interrupted` wherever the main thread is: for code without a `check`."""
        self._raises = True
        try:
            self.check()
            yield
        finally:
            self._raises = False

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._note(signum)
        if self._raises:
            raise Interrupted(signum)

    def _watch(self, reader: int) -> None:
        poller = select.poll()  # which, unlike select, takes descriptors above 1,023
        poller.register(reader, select.POLLIN)
        while True:
            if not poller.poll(ASK_EVERY_S * 1000 if self._board else None):
                self._ask_the_others()
                continue
            if (read := os.read(reader, 1)) == _END:
                return
            signum = read[0]
            if signum not in SIGNALS:  # that of a child that ended, which torch listens to once it has workers
                continue
            if self.told is None:
                self._note(signum)
            elif signum == signal.SIGINT and time.monotonic() - self._told_at > SAME_S:
                stop_at_once(128 + signum)

    def _ask_the_others(self) -> None:
        assert self._board is not None
        if self.told is not None:
            self._board.post(self.told)
        elif (signum := self._board.read()) is not None:
            self._note(signum)
            signal.pthread_kill(threading.main_thread().ident or 0, signum)  # ends what it waits for here, too

    def _note(self, signum: int) -> None:
        if self.told is None:
            self._told_at = time.monotonic()
            self.told = signum
            again = " Ctrl-C again stops at once." if signum == signal.SIGINT else ""
            print(f"\n{signal.Signals(signum).name}: stopping with a checkpoint.{again}", file=sys.stderr, flush=True)


def stop_at_once(exit_status: int) -> None:
    """Ends this process and all that it started, with nothing saved and nothing closed."""
    kill_children()
    os._exit(exit_status)


def leave(exit_status: int) -> NoReturn:
    """Exits as usual, with what is registered for that; at once if that takes longer than `EXIT_S`."""
    Interrupts.exit_status = exit_status
    timer = threading.Timer(EXIT_S, stop_at_once, (exit_status,))
    timer.daemon = True
    timer.start()
    raise SystemExit(exit_status)


def kill_children() -> None:
    """Kills every process that this one started, and theirs."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


def follow_launcher() -> None:
    """Has this process told to stop when the launcher that started it is gone; without one, and off Linux, nothing.

    `accelerate launch` hands no signal on to a single process, and cannot when it is killed.
    """
    if sys.platform == "linux" and LAUNCHED & os.environ.keys():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


@atexit.register  # at import, so that it runs after what trackers and tools have registered
def _end_what_is_left() -> None:
    if Interrupts.stopped:
        kill_children()
    if Interrupts.exit_status is not None:  # nothing is left but seconds of collecting garbage
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(Interrupts.exit_status)


class _Board:
    """The ranks' common store, where a rank that was told to stop leaves word for those that wait elsewhere."""

    _runs = 0

    def __init__(self, store: Any, key: str):
        self._store, self._key = store, key
        self._posted = False

    @classmethod
    def of_this_run(cls) -> _Board | None:
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return None
        cls._runs += 1
        return cls(distributed.distributed_c10d._get_default_store(), f"arpo/interrupt/{cls._runs}")

    def post(self, signum: int) -> None:
        if not self._posted:
            self._posted = True
            with contextlib.suppress(RuntimeError):  # the store ends with the launcher
                self._store.set(self._key, str(signum))

    def read(self) -> int | None:
        with contextlib.suppress(RuntimeError):
            return int(self._store.get(self._key)) if self._store.check([self._key]) else None
        return None
