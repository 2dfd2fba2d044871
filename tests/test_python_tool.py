"""The python tool shows what a notebook would, and the sandbox stops each thing that its docstring says it stops."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import arpo_trl.tools.python as python_module
from arpo_trl.errors import SandboxError, ToolError
from arpo_trl.tools.box import tool_spec
from arpo_trl.tools.python import PythonTool, python_tool
from arpo_trl.tools.sandbox import Ending, Limits, Worker, check_isolation

LIMITS = Limits(timeout_s=1.0, cpu_s=5.0, memory_mb=256, output_bytes=10_000, file_mb=1, open_files=32)


def _can_isolate() -> bool:
    """Asks the kernel, not the sandbox: a sandbox that broke must fail these tests, not skip them."""
    sandlock = pytest.importorskip("sandlock")
    return bool(sandlock.landlock_abi_version() >= sandlock.min_landlock_abi())


def _worker(isolated: bool) -> Worker:
    if isolated and not _can_isolate():
        pytest.skip("this kernel cannot isolate")
    return Worker(LIMITS, isolated=isolated, preload=False)


@pytest.fixture(scope="module", params=["isolated", "unsafe"])
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    worker = _worker(request.param == "isolated")
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def isolated() -> Iterator[Worker]:
    worker = _worker(True)
    yield worker
    worker.close()


@pytest.fixture(scope="module")
def tool() -> Iterator[PythonTool]:
    if not _can_isolate():
        pytest.skip("this kernel cannot isolate")
    tool = PythonTool(Limits(timeout_s=5.0), max_workers=4, allow_unsafe=False)
    yield tool
    tool.close()


def run(worker: Worker, code: str) -> str:
    """What the code printed, having finished."""
    ran = worker.run(textwrap.dedent(code))
    assert ran.ending is Ending.FINISHED, ran
    return ran.output


def refused(worker: Worker, code: str) -> str:
    """The last line of the traceback that the code ended with."""
    ran = worker.run(textwrap.dedent(code))
    assert ran.ending is Ending.RAISED, ran
    return ran.output.splitlines()[-1]


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def await_death(*pids: int) -> None:
    deadline = time.monotonic() + 20
    while any(map(is_alive, pids)):
        assert time.monotonic() < deadline, f"still alive: {[pid for pid in pids if is_alive(pid)]}"
        time.sleep(0.01)


# What a call shows.


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("print(7.874 * 1000)", "7874.0"),
        ("x = 20\nx + 1", "21"),
        ("print('a')\n'b'", "a\n'b'"),
        ("x = 1", ""),
        ("None", ""),
        ("", ""),
        ("import sys\nprint('to stderr', file=sys.stderr)", "to stderr"),
        ("def f(n):\n    return 1 if n == 0 else n * f(n - 1)\nf(5)", "120"),
        ("print('é 数'), '\\ud800'", "é 数\n(None, '\\ud800')"),
        ("import sympy\nsympy.factor('x**2 - 1')", "(x - 1)*(x + 1)"),
        ("import numpy\nint(numpy.arange(4).sum())", "6"),
        ("import threading\nthreading.Thread(target=print, args=('from a thread',)).start()", "from a thread"),
        ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\nP(1)", "P(x=1)"),
        ("print('before')\nraise SystemExit", "before"),
        ("__name__", "'__main__'"),
    ],
)
def test_a_call_shows_output_and_last_value(tool: PythonTool, code: str, shown: str) -> None:
    assert tool(code) == shown


def test_an_exception_shows_the_output_before_it_and_the_users_frames_only(tool: PythonTool) -> None:
    with pytest.raises(ToolError) as caught:
        tool("print('before')\ndef f():\n    import json\n    json.loads('{')\nf()")
    lines = str(caught.value).splitlines()
    assert lines[:3] == ["before", "Traceback (most recent call last):", '  File "<python>", line 5, in <module>']
    assert lines[-1].startswith("json.decoder.JSONDecodeError: ")
    assert [line for line in lines if "File " in line] == [
        '  File "<python>", line 5, in <module>',
        '  File "<python>", line 4, in f',
    ]


@pytest.mark.parametrize(
    ("code", "last_line"),
    [
        ("print(", "SyntaxError: '(' was never closed"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        ("def f(): f()\nf()", "RecursionError: maximum recursion depth exceeded"),
        ("input()", "EOFError: EOF when reading a line"),
    ],
)
def test_a_failure_ends_in_one_line_that_names_it(tool: PythonTool, code: str, last_line: str) -> None:
    with pytest.raises(ToolError) as caught:
        tool(code)
    assert str(caught.value).splitlines()[-1] == last_line


def test_a_crash_is_told_apart_from_an_exception(tool: PythonTool) -> None:
    with pytest.raises(ToolError, match=r"(?s)^here\nError: the python process was killed or crashed"):
        tool("print('here')\nimport os\nos.abort()")


def test_random_numbers_are_the_same_in_every_call(tool: PythonTool) -> None:
    code = "import random, numpy\n(random.random(), float(numpy.random.rand()))"
    assert tool(code) == tool(code)


def test_the_tool_is_a_function_that_can_be_offered_to_a_model() -> None:
    if not _can_isolate():
        pytest.skip("this kernel cannot isolate")
    spec = tool_spec(python_tool(max_workers=1))
    assert (spec.name, spec.single_text_parameter, spec.is_async) == ("python", "code", False)


def test_calls_from_many_threads_get_their_own_output(tool: PythonTool) -> None:
    shown: dict[int, list[str]] = {}

    def call(number: int) -> None:
        shown[number] = [tool(f"print({number} * 1000 + {i})") for i in range(10)]

    threads = [threading.Thread(target=call, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert shown == {number: [f"{number * 1000 + i}" for i in range(10)] for number in range(8)}


# What both tiers stop.


def test_a_deadline_stops_the_call_and_keeps_its_output(worker: Worker) -> None:
    ran = worker.run("print('before', flush=True)\nwhile True: pass")
    assert (ran.output, ran.ending) == ("before\n", Ending.TIMEOUT)


def test_a_deadline_stops_threads_that_ignore_signals(worker: Worker) -> None:
    ran = worker.run(
        "import signal, threading\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())\n"
        "while True: threading.Event().wait(1)"
    )
    assert ran.ending is Ending.TIMEOUT


@pytest.mark.parametrize("write", ["print('x' * 1000)", "os.write(1, b'x' * 100_000)", "sys.stderr.write('x' * 99)"])
def test_a_flood_is_stopped_while_it_is_read(worker: Worker, write: str) -> None:
    ran = worker.run(f"import os, sys\nwhile True: {write}")
    assert ran.ending is Ending.FLOOD
    assert len(ran.output) == 10_000
    assert run(worker, "print('next')") == "next\n"


@pytest.mark.parametrize("allocation", ["bytearray(1 << 30)", "__import__('mmap').mmap(-1, 1 << 30)"])
def test_memory_is_limited(worker: Worker, allocation: str) -> None:
    assert refused(worker, f"x = {allocation}").startswith(("MemoryError", "OSError: [Errno 12]"))


def test_a_huge_file_is_not_written(worker: Worker) -> None:
    # file_mb = 1
    assert refused(worker, "open('big', 'wb').write(b'x' * (1 << 21))") == "OSError: [Errno 27] File too large"


def test_open_files_are_limited(worker: Worker) -> None:
    assert refused(worker, "files = [open('/dev/null') for _ in range(100)]").startswith("OSError: [Errno 24]")


def test_limits_cannot_be_raised(isolated: Worker) -> None:
    code = "import resource\nresource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))"
    assert refused(isolated, code).startswith(("PermissionError", "ValueError", "OSError"))


def test_the_environment_of_the_trainer_is_not_there(monkeypatch: pytest.MonkeyPatch, worker: Worker) -> None:
    assert "HOME" in os.environ or "PATH" in os.environ
    assert run(worker, "import os\nprint('HOME' in os.environ, 'PATH' in os.environ)") == "False False\n"


def test_files_and_variables_are_gone_at_the_next_call(worker: Worker) -> None:
    run(
        worker,
        """
        import builtins, os, sys
        left = builtins.left = sys.left = 1
        os.mkdir("folder"); open("folder/file", "w").write("left"); os.symlink("/", "link")
        os.chdir("folder")
        """,
    )
    code = "import builtins, os, sys\nprint(os.listdir(), hasattr(builtins, 'left'), hasattr(sys, 'left'))\nleft"
    ran = worker.run(code)
    assert ran.output.startswith("[] False False\n")
    assert ran.output.endswith("NameError: name 'left' is not defined\n")


def test_code_of_other_calls_is_not_in_memory(worker: Worker) -> None:
    run(worker, "secret = 'sesame' + 'street'; print(secret)")
    code = "import gc\nsum('sesame' 'street'[:0] + 's' in str(o) for o in gc.get_objects() if type(o) is str)"
    assert run(worker, code) == "0\n"


def test_the_pipe_that_calls_share_is_blocking_again_at_the_next_call(worker: Worker) -> None:
    run(worker, "import os\nos.set_blocking(1, False)")
    assert run(worker, "import os\nprint(os.get_blocking(1))") == "True\n"


# What only isolation stops.


def test_files_outside_are_not_read(isolated: Worker, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for path in (secret, "/etc/passwd", "/proc/self/environ", f"/proc/{os.getpid()}/environ", __file__):
        assert refused(isolated, f"open({str(path)!r}).read()").startswith("PermissionError")
    assert refused(isolated, "import os\nos.listdir('/')").startswith("PermissionError")


def test_files_outside_are_not_changed(isolated: Worker, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    victim.chmod(0o600)
    before = victim.stat()
    for attempt in (
        "open({0!r}, 'w')",
        "os.truncate({0!r}, 0)",
        "os.unlink({0!r})",
        "os.rename({0!r}, {0!r} + '2')",
        "os.link({0!r}, 'link')",
        "os.chmod({0!r}, 0o777)",
        "os.chown({0!r}, os.getuid(), os.getgid())",
        "os.utime({0!r}, (1, 1))",
        "os.setxattr({0!r}, 'user.x', b'1')",
        "os.mkdir({0!r} + '2')",
        "os.symlink('/', {0!r} + '2')",
    ):
        assert "Error" in refused(isolated, "import os\n" + attempt.format(str(victim))), attempt
    after = victim.stat()
    assert victim.read_text() == "as it was"
    assert (after.st_mode, after.st_mtime_ns) == (before.st_mode, before.st_mtime_ns)
    assert list(tmp_path.iterdir()) == [victim]


def test_the_network_is_not_reached(isolated: Worker, tmp_path: Path) -> None:
    unix_path = str(tmp_path / "socket")
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.socket(socket.AF_UNIX) as unix,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        unix.bind(unix_path)
        unix.listen()
        abstract_name = f"\0arpo-test-{os.getpid()}"
        abstract.bind(abstract_name)
        abstract.listen()
        for attempt in (
            f"socket.create_connection(('127.0.0.1', {server.getsockname()[1]}))",
            "socket.create_connection(('192.0.2.1', 80), timeout=0.5)",
            "socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
            "socket.create_server(('127.0.0.1', 0))",
            f"socket.socket(socket.AF_UNIX).connect({unix_path!r})",
            f"socket.socket(socket.AF_UNIX).connect({abstract_name!r})",
        ):
            assert refused(isolated, "import socket\n" + attempt).startswith("PermissionError"), attempt


def test_processes_are_not_started(isolated: Worker) -> None:
    assert refused(isolated, "import os\nos.fork()").startswith(("BlockingIOError", "PermissionError"))
    assert refused(isolated, "import subprocess\nsubprocess.run(['/bin/sh'])").startswith(
        ("BlockingIOError", "PermissionError")
    )
    assert refused(isolated, "import os\nos.execv('/bin/sh', ['sh'])").startswith("PermissionError")


def test_the_worker_and_the_trainer_are_neither_signalled_nor_traced(isolated: Worker) -> None:
    for pid in ("os.getppid()", str(os.getpid())):
        assert refused(isolated, f"import os\nos.kill({pid}, 9)").startswith("PermissionError")
        code = f"import ctypes, os\nctypes.CDLL(None).ptrace(16, {pid}, 0, 0)"
        assert run(isolated, code) == "-1\n"
        assert refused(isolated, f"import os\nopen(f'/proc/{{{pid}}}/mem', 'r+b')").startswith("PermissionError")
    worker_pid = isolated.pid
    isolated.run("import os, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.killpg(0, signal.SIGTERM)")
    assert run(isolated, "print('served')") == "served\n"
    assert isolated.pid == worker_pid


def test_other_processes_keep_their_limits_and_priority(isolated: Worker) -> None:
    for pid in ("os.getppid()", str(os.getpid())):
        for attempt in (
            f"resource.prlimit({pid}, resource.RLIMIT_CORE, (0, 0))",
            f"os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
            f"os.sched_setaffinity({pid}, {{0}})",
            f"os.sched_setscheduler({pid}, os.SCHED_BATCH, os.sched_param(0))",
        ):
            assert refused(isolated, f"import os, resource\n{attempt}").startswith("PermissionError"), attempt


def test_files_in_memory_that_no_limit_counts_are_not_made(isolated: Worker) -> None:
    assert refused(isolated, "import os\nos.memfd_create('x')").startswith("PermissionError")


# Where code cannot be isolated.


def test_the_probe_names_what_code_can_do_in_a_plain_process() -> None:
    worker = _worker(False)
    try:
        with pytest.raises(SandboxError, match="read files, write files, reach the network, start processes"):
            check_isolation(worker)
    finally:
        worker.close()


@pytest.fixture
def no_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which a sandbox starts and does not hold."""

    class LeakyWorker(Worker):
        def __init__(self, limits: Limits, *, isolated: bool, preload: bool) -> None:
            super().__init__(limits, isolated=False, preload=preload)

    monkeypatch.setattr(python_module, "Worker", LeakyWorker)


@pytest.mark.usefixtures("no_isolation")
def test_without_isolation_the_tool_is_refused_and_the_way_out_named() -> None:
    with pytest.raises(SandboxError, match=r"code can read files, .*\. Use a machine .* set allow_unsafe: true"):
        python_tool()


@pytest.mark.usefixtures("no_isolation")
def test_allow_unsafe_runs_after_a_warning() -> None:
    with pytest.warns(UserWarning, match="runs as your user"):
        python = python_tool(allow_unsafe=True)
    assert python("1 + 1") == "2"


def test_a_machine_without_sandlock_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sandlock", None)
    with pytest.raises(SandboxError, match=r"sandlock is not installed here .* set allow_unsafe: true"):
        python_tool()


# Nothing is left behind.


def test_a_worker_that_died_idle_is_replaced(tool: PythonTool) -> None:
    assert tool("1") == "1"
    for workers in tool._idle.values():
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
    assert tool("2") == "2"


def test_a_closed_worker_leaves_no_process_and_no_folder() -> None:
    worker = _worker(False)
    pid, folder = worker.pid, worker.folder
    run(worker, "open('file', 'w').write('x')")
    worker.close()
    assert not is_alive(pid)
    assert not folder.exists()


# Prints the ids of a worker and of the call that hangs in it.
HANGING = """
import os, sys, threading, time
from pathlib import Path
from arpo_trl.tools.sandbox import Limits, Worker
worker = Worker(Limits(timeout_s=600), isolated={isolated}, preload=False)
code = "import ctypes, time; ctypes.CDLL(None).prctl(1, 0, 0, 0, 0); time.sleep(600)"  # forgets to die with its parent
threading.Thread(target=worker.run, args=(code,), daemon=True).start()
children = Path(f"/proc/{{worker.pid}}/task/{{worker.pid}}/children")
while not children.read_text():
    time.sleep(0.01)
time.sleep(0.2)
print(worker.pid, children.read_text(), worker.folder, flush=True)
{then}
"""


@pytest.mark.parametrize("tier", ["isolated", "unsafe"])
@pytest.mark.parametrize("end", ["exit", "SIGKILL"])
def test_no_process_outlives_the_trainer(tier: str, end: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    if tier == "isolated":
        request.getfixturevalue("isolated")  # skips where there is none
    script = tmp_path / "trainer.py"
    then = "time.sleep(600)" if end == "SIGKILL" else ""
    script.write_text(HANGING.format(isolated=tier == "isolated", then=then))
    source = Path(python_module.__file__).parents[2]
    trainer = subprocess.Popen(
        [sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": str(source)}
    )
    assert trainer.stdout is not None
    with trainer:
        *ids, folder = trainer.stdout.readline().split()
        pids = [int(pid) for pid in ids]
        if end == "SIGKILL":
            trainer.kill()
        trainer.wait(timeout=30)
    assert len(pids) == 2
    await_death(*pids)
    if end == "exit":
        assert not Path(folder).exists()
    shutil.rmtree(folder, ignore_errors=True)
