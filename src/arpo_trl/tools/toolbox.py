"""Runs the model's tool calls: many at once, each with a deadline, and every failure as text for the model.

    submit(call) ─▶ cached? joined to an identical call in flight? else queued ─▶ place free ─▶ thread or event loop
    poll()       ◀─ (ticket, ToolResult) ◀───────────── text, or what went wrong as text ◀── done, or deadline

A scheduling thread owns places and deadlines and never runs a tool. A call of a sync tool runs in a daemon thread of
its own, one of an async tool on an event loop that all async tools share. A call that misses its deadline is
abandoned: its place is free at once, whatever its thread still does. (An async tool that blocks that loop makes the
async calls after it miss theirs.)

What a tool says of itself, as attributes of its function:

    tool.deterministic = True   identical calls that are under way at once may be one, and all get its result
    tool.run_in = "main"        a sync tool runs in the thread that polls: one call after the other, in their order,
                                without a place, and without a deadline, since nothing can end it there
    tool.create_state = create  its calls act on a state that each path has for itself; see `arpo_trl.tools.state`
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import json
import queue
import re
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePath
from typing import Any, Literal, get_args
from uuid import UUID

from transformers.utils.chat_template_utils import get_json_schema

from arpo_trl.common.queues import drained
from arpo_trl.errors import ConfigError, ToolError, ToolSpecError, ToolStopped, ToolUnavailable
from arpo_trl.net.background import LoopThread
from arpo_trl.tools.calls import CallSource, ToolCall, ToolFailure
from arpo_trl.tools.state import BoundTool, CreateState, NoState, PathState, PathStates
from arpo_trl.visible import get_logger

logger = get_logger(__name__)

RESERVED_TAGS = frozenset({"think", "answer", "result"})

_TAG = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_MIN_MAX_CHARS = 100
_MAX_ERROR_CHARS = 300
_MAX_CACHED = 100_000
_POLLER_S = 0.05
"""For how long `poll` goes on starting calls in its own thread; then the engine has its turn."""
_NAMES_THREADS = re.compile(r"\bthreads?\b", re.IGNORECASE)
"""What libraries say that want one thread: sqlite3, asyncio, signal, Playwright."""
_JSON_TYPES: dict[str, tuple[type, ...]] = {
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list, tuple),
    "object": (dict,),
}

_WRITTEN_OUT = (Decimal, Fraction, date, time_of_day, timedelta, UUID, PurePath)
"""Values that have one way to be written as text."""

RunIn = Literal["thread", "main"]

_Outcome = tuple[str, ToolFailure | None]  # the model's text, and how the call failed if it did


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolResult:
    """The outcome of a call.

    Example: `ToolResult(text="42", failure=None, seconds=0.1, source=CallSource.EXECUTED)`
    """

    text: str
    """What the model reads: never empty, at most `max_chars` long, always encodable as UTF-8."""
    failure: ToolFailure | None
    """None: the call succeeded."""
    seconds: float
    """Wall-clock seconds of the execution that produced the text; 0.0 for a cached result or a refused call."""
    source: CallSource

    @property
    def ok(self) -> bool:
        return self.failure is None


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolSpec:
    """What is needed to offer a tool to a model and to check its calls; `tool_spec` makes it.

    Example: `tool_spec(python_tool()).single_text_parameter` is "code".
    """

    name: str
    parameters: tuple[str, ...]
    schema: dict[str, Any]
    """JSON schema of the function, in the format of chat templates."""
    is_async: bool
    deterministic: bool
    """Identical calls may share one execution."""
    run_in: RunIn
    """Where a sync tool runs. "thread": each call in a new thread. "main": all calls in the thread that polls."""
    create_state: CreateState | None
    """Creates the state that a path's calls of the tool act on; None for a tool without state."""
    single_text_parameter: str | None
    """The only required parameter if it is a string: the text between the tool's tags. Else None."""


def tool_spec(tool: Callable[..., Any]) -> ToolSpec:
    """The specification of a typed, documented function.

    A function whose parameters are known at run time only (a tool of an MCP server) carries its own schema, as chat
    templates take it, in the attribute `json_schema`. What the attributes `deterministic`, `run_in` and `create_state`
    mean is said at the top of this module.

    Raises `ToolSpecError` for a name that cannot be a tag, for `*args` or `**kwargs`, for a missing docstring, type or
    description of a parameter, and for an attribute that means nothing.
    """
    name = getattr(tool, "__name__", None)
    if name is None:
        raise ToolSpecError(f"a tool is a named function, got {tool!r}. Wrap it in a `def` that has the tool's name.")
    if not _TAG.fullmatch(name):
        raise ToolSpecError(
            f"tool {name!r}: its name is its tag, so it has to match {_TAG.pattern}. Rename the function."
        )
    if name in RESERVED_TAGS:
        raise ToolSpecError(f"tool {name!r}: <{name}> has a meaning of its own in a rollout. Rename the function.")
    signature = inspect.signature(tool)
    for parameter in signature.parameters.values():
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD, parameter.POSITIONAL_ONLY):
            raise ToolSpecError(f"tool {name!r}: a model cannot be offered {str(parameter)!r}. Name each parameter.")
    try:
        schema = getattr(tool, "json_schema", None) or get_json_schema(tool)
    except Exception as error:  # its own parsing errors, and whatever unusual annotations raise in it
        raise ToolSpecError(
            f"tool {name!r} cannot be described to a model: {error} "
            "It needs a docstring with an `Args:` section that describes each parameter, and a type for each."
        ) from error
    properties = schema["function"]["parameters"]["properties"]
    required = [p.name for p in signature.parameters.values() if p.default is p.empty]
    single = required[0] if len(required) == 1 and properties[required[0]].get("type") == "string" else None
    is_async = inspect.iscoroutinefunction(tool)
    deterministic: Any = getattr(tool, "deterministic", False)
    run_in: Any = getattr(tool, "run_in", "thread")
    create_state: Any = getattr(tool, "create_state", None)
    if not isinstance(deterministic, bool):
        raise ToolSpecError(f"tool {name!r}: its attribute deterministic is {deterministic!r}; expected a bool.")
    if run_in not in get_args(RunIn):
        raise ToolSpecError(f"tool {name!r}: its attribute run_in is {run_in!r}; expected one of {get_args(RunIn)}.")
    if is_async and run_in == "main":
        raise ToolSpecError(
            f"tool {name!r} is async and runs on an event loop, but its run_in is 'main'. Make it a sync function."
        )
    if create_state is not None and not callable(create_state):
        raise ToolSpecError(
            f"tool {name!r}: its attribute create_state is {create_state!r}; expected a function that takes the id of "
            "a group and returns a new PathState."
        )
    return ToolSpec(
        name=name,
        parameters=tuple(signature.parameters),
        schema=schema,
        is_async=is_async,
        deterministic=deterministic,
        run_in=run_in,
        create_state=create_state,
        single_text_parameter=single,
    )


@dataclass(slots=True)
class _Flight:
    """One execution and the tickets that wait for it."""

    key: tuple[str, str] | None
    """Its tool, and its arguments and its state's key as text: of identical calls the same. None: like no other."""
    call: ToolCall
    tool: BoundTool
    tickets: list[int]


@dataclass(frozen=True, slots=True)
class _Raised:
    """What a tool raised, as a value: some exceptions change the course of the thread or loop they travel through."""

    error: BaseException


class _Overdue(Exception):
    """What a sync tool returned is an awaitable whose result did not come in time."""


class ToolBox:
    """The tools of a run, and the calls to them that are under way.

    Args:
        tools: Typed, documented functions, sync or async; a function's name is its tag.
        timeout_s: Seconds from a call's start to its deadline; waiting for a place does not count. Calls of tools with
            `run_in` "main" have none.
        concurrency: Places, that is calls that run at once.
        per_tool: For some tools, by name, how many of their calls may run at once; besides `concurrency`, which a call
            does not take part of while it waits for its tool.
        cache: Give the text of an earlier successful call with the same name and arguments again; so every tool is
            taken to be deterministic.
        max_chars: Longest text a model is shown; of a longer one head and tail are kept and the cut is marked.

    One thread submits and polls. Close it, or use it as a context manager; threads of calls that hang never keep the
    interpreter from exiting.
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
    ) -> None:
        for setting, value, least in (("concurrency", concurrency, 1), ("max_chars", max_chars, _MIN_MAX_CHARS)):
            if value < least:
                raise ConfigError(f"{setting} of a ToolBox is {value}, expected at least {least}")
        if not timeout_s > 0:
            raise ConfigError(f"timeout_s of a ToolBox is {timeout_s}, expected more than 0")
        self.specs: dict[str, ToolSpec] = {}
        self._tools: dict[str, Callable[..., Any]] = {}
        for tool in tools:
            spec = tool_spec(tool)
            if spec.name in self.specs:
                raise ToolSpecError(f"two tools are named {spec.name!r}; a tag has to name one. Rename one of them.")
            self.specs[spec.name] = spec
            self._tools[spec.name] = tool
        self._no_state = NoState(self._tools)
        self._create = {name: spec.create_state for name, spec in self.specs.items() if spec.create_state is not None}
        for name, places in (per_tool or {}).items():
            if name not in self.specs:
                raise ConfigError(
                    f"The per-tool limits of a ToolBox name {name!r}, which is not a tool; the tools are: "
                    f"{', '.join(self.names)}."
                )
            if not isinstance(places, int) or places < 1:
                raise ConfigError(f"The limit of tool {name!r} is {places!r}; expected an integer of at least 1.")
        self._timeout_s = timeout_s
        self._max_chars = max_chars
        self._lock = threading.Lock()  # guards everything below
        self._joinable: dict[tuple[str, str], _Flight] = {}  # those under way, of deterministic tools
        self._cache: dict[tuple[str, str], str] | None = {} if cache else None
        self._tickets = 0
        self._pending = 0
        self._for_poller: deque[_Flight] = deque()  # of tools with run_in "main"
        self._done: queue.SimpleQueue[tuple[int, ToolResult]] = queue.SimpleQueue()
        self._scheduler = LoopThread("arpo-tools-scheduler")
        self._places = asyncio.Semaphore(concurrency)
        self._tool_places = {name: asyncio.Semaphore(places) for name, places in (per_tool or {}).items()}
        self._async_tools = LoopThread("arpo-tools-async")
        self._thread_bound: set[str] = set()  # tools that were said to look so
        self._not_closed: set[type] = set()  # states that were said to fail so
        self._closed = False

    @property
    def names(self) -> tuple[str, ...]:
        """The tools' names, in the order given."""
        return tuple(self.specs)

    @property
    def pending(self) -> int:
        """Tickets that `poll` has not delivered yet."""
        with self._lock:
            return self._pending

    def create_states(self, group: int) -> PathStates:
        """What the calls of a path act on that starts at the root of that group, for `submit`; close it in the end."""
        return PathStates(group, self._create, self._no_state, self._notice_not_closed)

    def submit(self, call: ToolCall, states: PathStates | None = None) -> int:
        """The ticket under which `poll` delivers this call's result; never blocks, and never raises for a bad call.

        Args:
            states: Those of the path that calls; what they raise is raised. None: the call runs the tool as it was
                given to the box.
        """
        if self._closed:
            raise RuntimeError("this ToolBox is closed")
        refusal = self._refusal(call)
        if refusal is None:
            tool = (
                BoundTool(run=self._tools[call.name], key=(), turn=None) if states is None else states.bind(call.name)
            )
            key = _key(call, tool)
        with self._lock:
            ticket = self._tickets
            self._tickets += 1
            self._pending += 1
            if refusal is not None:
                self._done.put(
                    (
                        ticket,
                        ToolResult(text=refusal, failure=ToolFailure.BAD_CALL, seconds=0.0, source=CallSource.REFUSED),
                    )
                )
            elif key is not None and self._cache is not None and key in self._cache:
                self._done.put(
                    (ticket, ToolResult(text=self._cache[key], failure=None, seconds=0.0, source=CallSource.CACHED))
                )
            elif key is not None and key in self._joinable:
                self._joinable[key].tickets.append(ticket)
            else:
                flight, spec = _Flight(key, call, tool, [ticket]), self.specs[call.name]
                if key is not None and (spec.deterministic or self._cache is not None):
                    self._joinable[key] = flight
                if spec.run_in == "main":
                    self._for_poller.append(flight)
                else:
                    self._scheduler.start(self._fly(flight))
        return ticket

    def poll(self, timeout_s: float = 0.0) -> list[tuple[int, ToolResult]]:
        """The (ticket, result) pairs that are there, first done first; waits at most `timeout_s` for the first.

        Before that it runs calls of tools with `run_in` "main": the first, and more for as long as they are quick.
        """
        start = time.perf_counter()
        while self._for_poller and time.perf_counter() - start < _POLLER_S:
            self._fly_here(self._for_poller.popleft())
        delivered = list(drained(self._done, timeout_s))
        with self._lock:
            self._pending -= len(delivered)
        return delivered

    def state_dict(self) -> dict[tuple[str, str], str]:
        """What its cache holds, for `load_state_dict`; empty without one."""
        with self._lock:
            return dict(self._cache or {})

    def load_state_dict(self, texts: Mapping[tuple[str, str], str]) -> None:
        """Puts what `state_dict` gave in the place of what the cache holds, if there is one."""
        with self._lock:
            if self._cache is not None:
                self._cache = dict(texts)

    def close(self) -> None:
        """Stop; results that were not polled are lost. May be called again."""
        if not self._closed:
            self._closed = True
            self._scheduler.stop()
            self._async_tools.stop()

    def __enter__(self) -> ToolBox:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _refusal(self, call: ToolCall) -> str | None:
        """Text for the model when the call cannot be made, else None."""
        spec = self.specs.get(call.name)
        if spec is None:
            return self._presentable(f"Error: there is no tool {call.name!r}; the tools are: {', '.join(self.names)}.")
        try:
            inspect.signature(self._tools[call.name]).bind(**call.arguments)
        except TypeError as error:
            return self._presentable(f"Error: {call.name}: {error}.")
        properties = spec.schema["function"]["parameters"]["properties"]
        for name, value in call.arguments.items():
            expected = properties[name].get("type")
            types = _JSON_TYPES.get(expected) if isinstance(expected, str) else None
            # bool is an int to Python, not to a schema
            if types and (not isinstance(value, types) or (isinstance(value, bool) and bool not in types)):
                if value is None and properties[name].get("nullable"):
                    continue
                return f"Error: {call.name}: {name} has to be of type {expected}, got {type(value).__name__}."
        return None

    async def _fly(self, flight: _Flight) -> None:
        """Execute the flight once it has a place. Runs on the scheduling thread."""
        place_of_tool = self._tool_places.get(flight.call.name, contextlib.nullcontext())
        async with flight.tool.turn or contextlib.nullcontext(), place_of_tool, self._places:
            start = time.perf_counter()
            try:
                text, failure = await asyncio.wait_for(self._execute(flight), self._timeout_s)
            except TimeoutError:
                text, failure = self._overdue(flight.call.name)
            except RuntimeError as error:  # no thread to be had: a lost ticket would be waited for in vain
                text, failure = self._as_text(flight.call.name, _Raised(error))
            seconds = time.perf_counter() - start
        self._land(flight, text, failure, seconds)

    def _fly_here(self, flight: _Flight) -> None:
        """Execute the flight in this thread, where Ctrl-C is the user's and no failure of the tool."""
        start = time.perf_counter()
        value = self._awaited(_returned(flight.tool.run, flight.call.arguments))
        if isinstance(value, _Raised) and isinstance(value.error, KeyboardInterrupt):
            raise value.error
        text, failure = self._as_text(flight.call.name, value)
        self._land(flight, text, failure, time.perf_counter() - start)

    def _land(self, flight: _Flight, text: str, failure: ToolFailure | None, seconds: float) -> None:
        """Deliver to all tickets of the flight."""
        with self._lock:
            if flight.key is not None:
                self._joinable.pop(flight.key, None)
                if self._cache is not None and failure is None:
                    if len(self._cache) >= _MAX_CACHED:
                        del self._cache[next(iter(self._cache))]  # the oldest
                    self._cache[flight.key] = text
            source = CallSource.EXECUTED
            for ticket in flight.tickets:
                self._done.put((ticket, ToolResult(text=text, failure=failure, seconds=seconds, source=source)))
                source = CallSource.JOINED

    def _execute(self, flight: _Flight) -> asyncio.Future[_Outcome]:
        """A future of the scheduling loop with the outcome, which is computed off that loop and never an exception."""
        call, tool = flight.call, flight.tool.run

        async def work_async() -> _Outcome:
            return self._as_text(call.name, await _returned_async(tool, call.arguments))

        if self.specs[call.name].is_async:
            return asyncio.wrap_future(self._async_tools.start(work_async()))
        loop = asyncio.get_running_loop()
        future: asyncio.Future[_Outcome] = loop.create_future()

        def settle(outcome: _Outcome) -> None:
            if not future.done():
                future.set_result(outcome)

        def work() -> None:
            value = self._awaited(_returned(tool, call.arguments))
            if isinstance(value, _Raised):
                self._notice_bound_to_thread(call.name, value.error)
            outcome = self._as_text(call.name, value)
            with contextlib.suppress(RuntimeError):  # the box was closed meanwhile
                loop.call_soon_threadsafe(settle, outcome)

        # A thread per call costs some 50 µs, and one that hangs is nobody else's.
        threading.Thread(target=work, name=f"arpo-tool-{call.name}", daemon=True).start()
        return future

    def _awaited(self, value: Any) -> Any:
        """What a sync tool returned; where that is an awaitable, what comes of it on the loop of the async tools."""
        if not inspect.isawaitable(value):
            return value
        future = self._async_tools.start(_result_of(value))
        try:
            return future.result(self._timeout_s)
        except TimeoutError:
            return _Raised(_Overdue())
        finally:
            future.cancel()

    def _notice_bound_to_thread(self, name: str, error: BaseException) -> None:
        """Says once if a tool seems to want one thread: else only the model would ever read so."""
        described = _describe(error)
        if name not in self._thread_bound and not isinstance(error, ToolError) and _NAMES_THREADS.search(described):
            self._thread_bound.add(name)
            logger.warning(
                f"A call of tool {name!r} failed: {described.removeprefix('Error: ')} Each call runs in a thread of "
                f"its own. If the tool needs the one it was made in, set its attribute: {name}.run_in = 'main'."
            )

    def _notice_not_closed(self, state: PathState, error: Exception) -> None:
        """Says once of each kind of state that closing it failed."""
        if type(state) not in self._not_closed:
            self._not_closed.add(type(state))
            logger.warning(
                f"close() of {type(state).__name__} failed: {type(error).__name__}: {error}. The run goes on, but "
                "what the state held may not be released. Further failures of its close() are not logged."
            )

    def _overdue(self, name: str) -> _Outcome:
        return f"Error: the {name} call took longer than {self._timeout_s:g} s.", ToolFailure.TIMEOUT

    def _as_text(self, name: str, value: Any) -> _Outcome:
        if isinstance(value, _Raised) and isinstance(value.error, _Overdue):
            return self._overdue(name)
        if isinstance(value, _Raised):
            return self._presentable(_describe(value.error)), _failure_of(value.error)
        if isinstance(value, str):
            return self._presentable(value), None
        if isinstance(value, _WRITTEN_OUT):
            return self._presentable(str(value)), None
        if isinstance(value, (bool, int, float, dict, list, tuple)) or _is_array(value):
            with contextlib.suppress(Exception):  # not JSON, contains itself, or an odd subclass
                return self._presentable(json.dumps(value, ensure_ascii=False, default=_jsonable)), None
        message = f"Error: the {name} call returned {type(value).__name__}, which is not text."
        return message, ToolFailure.NOT_TEXT

    def _presentable(self, text: str) -> str:
        """`text` as a model can be shown it: encodable, not empty, not too long."""
        # Surrogate pairs become their character; lone ones, which no tokenizer encodes, U+FFFD, and so does NUL.
        text = text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").replace("\0", "\ufffd")
        if not text.strip():
            return "(no output)"
        if len(text) <= self._max_chars:
            return text
        mark = f"\n[… {len(text) - self._max_chars} or more characters left out …]\n"
        kept = self._max_chars - len(mark)
        return text[: kept - kept // 2] + mark + text[len(text) - kept // 2 :]


def _key(call: ToolCall, tool: BoundTool) -> tuple[str, str] | None:
    if tool.key is None:
        return None
    return call.name, json.dumps([call.arguments, *tool.key], sort_keys=True, default=repr)


def _returned(tool: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        return tool(**arguments)
    except BaseException as error:
        return _Raised(error)


async def _result_of(awaitable: Awaitable[Any]) -> Any:
    try:
        return await awaitable
    except BaseException as error:
        return _Raised(error)


async def _returned_async(tool: Callable[..., Any], arguments: dict[str, Any]) -> Any:
    try:
        return await tool(**arguments)
    except BaseException as error:
        return _Raised(error)


def _is_array(value: Any) -> bool:
    """Whether it is an array or scalar of numpy, or of a library with its interface."""
    return callable(getattr(value, "tolist", None)) and hasattr(value, "dtype")


def _jsonable(value: Any) -> Any:
    """What JSON can hold in the place of a value it cannot."""
    if isinstance(value, _WRITTEN_OUT):
        return str(value)
    if _is_array(value):
        return value.tolist()
    raise TypeError(type(value).__name__)


def _failure_of(error: BaseException) -> ToolFailure:
    if isinstance(error, ToolUnavailable):
        return ToolFailure.DEGRADED
    return ToolFailure.STOPPED if isinstance(error, ToolStopped) else ToolFailure.ERROR


def _describe(error: BaseException) -> str:
    """The message of a `ToolError`; of anything else one short line that gives no path of this machine away."""
    if isinstance(error, ToolError):
        return str(error)
    message: str | None = None
    with contextlib.suppress(Exception):  # a message that cannot be made into text is no message
        message = error.strerror if isinstance(error, OSError) else str(error)
    first_line = (message or "").strip().partition("\n")[0][:_MAX_ERROR_CHARS]
    return f"Error: {type(error).__name__}: {first_line}" if first_line else f"Error: {type(error).__name__}"
