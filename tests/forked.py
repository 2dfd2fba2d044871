"""Starts Python programs as forks of a process that has already imported torch, transformers and TRL.

    process = Fork(["-m", "accelerate.commands.launch", …], cwd=folder, env=variables, log=path)
    status = process.wait(60.0)
    written = run(["train.py", …], cwd=folder, env=variables)

A new interpreter needs 6 s of CPU time for these imports, `accelerate launch` on two ranks three times that, a vLLM
server 30 s. A fork needs none; torch's launcher and vLLM fork their processes, too. A program whose command names vLLM
is forked from a process that has imported vLLM. For all others vLLM seems not to be installed (`without_vllm`).

A program can also be forked from a process that has imported arpo_trl from another folder, with `package=folder`.

A fork differs from a new interpreter in two points: a variable that is read while a module is imported has the value
that it has in the tests' process, and /proc shows the command and the environment of the first process.
"""

from __future__ import annotations

import atexit
import errno
import faulthandler
import functools
import gc
import hashlib
import importlib
import json
import multiprocessing
import os
import random
import resource
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO, NoReturn

import numpy as np

ROOT = Path(__file__).parent.parent
PRELOADED = ("deepspeed", "accelerate.commands.launch", "arpo_trl.scripts.train", "arpo_trl.scripts.sft")
PRELOADED_VLLM = (
    *("vllm.entrypoints.openai.api_server", "vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor"),
    *("vllm.v1.worker.cpu_worker", "vllm.model_executor.models.qwen2", "vllm.model_executor.models.qwen3"),
)
RANKS = "TEST_RANKS"
"""The environment variable with the path of the file into which a launcher writes the ranks that it starts."""
LOOK_S = 0.02
PAUSE_S = 0.0005
_CONTEXT = multiprocessing.get_context("fork")


def run(
    words: Sequence[str], *, cwd: Path, env: Mapping[str, str], timeout: float = 580.0, vllm: bool | None = None
) -> str:
    """Runs a program to its end and returns its output on both streams. It must exit with status 0. `vllm` as in
    `Fork`."""
    with tempfile.TemporaryDirectory(prefix="fork-") as folder:
        log = Path(folder) / "log"
        process = Fork(words, cwd=cwd, env=env, log=log, vllm=vllm)
        try:
            status = process.wait(timeout)
        finally:
            process.kill()
        written = log.read_text("utf-8", errors="replace")
    assert status == 0, written[-6000:]
    return written


class _Waits:
    """The parts of `subprocess.Popen` other than starting a process."""

    args: Sequence[str]
    pid: int
    returncode: int | None = None

    def poll(self) -> int | None:
        raise NotImplementedError

    def wait(self, timeout: float | None = None) -> int:
        end = None if timeout is None else time.monotonic() + timeout
        while (status := self.poll()) is None:
            if end is not None and time.monotonic() > end:
                assert timeout is not None
                raise subprocess.TimeoutExpired(self.args, timeout)
            time.sleep(LOOK_S)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Fork(_Waits):
    """A running program. `words` are the arguments after the interpreter's name on a command line."""

    def __init__(
        self,
        words: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        log: Path,
        errors: Path | None = None,
        vllm: bool | None = None,
        package: Path = ROOT / "src",
    ):
        """`cwd` and `env` are the program's. What it writes to both streams is appended to `log`.

        Args:
            errors: The file for what it writes to standard error, instead of `log`.
            vllm: Whether it finds vLLM; None: if its words name vLLM.
            package: The folder with the package arpo_trl.
        """
        self.args = list(words)
        self._server = _server(vllm=any("vllm" in word for word in words) if vllm is None else vllm, package=package)
        streams = [log, errors or log]
        for stream in streams:
            stream.touch()
        self.pid = self._server.fork(words=self.args, cwd=str(cwd), env=dict(env), streams=[*map(str, streams)])

    def poll(self) -> int | None:
        if self.returncode is None:
            self.returncode = self._server.status(self.pid)
        return self.returncode


class _Server:
    """The process that is forked, which all workers of a test run share. It ends after the last of them has ended."""

    def __init__(self, *, vllm: bool, package: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._statuses: dict[int, int] = {}
        name = hashlib.sha256(f"{TEST_RUN} {vllm} {package}".encode()).hexdigest()[:16]
        address = str(Path(tempfile.gettempdir()) / f"forks-{name}")
        with socket.socket(socket.AF_UNIX) as listener:
            try:
                listener.bind(address)
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                listener.listen()
                self._start(listener, vllm, package)
            self._connect(address)

    def _start(self, listener: socket.socket, vllm: bool, package: Path) -> None:
        here = Path(__file__).parent
        paths = [package, here, os.environ.get("PYTHONPATH", "")]
        if not vllm:
            paths.insert(0, here / "without_vllm")
        self._process = subprocess.Popen(
            [sys.executable, __file__, str(listener.fileno()), *(PRELOADED_VLLM if vllm else ())],
            stdin=subprocess.DEVNULL,
            stdout=2,  # for what is printed during imports
            pass_fds=[listener.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))},
            start_new_session=True,
        )

    def _connect(self, address: str) -> None:
        end = time.monotonic() + 5.0
        while True:
            try:
                return self._socket.connect(address)
            except ConnectionRefusedError:  # another worker has bound it and listens in a moment; nothing tells when
                if time.monotonic() > end:
                    raise
                time.sleep(LOOK_S)

    def fork(self, **program: Any) -> int:
        self._socket.sendall(json.dumps(program).encode() + b"\n")
        while (pid := self._read()) is None:
            pass
        return pid

    def status(self, pid: int) -> int | None:
        """The exit status of a fork, negative for a signal; None while it runs."""
        while select.select([self._socket], [], [], 0.0)[0]:
            self._read()
        return self._statuses.get(pid)

    def _read(self) -> int | None:
        """Reads that a fork ended, or the number of a new one, which it returns."""
        answer = self._socket.recv(LINE, socket.MSG_WAITALL)
        if not answer:
            raise AssertionError("The process that is forked has ended. Its output is among the test's.")
        said = json.loads(answer)
        if "status" not in said:
            return int(said["pid"])
        self._statuses[said["pid"]] = said["status"]
        return None


TEST_RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
LINE = 64
"""Bytes of each message of the server, so that it is read without a search for its end."""


@functools.cache
def _server(*, vllm: bool, package: Path) -> _Server:
    return _Server(vllm=vllm, package=package)


def serve(listener: socket.socket, modules: Sequence[str]) -> None:
    """Imports the modules. Then forks this process for each program that a worker asks for, until all have closed
    their connections."""
    for module in modules:
        importlib.import_module(module)
    # On a CPU DeepSpeed would build its collectives in shared memory, for which g++ takes 50 s. Without them, it uses
    # torch's, as on GPUs. It has no setting for this: it tries whatever the machine can build.
    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None  # type: ignore[attr-defined]
    if shared := sys.modules.get("vllm.distributed.device_communicators.shm_broadcast"):
        # vLLM's processes take a core each while they wait for one another, and tests have few cores. They poll shared
        # memory, so a pause between two looks only delays them. In a vLLM without these names tests are slower.
        shared.sched_yield = lambda: time.sleep(PAUSE_S)  # type: ignore[attr-defined]
        # A server reports its settings together with its machine's, for which it starts pip twice: 2 s of CPU time.
        information = importlib.import_module("vllm.entrypoints.serve.dev.server_info.api_router")
        information._get_system_env_info_cached = dict  # type: ignore[attr-defined]
        # The KV cache on a CPU has whole GiB, and a start writes all of it. Tiny models need less than a tenth.
        sys.modules["vllm.platforms.cpu"].GiB_bytes = 100_000_000  # type: ignore[attr-defined]
        # It starts an interpreter for each new kind of model, lest its class initialize CUDA in this process.
        sys.modules["vllm.model_executor.models.registry"]._run_in_subprocess = lambda call: call()  # type: ignore[attr-defined]
    gc.collect()
    gc.freeze()  # a collection in a fork would otherwise copy the memory of all these modules
    workers: dict[socket.socket, BinaryIO] = {}
    askers: dict[int, socket.socket] = {}
    while True:
        ready, _, _ = select.select([listener, *workers], [], [], LOOK_S)
        for one in ready:
            if one is listener:
                worker, _ = listener.accept()
                workers[worker] = worker.makefile("rb")
            elif line := workers[one].readline():
                pid = os.fork()
                if pid == 0:
                    program = json.loads(line)
                    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
                    streams = [os.open(path, flags, 0o600) for path in program["streams"]]
                    _become(program["words"], program["cwd"], program["env"], *streams)
                askers[pid] = one
                _answer(one, pid=pid)
            else:
                workers.pop(one).close()
                one.close()
                if not workers:
                    Path(listener.getsockname()).unlink()
                    return
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                _answer(askers.pop(ended[0]), pid=ended[0], status=os.waitstatus_to_exitcode(ended[1]))


def _answer(worker: socket.socket, **said: int) -> None:
    with suppress(OSError):  # the worker may have ended before its fork
        worker.sendall(json.dumps(said).encode().ljust(LINE))


def _become(words: list[str], cwd: str, env: dict[str, str], stdout: int | None, stderr: int | None) -> NoReturn:
    """Runs a program in this process, which has just been forked, as a new interpreter would; ends the process."""
    status = 1
    try:
        os.setsid()
        for number, stream in ((1, stdout), (2, stderr)):
            if stream is not None:
                os.dup2(stream, number)
        os.closerange(3, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
        for name in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGCHLD):
            signal.signal(name, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os.chdir(cwd)
        os.environ.clear()
        os.environ.update(env)
        if env.get("PYTHONFAULTHANDLER"):
            faulthandler.enable()
        if env.get("TORCHDYNAMO_DISABLE") == "1":  # torch reads it during its import
            sys.modules["torch._dynamo.config"].disable = True  # type: ignore[attr-defined]
        _seed()
        _fork_children()
        status = _run(words)
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        _remove_shared_memory()
        os._exit(status)


def _remove_shared_memory() -> None:
    """Removes vLLM's shared memory between ranks, which a C++ destructor does at the end of an interpreter."""
    with suppress(OSError):
        for line in Path("/proc/self/maps").read_text().splitlines():
            if "cpushm_" in line:
                Path(line[line.index("/dev/shm") :]).unlink(missing_ok=True)


def _seed() -> None:
    """Two forks must not draw the same numbers, as two interpreters do not."""
    random.seed()
    np.random.seed()


def _run(words: list[str]) -> int:
    """Runs `[-u] -m MODULE …` or `[-u] SCRIPT …`; the exit status."""
    words = words[words[0] == "-u" :]
    is_module = words[0] == "-m"
    name, *flags = words[is_module:]
    sys.argv = [name, *flags]
    first = os.getcwd() if is_module else str(Path(name).resolve().parent)
    sys.path[:] = list(dict.fromkeys([first, *filter(None, os.environ.get("PYTHONPATH", "").split(":")), *sys.path]))
    try:
        if is_module:
            runpy.run_module(name, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(name, run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


class _Rank(_Waits):
    """A rank that a launcher has forked."""

    def __init__(self, words: list[str], env: dict[str, str], stdout: int | None, stderr: int | None):
        self.args = words
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(words, os.getcwd(), env, stdout, stderr)
        if RANKS in env:
            with Path(env[RANKS]).open("a") as ranks:
                ranks.write(f"{env['RANK']} {self.pid}\n")

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode


def _fork_children() -> None:
    """Makes the launchers of accelerate and torch, and vLLM, fork this process where they would start interpreters."""
    from accelerate.commands import launch
    from torch.distributed.elastic.multiprocessing.subprocess_handler.subprocess_handler import SubprocessHandler

    launch.subprocess = SimpleNamespace(  # of accelerate's launch of one process
        Popen=lambda words, env: _Rank(words[1:], env, None, None), CalledProcessError=subprocess.CalledProcessError
    )

    def popen(handler: Any, words: tuple[str, ...], env: dict[str, str]) -> Any:
        streams = [stream and stream.fileno() for stream in (handler._stdout, handler._stderr)]
        return _Rank(list(words[1:]), env, *streams)

    SubprocessHandler._popen = popen  # type: ignore[method-assign]
    if "vllm.v1.engine.core" in sys.modules:
        multiprocessing.get_context = lambda method=None: _CONTEXT  # type: ignore[assignment]


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])), [*PRELOADED, *sys.argv[2:]])
