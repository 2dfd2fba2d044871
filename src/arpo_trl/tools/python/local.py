"""The `python` tool: model-written code in a sandboxed interpreter, its output as a notebook would show it."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from arpo_trl.errors import ConfigError, SandboxError, ToolError, ToolStopped
from arpo_trl.tools.calls import ToolCall, ToolFailure
from arpo_trl.tools.python.sandbox import ISOLATING, Ending, Limits, Run, Tier, Worker, WorkerLost, isolated_worker
from arpo_trl.tools.state import PathState

ISOLATIONS = ("auto", *(str(tier) for tier in ISOLATING))

_COVERS = {
    Tier.SANDLOCK: "isolated by sandlock (Landlock, seccomp): no files, processes or network but its own; limits on "
    "time, memory, disk, threads and output",
    Tier.NAMESPACES: "isolated by user namespaces and seccomp: no files, processes or network but its own; limits on "
    "time, memory, disk, threads and output",
    Tier.UNSAFE: "NOT isolated: limits on time, memory, disk, threads and output only",
}


class PythonTool:
    """Runs code in workers of its own, at most `max_workers` at once; safe to call from many threads.

    Isolation is tried, not assumed: the first tier that holds on this machine is taken. Where code can break out of
    each, construction raises `SandboxError`, unless `allow_unsafe`, which warns once and runs code in a plain process
    with resource limits. `arpo_trl.tools.python.sandbox` lists what each tier stops.
    """

    def __init__(self, limits: Limits, *, max_workers: int, allow_unsafe: bool, isolation: str = "auto") -> None:
        if isolation not in ISOLATIONS:
            raise ConfigError(f"The isolation of the python tool is {isolation!r}; expected one of {ISOLATIONS}.")
        self._limits = limits
        self._places = threading.BoundedSemaphore(max_workers)
        self._lock = threading.Lock()
        self._idle: dict[bool, list[Worker]] = {False: [], True: []}  # by `preload`
        self._pid = os.getpid()
        tiers = ISOLATING if isolation == "auto" else (Tier(isolation),)
        try:
            first, self.tier = isolated_worker(limits, tiers, preload=False)
        except SandboxError as error:
            if not allow_unsafe:
                raise SandboxError(
                    f"{error}. Use a machine where it can be isolated, or a remote executor (python_executor_url), or "
                    "set allow_unsafe: true to run the model's code as your user, with your files and network."
                ) from error
            warnings.warn(f"{error}. The model's code runs as your user, with your files and network.", stacklevel=3)
            self.tier = Tier.UNSAFE
            first = Worker(limits, tier=self.tier, preload=False)
        self._idle[False].append(first)
        self._close = weakref.finalize(self, _close_all, self._idle, self._lock)

    def __str__(self) -> str:
        """How the model's code is kept apart, in a line."""
        return f"Model-written Python runs {_COVERS[self.tier]}."

    def __call__(self, code: str, earlier: Sequence[str] = ()) -> str:
        """What `code` prints, run after the cells `earlier`, whose output is not shown.

        Raises `ToolError` with the output so far when it fails, `ToolStopped` when a limit or a crash ended it.
        """
        ran = self._run(code, earlier)
        reason = stop_reason(ran.ending, self._limits, earlier)
        return shown(ran.output, ran.ending, reason)

    def _run(self, code: str, earlier: Sequence[str]) -> Run:
        # Decides the speed only: numpy and sympy can be imported either way, and forking their 70 MB takes 2 ms.
        preload = any(name in cell for cell in (*earlier, code) for name in ("numpy", "sympy"))
        with self._places:
            worker = self._take_idle(preload)
            if worker is not None:
                with contextlib.suppress(WorkerLost):  # it may have been dead for long: a fresh one gets its chance
                    return self._run_in(worker, code, earlier, preload)
            try:
                worker = Worker(self._limits, tier=self.tier, preload=preload)
            except (SandboxError, OSError) as error:  # the first one could: this machine is short of something now
                warnings.warn(f"A call of the python tool fails: {error}.", stacklevel=2)
                raise ToolStopped("Error: the python process could not be started") from None
            try:
                return self._run_in(worker, code, earlier, preload)
            except WorkerLost:
                raise ToolStopped("Error: the python process died") from None

    def _run_in(self, worker: Worker, code: str, earlier: Sequence[str], preload: bool) -> Run:
        ran = worker.run(code, earlier)
        with self._lock:
            self._idle[preload].append(worker)
        return ran

    def _take_idle(self, preload: bool) -> Worker | None:
        with self._lock:
            if self._pid != os.getpid():  # in a fork of the trainer: the pipes are the trainer's
                self._pid = os.getpid()
                for workers in self._idle.values():
                    workers.clear()
            workers = self._idle[preload]
            return workers.pop() if workers else None

    def close(self) -> None:
        """End the idle workers; also done when the tool is garbage and at exit."""
        self._close()


def _close_all(idle: dict[bool, list[Worker]], lock: threading.Lock) -> None:
    with lock:
        for workers in idle.values():
            while workers:
                workers.pop().close()


def stop_reason(ending: Ending, limits: Limits, earlier: Sequence[str]) -> str:
    """The line that tells the model why its call was stopped; empty where a traceback says it, or nothing has to."""
    cells = ", the cells before it included" if earlier else ""
    return {
        Ending.FINISHED: "",
        Ending.RAISED: "",
        Ending.DIED: "Error: the python process was killed or crashed (memory limit "
        f"{limits.memory_mb} MB, file limit {limits.file_mb} MB)",
        Ending.TIMEOUT: f"Error: the code ran longer than {limits.timeout_s:g} s{cells}",
        Ending.CPU: f"Error: the code used more than {limits.cpu_s:g} s of CPU time{cells}",
        Ending.FLOOD: f"Error: stopped, the code printed more than {limits.output_bytes} bytes",
        Ending.DISK: f"Error: stopped, the code wrote more than {limits.disk_mb} MB or {limits.files} files",
        Ending.THREADS: f"Error: stopped, the code ran more than {limits.threads} threads",
    }[ending]


def shown(output: str, ending: Ending, reason: str) -> str:
    """What a call that finished shows. Raises `ToolError`, or `ToolStopped`, with what any other shows."""
    output = output.rstrip("\n")
    if ending is Ending.FINISHED:
        return output
    error = ToolError if ending is Ending.RAISED else ToolStopped
    raise error("\n".join(part for part in (output, reason) if part) or "Error: the code failed without a message")


class PastCells(PathState):
    """The calls that a path has made. Each new call runs them again before its own code.

    The calls are an immutable tuple: siblings share those before they parted, and nothing after.

    Args:
        run: Runs `code` after the cells `earlier`, sync or async.
        calls: Each call's arguments, and its failure if it failed; oldest first.
    """

    def __init__(
        self, run: Callable[..., Any], calls: tuple[tuple[dict[str, Any], ToolFailure | None], ...] = ()
    ) -> None:
        self._run = run
        self._calls = calls

    @property
    def key(self) -> tuple[Any, ...]:
        return self._calls

    @property
    def cells(self) -> list[str]:
        """The code of the calls that left something behind: those that finished, and those that raised.

        A call that was stopped is left out: it would be stopped again, and a notebook whose kernel died forgets.
        """
        return [str(arguments["code"]) for arguments, failure in self._calls if failure in (None, ToolFailure.ERROR)]

    def bind(self, tool: str) -> Callable[..., Any]:
        return partial(self._run, earlier=self.cells)

    def record(self, call: ToolCall, failure: ToolFailure | None) -> None:
        self._calls += ((call.arguments, failure),)

    def fork(self) -> PastCells:
        return PastCells(self._run, self._calls)


def offer(python: Any, run: Callable[..., Any], *, stateful: bool) -> Any:
    """The function `python`, documented for a model and, if stateful, with a state of `PastCells`.

    Its attribute `isolation` says in a line how `run` keeps the code apart.
    """
    kept = "variables are kept between calls" if stateful else "nothing is kept between calls"
    python.__doc__ = f"""Run Python code and return what it prints and the value of a last line that is an expression.

        Args:
            code: The Python code to run. numpy and sympy can be imported; {kept}.
        """
    python.isolation = str(run)
    if stateful:
        python.create_state = lambda group: PastCells(run)
    return python


def python_tool(
    *,
    timeout_s: float = 5.0,
    memory_mb: int = 512,
    max_output_chars: int = 100_000,
    max_workers: int | None = None,
    allow_unsafe: bool = False,
    isolation: str = "auto",
    stateful: bool = False,
) -> Callable[[str], str]:
    """A function `python(code: str) -> str` to offer to a model; its `isolation` says how the code is kept apart.

    Args:
        timeout_s: Seconds a call may run, of wall time and of CPU time; what it printed before is kept.
        memory_mb: MiB of address space a call may take on top of the warm interpreter's own.
        max_output_chars: A call that prints more (in UTF-8 bytes) is stopped; what it printed up to there is kept.
        max_workers: Calls that run at once, each in a warm interpreter (10 MB; 70 MB for code that uses numpy or
            sympy); default twice the CPU count.
        allow_unsafe: Where code cannot be isolated, run it anyway with resource limits only, after a warning.
        isolation: "auto" takes the first tier that holds on this machine; or the name of one, of `ISOLATIONS`.
        stateful: A call sees the variables of its path's earlier calls, which are run again before it, within the
            same `timeout_s`. Sibling paths never share anything.

    Raises `SandboxError` where code cannot be isolated and `allow_unsafe` is false.
    """
    limits = Limits(timeout_s=timeout_s, cpu_s=timeout_s, memory_mb=memory_mb, output_bytes=max_output_chars)
    workers = max_workers or 2 * (os.cpu_count() or 1)
    run = PythonTool(limits, max_workers=workers, allow_unsafe=allow_unsafe, isolation=isolation)

    def python(code: str) -> str:
        return run(code)

    return offer(python, run, stateful=stateful)
