"""A warm Python interpreter that runs pieces of code one by one, isolated from this machine and from each other.

The protection of each tier (every line has a test for each tier):

    | model-written code tries to                              | sandlock | namespaces | unsafe |
    |----------------------------------------------------------|----------|------------|--------|
    | run past its deadline, in wall or in CPU time            | yes      | yes        | yes    |
    | print too much output (stopped while it is read)         | yes      | yes        | yes    |
    | take too much memory                                     | yes      | yes        | yes    |
    | write a huge file; open very many                        | yes      | yes        | yes    |
    | write very much in total; leave very many files          | yes      | yes        | yes    |
    | run very many threads (stopped while they are counted)   | yes      | yes        | yes    |
    | run more than four times as many threads, at any moment | root     | yes (1)    | root   |
    | see the environment of the trainer                       | yes      | yes        | yes    |
    | leave files or variables for the next call               | yes      | yes        | yes    |
    | change the pipe of the next call                         | yes      | yes        | yes    |
    | use rights that only root has                            | yes      | yes        | yes    |
    | raise its limits                                         | yes      | yes        | no     |
    | read files outside Python's and the system's libraries   | yes      | yes        | no     |
    | write, chmod or touch files outside its own folder       | yes      | yes        | no     |
    | read or change attributes, flags, access lists of files  | yes      | yes        | no     |
    | lock, lease or watch files; change its own pipe          | yes      | yes        | no     |
    | reach the network, including this machine's ports        | yes      | yes        | no     |
    | start processes, and so leave some behind                | yes      | yes        | no     |
    | signal or trace the worker that runs later calls         | yes      | yes        | no     |
    | change limits or priority of other processes             | yes      | yes        | no     |
    | see other processes: ids, groups, limits, CPU time       | yes      | yes        | no     |
    | leave shared memory, keys or files in memory behind      | yes      | yes        | no     |
    | use parts of the kernel that a computation does not need | yes      | yes        | no     |
    | see whether a path exists, its size, owner and times,    |          |            |        |
    | and where a link points                                  | no       | yes        | no     |
    | see the machine's kernel, uptime, memory and load        | no       | no         | no     |

    (1) except if the trainer is root with a hard limit of fewer than 10,000 processes

- sandlock: Landlock and seccomp around the worker, with stricter rules around each call. Needs Linux 6.12 or newer.
- namespaces: `namespaces` around the worker and each call, and seccomp around each call. Needs Linux 5.14 or newer and
  the right to create user namespaces, which some distributions and most containers deny. (bubblewrap needs the same
  right.)
- unsafe: only a child process with resource limits and without capabilities.

`syscalls` lists the system calls that are allowed in the first two tiers. Threads are counted two hundred times a
second, and a call that exceeds the limit is stopped. The kernel refuses more than four times the limit, because it
counts the threads of a user: under namespaces, the user of a user namespace; otherwise a user that each call has to
itself, which needs a trainer with the capabilities SETUID and SYS_PTRACE ("root" in the table; a container's root
often lacks the second). Without them there may be several hundred threads before a call is stopped, or several
thousand on a busy machine. In unsafe, code can undo this change of its user, and only the threads of the call's
process are counted, not the threads of processes that it starts.

The kernel cannot limit the size of a folder under sandlock and unsafe. So files are counted fifty times a second.
Until a call is stopped there may be several thousand files.

No tier prevents code from using all cores until its deadline. Only a virtual machine protects against kernel exploits.

Starting an interpreter and importing sympy takes longer than most calls. So a worker does this once and forks for each
call. `worker` describes how calls are isolated from each other. A worker runs one call at a time, so use one per
thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import select
import socket
import stat
import subprocess
import sys
import tempfile
import time
import weakref
import zoneinfo
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from arpo_trl.errors import SandboxError
from arpo_trl.tools.python import cell as python_cell
from arpo_trl.tools.python import folder as python_folder
from arpo_trl.tools.python import namespaces as python_namespaces
from arpo_trl.tools.python import refusals as python_refusals
from arpo_trl.tools.python import semaphores as python_semaphores
from arpo_trl.tools.python import syscalls as python_syscalls
from arpo_trl.tools.python import worker as python_worker
from arpo_trl.tools.python.worker import REPLY, REQUEST
from arpo_trl.visible import encodable

_START_TIMEOUT_S = 60.0
_GRACE_S = 5.0  # beyond the deadline of a call, before the worker counts as lost
# Seconds between checks of the limits that the kernel does not enforce. Threads start fast, and a count takes 20 µs.
_CHECK_THREADS_S, _CHECK_FILES_S = 0.005, 0.02
_READ_BYTES = 1 << 16
_REFUSED_THREADS = 4  # times the limit at which a call is stopped
_CAP_SETUID, _CAP_SYS_PTRACE = 7, 19
_ENVIRONMENT = {
    "LANG": "C.UTF-8",
    "PYTHONHASHSEED": "0",  # sets print in the same order each time
    "OMP_NUM_THREADS": "1",  # a fork keeps only the thread that called fork
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "MPLBACKEND": "Agg",  # there is no display
}
_SITE_PACKAGES = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
_PREFIXES = {sys.prefix, sys.base_prefix, os.path.realpath(sys.base_prefix)} - {"/usr", "/usr/local"}
_LIBRARIES = (
    *((path, "site-packages") for path in _SITE_PACKAGES),
    (os.path.dirname(os.path.realpath(os.__file__)), "python"),
    *((path, "/python") for path in sorted(_PREFIXES, key=len, reverse=True)),
)
"""Folders of Python and of installed packages, and how the output of a call shows them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The limits of one call.

    Example: `Limits(timeout_s=10.0, memory_mb=1024)`
    """

    timeout_s: float = 5.0
    cpu_s: float = 5.0  # sum over all threads; checked ten times a second
    memory_mb: int = 512  # MiB of address space on top of that of the warm interpreter
    output_bytes: int = 100_000
    file_mb: int = 16  # MiB per file
    open_files: int = 64
    disk_mb: int = 64  # MiB written in total, including deleted files
    files: int = 1024  # files and folders that exist at the same time
    threads: int = 64  # threads that run at the same time


class Tier(StrEnum):
    """The isolation of a worker from this machine. The module docstring lists the protection of each tier."""

    SANDLOCK = "sandlock"
    NAMESPACES = "namespaces"
    UNSAFE = "unsafe"


ISOLATING = (Tier.SANDLOCK, Tier.NAMESPACES)
"""The tiers that isolate, in order of preference."""


class Ending(StrEnum):
    """The way a call ended."""

    FINISHED = "finished"
    RAISED = "raised"  # the traceback is in the output
    DIED = "died"  # the process ended without a traceback: a crash in C code, or a limit
    TIMEOUT = "timeout"
    CPU = "cpu"  # stopped at `cpu_s`
    FLOOD = "flood"  # stopped at `output_bytes`
    DISK = "disk"  # stopped at `disk_mb` or `files`
    THREADS = "threads"  # stopped at `threads`


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """The outcome of one call: its output, cut to `output_bytes`, and the way it ended.

    Example: `Run(output="42\\n", ending=Ending.FINISHED)`
    """

    output: str
    ending: Ending


def ending_of(exit_code: int) -> Ending:
    """Return how code ended whose process ended with `exit_code`, which is negative after a signal."""
    return {python_cell.SUCCEEDED: Ending.FINISHED, python_cell.RAISED: Ending.RAISED}.get(exit_code, Ending.DIED)


_OF_PARENT: list[Worker] = []
"""In a fork, closed workers of its parent. They are kept: the destructor of their process would wait for its end."""


class WorkerLost(Exception):
    """The worker has exited or does not answer. The call has no result, and the worker is closed."""


class Worker:
    """A warm interpreter in a separate process. `run` executes each call in a new fork of it. Not thread-safe.

    Args:
        preload: Import numpy and sympy before the first call.

    Raises:
        SandboxError: The process cannot be started with the isolation of `tier`.
    """

    def __init__(self, limits: Limits, *, tier: Tier, preload: bool) -> None:
        if not sys.platform.startswith("linux"):
            raise SandboxError(f"The sandbox for Python code needs Linux, but this is {sys.platform}")
        self.tier = tier
        self._limits = limits
        self.folder = Path(tempfile.mkdtemp(prefix="arpo-python-"))
        """The working directory of every call, empty at its start."""
        # Also runs at exit, when a call may still be running. Only a killed trainer leaves the folder behind.
        self._owner_pid = os.getpid()
        self._remove_folder = weakref.finalize(self, _remove_own, self.folder, self._owner_pid)
        self._process: Any = None  # subprocess.Popen or sandlock.Process: stdin, stderr, pid, kill, wait
        try:
            self._process = _start(self.folder, tier, preload, limits)
            self._stdin, self._control = self._process.stdin.fileno(), self._process.stderr.fileno()
            self._ending = False  # whether the fork of the last call may still exist
            self._await_ready(tier)
            self.pid = _only_child(self._process.pid) if tier is Tier.NAMESPACES else int(self._process.pid)
            self._set_limits()
            # The worker now forks for the first call. The fork inherits the limits.
            os.write(self._stdin, REQUEST.pack(-1.0))
        except BaseException:
            self.close()
            raise

    def _await_ready(self, tier: Tier) -> None:
        said = b""
        deadline = time.monotonic() + _START_TIMEOUT_S
        while len(said) < REPLY.size or said[:1] != b"R":
            wait_ms = max(0.0, deadline - time.monotonic()) * 1000
            chunk = os.read(self._control, _READ_BYTES) if _poll(wait_ms, self._control) else b""
            said += chunk
            if not chunk:
                lines = said.decode(errors="replace").split("\n")
                error = next((line.strip() for line in reversed(lines) if line.strip()), "it printed nothing")
                raise SandboxError(f"the Python worker ({tier}) did not start: {error[-500:]}")

    def _set_limits(self) -> None:
        """Set limits on the worker from outside. Its forks inherit them and cannot raise them."""
        pid, limits = self.pid, self._limits
        if not _children_of(pid).exists():
            raise SandboxError(f"this kernel has no {_children_of(pid)}, so calls cannot be monitored")
        pages = int(Path(f"/proc/{pid}/statm").read_text().split()[0])
        memory = pages * os.sysconf("SC_PAGE_SIZE") + (limits.memory_mb << 20)
        for kind, value in (
            (resource.RLIMIT_AS, memory),
            (resource.RLIMIT_FSIZE, limits.file_mb << 20),
            (resource.RLIMIT_NOFILE, limits.open_files),
            (resource.RLIMIT_CORE, 0),
        ):
            value = python_worker.within(resource.prlimit(pid, kind)[1], value)
            resource.prlimit(pid, kind, (value, value))

    @property
    def is_of_parent(self) -> bool:
        """Whether this process is a fork of the one that started the worker."""
        return os.getpid() != self._owner_pid

    def run(self, code: str, earlier: Sequence[str] = ()) -> Run:
        """Run `code` after the cells `earlier`, whose output is hidden. All cells share one deadline.

        Raises:
            WorkerLost: The worker failed during this call or before it.
        """
        deadline = time.monotonic() + self._limits.timeout_s + _GRACE_S
        try:
            self._await_end(deadline)
            cells = json.dumps([encodable(cell) for cell in (*earlier, code)])
            (self.folder / python_worker.CELLS_FILE).write_text(cells, "utf-8")
            with self._new_pipe() as pipe:
                os.write(self._stdin, REQUEST.pack(self._limits.timeout_s))
                output, kind, status, excess = self._read(pipe, deadline)
            with contextlib.suppress(OSError):  # a failure is harmless: this runs again before the next call
                python_folder.empty(self.folder)
        except OSError as error:
            self.close()
            # Without the name of the worker's folder, so that a warning about a full disk does not repeat.
            reason = f"{error.strerror}: {self.folder.parent}" if error.filename else str(error)
            raise WorkerLost(reason) from error
        except BaseException:  # such as KeyboardInterrupt; otherwise the next call would read this call's reply
            self.close()
            raise
        if len(output) > self._limits.output_bytes:
            cut = output[: self._limits.output_bytes].decode("utf-8", "ignore")
            return Run(output=self._without_paths(cut), ending=Ending.FLOOD)
        limit = excess or {b"T": Ending.TIMEOUT, b"C": Ending.CPU}.get(kind)
        ending = limit or ending_of(os.waitstatus_to_exitcode(status))
        return Run(output=self._without_paths(output.decode("utf-8", "replace")), ending=ending)

    @contextlib.contextmanager
    def _new_pipe(self) -> Iterator[int]:
        """Make a named pipe for the output of one call, and yield its read end. The fork removes the name."""
        path = self.folder / python_worker.OUTPUT_PIPE
        os.mkfifo(path, 0o600)
        pipe = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            yield pipe
        finally:
            os.close(pipe)

    def _without_paths(self, text: str) -> str:
        """Return what a call printed without paths of this machine, such as those in tracebacks that code prints."""
        for path, name in ((str(self.folder), "/sandbox"), *_LIBRARIES):
            text = text.replace(path, name)
        return text

    def _read(self, pipe: int, deadline: float) -> tuple[bytes, bytes, int, Ending | None]:
        """Return (output up to just beyond the limit, reply kind, wait status, limit that stopped it) of a call."""
        output = bytearray()
        is_open = True
        excess: Ending | None = None
        next_check = time.monotonic() + _CHECK_THREADS_S
        next_check_of_files = time.monotonic() + _CHECK_FILES_S
        while True:
            # After a stop, the pipe may stay full and readable, so wait only for the reply.
            awaited = (pipe, self._control) if is_open and not excess else (self._control,)
            until = deadline if excess else min(deadline, next_check)
            ready = _poll(max(0.0, until - time.monotonic()) * 1000, *awaited)
            if self._control in ready:
                kind, status = self._reply()
                self._ending = True
                break
            if time.monotonic() >= deadline:
                raise OSError("the worker does not answer")
            if pipe in ready:
                chunk = os.read(pipe, _READ_BYTES)
                output += chunk
                is_open = bool(chunk)  # code may close its output and continue
            if excess:
                continue
            if len(output) > self._limits.output_bytes:
                excess = Ending.FLOOD
            elif (now := time.monotonic()) >= next_check:
                excess = self._excess(with_files=now >= next_check_of_files)
                if now >= next_check_of_files:
                    next_check_of_files = time.monotonic() + _CHECK_FILES_S
                next_check = time.monotonic() + _CHECK_THREADS_S
            if excess:
                os.write(self._stdin, REQUEST.pack(-1.0))
        # The call has ended. The rest of its output is in the pipe.
        with contextlib.suppress(BlockingIOError):
            while len(output) <= self._limits.output_bytes and (chunk := os.read(pipe, _READ_BYTES)):
                output += chunk
        return bytes(output), kind, status, excess

    def _excess(self, *, with_files: bool) -> Ending | None:
        """Return the limit that the running call exceeds, among those that the kernel cannot enforce, or None."""
        with contextlib.suppress(OSError, SandboxError):  # the call has just ended
            call = Path(f"/proc/{_only_child(self.pid)}")
            if (call / "task").stat().st_nlink - 2 > self._limits.threads:
                return Ending.THREADS
            # A call under namespaces has a private file system of limited size.
            if with_files and self.tier is not Tier.NAMESPACES:
                accounts = dict(line.split(": ") for line in (call / "io").read_text().splitlines())
                size = self._limits.disk_mb << 20
                written = max(int(accounts["wchar"]), int(accounts["write_bytes"]), _bytes_of_deleted(call / "fd"))
                if written > size or python_folder.holds_more(self.folder, files=self._limits.files, size=size):
                    return Ending.DISK
        return None

    def _reply(self) -> tuple[bytes, int]:
        reply = os.read(self._control, REPLY.size)
        if len(reply) < REPLY.size:
            raise OSError("the worker has exited")
        kind, status = REPLY.unpack(reply)
        return kind, status

    def _await_end(self, deadline: float) -> None:
        """Wait until the fork of the last call has exited, and remove its files."""
        if self._ending:
            if not _poll(max(0.0, deadline - time.monotonic()) * 1000, self._control):
                raise OSError("the worker does not answer")
            self._reply()
            python_folder.empty(self.folder)
            self._ending = False

    def close(self) -> None:
        """Stop the worker and its call, and remove its folder. May be called repeatedly. In a fork of the process that
        started the worker, the worker goes on."""
        if self.is_of_parent:
            _OF_PARENT.append(self)
            return
        process, self._process = self._process, None
        if process is not None:
            process.stdin.close()  # then the worker kills its fork and exits
            with contextlib.suppress(OSError):
                process.kill()
            process.wait()
            process.stderr.close()
        self._remove_folder()


def _remove_own(folder: Path, owner_pid: int) -> None:
    """Remove the folder of a worker, except in a fork of its owner, which still uses it."""
    if os.getpid() == owner_pid:
        python_folder.remove(folder)


def _poll(timeout_ms: float, *fds: int) -> set[int]:
    poller = select.poll()
    for fd in fds:
        poller.register(fd, select.POLLIN)
    return {fd for fd, _ in poller.poll(timeout_ms)}


def _children_of(pid: int) -> Path:
    return Path(f"/proc/{pid}/task/{pid}/children")


def _bytes_of_deleted(files: Path) -> int:
    """Return the size on disk of deleted files that a process has open. What it wrote through a mapping to one on a
    tmpfs is in no other count.

    Args:
        files: The folder /proc/PID/fd of the process.
    """
    size = 0
    for file in files.iterdir():
        with contextlib.suppress(OSError):  # it has just been closed
            status = file.stat()
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 0:
                size += status.st_blocks * 512
    return size


def _only_child(pid: int) -> int:
    """Return the process id of the only child of `pid`."""
    try:
        return int(_children_of(pid).read_text())
    except (OSError, ValueError) as error:
        raise SandboxError(f"the child of process {pid} is not in /proc ({error}), so it cannot be limited") from error


def _most_threads(tier: Tier, limits: Limits) -> int:
    """Return the number of threads beyond which the kernel refuses more; 0 if it cannot count those of a call.

    It is above `limits.threads`, at which a call is stopped with a reason. Outside a user namespace a call needs its
    own user, and a trainer that can still read how much that user's process writes.
    """
    if tier is Tier.NAMESPACES or _has_capabilities(_CAP_SETUID, _CAP_SYS_PTRACE):
        return _REFUSED_THREADS * limits.threads
    return 0


def _has_capabilities(*numbers: int) -> bool:
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    effective = int(status["CapEff"], 16)
    return all(effective >> number & 1 for number in numbers)


def _start(folder: Path, tier: Tier, preload: bool, limits: Limits) -> Any:
    """Start the worker process with pipes to stdin and from stderr, and return it."""
    # The resolved executable, because a virtual environment's executable needs files that the sandbox hides.
    executable = os.path.realpath(sys.executable)
    modules = (
        *(python_worker, python_cell, python_syscalls, python_namespaces),
        *(python_semaphores, python_refusals),
    )
    scripts = [os.path.realpath(str(module.__file__)) for module in modules]
    libraries = ["/lib", "/lib64", "/usr/lib", "/usr/lib64", "/etc/ld.so.cache", f"{sys.base_prefix}/lib"]
    readable = [executable, *scripts, *libraries, *_SITE_PACKAGES, *zoneinfo.TZPATH, "/dev/null", "/dev/urandom"]
    readable = [path for path in readable if os.path.exists(path)]
    command = [executable, "-s", "-S", "-P", "-B", "-X", "utf8", "-W", "ignore", scripts[0]]
    scratch = f"size={limits.disk_mb}m,nr_inodes={limits.files}"
    command += [tier, "preload" if preload else "bare", str(limits.cpu_s), str(_most_threads(tier, limits))]
    command += [scratch, str(folder)]
    command += [*_SITE_PACKAGES, "--", *readable]
    if tier is not Tier.SANDLOCK:
        try:
            return subprocess.Popen(
                command,
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                cwd=folder,
                env=_ENVIRONMENT,
                start_new_session=True,
            )
        except OSError as error:
            raise SandboxError(f"{executable} cannot be started: {error.strerror}") from error
    try:
        import sandlock
        from sandlock.sandbox import StdioMode
    except (ImportError, OSError) as error:
        raise SandboxError(f"sandlock is not installed ({error}), so it cannot isolate Python code") from error
    except RuntimeError as error:  # a user without a home directory, whose path it determines
        raise SandboxError(f"sandlock cannot be imported ({str(error).rstrip('.')}): set HOME to a folder") from error
    sandbox = sandlock.Sandbox(
        fs_readable=readable,
        fs_writable=[str(folder), "/dev/null"],
        cwd=str(folder),
        clean_env=True,
        env=_ENVIRONMENT,
        max_processes=2,  # the worker and one fork
    )
    try:
        return sandbox.popen(command, stdin=StdioMode.PIPED, stdout=StdioMode.NULL, stderr=StdioMode.PIPED)
    except (RuntimeError, sandlock.SandlockError) as error:
        raise SandboxError(
            f"sandlock cannot isolate Python code here ({error}): it needs Landlock ABI "
            f"{sandlock.min_landlock_abi()}, but this kernel has {sandlock.landlock_abi_version()}"
        ) from error


# Each attempt that succeeds prints its name.
_PROBE = """
import os, socket, sys
def read_files(): open("/etc/passwd").read()
def write_files(): open({outside!r}, "w")
def reach_the_network(): socket.create_connection(("127.0.0.1", {port}), timeout=1)
def start_processes():
    if os.fork() == 0: os._exit(0)
def signal_processes():
    pid = os.getppid() or {pid}  # 0: the parent is in a pid namespace above
    if pid == os.getpid(): raise PermissionError
    os.kill(pid, 0)
def see_the_environment(): os.environ[{variable!r}]
def change_limits(): __import__("resource").prlimit({pid}, __import__("resource").RLIMIT_CORE)
for attempt in (read_files, write_files, reach_the_network, start_processes, signal_processes,
                see_the_environment, change_limits):
    try: attempt()
    except Exception: continue
    print(attempt.__name__.replace("_", " "))
print("probed")
"""


def check_isolation(worker: Worker) -> None:
    """Test whether code in `worker` can break out.

    Raises:
        SandboxError: It can, and the message lists the ways. Or the test did not run.
    """
    variable = next(iter(os.environ.keys() - _ENVIRONMENT.keys()), "NO_SUCH_VARIABLE")
    with socket.create_server(("127.0.0.1", 0)) as server, tempfile.TemporaryDirectory() as elsewhere:
        outside = str(Path(elsewhere, "probe"))
        port = server.getsockname()[1]
        ran = worker.run(_PROBE.format(outside=outside, port=port, variable=variable, pid=os.getpid()))
    *escapes, last = ran.output.splitlines() or [""]
    if ran.ending is not Ending.FINISHED or last != "probed":
        raise SandboxError(f"the sandbox does not run Python code here: {ran.ending}, {ran.output.strip()[-500:]!r}")
    if escapes:
        raise SandboxError(f"the sandbox does not isolate Python code here: code in it can {', '.join(escapes)}")


def isolated_worker(limits: Limits, tiers: Sequence[Tier]) -> tuple[Worker, Tier]:
    """Return a worker of the first of `tiers` that passes `check_isolation` on this machine, and that tier.

    Raises:
        SandboxError: No tier passes. The message contains the reason for each.
    """
    faults = []
    for tier in tiers:
        worker = None
        try:
            worker = Worker(limits, tier=tier, preload=False)
            check_isolation(worker)
            return worker, tier
        except (SandboxError, WorkerLost) as error:
            faults.append(f"{tier}: {error}")
            if worker is not None:
                worker.close()
    raise SandboxError("; ".join(faults))


def isolating_tier() -> Tier:
    """Return the first tier that isolates code on this machine. Raises as `isolated_worker`."""
    limits = Limits(timeout_s=5, cpu_s=5, memory_mb=256, output_bytes=1000)
    worker, tier = isolated_worker(limits, ISOLATING)
    worker.close()
    return tier
