"""What the tools of one path act on.

    create_state(group) ─▶ state ── calls ──▶ … ── calls ──▶ close     one for a path that starts at the root
                                       └─ fork ─▶ state ── calls ─▶ close     one for a branch, as of its observation

A tool whose calls depend on the path's earlier calls has an attribute `create_state`, a function of one argument that
returns a new `PathState`; tools with the same `create_state` share a path's state. It gets the id of the path's group
(`GroupRequest.id`). All other tools have no state.

A state is created before the first call that needs it, forked where a branch may start, and closed when its path ends.
All of that runs in the thread that samples, so decoding waits for it. Each state that was created or forked is closed
exactly once, also when its group fails or the rollout is interrupted. An exception of `create_state`, `bind`, `record`
or `fork` is the failure of the group; one of `close` is logged once, and the rollout goes on.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from arpo_trl.errors import ToolSpecError
from arpo_trl.tools.calls import ToolCall, ToolFailure

logger = logging.getLogger(__name__)


class PathState(ABC):
    """What the calls of one path to one or several tools act on.

    Example: a store of values, which `put` writes and `get` reads.

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
        """What a result depends on besides the tool and the arguments, as JSON values; None if calls use the state.

        With a key, a call of this path may get the result of a call with the same key (`ToolBox` says when), and calls
        of one turn run at once. With None each call runs, and the calls of the path run one after the other.
        """
        return None

    def bind(self, tool: str) -> Callable[..., Any]:
        """The function that runs the next call of `tool`: async if the tool is. By default the method of that name.

        Asked for when the call is made; the calls of one turn are all made before any of them is recorded.
        """
        return getattr(self, tool)

    def record(self, call: ToolCall, failure: ToolFailure | None) -> None:  # noqa: B027
        """Told of each call that was made, in the order of the path, before the path's next turn.

        Not of calls that were refused. A call that missed its deadline (`TIMEOUT`) may still be running.
        """

    @abstractmethod
    def fork(self) -> PathState:
        """An independent copy for a branch that starts here."""

    def close(self) -> None:  # noqa: B027
        """Releases what the state holds. A call that was abandoned may still be running, or start; nobody sees it."""


CreateState = Callable[[int], PathState]


class NoState(PathState):
    """The state of tools that have none: each call is the function's own."""

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
    turn: asyncio.Lock | None
    """A lock to hold while the call runs, if the calls of the state run one after the other. Else None."""


class PathStates:
    """All states of one path: one for each `create_state` among the tools, and one for the tools without.

    Args:
        group: The id of the path's group.
        create: The tools with a state, by name.
        no_state: The state of all others.
        close_failed: Told of a state whose `close` raised.
    """

    def __init__(
        self,
        group: int,
        create: Mapping[str, CreateState],
        no_state: NoState,
        close_failed: Callable[[PathState, Exception], None],
    ):
        self.group = group
        self._create = create
        self._no_state = no_state
        self._close_failed = close_failed
        self._states: dict[CreateState, PathState] = {}
        self._turns: dict[CreateState, asyncio.Lock] = {}

    def bind(self, tool: str) -> BoundTool:
        """The tool as the path's next call runs it."""
        state = self._of(tool)
        key = state.key
        turn = self._turns.setdefault(self._create[tool], asyncio.Lock()) if key is None else None
        return BoundTool(run=state.bind(tool), key=key, turn=turn)

    def record(self, call: ToolCall, failure: ToolFailure | None) -> None:
        self._of(call.name).record(call, failure)

    def fork(self) -> PathStates:
        """The states of a branch that starts here. When one cannot be forked, those that were are closed."""
        branch = PathStates(self.group, self._create, self._no_state, self._close_failed)
        try:
            for create, state in self._states.items():
                branch._states[create] = _checked(state.fork(), f"fork() of {type(state).__name__}")
        except BaseException:
            branch.close()
            raise
        return branch

    def close(self) -> None:
        """Closes each state once, however often this is called."""
        while self._states:
            _, state = self._states.popitem()
            try:
                state.close()
            except Exception as error:
                self._close_failed(state, error)

    def _of(self, tool: str) -> PathState:
        if (create := self._create.get(tool)) is None:
            return self._no_state
        if create not in self._states:
            self._states[create] = _checked(create(self.group), f"create_state of tool {tool!r}")
        return self._states[create]


def _checked(state: Any, made_by: str) -> PathState:
    if not isinstance(state, PathState):
        raise ToolSpecError(f"{made_by} returned {type(state).__name__}; expected a PathState. Derive it from that.")
    return state
