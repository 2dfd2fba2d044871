"""The python tool has the output of a notebook, and the sandbox blocks everything that its docstring lists."""

import contextlib
import gc
import json
import os
import platform
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import arpo_trl.tools.python.local as python_module
import arpo_trl.tools.python.sandbox as sandbox_module
from arpo_trl.errors import ConfigError, SandboxError, ToolError, ToolStopped
from arpo_trl.tools.builtin import ToolArguments, _print_once, build_tools
from arpo_trl.tools.calls import ToolCall, ToolFailure
from arpo_trl.tools.python import namespaces as python_namespaces
from arpo_trl.tools.python.local import PastCells, PythonTool, python_tool, stop_reason
from arpo_trl.tools.python.local import shown as displayed
from arpo_trl.tools.python.sandbox import (
    ISOLATING,
    Ending,
    Limits,
    Run,
    Tier,
    Worker,
    WorkerLost,
    check_isolation,
    isolated_worker,
)
from arpo_trl.tools.spec import tool_spec
from support import can_isolate, has_ended, until, worker_of

pytestmark = pytest.mark.slow  # starts processes

LIMITS = Limits(timeout_s=60.0, cpu_s=30.0, memory_mb=256, output_bytes=10_000, file_mb=1, open_files=32)
NO_SUCH_CALL = "OSError: [Errno 38] Function not implemented"


@pytest.fixture(scope="module", params=list(Tier))
def worker(request: pytest.FixtureRequest) -> Iterator[Worker]:
    with worker_of(request.param, LIMITS) as worker:
        yield worker


@pytest.fixture(scope="module")
def hurried(worker: Worker) -> Iterator[Worker]:
    """One of the same tier with a deadline of a second."""
    with worker_of(worker.tier, replace(LIMITS, timeout_s=1.0)) as hurried:
        yield hurried


@pytest.fixture(scope="module")
def saving(worker: Worker) -> Iterator[Worker]:
    """One of the same tier with a second of CPU time, which no load of the machine uses up."""
    with worker_of(worker.tier, replace(LIMITS, cpu_s=1.0)) as saving:
        yield saving


@pytest.fixture(scope="module", params=ISOLATING)
def isolated(request: pytest.FixtureRequest) -> Iterator[Worker]:
    with worker_of(request.param, LIMITS) as worker:
        yield worker


@pytest.fixture(scope="module")
def tool() -> Iterator[PythonTool]:
    if not any(map(can_isolate, ISOLATING)):
        pytest.skip("this kernel cannot isolate")
    tool = PythonTool(Limits(timeout_s=60.0, cpu_s=30.0), max_workers=4, allow_unsafe=False)
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


def await_death(*pids: int) -> None:
    until(lambda: all(map(has_ended, pids)))


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


CASES = [json.loads(line) for line in (Path(__file__).parent / "cases" / "python_code.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("code", ["```\n" + " " * 50_000 + "\nx x", "```python\n" * 20_000, "    x x\n" * 10_000])
def test_a_repair_takes_less_than_a_call(saving: Worker, code: str) -> None:
    assert saving.run(code).ending in (Ending.FINISHED, Ending.RAISED)  # not stopped at its second


def check_case(worker: Worker, case: dict[str, str]) -> None:
    ran = worker.run(case["code"])
    if "error" in case:
        with pytest.raises(ToolError) as caught:
            displayed(ran.output, ran.ending, "")
        assert str(caught.value).endswith(case["error"])
    else:
        assert displayed(ran.output, ran.ending, "") == case["shown"]


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"{i}-{case['kind']}") for i, case in enumerate(CASES, 1) if case["kind"] != "refused"],
)
def test_cases(worker: Worker, case: dict[str, str]) -> None:
    check_case(worker, case)


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"{i}-{case['kind']}") for i, case in enumerate(CASES, 1) if case["kind"] == "refused"],
)
def test_cases_of_isolated_code(isolated: Worker, case: dict[str, str]) -> None:
    check_case(isolated, case)


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
        ("input()", "EOFError: there is no input here; write the values into the code"),
    ],
)
def test_a_failure_ends_in_one_line_that_names_it(tool: PythonTool, code: str, last_line: str) -> None:
    with pytest.raises(ToolError) as caught:
        tool(code)
    assert str(caught.value).splitlines()[-1] == last_line


def test_a_crash_differs_from_an_exception(tool: PythonTool) -> None:
    with pytest.raises(ToolError, match=r"(?s)^here\nError: the python process was killed or crashed"):
        tool("print('here')\nimport os\nos.abort()")


def test_random_numbers_are_the_same_in_every_call(tool: PythonTool) -> None:
    code = "import random, numpy\n(random.random(), float(numpy.random.rand()))"
    assert tool(code) == tool(code)


def test_the_tool_is_a_function_that_can_be_offered_to_a_model() -> None:
    if not any(map(can_isolate, ISOLATING)):
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


# Cells before it.


@pytest.fixture
def cells(worker: Worker) -> Callable[..., Run]:
    return lambda *codes: worker.run(codes[-1], codes[:-1])


def test_a_call_sees_earlier_variables_and_shows_only_its_own_output(cells: Callable[..., Run]) -> None:
    ran = cells(
        "import math\nprint('first')\n'first value'\nopen('kept', 'w').write('text')",
        "x = 40",
        "print(x + 2), math.pi > 3, open('kept').read()",
    )
    assert (ran.output, ran.ending) == ("42\n(None, True, 'text')\n", Ending.FINISHED)


def test_a_cell_that_raised_keeps_its_earlier_effects_and_later_cells_run(cells: Callable[..., Run]) -> None:
    ran = cells(
        "x = 1\nraise ValueError('shown before')\nx = 2",
        "def f(): return 1 / 0",
        "import sys; sys.exit(3)",
        "print(x)\nf()",
    )
    assert ran.output.splitlines()[0] == "1"
    assert ran.output.splitlines()[-1] == "ZeroDivisionError: division by zero"
    assert '  File "<python 2>", line 1, in f' in ran.output.splitlines()  # the line of the cell that defined it
    assert "shown before" not in ran.output
    assert ran.ending is Ending.RAISED


@pytest.mark.parametrize(
    "hides",
    [
        "import os; os.system('echo shown'); os.write(1, b'shown')",
        "import sys; sys.stderr.write('shown'); sys.__stdout__ = None",
        "print('shown', end='')",
        "import os; os.close(1)",
    ],
)
def test_nothing_that_an_earlier_cell_prints_is_shown(cells: Callable[..., Run], hides: str) -> None:
    assert cells(hides, "print('own')").output == "own\n"


def test_work_of_a_pool_ends_with_its_cell_and_later_cells_use_the_pool(cells: Callable[..., Run]) -> None:
    ran = cells(
        "import time\nfrom concurrent.futures import ThreadPoolExecutor\npool, done = ThreadPoolExecutor(2), []",
        "for i in 1, 2, 3: pool.submit(lambda i=i: (time.sleep(i / 20), print('shown before'), done.append(i)));",
        "print(done, pool.submit(abs, -4).result())",
    )
    assert (ran.output, ran.ending) == ("[1, 2, 3] 4\n", Ending.FINISHED)


def test_idle_processes_of_a_pool_do_not_hold_a_call() -> None:
    pool = "from concurrent.futures import ProcessPoolExecutor\npool = ProcessPoolExecutor(1)\n"
    with worker_of(Tier.UNSAFE, LIMITS) as worker:
        ran = worker.run("import time\npool.submit(time.sleep, 0.2), print(pool.submit(abs, -2).result());", [pool])
    assert (ran.output, ran.ending) == ("2\n", Ending.FINISHED)


def test_earlier_cells_count_towards_the_deadline(hurried: Worker) -> None:
    nap = "import time; time.sleep(0.45)"  # the deadline is a second: none of the three reaches it alone
    assert hurried.run(nap, [nap, nap]).ending is Ending.TIMEOUT


def test_siblings_share_only_the_cells_before_their_branch(cells: Callable[..., Run]) -> None:
    assert cells("x = [1]", "x.append(2); x").output == "[1, 2]\n"
    assert cells("x = [1]", "x").output == "[1]\n"
    assert cells("x").output.endswith("NameError: name 'x' is not defined\n")


def test_only_calls_that_left_something_behind_are_run_again() -> None:
    state = PastCells(lambda code, earlier: f"{code} after {earlier}")
    for failure in (None, ToolFailure.ERROR, ToolFailure.STOPPED, ToolFailure.TIMEOUT):
        state.record(ToolCall(name="python", arguments={"code": str(failure)}), failure)
    assert state.bind("python")(code="x") == "x after ['None', 'error']"
    assert len(state.key) == 4  # the others are told apart all the same


def test_a_fork_of_the_cells_knows_those_before_it_and_no_later_ones() -> None:
    before, after_fork = (
        ToolCall(name="python", arguments={"code": "x = 1"}),
        ToolCall(name="python", arguments={"code": "x = 2"}),
    )
    state = PastCells(lambda code, earlier: earlier)
    state.record(before, None)
    fork = state.fork()
    state.record(after_fork, None)
    assert (state.bind("python")(code=""), fork.bind("python")(code="")) == (["x = 1", "x = 2"], ["x = 1"])
    assert fork.key == (({"code": "x = 1"}, None),)


def test_a_stateful_tool_describes_its_state_and_a_stateless_one_keeps_nothing() -> None:
    if not any(map(can_isolate, ISOLATING)):
        pytest.skip("this kernel cannot isolate")
    stateful, stateless = tool_spec(python_tool(stateful=True)), tool_spec(python_tool())
    assert stateful.create_state is not None and stateless.create_state is None
    described = [
        spec.schema["function"]["parameters"]["properties"]["code"]["description"] for spec in (stateful, stateless)
    ]
    assert "variables are kept between calls" in described[0]
    assert "nothing is kept between calls" in described[1]


def test_a_call_stopped_by_a_limit_differs_from_a_call_that_raised(tool: PythonTool) -> None:
    with pytest.raises(ToolStopped, match=r"killed or crashed"):
        tool("import os; os._exit(9)")
    with pytest.raises(ToolError) as caught:
        tool("1 / 0")
    assert not isinstance(caught.value, ToolStopped)


# What every tier stops.


def test_a_deadline_stops_the_call_and_keeps_its_output(worker: Worker) -> None:
    for timeout_s in (1.0, 20.0):  # the longer one if a busy machine did not even print within the shorter one
        with worker_of(worker.tier, replace(LIMITS, timeout_s=timeout_s)) as limited:
            ran = limited.run("import time\nprint('before', flush=True)\nwhile True: time.sleep(0.01)")
        assert ran.ending is Ending.TIMEOUT
        if ran.output:
            break
    assert ran.output == "before\n"


def test_a_deadline_stops_threads_that_ignore_signals(hurried: Worker) -> None:
    ran = hurried.run(
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


def test_threads_are_limited(worker: Worker) -> None:
    # The limit is 64. A thread in Python takes 8 MB of address space, so these share a small stack.
    many = """
        import threading, time
        threading.stack_size(64 << 10)
        for i in range({}): threading.Thread(target=time.sleep, args=({},)).start()
        """
    assert run(worker, many.format(40, 0.3)) == ""
    assert worker.run(textwrap.dedent(many.format(150, 50))).ending is Ending.THREADS
    assert run(worker, "print('next')") == "next\n"


def test_the_kernel_refuses_threads_that_are_not_counted_in_time(
    worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox_module, "_CHECK_THREADS_S", 60.0)
    hard = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    if worker.tier is not Tier.NAMESPACES and not sandbox_module._most_threads(worker.tier, LIMITS):
        return  # the trainer is not root
    if worker.tier is Tier.NAMESPACES and os.geteuid() == 0 and 0 <= hard < python_namespaces._MANY_PROCESSES:
        return
    code = """
        import _thread, threading
        threading.stack_size(64 << 10)
        held, started = _thread.allocate_lock(), 0
        held.acquire()
        try:
            for _ in range(1000):
                _thread.start_new_thread(held.acquire, ())
                started += 1
        except RuntimeError as error:
            print(started, error)
        """
    number, error = run(worker, code).split(" ", 1)
    # four times the limit of 64; the call itself is one, and under namespaces the worker and its parent are two
    assert (int(number), error) == (253 if worker.tier is Tier.NAMESPACES else 255, "can't start new thread\n")


def test_a_call_may_ask_for_the_rights_of_its_own_files(worker: Worker) -> None:
    code = "import os\nopen('f', 'w').close()\nprint(os.access('.', os.W_OK), os.access('f', os.W_OK))"
    assert run(worker, code) == "True True\n"


def test_threads_created_without_python_are_limited(worker: Worker) -> None:
    # Each stays in `pause` for good; they share the stack of the first, which they do not touch.
    clone = """
        import ctypes, mmap, time
        code = mmap.mmap(-1, 4096, prot=7)
        code.write(bytes.fromhex('b83800000048c7c7000f050031f631d24d31d24d31c00f0585c07509b8220000000f05ebf7c3'))
        make = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
        for i in range(2000): make()
        time.sleep(50)
        """
    if platform.machine() != "x86_64":
        pytest.skip("machine code of x86-64")
    assert worker.run(textwrap.dedent(clone)).ending is Ending.THREADS
    assert run(worker, "print('next')") == "next\n"


def test_files_that_a_call_leaves_are_limited_in_number_and_in_bytes(worker: Worker) -> None:
    # 1,024 files and 64 MB, of at most a MB each; the kernel refuses them or the call is stopped.
    for fill in (
        "import os\nfor i in range(1100): os.mkdir(str(i), 0o300)",
        "for i in range(5000): open(str(i), 'w').close()",
        "for i in range(200): open(str(i), 'wb').write(bytes(1 << 20))",
    ):
        ran = worker.run(f"{fill}\nimport time; time.sleep(50)")
        if worker.tier is Tier.NAMESPACES:
            assert ran.output.splitlines()[-1].startswith("OSError: [Errno 28] No space left on device"), ran
        else:
            assert ran.ending is Ending.DISK, ran
        assert list(worker.folder.iterdir()) == []
        assert run(worker, "import os\nos.listdir()") == "[]\n"


@pytest.mark.parametrize("tier", [Tier.SANDLOCK, Tier.UNSAFE])
def test_removed_files_count_that_are_written_through_mappings(tier: Tier, monkeypatch: pytest.MonkeyPatch) -> None:
    """The temporary folder may be in memory. Then such files take memory that the kernel does not count as written."""
    monkeypatch.setattr("tempfile.tempdir", "/dev/shm")
    code = """
        import mmap, os, time
        for i in range(20):  # of the 32 files that may be open
            fd = os.open('f', os.O_CREAT | os.O_RDWR)
            os.unlink('f')
            os.ftruncate(fd, 1 << 20)
            with mmap.mmap(fd, 1 << 20) as memory: memory[:] = bytes([1]) * (1 << 20)
        time.sleep(50)
        """
    with worker_of(tier, replace(LIMITS, disk_mb=16)) as worker:
        assert worker.run(textwrap.dedent(code)).ending is Ending.DISK


def test_what_earlier_cells_write_is_hidden_whatever_they_write_to(worker: Worker) -> None:
    earlier = "import os, sys\nfor fd in (1, 2): os.write(fd, b'old')\nprint('old', file=sys.stderr)"
    assert worker.run("print('new')\nos.write(2, b'newer');", [earlier]).output == "new\nnewer"


def test_bytes_written_to_files_that_are_removed_count(worker: Worker) -> None:
    code = """
        import os, time
        for i in range(200):
            fd = os.open('f', os.O_CREAT | os.O_RDWR)
            os.unlink('f')
            os.write(fd, bytes(1 << 20))
            os.close(fd)
        """
    if worker.tier is Tier.NAMESPACES:  # in a file system of its own, of 64 MB, they have made room again
        assert run(worker, code) == ""
    else:
        assert worker.run(textwrap.dedent(code) + "time.sleep(50)").ending is Ending.DISK


def test_a_call_beyond_a_limit_returns_an_error_text(tool: PythonTool) -> None:
    many = "import threading, time\nthreading.stack_size(64 << 10)\nprint('before')\n"
    many += "for i in range(150): threading.Thread(target=time.sleep, args=(50,)).start()"
    with pytest.raises(ToolStopped) as caught:
        tool(many)
    assert str(caught.value) == "before\nError: stopped, the code ran more than 64 threads"
    limits = Limits(disk_mb=3, files=5)
    assert stop_reason(Ending.DISK, limits, []) == "Error: stopped, the code wrote more than 3 MB or 5 files"


@pytest.mark.parametrize("mess", ["for i in range(900): os.mkdir('d'); os.chdir('d')", "os.makedirs('d/e', 0o300)"])
def test_a_worker_removes_all_files_of_a_call(worker: Worker, mess: str) -> None:
    worker.run(f"import os\n{mess}")
    assert run(worker, "import os\nos.listdir()") == "[]\n"
    assert list(worker.folder.iterdir()) == []


def test_a_call_keeps_no_capability(worker: Worker) -> None:
    held: dict[str, str] = {}

    def look() -> None:
        """Reads the rights of the call once its code has given it a name, and ends it."""
        children = Path(f"/proc/{worker.pid}/task/{worker.pid}/children")
        while held.get("Name") != "looking":
            time.sleep(0.01)
            with contextlib.suppress(OSError):
                status = Path(f"/proc/{children.read_text().strip()}/status").read_text()
                held.update(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
        os.kill(int(held["Pid"]), signal.SIGKILL)

    looking = threading.Thread(target=look, daemon=True)
    looking.start()
    ran = worker.run("import ctypes, time; ctypes.CDLL(None).prctl(15, b'looking'); time.sleep(50)")
    assert ran.ending is Ending.DIED, ran
    looking.join()
    assert held["NoNewPrivs"] == "1"
    for name in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(held[name], 16) == 0
    if os.getuid() == 0:  # others may not drop it
        assert int(held["CapBnd"], 16) == 0


def test_a_folder_that_cannot_be_emptied_costs_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    with worker_of(Tier.UNSAFE, LIMITS) as worker:
        run(worker, "1")
        monkeypatch.setattr(sandbox_module.python_folder, "empty", lambda folder: os.open("/no such file", 0))
        with pytest.raises(WorkerLost):
            for _ in range(2):
                worker.run("1")


def test_cpu_time_is_limited_over_all_threads(worker: Worker) -> None:
    # Four threads at hashing, which frees the lock, use CPU seconds faster than wall seconds where there are cores.
    limits = replace(LIMITS, cpu_s=0.5)
    code = """
import hashlib, threading
def burn():
    while True: hashlib.sha256(b"x" * 1_000_000)
for _ in range(4): threading.Thread(target=burn).start()
"""
    with worker_of(worker.tier, limits) as limited:
        assert limited.run(code).ending is Ending.CPU
        assert run(limited, "print('next')") == "next\n"


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


def test_each_call_has_its_own_pipe(worker: Worker) -> None:
    # F_SETPIPE_SZ, F_GETPIPE_SZ; the filter of an isolated call refuses both, and only the unsafe tier can try
    change = "import fcntl, os\nos.set_blocking(1, False)\ntry: fcntl.fcntl(1, 1031, 1 << 17)\nexcept OSError: pass"
    look = "import fcntl, os\nsize = 1 << 16\ntry: size = fcntl.fcntl(1, 1032)\nexcept OSError: pass"
    run(worker, change)
    assert run(worker, f"{look}\nprint(os.get_blocking(1), os.get_blocking(2), size)") == "True True 65536\n"


def test_a_call_that_closes_its_output_goes_on(worker: Worker) -> None:
    ran = worker.run("import os, time\nprint('before', flush=True)\nos.close(1); os.close(2)\ntime.sleep(0.2)")
    assert (ran.output, ran.ending) == ("before\n", Ending.FINISHED)


def test_a_worker_keeps_step_through_calls_that_end_in_every_way(worker: Worker) -> None:
    loud = "import os, threading\ndef loud():\n    while True: os.write(1, b'left over')\n"
    ways = [
        ("print({0})", Ending.FINISHED, "{0}\n"),
        ("print({0})\n1 / 0", Ending.RAISED, "{0}\n"),
        ("import os; os.write(1, b'{0}'); os._exit(9)", Ending.DIED, "{0}"),
        ("import os; os.write(1, b'{0}'); os.close(3)", Ending.FINISHED, "{0}"),
        ("import os; os.write(1, b'{0}'); os.closerange(0, 64)", Ending.FINISHED, "{0}"),
        (f"{loud}for _ in range(3): threading.Thread(target=loud, daemon=True).start()", None, ""),
        ("print({0})\nwhile True: print('x' * 1000)", Ending.FLOOD, "{0}\n"),
        ("open(str({0}), 'w').write('x')\nimport os\nprint(os.listdir())", Ending.FINISHED, "['{0}']\n"),
    ]
    order = random.Random(0)
    for number in range(150):
        code, ending, begins = order.choice(ways)
        ran = worker.run(code.replace("{0}", str(number)))
        assert ending is None or ran.ending is ending, (number, code, ran)
        assert ran.output.startswith(begins.replace("{0}", str(number))), (number, code, ran)


# What only isolation stops.


def test_files_outside_are_not_read(isolated: Worker, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("secret")
    for path in (secret, "/etc/passwd", "/proc/self/environ", f"/proc/{os.getpid()}/environ", __file__):
        assert refused(isolated, f"open({str(path)!r}).read()").startswith(("PermissionError", "FileNotFoundError"))
    # Landlock refuses the folder, a namespace shows another: Python's and the system's libraries, and the way there.
    ran = isolated.run("import os\nfor name in os.listdir('/'): print(name)")
    assert ran.output.endswith("Permission denied: '/'\n") or "home" not in ran.output.splitlines()


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


def test_a_fork_of_this_process_leaves_the_worker_and_its_folder_alone(isolated: Worker) -> None:
    tool = PythonTool(isolated._limits, max_workers=1, allow_unsafe=False, isolation=str(isolated.tier))
    assert tool("print(1)") == "1"
    (worker,) = (worker for workers in tool._idle.values() for worker in workers)
    child = os.fork()
    if not child:
        signal.alarm(60)  # in case it hangs
        made = tool("print(2)")
        gc.collect()
        worker.close()
        os._exit(made != "2")
    assert os.waitpid(child, 0)[1] == 0
    assert worker.folder.exists() and tool("print(3)") == "3"
    assert [worker] == [worker for workers in tool._idle.values() for worker in workers]
    tool.close()


def test_a_fork_that_closes_the_tool_leaves_the_worker_alone(isolated: Worker) -> None:
    tool = PythonTool(isolated._limits, max_workers=1, allow_unsafe=False, isolation=str(isolated.tier))
    child = os.fork()
    if not child:
        signal.alarm(60)  # in case it hangs
        tool.close()
        del tool
        gc.collect()
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert tool("print(3)") == "3"
    tool.close()


def test_processes_are_not_started(isolated: Worker) -> None:
    refusal = ("BlockingIOError", "PermissionError", "FileNotFoundError")
    for attempt in (
        "os.fork()",
        "subprocess.run(['/bin/sh'])",
        "os.execv('/bin/sh', ['sh'])",
        "os.posix_spawn('/bin/sh', ['sh'], {})",
    ):
        assert refused(isolated, f"import os, subprocess\n{attempt}").startswith(refusal), attempt


def test_the_worker_and_the_trainer_are_neither_signalled_nor_traced(isolated: Worker) -> None:
    # A pid namespace shows a process no other: the parent's id is 0, which names the caller's own group.
    there = "import os\nparent = os.getppid() or 4194303\n"
    for pid in ("parent", str(os.getpid())):
        assert refused(isolated, f"{there}os.kill({pid}, 9)").startswith(("PermissionError", "ProcessLookupError"))
        assert run(isolated, f"{there}import ctypes\nctypes.CDLL(None).ptrace(16, {pid}, 0, 0)") == "-1\n"
        memory = refused(isolated, f"{there}open(f'/proc/{{{pid}}}/mem', 'r+b')")
        assert memory.startswith(("PermissionError", "FileNotFoundError"))
    worker_pid = isolated.pid
    isolated.run("import os, signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nos.killpg(0, signal.SIGTERM)")
    assert run(isolated, "print('served')") == "served\n"
    assert isolated.pid == worker_pid


def test_calls_leave_no_descriptors_open_here(isolated: Worker) -> None:
    """A trainer makes many thousand calls and may often have 1,024 descriptors. sandlock's supervisor is in it."""
    here = Path("/proc/self/fd")
    run(isolated, "1")
    before = len(list(here.iterdir()))
    for _ in range(30):
        run(isolated, "print(1)")
    for leave in ("os.setsid()", "os.setpgid(0, 0)"):
        for _ in range(15):
            assert refused(isolated, f"import os\n{leave}") == NO_SUCH_CALL
    # A few come and go as forks do.
    assert len(list(here.iterdir())) < before + 10


def test_other_processes_keep_their_limits_and_priority(isolated: Worker) -> None:
    for pid in ("os.getppid()", str(os.getpid())):
        for attempt in (
            f"resource.prlimit({pid}, resource.RLIMIT_CORE, (0, 0))",
            f"os.setpriority(os.PRIO_PROCESS, {pid}, 19)",
            f"os.sched_setaffinity({pid}, {{0}})",
            f"os.sched_setscheduler({pid}, os.SCHED_BATCH, os.sched_param(0))",
        ):
            refusal = refused(isolated, f"import os, resource\n{attempt}")
            assert refusal.startswith(("PermissionError", NO_SUCH_CALL)), attempt


def test_what_would_outlive_a_call_or_counts_towards_no_limit_is_not_made(isolated: Worker) -> None:
    assert refused(isolated, "import os\nos.memfd_create('x')") == NO_SUCH_CALL
    for call in ("shmget(0x61727, 4096, 0o1777)", "msgget(0x61727, 0o1777)", "semget(0x61727, 1, 0o1777)"):
        assert run(isolated, f"import ctypes\nctypes.CDLL(None).{call}") == "-1\n", call


def test_namespaces_bound_a_folder_as_a_whole_and_show_nothing_outside(tmp_path: Path) -> None:
    with worker_of(Tier.NAMESPACES, LIMITS) as worker:
        many = "for i in range(5000): open(str(i), 'w').close()"
        assert refused(worker, many).startswith("OSError: [Errno 28] No space left on device")
        large = "for i in range(200): open(str(i), 'wb').write(bytes(1 << 20))"
        assert refused(worker, large).startswith("OSError: [Errno 28] No space left on device")
        assert run(worker, f"import os\nos.path.exists({str(tmp_path)!r}), os.listdir()") == "(False, [])\n"


STANDARD = """
import asyncio, ctypes, mmap, os, resource, shelve, shutil, signal, socket, sqlite3, subprocess, tempfile, time, uuid
import zipfile
from concurrent.futures import ThreadPoolExecutor
"""


@pytest.mark.parametrize(
    "code",
    [
        "async def f(): return await asyncio.to_thread(lambda: 42)\nprint(asyncio.run(f()))",
        "with ThreadPoolExecutor(4) as pool: print(*pool.map(int, '42'), sep='')",
        "with tempfile.TemporaryFile(dir='.') as f: f.write(b'42'); f.seek(0); print(f.read().decode())",
        "open('a', 'w').write('42')\nshutil.copyfile('a', 'b'), shutil.move('b', 'c')\nprint(open('c').read())",
        "os.makedirs('a/b'), os.symlink('a', 'l'), os.path.realpath('l'), shutil.rmtree('a')\nprint(42)",
        "with zipfile.ZipFile('z', 'w') as z: z.writestr('f', '42')\nprint(int(zipfile.ZipFile('z').read('f')))",
        "m = mmap.mmap(-1, 4096); m.resize(8192); m[0] = 42; print(m[0])",
        "signal.signal(14, lambda *_: print(42)); signal.setitimer(0, 0.01); time.sleep(0.1)",
        "signal.signal(10, lambda *_: print(42)); signal.raise_signal(10)",
        "signal.signal(10, lambda *_: print(42)); os.kill(os.getpid(), 10)",
        "print(ctypes.CFUNCTYPE(ctypes.c_int)(lambda: 42)())",
        "print(sqlite3.connect(':memory:').execute('select 42').fetchone()[0])",
        "with sqlite3.connect('a.db') as db: db.execute('create table t as select 42')\n"
        "print(sqlite3.connect('a.db').execute('select * from t').fetchone()[0])",
        "with shelve.open('a') as kept: kept['a'] = 42\nprint(shelve.open('a')['a'])",
        "time.process_time(), time.thread_time(), uuid.uuid4(), os.cpu_count(), os.times(), os.uname()\nprint(42)",
        "resource.getrlimit(resource.RLIMIT_AS), resource.getrusage(0)\nprint(42)",
        "try: subprocess.run(['true'])\nexcept PermissionError: print(42)",
        "try: socket.socket()\nexcept PermissionError: print(42)",
    ],
)
def test_what_computations_use_works(isolated: Worker, code: str) -> None:
    assert run(isolated, STANDARD + code) == "42\n"


def test_numpy_sympy_and_pandas_work(isolated: Worker) -> None:
    code = """
        import numpy, pandas, sympy
        numpy.save("a.npy", numpy.linalg.svd(numpy.ones((90, 90)))[1])
        numpy.load("a.npy", mmap_mode="r"), numpy.random.default_rng(), numpy.fft.fft(numpy.ones(64))
        table = pandas.DataFrame({"a": [40, 2], "b": ["x", "x"]})
        table.to_csv("a.csv")
        x = sympy.Symbol("x")
        print(pandas.read_csv("a.csv").groupby("b").a.sum().iloc[0], sympy.integrate(x, x), sympy.lambdify(x, x)(1))
        """
    with worker_of(isolated.tier, Limits(timeout_s=60.0, cpu_s=60.0, memory_mb=4096)) as roomy:
        assert run(roomy, code) == "42 x**2/2 1\n"


# Where code cannot be isolated.


def test_the_probe_lists_the_escapes_in_a_plain_process() -> None:
    with (
        worker_of(Tier.UNSAFE, LIMITS) as worker,
        pytest.raises(SandboxError, match="read files, write files, reach the network, start processes"),
    ):
        check_isolation(worker)


@pytest.mark.parametrize("tier", ISOLATING)
def test_each_tier_is_used_if_requested(tier: Tier) -> None:
    if not can_isolate(tier):
        pytest.skip(f"this kernel cannot isolate by {tier}")
    python = python_tool(isolation=tier, max_workers=1)
    assert python("6 * 7") == "42"
    assert f"isolated by {'sandlock' if tier is Tier.SANDLOCK else 'user namespaces'}" in python.isolation


def test_the_next_tier_is_taken_where_the_first_does_not_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    if not can_isolate(Tier.NAMESPACES):
        pytest.skip("this kernel cannot isolate by namespaces")
    monkeypatch.setitem(sys.modules, "sandlock", None)  # not installed
    worker, tier = isolated_worker(LIMITS, ISOLATING)
    worker.close()
    assert tier is Tier.NAMESPACES


def test_a_worker_that_does_not_start_is_a_reason_of_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    script = tmp_path / "worker.py"
    script.write_text("raise OSError(28, 'user namespaces are denied or used up')\n", "utf-8")
    monkeypatch.setattr(sandbox_module.python_worker, "__file__", str(script))
    with pytest.raises(SandboxError) as raised:
        Worker(LIMITS, tier=Tier.UNSAFE, preload=False)
    error = "OSError: [Errno 28] user namespaces are denied or used up"
    assert str(raised.value) == f"the Python worker (unsafe) did not start: {error}"


def test_an_unknown_isolation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"is 'docker'; expected one of \('auto', 'sandlock', 'namespaces'\)"):
        python_tool(isolation="docker")


@pytest.fixture
def no_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which every sandbox starts but none isolates."""

    class LeakyWorker(Worker):
        def __init__(self, limits: Limits, *, tier: Tier, preload: bool) -> None:
            super().__init__(limits, tier=Tier.UNSAFE, preload=preload)

    monkeypatch.setattr(sandbox_module, "Worker", LeakyWorker)


@pytest.mark.usefixtures("no_isolation")
def test_without_isolation_the_tool_is_refused_and_the_way_out_named() -> None:
    with pytest.raises(
        SandboxError,
        match=r"sandlock: .*code in it can read files, .*; namespaces: .*it can read .* set allow_unsafe: true",
    ):
        python_tool()


@pytest.mark.usefixtures("no_isolation")
def test_allow_unsafe_runs_after_a_warning() -> None:
    with pytest.warns(UserWarning, match="runs as your user"):
        python = python_tool(allow_unsafe=True)
    assert python("1 + 1") == "2"


def test_a_machine_without_sandlock_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sandlock", None)
    with pytest.raises(SandboxError, match=r"sandlock is not installed .* set allow_unsafe: true"):
        python_tool(isolation="sandlock")


def test_a_user_without_a_home_directory_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in [name for name in sys.modules if name.partition(".")[0] == "sandlock"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 2)  # no user of this machine
    with pytest.raises(
        SandboxError, match=r"sandlock cannot be imported \(Could not .*directory\): set HOME to a fold"
    ):
        python_tool(isolation="sandlock")


def test_a_configuration_logs_the_isolation_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not any(map(can_isolate, ISOLATING)):
        pytest.skip("this kernel cannot isolate")
    for rank, lines in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        _print_once.cache_clear()  # as in a new process
        for _ in range(2):
            (python,) = build_tools(ToolArguments(tools=["python"], python_stateful=True))
        assert tool_spec(python).create_state is not None
        assert capsys.readouterr().err.count("Model-written Python runs isolated by ") == lines


# Nothing is left behind.


def test_a_worker_that_died_idle_is_replaced(tool: PythonTool) -> None:
    assert tool("1") == "1"
    for workers in tool._idle.values():
        for worker in workers:
            os.kill(worker.pid, signal.SIGKILL)
    assert tool("2") == "2"


def test_a_call_for_which_no_process_can_be_started_fails_with_a_warning(
    tool: PythonTool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def start(*args: object) -> None:
        raise SandboxError("python cannot be started: Resource temporarily unavailable")

    with monkeypatch.context() as patch:
        patch.setattr(sandbox_module, "_start", start)
        patch.setattr(tool, "_idle", {False: [], True: []})
        with (
            pytest.warns(UserWarning, match="A call of the python tool fails: .* Resource temporarily unavailable"),
            pytest.raises(ToolStopped, match=r"^Error: the python process could not be started, or was lost$"),
        ):
            tool("1")
    assert tool("1") == "1"


def test_a_full_disk_is_named_in_a_warning(tool: PythonTool, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sandbox_module.python_worker, "CELLS_FILE", "/dev/full")  # no write to it succeeds
        with (
            pytest.warns(UserWarning, match="A call of the python tool fails: .*No space left on device"),
            pytest.raises(ToolStopped, match="was lost"),
        ):
            tool("1")
    assert tool("1") == "1"


@pytest.mark.parametrize("tier", list(Tier))
def test_a_closed_worker_leaves_no_process_and_no_folder(tier: Tier) -> None:
    if not can_isolate(tier):
        pytest.skip(f"this kernel cannot isolate by {tier}")
    worker = Worker(LIMITS, tier=tier, preload=False)
    pid, folder = worker.pid, worker.folder
    run(worker, "open('file', 'w').write('x')")
    worker.close()
    await_death(pid)
    assert not folder.exists()


# Prints the limits of a call under lower limits of the trainer.
LIMITED = """
import resource
from arpo_trl.tools.python.sandbox import Limits, Tier, Worker
resource.setrlimit(resource.RLIMIT_FSIZE, (10 << 20, 10 << 20))
resource.setrlimit(resource.RLIMIT_NOFILE, (1000, 1000))
worker = Worker(Limits(timeout_s=60.0, file_mb=64, open_files=2000), tier=Tier({tier!r}), preload=False)
print(worker.run("import resource\\nprint(resource.getrlimit(1), resource.getrlimit(7))").output)
worker.close()
"""


@pytest.mark.parametrize("tier", list(Tier))
def test_limits_stay_within_the_hard_limits_of_the_trainer(tier: Tier) -> None:
    if not can_isolate(tier):
        pytest.skip(f"this kernel cannot isolate by {tier}")
    script = LIMITED.format(tier=str(tier))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert (done.stdout.split("\n")[0], done.returncode) == ("(10485760, 10485760) (1000, 1000)", 0), done.stderr


# Prints the ids of a worker and of the call that hangs in it.
HANGING = """
import os, sys, threading, time
from pathlib import Path
from arpo_trl.tools.python.sandbox import Limits, Tier, Worker
worker = Worker(Limits(timeout_s=600), tier=Tier({tier!r}), preload=False)
code = "import ctypes, time; ctypes.CDLL(None).prctl(1, 0, 0, 0, 0); time.sleep(600)"  # forgets to die with its parent
threading.Thread(target=worker.run, args=(code,), daemon=True).start()
children = Path(f"/proc/{{worker.pid}}/task/{{worker.pid}}/children")
while not children.read_text():
    time.sleep(0.01)
time.sleep(0.2)
print(worker.pid, children.read_text(), worker.folder, flush=True)
{then}
"""


@pytest.mark.parametrize("tier", list(Tier))
@pytest.mark.parametrize("end", ["exit", "SIGKILL"])
def test_no_process_outlives_the_trainer(tier: Tier, end: str, tmp_path: Path) -> None:
    if not can_isolate(tier):
        pytest.skip(f"this kernel cannot isolate by {tier}")
    script = tmp_path / "trainer.py"
    then = "time.sleep(600)" if end == "SIGKILL" else ""
    script.write_text(HANGING.format(tier=str(tier), then=then))
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
        trainer.wait(timeout=120)
    assert len(pids) == 2
    await_death(*pids)
    if end == "exit":
        assert not Path(folder).exists()
    shutil.rmtree(folder, ignore_errors=True)
