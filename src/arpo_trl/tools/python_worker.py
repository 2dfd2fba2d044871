"""Runs each piece of code in a fork of one warm interpreter; the script behind `arpo_trl.tools.sandbox.Worker`.

Started as `python worker.py isolated|unsafe preload|bare SITE_PACKAGES…` with the private folder as working directory,
and imports nothing of arpo_trl, which it could not read from inside the sandbox.

    stdin    requests, 8 bytes each: seconds to run the file `code` for, or a negative number: stop what runs now
    stdout   what the code prints; this process never writes to it
    stderr   replies of this process: "R" ready, then per request how the fork ended (`REPLY`)

This process never holds a call's code or output, so its forks cannot find those of an earlier call in their memory.
A fork closes stdin and stderr before it runs anything and enters a Landlock domain of its own, from which this process
can be neither signalled nor traced: nothing that a call does reaches the next one.
"""

import ast
import contextlib
import ctypes
import fcntl
import gc
import importlib
import io
import linecache
import os
import random
import select
import signal
import struct
import sys
import threading
import traceback
import types

REQUEST = struct.Struct("!d")  # seconds; negative: stop
REPLY = struct.Struct("!ci")  # b"R" ready, b"D" ended by itself, b"T" out of time, b"S" stopped; wait status

SUCCEEDED = 0
RAISED = 1
CODE_FILE = "code"
SHOWN_NAME = "<python>"
TRACEBACK_LINES = 12

_PR_SET_PDEATHSIG = 1
_LANDLOCK_CREATE_RULESET = 444  # the same numbers on every architecture
_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_SCOPES = 0b11  # abstract Unix sockets, signals (ABI 6)


class _RulesetAttr(ctypes.Structure):
    """`struct landlock_ruleset_attr`."""

    _fields_ = [("access_fs", ctypes.c_uint64), ("access_net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


_libc = ctypes.CDLL(None, use_errno=True)


def _syscall(*arguments: object) -> int:
    value = int(_libc.syscall(*arguments))
    if value < 0:
        raise OSError(ctypes.get_errno(), f"system call {arguments[0]} failed")
    return value


def serve(isolated: bool) -> None:
    """Answer requests until stdin ends, that is until the parent has closed it or is gone."""
    # sandlock has this process die with the thread that started it. Threads that call tools come and go, and a fork
    # can undo its death signal: so this process outlives both thread and trainer, and ends its fork when stdin ends.
    _libc.prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)
    ruleset = None
    if isolated:
        attr = _RulesetAttr(0, 0, _LANDLOCK_SCOPES)
        ruleset = _syscall(_LANDLOCK_CREATE_RULESET, ctypes.byref(attr), ctypes.sizeof(attr), 0)
    stdout_flags = fcntl.fcntl(1, fcntl.F_GETFL)
    gc.freeze()  # keeps the collector of a fork from writing to, and so copying, every inherited page
    os.write(2, REPLY.pack(b"R", 0))
    while request := os.read(0, REQUEST.size):
        (timeout_s,) = REQUEST.unpack(request)
        if timeout_s < 0:  # a stop that crossed the end of what it was meant for
            continue
        fcntl.fcntl(1, fcntl.F_SETFL, stdout_flags)  # the flags are shared with the last fork, which may have set them
        pid = os.fork()
        if pid == 0:
            _become_call(ruleset)
        os.write(2, REPLY.pack(*_watch(pid, timeout_s)))


def _watch(pid: int, timeout_s: float) -> tuple[bytes, int]:
    """(how it ended, wait status) of the fork, which is gone when this returns."""
    pidfd = os.pidfd_open(pid)
    poller = select.poll()
    poller.register(0, select.POLLIN)
    poller.register(pidfd, select.POLLIN)
    ready = {fd for fd, _ in poller.poll(timeout_s * 1000)}
    if pidfd in ready:
        kind = b"D"
    else:
        kind = b"S" if 0 in ready else b"T"
        if kind == b"S":
            os.read(0, REQUEST.size)  # the stop, or nothing: then the loop of `serve` ends as well
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):  # what the fork started, where it could start something
        os.killpg(pid, signal.SIGKILL)
    os.close(pidfd)
    return kind, status


def _become_call(ruleset: int | None) -> None:
    """Cut this fork off from the worker, run the code and leave with `SUCCEEDED` or `RAISED`; never returns."""
    status = RAISED
    try:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if ruleset is None:
            os.setsid()  # a group of its own, with what it starts
        else:
            _syscall(_LANDLOCK_RESTRICT_SELF, ruleset, 0)
        null = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null, 0)
        os.dup2(1, 2)
        os.closerange(3, 64)
        with open(CODE_FILE, encoding="utf-8") as file:
            source = file.read()
        os.unlink(CODE_FILE)
        # Line by line, so that what was printed before a deadline is there.
        output = io.BufferedWriter(io.FileIO(1, "w", closefd=False))
        sys.stdout = sys.stderr = io.TextIOWrapper(output, "utf-8", "backslashreplace", line_buffering=True)
        status = run(source)
        sys.stdout.flush()
    finally:
        os._exit(status)


def run(source: str) -> int:
    """`SUCCEEDED` or `RAISED`, having printed what a notebook cell would print."""
    random.seed(0)  # a run that is repeated sees the same numbers
    if "numpy.random" in sys.modules:
        sys.modules["numpy.random"].seed(0)
    linecache.cache[SHOWN_NAME] = (len(source), None, source.splitlines(keepends=True), SHOWN_NAME)
    main = types.ModuleType("__main__")
    sys.modules["__main__"] = main
    try:
        body = ast.parse(source, SHOWN_NAME).body
        shown = [body.pop()] if body and isinstance(body[-1], ast.Expr) else []
        exec(compile(ast.Module(body, []), SHOWN_NAME, "exec", dont_inherit=True), main.__dict__)
        exec(compile(ast.Interactive(shown), SHOWN_NAME, "single", dont_inherit=True), main.__dict__)
        for thread in threading.enumerate():
            if thread is not threading.current_thread() and not thread.daemon:
                thread.join()
    except SystemExit as error:
        if error.code in (None, 0):
            return SUCCEEDED
        print(f"SystemExit: {error.code}")
        return RAISED
    except BaseException as error:
        _print_traceback(error)
        return RAISED
    return SUCCEEDED


def _print_traceback(error: BaseException) -> None:
    """Print the last lines of the traceback with the frames of the user's own code only."""
    trace = traceback.TracebackException.from_exception(error)
    trace.stack = traceback.StackSummary.from_list([frame for frame in trace.stack if frame.filename == SHOWN_NAME])
    lines = "".join(trace.format(chain=False)).splitlines()
    if len(lines) > TRACEBACK_LINES:
        lines = ["Traceback (last lines):", *lines[-TRACEBACK_LINES:]]
    if sys.stdout is not None:
        print("\n".join(lines))


def main() -> None:
    isolated, preload, *site_packages = sys.argv[1:]
    sys.path.extend(site_packages)
    for name in ("numpy.random", "sympy") if preload == "preload" else ():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    serve(isolated == "isolated")


if __name__ == "__main__":
    main()
