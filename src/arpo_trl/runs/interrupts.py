"""Handles SIGTERM and Ctrl-C: the first stops the run at the next safe point, a second Ctrl-C stops it immediately.

A signal may arrive anywhere: between two collectives, or while a checkpoint is written. The handler only records it.
Code that waits (a rollout between two events, a reward function) polls the record with `check`. The trainer polls it
at points that all ranks reach, and the ranks decide together.

    SIGTERM, Ctrl-C ─▶ told ─┬─▶ check()      ends a wait of this rank: `Interrupted`
                             └─▶ the trainer  polls all ranks, and all raise `Interrupted` at the same place
    Ctrl-C again ──────────────▶ this process and its children are killed

A process that a reward or a tool forks meanwhile listens to nothing: SIGTERM ends it, and it ignores Ctrl-C, which a
terminal sends to all processes and which this process handles.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import multiprocessing
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from multiprocessing import util
from multiprocessing.connection import Connection
from types import FrameType
from typing import Any, ClassVar, NoReturn

import psutil
import torch
from accelerate import Accelerator
from torch import distributed

from arpo_trl.common.per_process import one_per_process
from arpo_trl.common.pipes import discard, is_unread
from arpo_trl.errors import Interrupted
from arpo_trl.visible import say

SIGNALS = (signal.SIGINT, signal.SIGTERM)
_END = b"\0"
"""A byte that is not a signal's number. It stops the thread that reads the numbers."""
SAME_S = 1.0
"""A second SIGINT within this many seconds counts as the same signal: the terminal and a launcher both send it."""
AFTER_FORK_S = 0.05
"""Seconds after a fork at which a signal that came during it is repeated: Python has left the fork by then."""
EXIT_S = 3.0
"""Seconds that an interrupted process may take for its cleanup."""
LAUNCHED = {"ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"}
"""Environment variables that `accelerate launch` and torchrun set."""
STOPS = "stopping with a checkpoint"
"""What the run says that it does after a signal, unless it is at its end."""
_PR_SET_PDEATHSIG = 1
ASK_EVERY_S = 0.5
"""Seconds between a rank's checks of whether another rank has received a signal."""


class Interrupts:
    """Records the signals that this process receives while `listening`."""

    stopped = False
    """Whether a signal has stopped training in this process."""
    exit_status: int | None = None
    """The exit status of this process; None until it is decided."""

    def __init__(self) -> None:
        self.active = False
        self.told: int | None = None
        """The first signal that requested a stop; None if there was none."""
        self.plan = STOPS
        self._told_at = 0.0
        self._raises = False
        self._shared: _SharedFlag | None = None
        self._before: dict[signal.Signals, Any] = {}
        """The handlers outside of `listening`."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """A context that handles the signals. Does nothing outside the main thread, since Python allows no handlers
        there."""
        if threading.current_thread() is not threading.main_thread() or self.active:
            yield
            return
        self.told, self.active, self._shared = None, True, _SharedFlag.of_this_run()
        self.plan = STOPS
        # Python runs handlers only when the main thread returns from library code. The second Ctrl-C must not wait
        # for that, so a thread reads the pipe to which the interpreter writes each signal's number.
        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        _Forks.listener = self
        wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        watcher = threading.Thread(target=self._watch, args=(reader,), name="arpo-interrupts", daemon=True)
        watcher.start()
        try:
            with _lasting(sys.stdout), _lasting(sys.stderr):
                yield
        finally:
            _Forks.listener = None
            signal.set_wakeup_fd(wakeup)
            for number, handler in self._before.items():
                signal.signal(number, handler)
            os.write(writer, _END)  # closing the pipe is not enough: a forked child may keep it open
            watcher.join()
            os.close(writer)
            os.close(reader)
            self.active = False

    def stop_listening_in_child(self) -> None:
        """Restores SIGTERM in a forked process, and ignores SIGINT."""
        signal.set_wakeup_fd(-1)  # the parent's thread reads the pipe
        signal.signal(signal.SIGTERM, self._before[signal.SIGTERM])
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        self.active = False

    def check(self) -> None:
        """Raises `Interrupted` if this rank has received a signal, or has been notified that another rank has."""
        if self.active and self.told is not None:
            raise Interrupted(self.told)

    def stop_together(self, accelerator: Accelerator) -> None:
        """Raises `Interrupted` on all ranks if one of them has received a signal. A collective."""
        if not self.active:
            return
        told = self.told or 0
        if accelerator.num_processes > 1:
            told = int(accelerator.gather(torch.tensor([told], device=accelerator.device)).max())
        if told:
            raise Interrupted(told)

    @contextmanager
    def over_errors(self) -> Iterator[None]:
        """A context in which an error after a signal becomes `Interrupted`: Ctrl-C also reaches the programs that a
        reward, an environment or an engine has started, and they fail."""
        try:
            yield
        except Exception:
            self.check()
            raise

    @contextmanager
    def raising(self) -> Iterator[None]:
        """A context in which a signal raises `Interrupted` at any point of the main thread, for code without `check`.

        In another thread it only calls `check`, since the main thread runs other code.
        """
        self.check()
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        self._raises = True
        try:
            self.check()
            yield
        finally:
            self._raises = False

    def _on_signal(self, signum: int, frame: FrameType | None) -> None:
        self._record(signum)
        if self._raises:
            raise Interrupted(self.told or signum)

    def _watch(self, reader: int) -> None:
        poller = select.poll()  # unlike `select`, it accepts descriptors above 1,023
        poller.register(reader, select.POLLIN)
        while True:
            if not poller.poll(ASK_EVERY_S * 1000 if self._shared else None):
                self._sync_with_ranks()
                continue
            if (read := os.read(reader, 1)) == _END:
                return
            signum = read[0]
            if signum not in SIGNALS:  # SIGCHLD, which torch handles if it has data loader workers
                continue
            if self.told is None:
                self._record(signum)
            elif signum == signal.SIGINT and time.monotonic() - self._told_at > SAME_S:
                stop_at_once(128 + signum)

    def _sync_with_ranks(self) -> None:
        assert self._shared is not None
        if self.told is not None:
            self._shared.post(self.told)
        elif (signum := self._shared.read()) is not None:
            self._record(signum)
            self._interrupt_main_thread()

    def raise_in_main_thread(self) -> None:
        """Repeats the signal for the code in `raising`, which has not noticed it."""
        if self._raises and self.told is not None:
            self._interrupt_main_thread()

    def _interrupt_main_thread(self) -> None:
        """Runs the handler in the main thread, also if it waits. SIGTERM, whatever signal was received, since SIGINT
        could be taken for a second Ctrl-C."""
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)

    def _record(self, signum: int) -> None:
        if self.told is None:
            self._told_at = time.monotonic()
            self.told = signum
            again = " Ctrl-C again stops immediately." if signum == signal.SIGINT else ""
            say(f"\n{signal.Signals(signum).name}: {self.plan}.{again}", to=sys.stderr)


@contextmanager
def _lasting(stream: Any) -> Iterator[None]:
    """A context in which the stream loses its text if its reader is gone.

    A Ctrl-C also ends the `tee` of `… | tee run.log`. Then a line of the log must not raise before the checkpoint is
    saved. A run in the background may outlive its terminal.
    """
    before: dict[str, Any] = {}
    own: dict[str, Any] = {}

    def lasting(method: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any) -> Any:
            try:
                return method(*args)
            except OSError as error:
                if not isinstance(error, BrokenPipeError) and error.errno != errno.EIO:  # that of a closed terminal
                    raise
                discard(stream)
                return len(args[0]) if args else None

        return called

    with contextlib.suppress(AttributeError, TypeError):  # there is no stream, or it cannot be changed
        for name in ("write", "flush"):
            before[name] = vars(stream).get(name)
            # Methods, since progress bars and loggers hold the stream itself.
            setattr(stream, name, lasting(getattr(stream, name)))
            own[name] = vars(stream)[name]
    try:
        yield
    finally:
        for name, method in own.items():
            if vars(stream).get(name) is not method:  # replaced by another library, such as a tracker
                continue
            delattr(stream, name)
            if before[name] is not None:
                setattr(stream, name, before[name])
        if own and is_unread(stream):  # the last line of the program must not raise either
            discard(stream)


class _Forks(threading.local):
    """Blocks the signals while a process forks: a child that gets one at once would report it through the pipe."""

    listener: ClassVar[Interrupts | None] = None
    """The one that listens now."""
    mask: set[Any] | None = None
    """The signals that were blocked before the fork of this thread."""
    raises = False
    """Whether a signal raised `Interrupted` before the fork. Python drops what is raised in these functions."""

    def before(self) -> None:
        if (listener := _Forks.listener) is not None:
            self.mask = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            if threading.current_thread() is threading.main_thread():
                self.raises, listener._raises = listener._raises, False

    def in_parent(self) -> None:
        self._unblock()
        if self.raises and (listener := _Forks.listener) is not None:
            listener._raises, self.raises = True, False
            if listener.told is not None:  # perhaps since the fork began
                threading.Timer(AFTER_FORK_S, listener.raise_in_main_thread).start()

    def _unblock(self) -> None:
        mask, self.mask = self.mask, None
        if mask is not None:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def in_child(self) -> None:
        listener, _Forks.listener = _Forks.listener, None
        if listener is not None:
            listener.stop_listening_in_child()
        self._unblock()


_forks = _Forks()
# At import, since it cannot be undone.
os.register_at_fork(before=_forks.before, after_in_parent=_forks.in_parent, after_in_child=_forks.in_child)


@one_per_process
def _end_of_run() -> tuple[Connection, Connection]:
    """The reader and the writer of a pipe to which this process writes at its end."""
    reader, writer = multiprocessing.Pipe(duplex=False)
    # Before multiprocessing waits for the processes that are left. A process of its own runs no atexit functions.
    util.Finalize(None, writer.send_bytes, (_END,), exitpriority=10)
    return reader, writer


def until_the_run_ends(begin: Callable[[int], None] | None) -> Callable[[int], None]:
    """The `worker_init_fn` of a data loader, after its own (`begin`), whose workers only their parent ends.

    A job may send SIGTERM to all its processes, and torch raises an error when a worker ends. Then the parent could
    not save. So workers ignore SIGTERM, also that of their parent: multiprocessing sends it at the parent's exit to
    workers that are left, and waits for them. A blocked SIGTERM could be asked for its sender, but threads that
    libraries start before this function do not block it.
    """
    return partial(_begin_worker, begin, _end_of_run()[0])


def _begin_worker(begin: Callable[[int], None] | None, end: Connection, number: int) -> None:
    if begin is not None:
        begin(number)
    for signum in SIGNALS:
        signal.signal(signum, signal.SIG_IGN)
    threading.Thread(target=_end_worker, args=(end,), name="arpo-worker-end", daemon=True).start()


def _end_worker(end: Connection) -> None:
    end.poll(None)
    os._exit(0)


def stop_at_once(exit_status: int) -> None:
    """Kills this process and all its children, without saving or closing anything."""
    kill_children()
    os._exit(exit_status)


def leave(exit_status: int) -> NoReturn:
    """Exits normally and runs `atexit` functions. Kills the process if that takes longer than `EXIT_S`."""
    Interrupts.exit_status = exit_status
    timer = threading.Timer(EXIT_S, stop_at_once, (exit_status,))
    timer.daemon = True
    timer.start()
    raise SystemExit(exit_status)


def kill_children() -> None:
    """Kills all child processes and their descendants."""
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            child.kill()


def follow_launcher() -> None:
    """Sends SIGTERM to this process when its launcher exits. Does nothing without a launcher, or outside Linux.

    `accelerate launch` does not forward signals to a single process, and it cannot forward them if it is killed.
    """
    if sys.platform == "linux" and LAUNCHED & os.environ.keys():
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


@atexit.register  # at import, so that it runs after the functions that trackers and tools register
def _end_process() -> None:
    if Interrupts.stopped:
        kill_children()
    if Interrupts.exit_status is not None:  # skips seconds of garbage collection
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(Interrupts.exit_status)


class _SharedFlag:
    """The signal number that the first interrupted rank writes to the ranks' common store for the other ranks."""

    _runs = 0

    def __init__(self, store: Any, key: str):
        self._store, self._key = store, key
        self._posted = False

    @classmethod
    def of_this_run(cls) -> _SharedFlag | None:
        """None if this process is the only rank."""
        if not distributed.is_initialized() or distributed.get_world_size() == 1:
            return None
        cls._runs += 1
        return cls(distributed.distributed_c10d._get_default_store(), f"arpo/interrupt/{cls._runs}")

    def post(self, signum: int) -> None:
        if not self._posted:
            self._posted = True
            with contextlib.suppress(RuntimeError):  # the store stops with the launcher
                self._store.set(self._key, str(signum))

    def read(self) -> int | None:
        with contextlib.suppress(RuntimeError):
            return int(self._store.get(self._key)) if self._store.check([self._key]) else None
        return None
