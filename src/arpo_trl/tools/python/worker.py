"""Runs each piece of code in a fork of one warm interpreter; the script behind `arpo_trl.tools.python.sandbox.Worker`.

Started as `python worker.py TIER preload|bare CPU_S SCRATCH FOLDER SITE_PACKAGES… -- READABLE…`, and imports
nothing of arpo_trl, which it could not read from inside the sandbox, but three files next to it, by their paths.

    stdin    requests, 8 bytes each: seconds to run the cells in the file `cells` for, or a negative number: stop what
             runs now, and be ready for the next
    stdout   what the code prints; this process never writes to it
    stderr   replies of this process (`REPLY`): "R" ready, then per request how the call ended, and "E" when its fork
             is gone, which takes about as long as a short call

This process never holds a call's code or output, so its forks cannot find those of an earlier call in their memory.
The fork for the next call is made ahead and waits. Before it reads the code it closes stdin and stderr, cuts itself
off from this process, by a Landlock domain or by namespaces, such that it can neither signal nor trace it, and gives
up capabilities and the system calls that a computation does not need: nothing that a call does reaches the next one.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import importlib.util
import io
import json
import os
import select
import signal
import struct
import sys
import time
from types import ModuleType

REQUEST = struct.Struct("!d")  # seconds; negative: stop
REPLY = struct.Struct("!ci")  # b"R", b"E"; b"D" ended by itself, b"T" out of time, b"C" of CPU, b"S" stopped; status

CELLS_FILE = "cells"
RAISED = 1  # as in python_cell
CPU_LOOK_S = 0.1
_IDLE_S = 0.003  # after which nobody is taken to be waiting for the fork
_RESULT_FD = 3  # on which a fork says how its last cell ended

_PR_SET_PDEATHSIG = 1
_LANDLOCK_CREATE_RULESET = 444  # the same numbers on every architecture
_LANDLOCK_RESTRICT_SELF = 446
_LANDLOCK_SCOPES = 0b11  # abstract Unix sockets, signals (ABI 6)

# What models use first. A fork that finds it done copies what is there instead of importing and working it out.
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
# A fork copies a page of memory when it first writes to it, if only to count a reference: half the time of a short
# call. One that waits with nothing to do does so with the pages that most calls need.
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


class _Call:
    """A fork that waits, cut off already, for the word to read the cells and run them."""

    def __init__(self, worker: _Worker):
        waiting, self._go = os.pipe()
        self.result, says = os.pipe()
        self._word = os.urandom(8)  # code that writes to every descriptor does not say it by accident
        self.pid = worker.namespaces.fork_call() if worker.namespaces else os.fork()
        if self.pid == 0:
            os.close(self._go)
            worker.become_call(waiting, says, self._word)
        os.close(waiting)
        os.close(says)
        self.pidfd = os.pidfd_open(self.pid)
        self._status: int | None = None

    def go(self) -> None:
        """Let it run. Raises BrokenPipeError when it is gone."""
        os.write(self._go, b"g")

    def result_in(self, said: bytes) -> int | None:
        """The wait status of a fork that ended its last cell, if it says so."""
        return said[-1] << 8 if said[:-1].endswith(self._word) else None

    def reap(self) -> int:
        """The wait status of a fork that has ended."""
        if self._status is None:
            _, self._status = os.waitpid(self.pid, 0)
        return self._status

    def end(self) -> None:
        """Return when the fork is gone, by force if it is not."""
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.reap()
        for fd in (self._go, self.result, self.pidfd):
            os.close(fd)


class _Worker:
    def __init__(self, tier: str, warm: bool, cpu_s: float, scratch: str, namespaces: ModuleType | None):
        self._tier = tier
        self._warm = warm
        self._cpu_s = cpu_s
        self._scratch = scratch
        self._cell = _load("python_cell")
        self._syscalls = _load("python_syscalls")
        self.namespaces = namespaces
        self._ruleset = None
        if tier == "sandlock":
            attr = _RulesetAttr(0, 0, _LANDLOCK_SCOPES)
            self._ruleset = _syscall(_LANDLOCK_CREATE_RULESET, ctypes.byref(attr), ctypes.sizeof(attr), 0)

    def serve(self) -> None:
        """Answer requests until stdin ends, that is until the parent has closed it or is gone."""
        if self.namespaces is None:
            # sandlock has this process die with the thread that started it. Threads that call tools come and go, and a
            # fork can undo its death signal: so this process outlives both thread and trainer, and ends its fork when
            # stdin ends.
            _libc.prctl(_PR_SET_PDEATHSIG, 0, 0, 0, 0)
        stdout_flags = fcntl.fcntl(1, fcntl.F_GETFL)
        gc.collect()
        gc.freeze()  # keeps the collector of a fork from writing to, and so copying, every inherited page
        os.write(2, REPLY.pack(b"R", 0))
        call: _Call | None = None
        while request := os.read(0, REQUEST.size):
            (timeout_s,) = REQUEST.unpack(request)
            call = call or _Call(self)
            if timeout_s < 0:  # limits are set now; or a stop that crossed the end of what it was meant for
                continue
            fcntl.fcntl(1, fcntl.F_SETFL, stdout_flags)  # shared with the last fork, which may have set them
            try:
                call.go()
            except BrokenPipeError:  # killed while it waited, as by a machine short of memory
                call.end()
                call = _Call(self)
                call.go()
            kind, status = self._watch(call, timeout_s)
            if kind == b"D":
                os.write(2, REPLY.pack(kind, status))
                call.end()
            else:  # it may be printing still
                call.end()
                os.write(2, REPLY.pack(kind, status))
            if self._tier == "unsafe":
                with contextlib.suppress(OSError):  # what the fork started, unless that left its group
                    os.killpg(call.pid, signal.SIGKILL)
            os.write(2, REPLY.pack(b"E", 0))
            call = _Call(self)

    def _watch(self, call: _Call, timeout_s: float) -> tuple[bytes, int]:
        """(how the call ended, wait status): by its word, by its death, or because it has to be ended."""
        poller = select.poll()
        for fd in (0, call.pidfd, call.result):
            poller.register(fd, select.POLLIN)
        cpu_clock = ~call.pid << 3 | 2  # of the whole process; see clock_getcpuclockid(3)
        deadline = time.monotonic() + timeout_s
        while True:
            left_s = deadline - time.monotonic()
            ready = {fd for fd, _ in poller.poll(max(0.0, min(left_s, CPU_LOOK_S)) * 1000)}
            if call.result in ready:
                said = os.read(call.result, 4096)
                if (status := call.result_in(said)) is not None:
                    return b"D", status
                if not said:
                    poller.unregister(call.result)  # it has closed it, and may yet run
            elif call.pidfd in ready:
                return b"D", call.reap()
            elif 0 in ready:
                os.read(0, REQUEST.size)  # the stop, or nothing: then the loop of `serve` ends as well
                return b"S", 0
            elif left_s <= 0:
                return b"T", 0
            elif time.clock_gettime(cpu_clock) > self._cpu_s:
                return b"C", 0

    def become_call(self, waiting: int, says: int, word: bytes) -> None:
        """Cut this fork off from the worker, await the word, run the cells and leave as the last ended."""
        status = RAISED
        try:
            _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            null = os.open(os.devnull, os.O_RDONLY)
            os.dup2(null, 0)
            os.dup2(1, 2)
            folder = os.open(".", os.O_RDONLY | os.O_DIRECTORY)
            if self._ruleset is not None:
                # Signals end at this domain, so it may stay in the worker's group. It must: sandlock's supervisor,
                # which is in the trainer, opens a descriptor for each process that leaves its group, and keeps them.
                _syscall(_LANDLOCK_RESTRICT_SELF, self._ruleset, 0)
            else:
                os.setsid()  # a group of its own: a signal to its group reaches no other, in any namespace
            if self.namespaces is not None:
                self.namespaces.lock(self._scratch)
            self._syscalls.drop_capabilities()
            if self._tier != "unsafe":
                self._syscalls.confine()
            if self._warm and not select.select([waiting], [], [], _IDLE_S)[0]:
                exec(_TOUCH, {})
            if not os.read(waiting, 1):  # the worker is gone
                return
            with open(os.open(CELLS_FILE, os.O_RDONLY, dir_fd=folder), encoding="utf-8") as file:
                cells = json.load(file)
            os.unlink(CELLS_FILE, dir_fd=folder)
            os.dup2(says, _RESULT_FD)
            os.closerange(_RESULT_FD + 1, 64)
            # Line by line, so that what was printed before a deadline is there.
            output = io.BufferedWriter(io.FileIO(1, "w", closefd=False))
            sys.stdout = sys.stderr = io.TextIOWrapper(output, "utf-8", "backslashreplace", line_buffering=True)
            # The one place that matplotlib can write its settings and its list of fonts to.
            os.environ["MPLCONFIGDIR"] = os.path.join(os.getcwd(), ".matplotlib")
            status = self._cell.run_cells(cells)
            os.write(_RESULT_FD, word + bytes([status]))
        finally:
            os._exit(status)


def _load(name: str) -> ModuleType:
    """The file next to this one, as a module: `python_cell` is in cell.py, so that code can have its own `cell`."""
    path = os.path.join(os.path.dirname(__file__), f"{name.removeprefix('python_')}.py")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def main() -> None:
    tier, preload, cpu_s, scratch, folder, *paths = sys.argv[1:]
    site_packages, readable = paths[: paths.index("--")], paths[paths.index("--") + 1 :]
    namespaces = None
    if tier == "namespaces":
        namespaces = _load("python_namespaces")
        namespaces.enter(folder, readable)
    sys.path.extend(site_packages)
    if tier != "unsafe":
        _load("python_semaphores").install()
    warm = False
    if preload == "preload":
        with contextlib.suppress(Exception):  # without them the rest of Python still works
            exec(_WARM_UP, {})
            warm = True
    _Worker(tier, warm, float(cpu_s), scratch, namespaces).serve()


if __name__ == "__main__":
    main()
