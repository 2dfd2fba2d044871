"""Mathematical equality decided in a process of its own, so that no answer a model writes can hang or kill training.

`rewards.mathematics` refuses what is too large to compute, but an integral or a sum may still keep sympy busy for
hours, and a limit set in Python does not interrupt big integers in C. So a worker process, this file run as a script,
compares under limits that the kernel enforces by ending it: processor seconds (so a busy machine changes no reward)
and memory. The next question starts a new worker. What it reads is a model's, so on Linux it is confined as calls of
the python tool are: no environment, no capabilities, no files to write, and no system calls but those that computing
needs (`tools.python.syscalls`).

    parent, any thread   ["1/2", "0.5"]\\n ──▶   worker
                                      1\\n ◀──
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import warnings
from functools import lru_cache

CPU_LIMIT_S = 2.0
"""Processor seconds one comparison may take. An ordinary one takes less than a millisecond."""
MEMORY_LIMIT_BYTES = 2 << 30
"""Address space of the worker. sympy needs a tenth of it."""
OPEN_FILES = 64
"""Descriptors of the worker."""
START_PATIENCE_S = 30.0
"""How long a machine that has no process left for the worker is asked again."""
_START_WAIT_S = 0.5


class MathWorker:
    """A process that answers "are these two expressions equal?", started at the first question.

    Thread-safe: questions queue up. A worker belongs to the process that made it; see `math_worker`.
    """

    def __init__(self, cpu_limit_s: float = CPU_LIMIT_S):
        self.cpu_limit_s = cpu_limit_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner_pid = os.getpid()
        atexit.register(self.close)

    def equal(self, prediction: str, gold: str) -> bool:
        """Whether `prediction` is mathematically equal to `gold`; False when that takes too much time or memory.

        Raises:
            RewardError: the worker cannot start at all.
        """
        return self._answer([prediction, gold]) == "1"

    def is_text(self, answer: str) -> bool:
        """Whether nothing but the same text equals `answer`: words, or what cannot be read within the limits.

        Raises:
            RewardError: the worker cannot start at all.
        """
        return self._answer([answer]) != "0"

    def _answer(self, question: list[str]) -> str:
        with self._lock:
            process = self._running()
            try:
                reply = _ask(process, json.dumps(question))
            except BaseException:  # an interrupt here would leave a reply in the pipe for the next question
                self._stop()
                raise
            if not reply:
                self._stop()
            return reply

    def close(self) -> None:
        """End the worker. The next question starts another."""
        if os.getpid() == self._owner_pid:
            with self._lock:
                self._stop()

    def _running(self) -> subprocess.Popen[str]:
        if self._process is not None and self._process.poll() is None:
            return self._process
        self._stop()
        self._process = process = _started(self.cpu_limit_s)
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            self._stop()
            from arpo_trl.errors import RewardError  # here: the worker needs none of it

            raise RewardError(
                f"The worker that compares mathematical answers did not start (exit code {process.returncode}); its "
                "own message is on stderr. Check that sympy imports."
            )
        return process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()  # closes the pipes and reaps it
            self._process = None


def _started(cpu_limit_s: float) -> subprocess.Popen[str]:
    """The worker process. Waits, with a warning, while the machine has no process or memory for it.

    Raises RewardError when it still has none after `START_PATIENCE_S`.
    """
    deadline = time.monotonic() + START_PATIENCE_S
    while True:
        try:
            return subprocess.Popen(
                # Isolated, and able to import what we can.
                [sys.executable, "-I", "-X", "utf8", __file__, str(cpu_limit_s), *filter(None, sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                env={},
            )
        except OSError as error:
            if time.monotonic() >= deadline:
                from arpo_trl.errors import RewardError  # here: the worker needs none of it

                raise RewardError(
                    f"The worker that compares mathematical answers could not be started for {START_PATIENCE_S:g} s "
                    f"({error}). Check the limits on processes and memory."
                ) from error
            warnings.warn(
                f"The worker that compares mathematical answers cannot be started now ({error}); rewards wait for it.",
                stacklevel=2,
            )
            time.sleep(_START_WAIT_S)


def _ask(process: subprocess.Popen[str], question: str) -> str:
    """The worker's reply, or "" when it died over the question."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(question + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return ""
    return process.stdout.readline().strip()


@lru_cache
def _worker_of(pid: int) -> MathWorker:
    return MathWorker()


def math_worker() -> MathWorker:
    """This process's worker. A forked process gets its own: two askers on one pipe would mix up their replies."""
    return _worker_of(os.getpid())


def _serve(cpu_limit_s: float) -> None:
    """Answer questions from stdin until it closes. Runs in the worker, in its main thread."""
    import logging
    import signal

    from arpo_trl.rewards.mathematics.equality import equal, is_text

    logging.disable(logging.CRITICAL)
    equal(r"\frac{1}{2}", "0.5")  # caches filled on first use, off the clock
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; this process ends when its stdin does

    replies = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)  # whatever the parser prints is no reply
    _confine()
    replies.write("ready\n")
    os.dup2(nowhere, 2)

    for line in sys.stdin:
        question = json.loads(line)
        # SIGPROF has no handler here: when the timer fires the kernel ends the process, even inside C code.
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
        try:
            yes = equal(*question) if len(question) == 2 else is_text(*question)
        except (Exception, RecursionError, MemoryError):
            yes = len(question) == 1
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write("1\n" if yes else "0\n")


def _confine() -> None:
    """Limit what this process may use and do, for good. Other systems than Linux limit its memory, if that."""
    import platform
    import resource

    limits = [(resource.RLIMIT_AS, MEMORY_LIMIT_BYTES)]
    if sys.platform == "linux":
        limits += [(resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NOFILE, OPEN_FILES), (resource.RLIMIT_CORE, 0)]
    for kind, value in limits:
        with contextlib.suppress(ValueError, OSError):  # not every system can limit its address space
            resource.setrlimit(kind, (value, value))
    if sys.platform == "linux":
        from arpo_trl.tools.python import syscalls

        syscalls.drop_capabilities()
        if platform.machine() in syscalls.ARCHITECTURES:
            syscalls.confine()


if __name__ == "__main__":
    sys.path[:] = sys.argv[2:]
    _serve(float(sys.argv[1]))
