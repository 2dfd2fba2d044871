"""Runs the model's tool calls concurrently. Each call has a deadline, and every failure becomes text for the model.

    submit(call) ─▶ cached? identical call running? otherwise queued ─▶ slot free ─▶ thread or event loop
    poll()       ◀─ (ticket, ToolResult) ◀────────── result or error as text ◀── done or timed out

A scheduling thread manages slots and deadlines and never runs a tool. Each call of a sync tool runs in a new daemon
thread. All calls of async tools run on one shared event loop. A call that misses its deadline is abandoned: its slot
is free immediately, even if its thread continues. (An async tool that blocks the loop makes later async calls time
out.)
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import inspect
import itertools
import json
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, replace
from typing import Any

from arpo_trl.common.queues import drained
from arpo_trl.common.user_code import parameters_of, text_of
from arpo_trl.errors import ConfigError, ToolError, ToolOverdue, ToolSpecError, ToolStopped, ToolUnavailable
from arpo_trl.net.background import LoopThread
from arpo_trl.tools.calls import CallSource, ToolCall, ToolFailure
from arpo_trl.tools.spec import ToolSet
from arpo_trl.tools.state import BoundTool, CreateState, PathState, PathStates
from arpo_trl.tools.texts import NotText, described, presentable, written_out
from arpo_trl.visible import get_logger

logger = get_logger(__name__)

_MIN_MAX_CHARS = 100
_MAX_CACHED = 100_000
_POLLER_S = 0.05
"""How long `poll` keeps starting calls in its thread before it returns, so that the engine can decode."""
_NAMES_THREADS = re.compile(r"\bthreads?\b", re.IGNORECASE)
"""Words in the errors of libraries that must be used from one thread: sqlite3, asyncio, signal, Playwright."""
_OPENING = "open()"
"""Replaces a tool's name for the opening of a path's states. No tool has a name with parentheses."""

_Outcome = tuple[str, ToolFailure | None]  # text for the model, failure of the call


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """The outcome of a call.

    Example: `ToolResult(text="42", failure=None, seconds=0.1, source=CallSource.EXECUTED)`
    """

    text: str
    """The text for the model: never empty, at most `max_chars` long, always encodable as UTF-8."""
    failure: ToolFailure | None
    """None: the call succeeded."""
    seconds: float
    """Wall-clock seconds of the execution that produced the text; 0.0 for a cached result or a refused call."""
    source: CallSource

    @property
    def ok(self) -> bool:
        return self.failure is None


@dataclass(slots=True, eq=False)
class _Execution:
    """One execution, and the tickets that wait for its result."""

    key: tuple[str, str] | None
    """The tool's name, and its arguments and state key as JSON; equal for identical calls. None: never shared."""
    call: ToolCall
    tool: BoundTool
    tickets: list[int]
    timeout_s: float
    is_async: bool = False
    in_poller: bool = False
    """Whether it runs in the thread that polls."""
    result: ToolResult | None = None
    """The outcome; None while it runs."""

    @property
    def is_next(self) -> bool:
        """Whether no earlier call of its state is unfinished."""
        return self.tool.turn is None or self.tool.turn[0] is self


@dataclass(frozen=True, slots=True)
class _Raised:
    """An exception of a tool, wrapped in a value. If raised directly, it might stop the thread or the event loop."""

    error: BaseException


class ToolBox:
    """The tools of a run, and their pending calls.

    One thread submits and polls. Close the box, or use it as a context manager. Threads of hanging calls do not keep
    the interpreter from exiting.

    Args:
        tools: Typed, documented functions, sync or async. A function's name is its tag.
        timeout_s: Seconds from the start of a call to its deadline; the wait for a slot does not count. Calls of tools
            with `run_in` "main" have no deadline.
        concurrency: The number of slots, which is the maximum number of calls that run at the same time.
        per_tool: By tool name, for some tools: the maximum number of calls that run at the same time. A call that
            waits for this limit takes no slot. The limit that a tool declares as its `concurrency` also holds.
        cache: Reuse the text of an earlier successful call with the same name and arguments. This treats every tool as
            deterministic.
        max_chars: The maximum length of a text for the model. A longer text keeps its beginning and end, with a mark
            between them.
        path_state: As in `ToolSet`.

    Raises:
        ConfigError: A number is out of range, or `per_tool` names an unknown tool.
        ToolSpecError: A function cannot be a tool (see `tool_spec`), or two have the same name.
    """

    def __init__(
        self,
        tools: Sequence[Callable[..., Any]],
        *,
        timeout_s: float = 20.0,
        concurrency: int = 32,
        per_tool: Mapping[str, int] | None = None,
        cache: bool = False,
        max_chars: int = 100_000,
        path_state: CreateState | None = None,
    ) -> None:
        for setting, value, least in (("concurrency", concurrency, 1), ("max_chars", max_chars, _MIN_MAX_CHARS)):
            if value < least:
                raise ConfigError(f"{setting} of a ToolBox is {value}, expected at least {least}")
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s of a ToolBox is {timeout_s}, expected more than 0")
        self._offered = ToolSet(tools, path_state)
        self.specs = self._offered.specs
        limits = {name: spec.concurrency for name, spec in self.specs.items() if spec.concurrency is not None}
        for name, limit in (per_tool or {}).items():
            if name not in self.specs:
                raise ConfigError(
                    f"The per-tool limits of a ToolBox name {name!r}, which is not a tool; the tools are: "
                    f"{', '.join(self.names)}."
                )
            if not isinstance(limit, int) or limit < 1:
                raise ConfigError(f"The limit of tool {name!r} is {limit!r}; expected an integer of at least 1.")
            limits[name] = min(limit, limits.get(name, limit))
        self._timeout_s = timeout_s
        self._max_chars = max_chars
        self._lock = threading.Lock()  # guards all attributes below
        self._joinable: dict[tuple[str, str], _Execution] = {}  # running calls of deterministic tools
        self._cache: dict[tuple[str, str], str] | None = {} if cache else None
        self._tickets = itertools.count()
        self._for_poller: deque[_Execution] = deque()  # of tools with run_in "main"
        self._done: queue.SimpleQueue[tuple[int, ToolResult]] = queue.SimpleQueue()
        self._scheduler = LoopThread("arpo-tools-scheduler")
        self._slots = asyncio.Semaphore(concurrency)
        self._tool_slots = {name: asyncio.Semaphore(limit) for name, limit in limits.items()}
        self._async_tools = LoopThread("arpo-tools-async")
        self._thread_bound: set[str] = set()  # tools for which a warning was logged
        self._not_closed: set[type] = set()  # types of states for which a warning was logged
        self._closed = False

    @property
    def names(self) -> tuple[str, ...]:
        """The tools' names, in the given order."""
        return tuple(self.specs)

    def create_states(self, group: int, offered: ToolSet | None = None) -> PathStates:
        """Return the states for the calls of a path that starts at the root of `group`. The caller closes them.

        Args:
            offered: The tools that the path may call; None: all of the box.
        """
        return (offered or self._offered).create_states(group, self._notice_not_closed)

    def open(self, states: PathStates | PathState) -> int:
        """Open the states of a path in a thread, and return the ticket under which `poll` reports the outcome.

        Each of the `opening_steps` of the states may take as long as a call.
        """

        def run() -> str:
            states.open()
            return ""

        tool = BoundTool(run=run, key=None, turn=None)
        with self._lock:
            ticket = next(self._tickets)
        call = ToolCall(name=_OPENING, arguments={})
        execution = _Execution(None, call, tool, [ticket], self._timeout_s * states.opening_steps)
        self._scheduler.start(self._schedule(execution))
        return ticket

    def submit(self, call: ToolCall, states: PathStates | None = None, offered: ToolSet | None = None) -> int:
        """Start a call and return its ticket, under which `poll` delivers the result.

        This never blocks, and never raises for an invalid call.

        Args:
            states: The states of the calling path. Their exceptions propagate. None: the call runs the function that
                was passed to the box.
            offered: The tools that the path may call; None: all of the box.

        Raises:
            RuntimeError: The box is closed.
        """
        if self._closed:
            raise RuntimeError("This ToolBox is closed. Submit calls before close().")
        offered = offered or self._offered
        refusal = offered.refusal(call)
        if refusal is None:
            call = offered.received(call)
            run = offered.functions[call.name]
            tool = BoundTool(run=run, key=(), turn=None) if states is None else states.bind(call.name)
            if offered.specs[call.name].create_state is not None:
                _check_parameters(call, tool)
            key = _key(call, tool)
        with self._lock:
            ticket = next(self._tickets)
            if refusal is not None:
                refused = ToolResult(
                    text=presentable(refusal, self._max_chars),
                    failure=ToolFailure.BAD_CALL,
                    seconds=0.0,
                    source=CallSource.REFUSED,
                )
                self._done.put((ticket, refused))
            elif key is not None and self._cache is not None and key in self._cache:
                cached = ToolResult(text=self._cache[key], failure=None, seconds=0.0, source=CallSource.CACHED)
                self._done.put((ticket, cached))
            elif key is not None and (running := self._joinable.get(key)) is not None:
                running.tickets.append(ticket)
                if running.result is not None:
                    self._done.put((ticket, replace(running.result, source=CallSource.JOINED)))
            else:
                spec = offered.specs[call.name]
                timeout_s = self._timeout_s * tool.steps
                execution = _Execution(key, call, tool, [ticket], timeout_s, spec.is_async, spec.run_in == "main")
                if key is not None and (spec.deterministic or self._cache is not None):
                    self._joinable[key] = execution
                if tool.turn is not None:
                    tool.turn.append(execution)
                if execution.in_poller:
                    self._for_poller.append(execution)
                elif execution.is_next:
                    self._scheduler.start(self._schedule(execution))
        return ticket

    def submit_answered(self, result: ToolResult) -> int:
        """Return a ticket under which `poll` delivers `result`, which the caller already has."""
        with self._lock:
            ticket = next(self._tickets)
            self._done.put((ticket, result))
        return ticket

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, ToolResult]]:
        """Return the (ticket, result) pairs that are done, in order of completion.

        This waits up to `timeout_s` for the first pair. Before that, it runs calls of tools with `run_in` "main": at
        least one if any may run, and more until some 50 ms have passed. A call whose state has an unfinished earlier
        call may not run yet.
        """
        start = time.perf_counter()
        while time.perf_counter() - start < _POLLER_S and (execution := self._next_for_poller()) is not None:
            self._run_in_poller(execution)
        delivered = list(drained(self._done, timeout_s))
        if delivered:  # most polls find nothing
            with self._lock:
                self._settle({ticket for ticket, _ in delivered})
        return delivered

    def _next_for_poller(self) -> _Execution | None:
        """Remove the first execution that may run in this thread, and return it. None: there is none."""
        if not self._for_poller:  # only this thread adds and removes executions
            return None
        with self._lock:
            execution = next((execution for execution in self._for_poller if execution.is_next), None)
        if execution is not None:
            self._for_poller.remove(execution)
        return execution

    def _settle(self, tickets: set[int]) -> None:
        """Stop the sharing of executions whose results were polled, and cache the results.

        Until then identical calls join the execution. So the speed of the tool does not affect which calls join.
        """
        for key, execution in list(self._joinable.items()):
            if execution.result is None or tickets.isdisjoint(execution.tickets):
                continue
            del self._joinable[key]
            if self._cache is not None and execution.result.ok:
                if len(self._cache) >= _MAX_CACHED:
                    del self._cache[next(iter(self._cache))]  # the oldest
                self._cache[key] = execution.result.text

    def state_dict(self) -> dict[tuple[str, str], str]:
        """Return the content of the cache, for `load_state_dict`; empty without a cache."""
        with self._lock:
            return dict(self._cache or {})

    def load_state_dict(self, texts: Mapping[tuple[str, str], str]) -> None:
        """Replace the content of the cache with the content from `state_dict`. Without a cache, do nothing."""
        with self._lock:
            if self._cache is not None:
                self._cache = dict(texts)

    def close(self) -> None:
        """Stop. Results that were not polled are lost. May be called repeatedly."""
        if not self._closed:
            self._closed = True
            self._scheduler.stop()
            self._async_tools.stop()

    def __enter__(self) -> ToolBox:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    async def _schedule(self, first: _Execution) -> None:
        """Run the execution when it has a slot, then those of its state that it delayed. Runs on the scheduling
        thread."""
        execution: _Execution | None = first
        while execution is not None:
            slot_of_tool = self._tool_slots.get(execution.call.name, contextlib.nullcontext())
            async with slot_of_tool, self._slots:
                start = time.perf_counter()
                try:
                    text, failure = await asyncio.wait_for(self._start(execution), execution.timeout_s)
                except TimeoutError:
                    overdue = ToolOverdue.of(execution.call.name, execution.timeout_s)
                    text, failure = self._as_text(execution.call.name, _Raised(overdue))
                except BaseException as error:  # such as: no thread can start. Without a result the caller waits on
                    if self._closed:
                        raise
                    text, failure = self._as_text(execution.call.name, _Raised(error))
                seconds = time.perf_counter() - start
            execution = self._deliver(execution, text, failure, seconds)

    def _run_in_poller(self, execution: _Execution) -> None:
        """Run the execution in this thread. A Ctrl-C comes from the user and is not a failure of the tool. Python
        raises it in the main thread only."""
        start = time.perf_counter()
        value = self._awaited(execution.call.name, _returned(execution.tool.run, execution.call.arguments))
        if type(value) is _Raised:
            if isinstance(value.error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
                raise value.error
            self._notice_bound_to_thread(execution, value.error)
        text, failure = self._as_text(execution.call.name, value)
        delayed = self._deliver(execution, text, failure, time.perf_counter() - start)
        if delayed is not None:
            self._scheduler.start(self._schedule(delayed))

    def _deliver(
        self, execution: _Execution, text: str, failure: ToolFailure | None, seconds: float
    ) -> _Execution | None:
        """Deliver the result to all tickets of the execution.

        Returns the execution of the same state that it delayed, if that one runs outside of the thread that polls.
        """
        result = ToolResult(text=text, failure=failure, seconds=seconds, source=CallSource.EXECUTED)
        with self._lock:
            execution.result = result
            for ticket in execution.tickets:
                self._done.put((ticket, result))
                result = replace(result, source=CallSource.JOINED)
            if (turn := execution.tool.turn) is None:
                return None
            turn.popleft()
            return turn[0] if turn and not turn[0].in_poller else None

    def _start(self, execution: _Execution) -> asyncio.Future[_Outcome]:
        """Return a future of the scheduling loop with the outcome. The outcome is computed in another thread and is
        never an exception."""
        call, tool = execution.call, execution.tool.run

        async def work_async() -> _Outcome:
            return self._as_text(call.name, await _returned_async(tool, call.arguments))

        if execution.is_async:
            return asyncio.wrap_future(self._async_tools.start(work_async()))
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Outcome] = loop.create_future()

        def settle(outcome: _Outcome) -> None:
            if not future.done():
                future.set_result(outcome)

        def work() -> None:
            value = self._awaited(call.name, _returned(tool, call.arguments))
            if type(value) is _Raised:
                self._notice_bound_to_thread(execution, value.error)
            outcome = self._as_text(call.name, value)
            with contextlib.suppress(RuntimeError):  # the box has been closed
                loop.call_soon_threadsafe(settle, outcome)

        # A thread per call costs about 50 µs, and a hanging call blocks no other call.
        threading.Thread(target=work, name=f"arpo-tool-{call.name}", daemon=True).start()
        return future

    def _awaited(self, name: str, value: Any) -> Any:
        """Return `value`, the return value of the sync tool `name`. If it is awaitable, await it on the loop of async
        tools."""
        try:
            if not inspect.isawaitable(value):
                return value
        except BaseException as error:  # code of the value's class, such as a proxy without an object
            return _Raised(error)
        future = self._async_tools.start(_result_of(value))
        try:
            return future.result(self._timeout_s)
        except TimeoutError:
            return _Raised(ToolOverdue.of(name, self._timeout_s))
        except CancelledError as error:  # another coroutine of the loop cancelled it before its start
            return _Raised(error)
        finally:
            future.cancel()

    def _notice_bound_to_thread(self, execution: _Execution, error: BaseException) -> None:
        """Warn once if a tool seems to need a single thread. Otherwise only the model would see the error."""
        name, message = execution.call.name, described(error)
        if name not in self._thread_bound and not isinstance(error, ToolError) and _NAMES_THREADS.search(message):
            self._thread_bound.add(name)
            if execution.in_poller:
                hint = (
                    f"Its run_in is 'main', so it ran in the sampling thread, {threading.current_thread().name}. With "
                    "rollouts_ahead this is not the main thread, in which evaluations sample. Make what needs one "
                    "thread at the first call in each thread, and keep it in a threading.local()."
                )
            elif name in self.specs and self.specs[name].create_state is not None:
                hint = (
                    "The state of its path was made in another thread, for example by fork(). Make what needs one "
                    "thread in reset() or at the first call."
                )
            else:
                hint = (
                    "Each call runs in a new thread. If the tool must run in the thread that created it, set its "
                    f"attribute: {name}.run_in = 'main'."
                )
            logger.warning(f"A call of tool {name!r} failed: {message.removeprefix('Error: ')} {hint}")

    def _notice_not_closed(self, state: PathState, error: BaseException) -> None:
        """Warn once for each type of state whose `close` failed."""
        if type(state) not in self._not_closed:
            self._not_closed.add(type(state))
            logger.warning(
                f"close() of {type(state).__name__} failed: {type(error).__name__}: {text_of(error)}. The run "
                "continues, but the resources of the state may not be released. Further failures of its close() are "
                "not logged."
            )

    def _as_text(self, name: str, value: Any) -> _Outcome:
        if type(value) is _Raised:
            return presentable(described(value.error), self._max_chars), _failure_of(value.error)
        try:
            return presentable(written_out(value), self._max_chars), None
        except NotText as error:
            return f"Error: the {name} call returned {error}, which is not text.", ToolFailure.NOT_TEXT


def _check_parameters(call: ToolCall, tool: BoundTool) -> None:
    """Check that the function of a state takes the arguments of a valid call.

    Raises:
        ToolSpecError: It does not. Otherwise each call would fail, and only the model would see it.
    """
    if parameters_of(tool.run) is None:
        return
    try:
        inspect.signature(tool.run).bind(**call.arguments)
    except TypeError as error:
        raise ToolSpecError(
            f"The tool {call.name!r} takes {list(call.arguments)}, but the function with which a state runs its calls "
            f"does not ({error}). Give the state's method the parameters of the tool's function."
        ) from error


def _key(call: ToolCall, tool: BoundTool) -> tuple[str, str] | None:
    if tool.key is None:
        return None
    return call.name, json.dumps([call.arguments, *tool.key], sort_keys=True, default=repr)


def _returned(tool: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    """Call the tool. It gets a copy of the arguments, since it may change lists and dicts."""
    try:
        return tool(**copy.deepcopy(arguments))
    except BaseException as error:
        return _Raised(error)


async def _result_of(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except BaseException as error:
        return _Raised(error)


async def _returned_async(tool: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        return await tool(**copy.deepcopy(arguments))
    except BaseException as error:
        return _Raised(error)


def _failure_of(error: BaseException) -> ToolFailure:
    if isinstance(error, ToolUnavailable):
        return ToolFailure.DEGRADED
    if isinstance(error, ToolOverdue):
        return ToolFailure.TIMEOUT
    return ToolFailure.STOPPED if isinstance(error, ToolStopped) else ToolFailure.ERROR
