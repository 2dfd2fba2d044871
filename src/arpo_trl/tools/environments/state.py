"""Connects the instances of an environment to the paths of a tree: `EnvironmentState` is the `PathState` of a path."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack
from typing import Any

from arpo_trl.errors import ConfigError, ToolUnavailable
from arpo_trl.tools.calls import ToolCall, ToolFailure
from arpo_trl.tools.environments.differences import changed_lines
from arpo_trl.tools.environments.instances import Instance, Instances, Point, Start, as_reason
from arpo_trl.tools.environments.kind import EnvironmentKind, Kinds
from arpo_trl.tools.state import PathState
from arpo_trl.tools.toolbox import ToolBox

_MAX_CHANGE_CHARS = 2000
_ATTEMPTS = 3
_POLL_S = 0.05
_WAITING_POLL_S = 0.005
"""Seconds between two checks while a row waits for a slot."""


class Environments:
    """The environments of a run. This object is the `create_state` of their tools.

    Args:
        kinds: Their class, or several by their names in the column `environment`.
        timeout_s: The deadline of a call, and of each step of a reset or a replay.
        limit: The maximum number of live instances; None: no maximum.
        keeps: Whether the instance of a complete path stays open, in `kept`, until `close_kept`.
    """

    at_start = True

    def __init__(
        self,
        kinds: EnvironmentKind | Mapping[Any, EnvironmentKind],
        *,
        timeout_s: float,
        limit: int | None = None,
        keeps: bool = False,
    ):
        self.kinds = Kinds(kinds)
        self.keeps = keeps
        self.instances = Instances(timeout_s, limit)
        self._starts: dict[int, Start] = {}
        """By the group's id."""
        self._start_without_row: Start | None = None
        self.kept: dict[tuple[int, tuple[int, ...]], Instance | None] = {}
        """The instances of complete paths, by group and address; None: the path's instance could not be created."""
        self.handed: dict[int, EnvironmentState] = {}
        """States that are already open, by the group whose first path gets them."""
        for method in self.tools:
            method.create_state = self  # type: ignore[attr-defined]

    @property
    def tools(self) -> list[Callable[..., Any]]:
        """The tools of all classes. Tools of different classes may have the same name."""
        return [method for kind in self.kinds.by_name.values() for method in kind.methods.values()]

    def __call__(self, group: int) -> EnvironmentState:
        return self.handed.pop(group, None) or EnvironmentState(self, group, self._start_of(group))

    def _start_of(self, group: int) -> Start:
        if group in self._starts:
            return self._starts[group]
        if self._start_without_row is None:  # environments of tools
            self._start_without_row = Start(kind=self.kinds.of({}), row={})
        return self._start_without_row

    def start_groups(self, rows: Mapping[int, Mapping[str, Any]]) -> None:
        """Store the row of each group, by the group's id. The group's paths will start from it.

        Raises:
            DataError: A row does not name its environment, and there are several.
        """
        self._starts |= {
            group: Start(kind=self.kinds.of(row), row=self.kinds.given(row)) for group, row in rows.items()
        }

    def begin(
        self, rows: Mapping[int, Mapping[str, Any]], toolbox: ToolBox, between_events: Callable[[], None]
    ) -> dict[int, str | None]:
        """Start a rollout: open the environment of each group's first path, and return the texts for the prompts.

        Args:
            rows: The row of each group, by the group's id.
            between_events: Called repeatedly. It may raise an exception to stop. Then `close_kept` closes all open
                environments.

        Raises:
            ConfigError: An environment could not be created in several attempts.
        """
        self.start_groups(rows)
        waiting, failures = deque(sorted(rows)), Counter[int]()
        opening: dict[int, EnvironmentState] = {}
        stuck_since: float | None = None
        while waiting or opening:
            between_events()
            while waiting and (state := self._admitted(waiting[0])) is not None:
                self.handed[waiting.popleft()] = state
                opening[toolbox.open(state)] = state
            stuck_since = self._stuck_since(stuck_since) if waiting and not opening else None
            for ticket, result in toolbox.poll(_WAITING_POLL_S if waiting else _POLL_S):
                if (opened := opening.pop(ticket, None)) is None:
                    continue  # belongs to an interrupted rollout
                opened.opened(result.failure, result.text)
                if not opened.has_instance:
                    self.handed.pop(opened.group, opened).close()
                    failures[opened.group] += 1
                    if failures[opened.group] == _ATTEMPTS:
                        raise self._not_made(opened)
                    waiting.append(opened.group)
        return {group: self._starts[group].text for group in rows}

    def _admitted(self, group: int) -> EnvironmentState | None:
        state = EnvironmentState(self, group, self._starts[group])
        return state if state.admit() else None

    def _stuck_since(self, since: float | None) -> float | None:
        """Return the time since which no running path could free a slot; None if there is such a path.

        Raises:
            ConfigError: This has lasted longer than the time limit of closing.
        """
        if self.instances.in_use > len(self.handed):
            return None
        now = time.perf_counter()
        if since is not None and now - since > 2 * self.instances.timeout_s:
            raise ConfigError(
                "There is no free slot for the environment of a row (environment_concurrency): environments whose "
                "reset() or close() hangs use all slots. Correct them, or raise environment_concurrency, and resume."
            )
        return since or now

    def _not_made(self, state: EnvironmentState) -> ConfigError:
        return ConfigError(
            f"The environment {state.kind.name} could not be created for a row in {_ATTEMPTS} attempts: "
            f"{state.failure}. Without it the prompt is unknown. Correct the class or its server, and resume."
        )

    def close_groups(self, groups: Collection[int]) -> None:
        """Close all instances of these groups that no path uses, and drop their rows. Any thread may call this."""
        for group in groups:
            if (state := self.handed.pop(group, None)) is not None:
                state.close()
        for key in [key for key in list(self.kept) if key[0] in groups]:
            if (instance := self.kept.pop(key, None)) is not None:
                self.instances.close(instance)
        for group in groups:
            self._starts.pop(group, None)

    def close_kept(self) -> None:
        """Like `close_groups` for all groups, and wait for the instances in closing."""
        self.close_groups({*self._starts, *self.handed, *(group for group, _ in list(self.kept))})
        if not self.instances.settle():
            self.instances.tell_once("close() of an environment hangs", "The run continues without releasing it.")


class EnvironmentState(PathState):
    """The environment of one path. It has an instance after `open`. Before that, a branch has a point."""

    def __init__(self, environments: Environments, group: int, start: Start, point: Point | None = None):
        self._environments = environments
        self._instances = environments.instances
        self._start = start
        self.group = group
        self._point = point
        self._is_branch = point is not None
        self._instance: Instance | None = None
        self._has_room = False
        """Whether a slot is reserved for an instance that `open` has not yet created."""
        self._given_up = ""
        """The reason why there will be no instance; empty: there may be one."""
        self._failure = ""
        """The problem of `open`."""
        self._changes: deque[list[str]] = deque()
        """For each call that was bound and not recorded, a list that will contain its changes."""

    # Before the first turn

    @property
    def opening_steps(self) -> int:
        if self._instance is not None or self._given_up:
            return 0
        return 1 + (len(self._point.log) if self._point is not None else 0)

    def admit(self) -> bool:
        if self._instance is None and not self._has_room:
            self._has_room = self._instances.reserve()
        return self._has_room or self._instance is not None

    @property
    def will_be_admitted(self) -> bool:
        return self._has_room or self._instance is not None or self._instances.will_have_room

    def is_stuck(self, groups: Collection[int]) -> bool:
        kept = list(self._environments.kept.items())
        waiting = sum(group in groups for (group, _), instance in kept if instance is not None)
        return not self._has_room and self._instance is None and self._instances.all_hang(besides=waiting)

    def open(self) -> None:
        """Create the instance. If that fails, `opened` returns False."""
        instances = self._instances
        with ExitStack() as stack:
            with instances.changed:
                if not self._has_room:  # closed before this thread started
                    return
                self._has_room, point = False, self._point
                stack.enter_context(instances.making(self))  # before another thread may call `settle`
            try:
                made = instances.fresh(self._start) if point is None else instances.branch(point)
            except BaseException as error:
                self._failure = as_reason(error)
                instances.release()
                return
            with instances.changed:
                if not self._given_up:
                    self._instance = made
                    self._leave_point()
                    return
            instances.close(made)  # the deadline has passed, or the path has ended

    def opened(self, failure: ToolFailure | None, text: str) -> bool:
        instances = self._instances
        if instances.fatal is not None:
            raise instances.fatal
        with instances.changed:
            if self._instance is None:
                late = self._overdue() if failure is ToolFailure.TIMEOUT else ""
                self._given_up = self._failure or late or text.removeprefix("Error: ").rstrip(".")
        if self._given_up:
            instances.abandon(self)
            (instances.count_refused if self._is_branch else instances.count_failed)(self.kind, self._given_up)
        return not (self._is_branch and self._given_up)

    def _overdue(self) -> str:
        """Return why there is no instance if `open` has missed its deadline."""
        what = "fork() or the replay of its calls" if self._is_branch else "environment_factory and reset()"
        seconds = self.opening_steps * self._instances.timeout_s
        return f"{what} took longer than {seconds:g} s. Make this faster, or raise tool_timeout_s"

    @property
    def kind(self) -> EnvironmentKind:
        return self._start.kind

    @property
    def has_instance(self) -> bool:
        return self._instance is not None

    @property
    def failure(self) -> str:
        """The reason why there is no instance."""
        return self._given_up

    # Calls

    @property
    def call_steps(self) -> int:
        """A copy for branches may be made before the call, and a branch may fork the instance when it begins."""
        point = self._instance.point if self._instance is not None else None
        return 2 if point is not None and self.kind.copies and not point.doubt else 1

    def bind(self, tool: str) -> Callable[..., Any]:
        change: list[str] = []
        self._changes.append(change)

        def call(**arguments: Any) -> Any:
            return self._run(tool, arguments, change)

        return call

    def _run(self, tool: str, arguments: Mapping[str, Any], change: list[str]) -> Any:
        instances, instance = self._instances, self._instance
        if instance is None:
            raise ToolUnavailable("Error: the environment of this conversation is not available.")
        with instance.turn(instances.timeout_s):
            if instance.closed:
                raise ToolUnavailable("Error: the environment of this conversation is not available.")
            instances.check_unchanged(instance)
            instances.leave_point(instance)
            before = instance.description
            _, result = instances.called(instance, tool, arguments)
            try:
                instances.observe(instance)
                change.append("\n".join(changed_lines(before, instance.description))[:_MAX_CHANGE_CHARS])
            except BaseException as error:
                instance.doubt = f"digest() or describe() raised {as_reason(error)}"
        return result()

    def record(self, call: ToolCall, failure: ToolFailure | None) -> str | None:
        if self._instances.fatal is not None:
            raise self._instances.fatal
        if failure is ToolFailure.TIMEOUT and self._instance is not None:
            self._instance.doubt = f"the call {call.name} of its path missed its deadline"
        change = self._changes.popleft()
        return change[0] if change and change[0] else None

    # The end

    def fork(self) -> EnvironmentState:
        """Return a state at the same point. It has no instance before `open`."""
        point = self._point
        if point is None and self._instance is not None:
            point = self._instances.point_of(self._instance)
        if point is None:
            doubt = self._given_up or "the path has no environment"
            point = Point(self._start, [], None, doubt, origin=None)
        return EnvironmentState(self._environments, self.group, self._start, self._instances.use(point))

    def finish(self, address: tuple[int, ...]) -> None:
        if self._environments.keeps:
            self._environments.kept[self.group, address] = self._instance
            self._instance = None
        self.close()

    def close(self) -> None:
        with self._instances.changed:
            instance, self._instance = self._instance, None
            self._given_up = self._given_up or "the path has ended"
            self._instances.abandon(self)
            self._leave_point()
            if self._has_room:
                self._instances.release()
                self._has_room = False
        if instance is not None:
            self._instances.close(instance)

    def _leave_point(self) -> None:
        if self._point is not None:
            self._instances.leave(self._point)
            self._point = None
