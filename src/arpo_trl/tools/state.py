"""The state on which the tool calls of one path act.

    create_state(group) ─▶ state ── calls ──▶ … ── calls ──▶ close     for a path that starts at the root
                                       └─ fork ─▶ state ── calls ─▶ close     for a branch, from its observation on

If the calls of a tool depend on the path's earlier calls, the tool has an attribute `create_state`. This function
takes the id of the path's group (`GroupRequest.id`) and returns a new `PathState`. Tools with the same `create_state`
share the state of a path. All other tools have no state.

A state is created before the first call that needs it, forked at each possible start of a branch, and closed when its
path ends. All of this runs in the sampling thread, so decoding waits for it. Each state is closed exactly once, even
if its group fails or the rollout is interrupted. An exception in `create_state`, `bind`, `record` or `fork` fails the
group, and so does a library that ends the program there (`sys.exit`). An exception in `close` is logged once, and the
rollout continues.

If the creation of a state takes time, set `create_state.at_start = True`. Then the state is created with its path, and
`open` runs in a thread of the tools before the first turn of a path or branch.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

from arpo_trl.common.user_code import text_of
from arpo_trl.errors import ToolSpecError
from arpo_trl.tools.calls import ToolCall, ToolFailure
from arpo_trl.visible import get_logger

logger = get_logger(__name__)


class PathState(ABC):
    """The state on which the calls of one path act, for one or several tools.

    Example: a store of values that the tool `put` writes and the tool `get` reads.

        class Store(PathState):
            def __init__(self, values):
                self.values = values

            def put(self, name, value):
                self.values[name] = value
                return "stored"

            def get(self, name):
                return self.values.get(name, "nothing")

            def fork(self):
                return Store(dict(self.values))

        put.create_state = get.create_state = create_store  # def create_store(group): return Store({})
    """

    @property
    def key(self) -> tuple[Any, ...] | None:
        """The values on which a result depends in addition to the tool and its arguments, as a tuple of JSON values;
        None if calls change the state.

        With a key, a call may reuse the result of an identical call with the same key (see `ToolBox`), and the calls
        of one turn run concurrently. With None, every call runs, and the calls of the path run one after the other.
        """
        return None

    @property
    def call_steps(self) -> int:
        """The number of steps of the next call, each with the deadline of a call."""
        return 1

    def bind(self, tool: str) -> Callable[..., Any]:
        """Return the function that runs the next call of `tool`. By default it is the method with that name.

        It must be async if and only if the tool is. `bind` runs when the call is submitted. All calls of a turn are
        submitted before any of them is recorded.
        """
        return getattr(self, tool)

    def record(self, call: ToolCall, failure: ToolFailure | None) -> str | None:
        """Record a finished call. Runs for each call in the order of the path, before the path's next turn.

        It does not run for refused calls. A call that missed its deadline (`TIMEOUT`) may still be running. Returns
        the changes by the call, for the trajectory log; None if they are unknown.
        """
        return None

    @abstractmethod
    def fork(self) -> PathState:
        """Return an independent copy for a branch that starts here."""

    def close(self) -> None:  # noqa: B027
        """Release the resources of the state. An abandoned call may still run, or start. Its result is dropped."""

    def finish(self, address: tuple[int, ...]) -> None:
        """Called instead of `close` if the path with this address is complete. By default it closes the state."""
        self.close()

    # Only for states that are created with their path (`at_start`)

    @property
    def opening_steps(self) -> int:
        """The number of steps of `open`, each with the deadline of a call. 0: the path can start immediately."""
        return 0

    def admit(self) -> bool:
        """Whether the state may open now. If not, its path waits, and this method is called again after the next
        events. It must not block."""
        return True

    @property
    def will_be_admitted(self) -> bool:
        """Whether `admit` will return True soon, also if no path ends."""
        return True

    def is_stuck(self, groups: Collection[int]) -> bool:
        """Whether `admit` will not return True, because what hangs and what finished paths of `groups` keep, which are
        not complete, use all places."""
        return False

    def open(self) -> None:  # noqa: B027
        """Prepare the state before the path's first turn. Runs in a thread of the tools."""

    def opened(self, failure: ToolFailure | None, text: str) -> bool:
        """Whether the path may start. If not, another path replaces a branch, and for a path from the root the rollout
        fails. Runs in the sampling thread, after `open`.

        Args:
            failure: None: `open` returned. Otherwise it raised, or missed its deadline and may still be running.
            text: A description of the failure for users.
        """
        return failure is None


CreateState = Callable[[int], PathState]

_IN_USE: WeakValueDictionary[int, PathState] = WeakValueDictionary()
"""The open states that `create_state` functions returned, by their ids."""


class NoState(PathState):
    """The state of tools without state: each call runs the tool's function."""

    key = ()

    def __init__(self, tools: Mapping[str, Callable[..., Any]]):
        self._tools = tools

    def bind(self, tool: str) -> Callable[..., Any]:
        return self._tools[tool]

    def fork(self) -> NoState:
        return self


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundTool:
    """A tool, bound to the state of a path for one call.

    Example: `BoundTool(run=search, key=(), turn=None)`
    """

    run: Callable[..., Any]
    key: tuple[Any, ...] | None
    """`PathState.key` at the time of the call."""
    turn: deque[Any] | None
    """The unfinished calls of the state in their order, if they run one after the other. Otherwise None. `ToolBox`
    adds and removes calls, and runs the first one."""
    steps: int = 1
    """`PathState.call_steps` at the time of the call."""


class PathStates:
    """All states of one path: one for each distinct `create_state`, and one for the tools without state.

    Args:
        group: The id of the path's group.
        create: The `create_state` of each tool that has one, by the tool's name.
        no_state: The state of all other tools.
        close_failed: Called with a state whose `close` raised, and the exception.
    """

    def __init__(
        self,
        group: int,
        create: Mapping[str, CreateState],
        no_state: NoState,
        close_failed: Callable[[PathState, BaseException], None],
    ):
        self.group = group
        self._create = create
        self._no_state = no_state
        self._close_failed = close_failed
        self._states: dict[CreateState, PathState] = {}
        self._turns: dict[CreateState, deque[Any]] = {}

    def bind(self, tool: str) -> BoundTool:
        """Return the tool, bound to its state for the path's next call."""
        state = self._of(tool)
        kind, key = type(state).__name__, _key_of(state)
        with _as_exception(f"call_steps of {kind}"):
            steps = _whole(state.call_steps, 1, f"call_steps of {kind}")
        with _as_exception(f"bind() of {kind}"):
            run = state.bind(tool)
        if not callable(run):
            raise ToolSpecError(
                f"bind() of {kind} returned {type(run).__name__} for the tool {tool!r}; expected the function that "
                "runs its next call."
            )
        turn = self._turns.setdefault(self._create[tool], deque()) if key is None else None
        return BoundTool(run=run, key=key, turn=turn, steps=steps)

    def record(self, call: ToolCall, failure: ToolFailure | None) -> str | None:
        state = self._of(call.name)
        with _as_exception(hook := f"record() of {type(state).__name__}"):
            changes = state.record(call, failure)
        if not isinstance(changes, str | None):
            raise ToolSpecError(
                f"{hook} returned {type(changes).__name__}; expected the changes by the call as text, or None."
            )
        return changes

    def fork(self) -> PathStates:
        """Return the states of a branch that starts here. If a fork fails, the states forked before it are closed."""
        branch = PathStates(self.group, self._create, self._no_state, self._close_failed)
        try:
            for create, state in self._states.items():
                made_by = f"fork() of {type(state).__name__}"
                with _as_exception(made_by):
                    copy = _checked(state.fork(), made_by)
                    if copy is state and _key_of(state) is None:
                        raise ToolSpecError(
                            f"{made_by} returned the state itself, which path and branch would share although their "
                            "calls change it. Return a copy."
                        )
                branch._states[create] = copy
        except BaseException:
            branch.close()
            raise
        return branch

    def close(self) -> None:
        """Close each state once. May be called repeatedly."""
        self._end(lambda state: state.close())

    def finish(self, address: tuple[int, ...]) -> None:
        """Like `close`, for a path that is complete."""
        self._end(lambda state: state.finish(address))

    def start(self) -> None:
        """Create the states that are created with their path."""
        for tool, create in self._create.items():
            if getattr(create, "at_start", False):
                self._of(tool)

    @property
    def opening_steps(self) -> int:
        total = 0
        for state in self._states.values():
            with _as_exception(hook := f"opening_steps of {type(state).__name__}"):
                total += _whole(state.opening_steps, 0, hook)
        return total

    def admit(self) -> bool:
        with _as_exception("admit() of a PathState"):
            return all(state.admit() for state in self._states.values())

    @property
    def will_be_admitted(self) -> bool:
        with _as_exception("will_be_admitted of a PathState"):
            return all(state.will_be_admitted for state in self._states.values())

    def is_stuck(self, groups: Collection[int]) -> bool:
        with _as_exception("is_stuck() of a PathState"):
            return any(state.is_stuck(groups) for state in self._states.values())

    def open(self) -> None:
        for state in list(self._states.values()):
            state.open()

    def opened(self, failure: ToolFailure | None, text: str) -> bool:
        with _as_exception("opened() of a PathState"):
            outcomes = [state.opened(failure, text) for state in self._states.values()]
        return all(outcomes)

    def _end(self, end: Callable[[PathState], None]) -> None:
        while self._states:
            _, state = self._states.popitem()
            _IN_USE.pop(id(state), None)
            try:
                end(state)
            except KeyboardInterrupt:
                raise
            except BaseException as error:  # also SystemExit: a library may call sys.exit
                self._close_failed(state, error)

    def _of(self, tool: str) -> PathState:
        if (create := self._create.get(tool)) is None:
            return self._no_state
        if create not in self._states:
            made_by = f"create_state of tool {tool!r}"
            with _as_exception(made_by):
                state = _checked(create(self.group), made_by)
                if id(state) in _IN_USE and _key_of(state) is None:
                    raise ToolSpecError(
                        f"{made_by} returned the state of another path, although calls change it. Return a new one "
                        "each time."
                    )
            _IN_USE[id(state)] = self._states[create] = state
        return self._states[create]


@contextmanager
def _as_exception(hook: str) -> Iterator[None]:
    """A context in which what would end the program, such as sys.exit in a library, is an exception like any other.

    Ctrl-C passes.
    """
    try:
        yield
    except (Exception, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise ToolSpecError(
            f"{hook} raised {type(error).__name__}: {text_of(error)}, which would end the program. Let it raise an "
            "Exception instead."
        ) from error


def _checked(state: Any, made_by: str) -> PathState:
    if not isinstance(state, PathState):
        raise ToolSpecError(
            f"{made_by} returned {type(state).__name__}; expected a PathState. Derive its class from PathState."
        )
    return state


def _key_of(state: PathState) -> tuple[Any, ...] | None:
    """Return `PathState.key`.

    Raises:
        ToolSpecError: It is neither None nor a tuple of JSON values. Equal calls would share results by its text.
    """
    with _as_exception(f"key of {type(state).__name__}"):
        key = state.key
    got = None if key is None or isinstance(key, tuple) else type(key).__name__
    try:
        json.dumps(key, sort_keys=True)
    except (TypeError, ValueError, RecursionError) as error:
        got = got or f"a tuple with a value that is not JSON ({error})"
    if got is not None:
        raise ToolSpecError(
            f"key of {type(state).__name__} is {got}; expected None, or a tuple of JSON values: texts, numbers, True, "
            "False, None, and lists and dicts of them."
        )
    return key


def _whole(steps: Any, least: int, name: str) -> int:
    if not isinstance(steps, int) or steps < least:
        raise ToolSpecError(f"{name} is {steps!r}; expected a whole number of at least {least}.")
    return steps
