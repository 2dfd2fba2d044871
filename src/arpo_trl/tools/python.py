"""The `python` tool: model-written code in a sandboxed interpreter, its output as a notebook would show it."""

from __future__ import annotations

import contextlib
import os
import threading
import warnings
import weakref
from collections.abc import Callable

from arpo_trl.errors import SandboxError, ToolError
from arpo_trl.tools.sandbox import Ending, Limits, Run, Worker, WorkerLost, check_isolation


class PythonTool:
    """Runs code in workers of its own, at most `max_workers` at once; safe to call from many threads.

    Isolation is tried, not assumed: where code can break out, construction raises `SandboxError`, unless
    `allow_unsafe`, which warns once and runs code in a plain process with resource limits. `arpo_trl.tools.sandbox`
    lists what each stops.
    """

    def __init__(self, limits: Limits, *, max_workers: int, allow_unsafe: bool) -> None:
        self._limits = limits
        self._places = threading.BoundedSemaphore(max_workers)
        self._lock = threading.Lock()
        self._idle: dict[bool, list[Worker]] = {False: [], True: []}  # by `preload`
        self._pid = os.getpid()
        self._isolated = True
        try:
            first = Worker(limits, isolated=True, preload=False)
            try:
                check_isolation(first)
            except BaseException:
                first.close()
                raise
        except (SandboxError, WorkerLost) as error:
            if not allow_unsafe:
                raise SandboxError(
                    f"{error}. Use a machine where it can be isolated, or set allow_unsafe: true to run the model's "
                    "code as your user, with your files and network."
                ) from error
            warnings.warn(f"{error}. The model's code runs as your user, with your files and network.", stacklevel=3)
            self._isolated = False
            first = Worker(limits, isolated=False, preload=False)
        self._idle[False].append(first)
        self._close = weakref.finalize(self, _close_all, self._idle, self._lock)

    def __call__(self, code: str) -> str:
        """What `code` prints; raises `ToolError` with the output so far when it fails."""
        return _as_text(self._run(code), self._limits)

    def _run(self, code: str) -> Run:
        # Decides the speed only: numpy and sympy can be imported either way, and forking their 70 MB takes 10 ms.
        preload = "numpy" in code or "sympy" in code
        with self._places:
            worker = self._take_idle(preload)
            if worker is not None:
                with contextlib.suppress(WorkerLost):  # it may have been dead for long: a fresh one gets its chance
                    return self._run_in(worker, code, preload)
            worker = Worker(self._limits, isolated=self._isolated, preload=preload)
            try:
                return self._run_in(worker, code, preload)
            except WorkerLost:
                raise ToolError("Error: the python process died") from None

    def _run_in(self, worker: Worker, code: str, preload: bool) -> Run:
        ran = worker.run(code)
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


def _as_text(ran: Run, limits: Limits) -> str:
    output = ran.output.rstrip("\n")
    if ran.ending is Ending.FINISHED:
        return output
    reason = {
        Ending.RAISED: "",
        Ending.DIED: "Error: the python process was killed or crashed (memory limit "
        f"{limits.memory_mb} MB, file limit {limits.file_mb} MB)",
        Ending.TIMEOUT: f"Error: the code ran longer than {limits.timeout_s:g} s",
        Ending.FLOOD: f"Error: stopped, the code printed more than {limits.output_bytes} bytes",
    }[ran.ending]
    raise ToolError("\n".join(part for part in (output, reason) if part) or "Error: the code failed without a message")


def python_tool(
    *,
    timeout_s: float = 5.0,
    memory_mb: int = 512,
    max_output_chars: int = 100_000,
    max_workers: int | None = None,
    allow_unsafe: bool = False,
) -> Callable[[str], str]:
    """A function `python(code: str) -> str` to offer to a model.

    Args:
        timeout_s: Wall-clock seconds a call may run; what it printed before is kept.
        memory_mb: MiB of address space a call may take on top of the warm interpreter's own.
        max_output_chars: A call that prints more (in UTF-8 bytes) is stopped; what it printed up to there is kept.
        max_workers: Calls that run at once, each in a warm interpreter (10 MB; 70 MB for code that uses numpy or
            sympy); default twice the CPU count.
        allow_unsafe: Where code cannot be isolated, run it anyway with resource limits only, after a warning.

    Raises `SandboxError` where code cannot be isolated and `allow_unsafe` is false.
    """
    limits = Limits(timeout_s=timeout_s, memory_mb=memory_mb, output_bytes=max_output_chars)
    run = PythonTool(limits, max_workers=max_workers or 2 * (os.cpu_count() or 1), allow_unsafe=allow_unsafe)

    def python(code: str) -> str:
        """Run Python code and return what it prints, with the value of the last line if it is an expression.

        Args:
            code: The Python code to run. numpy and sympy can be imported; nothing is kept between calls.
        """
        return run(code)

    return python
