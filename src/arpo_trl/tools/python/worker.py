"""Runs each piece of code in a fork of one warm interpreter; the script behind `arpo_trl.tools.python.sandbox.Worker`.

It is started as `python worker.py TIER preload|bare CPU_S THREADS SCRATCH FOLDER SITE_PACKAGES… -- READABLE…`. The
sandbox hides arpo_trl, so this script imports only files next to it, by their paths.

    stdin    requests of 8 bytes: the seconds that the cells in the file `cells` may run; or a negative number, which
             stops the running call, if any, and prepares the fork for the next
    output   a named pipe next to `cells`, made for one call: the output of its code
    stderr   replies of this process (`REPLY`): "R" when ready, then per request how the call ended, and "E" when its
             fork has exited, which takes about as long as a short call

The code and the output of a call are never in this process, so a fork cannot find those of earlier calls in its
memory. The fork for the next call is created in advance and waits. Before that fork reads the code, it closes stdin
and stderr. The fork isolates itself from this process, by a Landlock domain or by namespaces, so that it cannot signal
or trace this process. The fork also drops its capabilities and all system calls that a computation does not need. So
no call can affect a later one.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import gc
import importlib.util
import io
import json
import os
import random
import resource
import select
import signal
import struct
import sys
import time
from types import ModuleType

REQUEST = struct.Struct("!d")  # seconds; negative: stop
REPLY = struct.Struct("!ci")  # b"R", b"E"; b"D" exited, b"T" timed out, b"C" out of CPU time, b"S" stopped; status

CELLS_FILE = "cells"
OUTPUT_PIPE = "output"
CPU_CHECK_S = 0.1  # between checks of the CPU time
_IDLE_S = 0.003  # a fork that waits this long has time to warm up
_TRANSIENT_USERS = (61184, 65519)  # of systemd's DynamicUser; containers may have no higher ids
_RESULT_FD = 3  # on which a fork reports how its last cell ended

_PR_SET_PDEATHSIG = 1
_LANDLOCK_CREATE_RULESET = 444  # the same numbers on every architecture
_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_SCOPES = 0b11  # abstract Unix sockets, signals (ABI 6)

# The functions that models use most. A fork inherits the imported modules and the caches that these calls fill.
_WARM_UP = """
import numpy.random, numpy.linalg
numpy.linalg.solve(numpy.eye(2), numpy.ones(2))
import sympy
x, y = sympy.symbols("x y")
n = sympy.Symbol("n", integer=True, positive=True)
sympy.factor(x**3 - 8), sympy.expand((x + y) ** 3), sympy.simplify(sympy.sin(x) ** 2 + sympy.cos(x) ** 2)
sympy.solve(x**2 - 5 * x + 6, x), sympy.solve([x + y - 3, x - y - 1], [x, y]), sympy.solve(sympy.Eq(2 * x, 3), x)
sympy.integrate(x**2 + 1, x), sympy.diff(sympy.sin(x) * sympy.exp(x), x), sympy.limit(sympy.sin(x) / x, x, 0)
sympy.summation(n, (n, 1, 10)), sympy.Matrix([[1, 2], [3, 4]]).inv(), sympy.factorint(360), sympy.isprime(97)
str(sympy.sqrt(8)), sympy.latex(x / 2), sympy.pi.evalf(20), sympy.sympify("2*x + 1"), sympy.Rational(1, 3)
sympy.gcd(12, 18), sympy.binomial(5, 2), sympy.nsimplify(0.5), float(sympy.Integer(2))
"""
# A fork copies a page of memory at its first write, even if only a reference count changes. This takes half the time
# of a short call. So an idle fork runs this code, which copies the pages that most calls need.
_TOUCH = """
import sympy
x = sympy.Symbol("x")
sympy.factor(x**3 - 8), sympy.solve(x**2 - 5 * x + 6, x)
"""


class _RulesetAttr(ctypes.Structure):
    """`struct landlock_ruleset_attr`."""

    _fields_ = [("access_fs", ctypes.c_uint64), ("access_net", ctypes.c_uint64), ("scoped", ctypes.c_uint64)]


_libc = ctypes.CDLL(None, use_errno=True)


def _syscall(*arguments: object) -> int:
    value = int(_libc.syscall(*arguments))
    if value < 0:
        raise OSError(ctypes.get_errno(), f"system call {arguments[0]} failed")
    return value


def within(hard: int, value: int) -> int:
    """Return `value`, or the hard limit if that is lower: only a process with more rights could raise it."""
    return value if hard == resource.RLIM_INFINITY else min(hard, value)


class _Call:
    """An isolated fork that waits for the signal to read the cells and run them."""

    def __init__(self, worker: _Worker):
        waiting, self._go = os.pipe()
        self.result, result_end = os.pipe()
        self._token = os.urandom(8)  # so that output of code to all descriptors does not look like a report
        self.pid = worker.namespaces.fork_call() if worker.namespaces else os.fork()
        if self.pid == 0:
            os.close(self._go)
            worker.become_call(waiting, result_end, self._token)
        os.close(waiting)
        os.close(result_end)
        self.pidfd = os.pidfd_open(self.pid)
        self._status: int | None = None

    def go(self) -> None:
        """Let the fork run the cells. Raises BrokenPipeError if it has exited."""
        os.write(self._go, b"g")

    def result_in(self, report: bytes) -> int | None:
        """Return the wait status of a fork that has ended its last cell, or None if `report` is not its report."""
        return report[-1] << 8 if report[:-1].endswith(self._token) else None

    def reap(self) -> int:
        """Return the wait status of the fork after it has exited."""
        if self._status is None:
            _, self._status = os.waitpid(self.pid, 0)
        return self._status

    def end(self) -> None:
        """Kill the fork if it still runs, and release its descriptors."""
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.reap()
        for fd in (self._go, self.result, self.pidfd):
            os.close(fd)


class _Worker:
    def __init__(self, tier: str, warm: bool, cpu_s: float, threads: int, scratch: str, namespaces: ModuleType | None):
        self._tier = tier
        self._warm = warm
        self._cpu_s = cpu_s
        self._threads = threads
        self._scratch = scratch
        self._cell = _load("python_cell")
        self._syscalls = _load("python_syscalls")
        self.namespaces = namespaces
        self._ruleset = None
        if tier == "sandlock":
            attr = _RulesetAttr(0, 0, _LANDLOCK_SCOPES)
            self._ruleset = _syscall(_LANDLOCK_CREATE_RULESET, ctypes.byref(attr), ctypes.sizeof(attr), 0)

    def serve(self) -> None:
        """Answer requests until stdin ends, when the parent has closed it or has exited."""
        if self.namespaces is None:
            # sandlock makes the kernel kill this process with the thread that started it, but threads that call tools
            # are short-lived. A fork can clear its own death signal. So this process must outlive the thread and the
            # trainer, and kill its fork when stdin ends.
            _libc.prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)
        gc.collect()
        gc.freeze()  # so that garbage collection in a fork does not write to, and so copy, every inherited page
        os.write(2, REPLY.pack(b"R", 0))
        call: _Call | None = None
        while request := os.read(0, REQUEST.size):
            (timeout_s,) = REQUEST.unpack(request)
            call = call or _Call(self)
            if timeout_s < 0:  # limits are now set, or the call to stop has just ended
                continue
            try:
                call.go()
            except BrokenPipeError:  # killed while it waited, for example because memory is short
                call.end()
                call = _Call(self)
                call.go()
            kind, status = self._watch(call, timeout_s)
            if kind == b"D":
                os.write(2, REPLY.pack(kind, status))
                call.end()
            else:  # it may still print
                call.end()
                os.write(2, REPLY.pack(kind, status))
            if self._tier == "unsafe":
                with contextlib.suppress(OSError):  # children of the fork that have not left its group
                    os.killpg(call.pid, signal.SIGKILL)
            os.write(2, REPLY.pack(b"E", 0))
            call = _Call(self)

    def _watch(self, call: _Call, timeout_s: float) -> tuple[bytes, int]:
        """Wait until the call reports its end, exits or must be stopped. Return (how it ended, wait status)."""
        poller = select.poll()
        for fd in (0, call.pidfd, call.result):
            poller.register(fd, select.POLLIN)
        cpu_clock = ~call.pid << 3 | 2  # of the whole process; see clock_getcpuclockid(3)
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            ready = {fd for fd, _ in poller.poll(max(0.0, min(left_s, CPU_CHECK_S)) * 1000)}
            if call.result in ready:
                report = os.read(call.result, 4096)
                if (status := call.result_in(report)) is not None:
                    return b"D", status
                if not report:
                    poller.unregister(call.result)  # the fork has closed it, and may still run
            elif call.pidfd in ready:
                return b"D", call.reap()
            elif 0 in ready:
                os.read(0, REQUEST.size)  # a stop, or the end of stdin, which also ends the loop of `serve`
                return b"S", 0
            elif left_s <= 0:
                return b"T", 0
            elif time.clock_gettime(cpu_clock) > self._cpu_s:
                return b"C", 0

    def _limit_threads(self) -> None:
        """Let the kernel limit the number of threads of this fork. It counts those of all processes with the same real
        user and user namespace, and exempts root, so this fork gets its own real user."""
        if self.namespaces is None:
            for user in (1 << 30 | random.getrandbits(29), random.randint(*_TRANSIENT_USERS)):
                with contextlib.suppress(OSError):  # it does not exist in this user namespace
                    os.setresuid(user, -1, -1)
                    break
            else:
                return
        threads = within(resource.getrlimit(resource.RLIMIT_NPROC)[1], self._threads)
        resource.setrlimit(resource.RLIMIT_NPROC, (threads, threads))

    def become_call(self, waiting: int, result_end: int, token: bytes) -> None:
        """Isolate this fork from the worker, wait for the signal, run the cells and exit with the last one's
        status."""
        status = self._cell.RAISED
        try:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.dup2(1, 2)  # this process writes nothing to it; later both are the call's pipe
            folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
            if self._ruleset is not None:
                # The Landlock domain blocks signals, so the fork can stay in the worker's process group. It must stay:
                # sandlock's supervisor, in the trainer, opens a descriptor for each process that leaves and keeps it.
                _syscall(_LANDLOCK_RESTRICT_SELF, self._ruleset, 0)
            else:
                os.setsid()  # a new process group: a signal to it reaches no other process in any namespace
            if self.namespaces is not None:
                self.namespaces.lock(self._scratch)
            if self._threads:
                self._limit_threads()
            self._syscalls.drop_capabilities()
            if self._tier != "unsafe":
                self._syscalls.confine()
                vars(self._cell)["NOT_PERMITTED"] = vars(sys.modules["python_refusals"])["MEANING"]
            if self._warm:
                poller = select.poll()
                poller.register(waiting, select.POLLIN)
                if not poller.poll(_IDLE_S * 1000):
                    exec(_TOUCH, {})
            if not os.read(waiting, 1):  # the worker has exited
                return
            with open(os.open(CELLS_FILE, os.O_RDONLY, dir_fd=folder), encoding="utf-8") as file:
                cells = json.load(file)
            output_end = os.open(OUTPUT_PIPE, os.O_WRONLY, dir_fd=folder)
            os.dup2(output_end, 1)
            os.dup2(output_end, 2)
            for name in (CELLS_FILE, OUTPUT_PIPE):
                os.unlink(name, dir_fd=folder)
            os.dup2(result_end, _RESULT_FD)
            os.closerange(_RESULT_FD + 1, 64)
            # Line-buffered, so that output printed before a deadline is not lost.
            output = io.BufferedWriter(io.FileIO(1, "w", closefd=False))
            shown = io.TextIOWrapper(output, "utf-8", "backslashreplace", line_buffering=True)
            sys.stdout = sys.stderr = sys.__stdout__ = sys.__stderr__ = shown  # type: ignore[misc]
            # The only folder in which matplotlib can write its settings and its list of fonts.
            os.environ["MPLCONFIGDIR"] = os.path.join(os.getcwd(), ".matplotlib")
            status = self._cell.run_cells(cells)
            os.write(_RESULT_FD, token + bytes([status]))
        finally:
            os._exit(status)


def _load(name: str) -> ModuleType:
    """Import a file next to this one as a module: `python_cell` is cell.py.

    The prefix leaves the name `cell` free for the model's code.
    """
    path = os.path.join(os.path.dirname(__file__), f"{name.removeprefix('python_')}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    tier, preload, cpu_s, threads, scratch, folder, *paths = sys.argv[1:]
    site_packages, readable = paths[: paths.index("--")], paths[paths.index("--") + 1 :]
    namespaces = None
    if tier == "namespaces":
        namespaces = _load("python_namespaces")
        namespaces.enter(folder, readable)
    sys.path.extend(site_packages)
    if tier != "unsafe":
        _load("python_semaphores").install()
        _load("python_refusals").install()
    warm = False
    if preload == "preload":
        with contextlib.suppress(Exception):  # numpy and sympy may be missing; Python works without them
            exec(_WARM_UP, {})
            warm = True
    os.access = functools.partial(os.access, effective_ids=True)  # the real user may be another one
    _Worker(tier, warm, float(cpu_s), int(threads), scratch, namespaces).serve()


if __name__ == "__main__":
    main()
