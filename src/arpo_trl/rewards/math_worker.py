"""Mathematical equality in a separate process, so that no answer of a model can block or crash training.

`rewards.mathematics` rejects numbers that are too large, but an integral or a sum can still keep sympy busy for hours,
and a timeout in Python does not interrupt big-integer code in C. So a worker process, which runs this file as a
script, compares the answers under limits that the kernel enforces: CPU time (not wall time, so that the load of the
machine does not affect rewards) and memory. The kernel kills a worker that exceeds a limit. The next question starts a
new worker. The worker's input comes from a model. So on Linux the worker is confined like calls of the python tool: it
has no environment and no capabilities, writes no files, and may make only the system calls of a list
(`tools.python.syscalls`).

    parent, any thread   ["1/2", "0.5"]\\n ──▶   worker
                                      1\\n ◀──
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

if __name__ == "__main__":  # before any import of this package, so that the worker runs the code that started it
    sys.path[:] = sys.argv[2:]

from arpo_trl.common.per_process import one_per_process

CPU_LIMIT_S = 2.0
"""The maximum CPU seconds of a comparison. A typical comparison takes less than a millisecond."""
MEMORY_LIMIT_BYTES = 2 << 30
"""Address space of the worker in bytes. sympy needs a tenth of it."""
OPEN_FILES = 64
"""The maximum number of open file descriptors of the worker."""
LIMIT_SIGNALS = frozenset((signal.SIGPROF, signal.SIGSEGV, signal.SIGABRT))
"""What ends a worker whose answer exceeds the limits: CPU time, the stack, or the memory of GMP."""
START_PATIENCE_S = 30.0
"""Seconds for which the start of a worker is retried on a machine without a free process."""
_START_WAIT_S = 0.5
_EXIT_S = 5.0
"""Seconds for the exit of a worker that has closed its pipe."""


class MathWorker:
    """A process that decides whether two expressions are equal. The first question starts it.

    Thread-safe: it answers one question at a time. Use a worker only in the process that created it; see
    `math_worker`.
    """

    def __init__(self, cpu_limit_s: float = CPU_LIMIT_S):
        self.cpu_limit_s = cpu_limit_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner_pid = os.getpid()
        atexit.register(self.close)

    def equal(self, prediction: str, gold: str) -> bool:
        """Whether `prediction` is mathematically equal to `gold`; False if the comparison exceeds a limit.

        Raises:
            RewardError: The worker cannot start, or ends by itself without an answer.
        """
        return self._answer([prediction, gold]) == "1"

    def is_text(self, answer: str) -> bool:
        """Whether only the same text equals `answer`: it consists of words, or the parser cannot read it within the
        limits.

        Raises:
            RewardError: As `equal`.
        """
        return self._answer([answer]) != "0"

    def _answer(self, question: list[str]) -> str:
        from arpo_trl.errors import RewardError  # imported late, because the worker does not need them
        from arpo_trl.visible import get_logger

        with self._lock:
            for _ in range(2):
                try:
                    process = self._running()
                    if reply := _ask(process, json.dumps(question)):
                        return reply
                    status = _exit_status(process)
                except BaseException:  # an interrupt may leave a line in the pipe, which the next question would read
                    self._stop()
                    raise
                self._stop()  # a new one can answer if only this one was killed, or had used up its memory
                if status is not None and -status in LIMIT_SIGNALS:
                    return ""
            if status is not None and status < 0:
                get_logger(__name__).warning(
                    "The worker that compares mathematical answers was killed by signal %d, twice, so an answer "
                    "counts as not equal. Check what ends processes here, such as a memory limit.",
                    -status,
                )
                return ""
            raise RewardError(
                "The worker that compares mathematical answers started, but "
                + ("closed its pipe" if status is None else f"exited with status {status}")
                + " instead of answering, twice; expected a reply. Check that this Python can run "
                "arpo_trl/rewards/math_worker.py."
            )

    def close(self) -> None:
        """Stop the worker. The next question starts a new one."""
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
            from arpo_trl.errors import RewardError  # imported late, because the worker does not need it

            raise RewardError(
                f"The worker that compares mathematical answers did not start (exit code {process.returncode}). Read "
                "its error on stderr, and check that sympy can be imported."
            )
        return process

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()  # closes the pipes and reaps it
            self._process = None


def _started(cpu_limit_s: float) -> subprocess.Popen[str]:
    """Start a worker process. Retry, with a warning, while the machine has no free process or memory.

    Raises:
        RewardError: The start still fails after `START_PATIENCE_S` seconds.
    """
    deadline = time.monotonic() + START_PATIENCE_S
    while True:
        try:
            return subprocess.Popen(
                # Isolated from the environment, with the import path of this process.
                [sys.executable, "-I", "-X", "utf8", __file__, str(cpu_limit_s), *map(os.path.abspath, sys.path)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                encoding="utf-8",
                env={},
                start_new_session=True,  # the parent handles Ctrl-C; the worker exits when stdin closes
            )
        except OSError as error:
            if time.monotonic() >= deadline:
                from arpo_trl.errors import RewardError  # imported late, because the worker does not need it

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
    """The worker's reply, or "" if the worker exited before it replied."""
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(question + "\n")
        process.stdin.flush()
    except BrokenPipeError:
        return ""
    return process.stdout.readline().strip()


def _exit_status(process: subprocess.Popen[str]) -> int | None:
    """The exit status of a worker without a reply, negative after a signal; None if it has only closed its pipe."""
    try:
        return process.wait(_EXIT_S)
    except subprocess.TimeoutExpired:
        return None


@one_per_process
def math_worker() -> MathWorker:
    """The worker of this process."""
    return MathWorker()


def _serve(cpu_limit_s: float) -> None:
    """Answer the questions on stdin until it closes. Runs in the worker's main thread."""
    import fcntl
    import logging

    from arpo_trl.rewards.mathematics.equality import equal, is_text

    logging.disable(logging.CRITICAL)
    equal(r"\frac{1}{2}", "0.5")  # fills caches before the CPU time of questions is measured

    # Not 2, which is free if the parent has no stderr: it is replaced below.
    replies = os.fdopen(fcntl.fcntl(1, fcntl.F_DUPFD_CLOEXEC, 3), "w", encoding="utf-8", buffering=1)
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)  # output that the parser prints must not be read as a reply
    _confine()
    replies.write("ready\n")
    os.dup2(null, 2)

    for line in sys.stdin:
        question = json.loads(line)
        # SIGPROF has no handler, so the kernel kills the process when the timer fires, even inside C code.
        signal.setitimer(signal.ITIMER_PROF, cpu_limit_s)
        try:
            yes = equal(*question) if len(question) == 2 else is_text(*question)
        except (Exception, RecursionError, MemoryError):
            yes = len(question) == 1
        signal.setitimer(signal.ITIMER_PROF, 0)
        replies.write("1\n" if yes else "0\n")


def _confine() -> None:
    """Permanently limit this process's resources and system calls. Systems other than Linux limit at most its
    memory."""
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
    _serve(float(sys.argv[1]))
