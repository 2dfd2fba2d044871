"""The `python` tool: runs model-written code in a sandboxed interpreter, with the output of a notebook."""

from __future__ import annotations

import contextlib
import os
import re
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

_ANSI_CODE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\))")
_COVERS = {
    Tier.SANDLOCK: "isolated by sandlock (Landlock, seccomp): no access to other files, processes or the network; "
    "limits on time, memory, disk, threads and output",
    Tier.NAMESPACES: "isolated by user namespaces and seccomp: no access to other files, processes or the network; "
    "limits on time, memory, disk, threads and output",
    Tier.UNSAFE: "NOT isolated: only limits on time, memory, disk, threads and output",
}


class PythonTool:
    """Runs code in at most `max_workers` workers at the same time. Thread-safe.

    Construction tests the isolation and uses the first tier that passes on this machine.
    `arpo_trl.tools.python.sandbox` lists the protection of each tier.

    Args:
        allow_unsafe: If no tier passes, warn and run code in a plain process with resource limits.

    Raises:
        SandboxError: No tier passes and `allow_unsafe` is false.
    """

    def __init__(self, limits: Limits, *, max_workers: int, allow_unsafe: bool, isolation: str = "auto") -> None:
        if isolation not in ISOLATIONS:
            raise ConfigError(f"The isolation of the python tool is {isolation!r}; expected one of {ISOLATIONS}.")
        self._limits = limits
        self._slots = threading.BoundedSemaphore(max_workers)
        self._lock = threading.Lock()
        self._idle: dict[bool, list[Worker]] = {False: [], True: []}  # by `preload`
        tiers = ISOLATING if isolation == "auto" else (Tier(isolation),)
        try:
            first, self.tier = isolated_worker(limits, tiers)
        except SandboxError as error:
            if not allow_unsafe:
                raise SandboxError(
                    f"{error}. Use a machine that supports isolation, or a remote executor (python_executor_url), or "
                    "set allow_unsafe: true to run the model's code as your user, with your files and network."
                ) from error
            warnings.warn(f"{error}. The model's code runs as your user, with your files and network.", stacklevel=3)
            self.tier = Tier.UNSAFE
            first = Worker(limits, tier=self.tier, preload=False)
        self._idle[False].append(first)
        self._close = weakref.finalize(self, _close_all, self._idle, self._lock)

    def __str__(self) -> str:
        """Return one line that describes the isolation of the model's code."""
        return f"Model-written Python runs {_COVERS[self.tier]}."

    def __call__(self, code: str, earlier: Sequence[str] = ()) -> str:
        """Return the output of `code`, which runs after the cells `earlier`, whose output is hidden.

        Raises:
            ToolError: The code raised; the message is its output, with the traceback.
            ToolStopped: A limit or a crash ended the code; the message is the output so far, with the reason.
        """
        ran = self._run(code, earlier)
        reason = stop_reason(ran.ending, self._limits, earlier)
        return shown(ran.output, ran.ending, reason)

    def _run(self, code: str, earlier: Sequence[str]) -> Run:
        # This affects only speed. numpy and sympy can always be imported, and a fork of their 70 MB takes 2 ms.
        preload = any(name in cell for cell in (*earlier, code) for name in ("numpy", "sympy"))
        with self._slots:
            worker = self._take_idle(preload)
            if worker is not None:
                with contextlib.suppress(WorkerLost):  # it may have exited earlier, so try a new one
                    return self._run_in(worker, code, earlier, preload)
            try:
                worker = Worker(self._limits, tier=self.tier, preload=preload)
                return self._run_in(worker, code, earlier, preload)
            except (SandboxError, WorkerLost, OSError) as error:  # the first worker worked, so resources are now short
                warnings.warn(f"A call of the python tool fails: {error}.", stacklevel=2)
                raise ToolStopped("Error: the python process could not be started, or was lost") from None

    def _run_in(self, worker: Worker, code: str, earlier: Sequence[str], preload: bool) -> Run:
        ran = worker.run(code, earlier)
        with self._lock:
            self._idle[preload].append(worker)
        return ran

    def _take_idle(self, preload: bool) -> Worker | None:
        with self._lock:
            workers = self._idle[preload]
            while workers:
                worker = workers.pop()
                if not worker.is_of_parent:
                    return worker
                worker.close()
            return None

    def close(self) -> None:
        """Stop the idle workers. This also happens at exit and when the tool is garbage-collected."""
        self._close()


def _close_all(idle: dict[bool, list[Worker]], lock: threading.Lock) -> None:
    with lock:
        for workers in idle.values():
            while workers:
                workers.pop().close()


def stop_reason(ending: Ending, limits: Limits, earlier: Sequence[str]) -> str:
    """Return the reason, shown to the model, why its call was stopped; empty if the code finished or raised."""
    cells = ", including the cells before it" if earlier else ""
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


def as_displayed(output: str) -> str:
    """Return what a terminal shows at the end: only the last state of a progress bar, and no colour codes."""
    if "\r" not in output and "\x1b" not in output:
        return output
    lines = (line.rstrip("\r").rpartition("\r")[2] for line in _ANSI_CODE.sub("", output).split("\n"))
    return "\n".join(lines)


def shown(output: str, ending: Ending, reason: str) -> str:
    """Return the text for the model after a finished call.

    Raises:
        ToolError, ToolStopped: The call raised or was stopped; the message is its text for the model.
    """
    output = as_displayed(output).rstrip("\n")
    if ending is Ending.FINISHED:
        return output
    error = ToolError if ending is Ending.RAISED else ToolStopped
    raise error("\n".join(part for part in (output, reason) if part) or "Error: the code failed without a message")


class PastCells(PathState):
    """The earlier calls of a path. Each new call runs them again before its code.

    The calls are an immutable tuple, so siblings share only the calls before their branch.

    Args:
        run: Runs `code` after the cells `earlier`; sync or async.
        calls: The arguments of each call, and its failure or None; oldest first.
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
        """The code of the calls whose variables later calls see: calls that finished and calls that raised.

        Stopped calls are omitted, because they would be stopped again. A notebook also loses its state if its kernel
        crashes.
        """
        return [str(arguments["code"]) for arguments, failure in self._calls if failure in (None, ToolFailure.ERROR)]

    def bind(self, tool: str) -> Callable[..., Any]:
        return partial(self._run, earlier=self.cells)

    def record(self, call: ToolCall, failure: ToolFailure | None) -> None:
        self._calls += ((call.arguments, failure),)

    def fork(self) -> PastCells:
        return PastCells(self._run, self._calls)


def offer(python: Any, run: Callable[..., Any], *, stateful: bool) -> Any:
    """Return the function `python` with a docstring for the model and, if stateful, a state of `PastCells`.

    Its attribute `isolation` is one line that says how `run` isolates the code.
    """
    kept = "variables are kept between calls" if stateful else "nothing is kept between calls"
    python.__doc__ = f"""Run Python code and return what it prints and the value of a last line that is an expression.

        Args:
            code: The Python code to run. numpy and sympy can be imported; {kept}.
        """
    python.isolation = str(run)
    python.depends_on_calls_only = True  # each call starts from a fresh interpreter; a state is the path's cells
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
    """Return a function `python(code: str) -> str` to offer to a model. Its `isolation` describes how the code is
    isolated.

    Args:
        timeout_s: The maximum seconds of a call, in wall time and in CPU time. Output printed before is kept.
        memory_mb: The maximum address space of a call, in MiB on top of that of the warm interpreter.
        max_output_chars: A call that prints more UTF-8 bytes is stopped. Output up to the limit is kept.
        max_workers: The maximum number of calls that run at the same time, each in a warm interpreter (10 MB; 70 MB
            for code that uses numpy or sympy). Default: twice the CPU count.
        allow_unsafe: If code cannot be isolated, warn and run it with resource limits only.
        isolation: One of `ISOLATIONS`. "auto" uses the first tier that works on this machine.
        stateful: Whether a call sees the variables of its path's earlier calls. The earlier calls run again before it,
            within the same `timeout_s`. Sibling paths never share state.

    Raises:
        SandboxError: Code cannot be isolated and `allow_unsafe` is false.
    """
    limits = Limits(timeout_s=timeout_s, cpu_s=timeout_s, memory_mb=memory_mb, output_bytes=max_output_chars)
    workers = max_workers or 2 * (os.cpu_count() or 1)
    run = PythonTool(limits, max_workers=workers, allow_unsafe=allow_unsafe, isolation=isolation)

    def python(code: str) -> str:
        return run(code)

    offered = offer(python, run, stateful=stateful)
    offered.concurrency = workers  # so that a call's deadline starts when it has a worker
    return offered
