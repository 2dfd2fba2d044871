"""Connects the instances of an environment to the paths of a tree: `EnvironmentState` is the `PathState` of a path."""

from __future__ import annotations

import difflib
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from arpo_trl.errors import ConfigError, ToolUnavailable
from arpo_trl.tools.calls import ToolCall, ToolFailure
from arpo_trl.tools.environments.instances import Instance, Instances, Point, as_reason
from arpo_trl.tools.environments.kind import EnvironmentKind
from arpo_trl.tools.state import PathState
from arpo_trl.tools.toolbox import ToolBox

_MAX_CHANGE_CHARS = 2000
_ATTEMPTS = 3
_POLL_S = 0.05


class Environments:
    """The environments of one class, as the `create_state` of its tools.

    Args:
        timeout_s: The deadline of a call, and of each step of a reset or a replay.
        limit: The maximum number of live instances; None: no maximum.
        keeps: Whether the instance of a complete path stays open, in `kept`, until `close_kept`.
    """

    at_start = True

    def __init__(self, kind: EnvironmentKind, *, timeout_s: float, limit: int | None = None, keeps: bool = False):
        self.kind = kind
        self.keeps = keeps
        self.rows: dict[int, Mapping[str, Any]] = {}
        """The row of each group, by the group's id."""
        self.instances = Instances(kind, self.rows, timeout_s, limit)
        self.kept: dict[tuple[int, tuple[int, ...]], Instance | None] = {}
        """The instances of complete paths, by group and address; None: the path's instance could not be made."""
        self.handed: dict[int, EnvironmentState] = {}
        """States that are open already, by the group whose first path gets them."""
        for method in kind.methods.values():
            method.create_state = self  # type: ignore[attr-defined]

    @property
    def tools(self) -> list[Callable[..., Any]]:
        """The tools of the environment, for a `ToolBox`."""
        return list(self.kind.methods.values())

    def __call__(self, group: int) -> EnvironmentState:
        return self.handed.pop(group, None) or EnvironmentState(self, group)

    def begin(
        self, rows: Mapping[int, Mapping[str, Any]], toolbox: ToolBox, between_events: Callable[[], None]
    ) -> dict[int, str | None]:
        """Start a rollout: open the environment of each group's first path, and return the texts for the prompts.

        Args:
            rows: The row of each group, by the group's id.
            between_events: Called again and again; may raise to stop. `close_kept` closes what is open.

        Raises:
            ConfigError: An environment could not be made in several attempts.
        """
        self.rows.clear()
        self.rows.update(rows)
        self.instances.texts.clear()
        failure = ""
        missing = set(rows)
        for _ in range(_ATTEMPTS):
            opening = {}
            for group in sorted(missing):
                self.handed[group] = state = EnvironmentState(self, group)
                if state.admit():
                    opening[toolbox.open(state)] = (group, state)
            while opening:
                between_events()
                for ticket, result in toolbox.poll(_POLL_S):
                    if ticket not in opening:
                        continue  # of a rollout that was interrupted
                    group, state = opening.pop(ticket)
                    state.opened(result.failure, result.text)
                    if state.has_instance:
                        missing.discard(group)
                    else:
                        failure = state.failure
                        self.handed.pop(group).close()
            if not missing:
                return dict(self.instances.texts)
        raise ConfigError(
            f"The environment {self.kind.name} could not be made for a row, in {_ATTEMPTS} attempts: {failure}. "
            "Without it the prompt is not known. Correct the class or its server, and resume."
        )

    def close_kept(self) -> None:
        """Close all instances that no path has, and wait for those that are being closed."""
        while self.handed:
            self.handed.popitem()[1].close()
        while self.kept:
            if (instance := self.kept.popitem()[1]) is not None:
                self.instances.close(instance)
        if not self.instances.settle():
            self.instances.tell_once(
                f"close() of the environment {self.kind.name} hangs",
                "The run continues; what it held is kept.",
            )


class EnvironmentState(PathState):
    """The environment of one path. It has an instance from `open` on; until then a point, if it is a branch."""

    def __init__(self, environments: Environments, group: int, point: Point | None = None):
        self._environments = environments
        self._instances = environments.instances
        self._group = group
        self._point = point
        self._is_branch = point is not None
        self._instance: Instance | None = None
        self._has_room = False
        """Whether room is reserved for an instance that `open` has still to make."""
        self._given_up = ""
        """Why there will be no instance; empty: there may be one."""
        self._failure = ""
        """What `open` met."""
        self._changes: deque[list[str]] = deque()
        """For each call that was bound and not recorded, a list that holds what it changed, once that is known."""

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

    def open(self) -> None:
        """Make the instance. If that fails, `opened` says so."""
        instances = self._instances
        with instances.changed:
            if not self._has_room:  # closed before this thread started
                return
            self._has_room, point = False, self._point
        with instances.making():
            try:
                made = instances.fresh(self._group) if point is None else instances.branch(point)
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
                self._given_up = self._failure or text.removeprefix("Error: ").rstrip(".")
        if self._given_up:
            (instances.count_refused if self._is_branch else instances.count_failed)(self._given_up)
        return not (self._is_branch and self._given_up)

    @property
    def has_instance(self) -> bool:
        return self._instance is not None

    @property
    def failure(self) -> str:
        """Why there is no instance."""
        return self._given_up

    # Calls

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
            instances.leave_point(instance)
            before = instance.description
            _, result = instances.called(instance, tool, arguments)
            try:
                instances.observe(instance)
                change.append(_difference(before, instance.description))
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
            point = Point(self._group, [], None, doubt, origin=None)
        return EnvironmentState(self._environments, self._group, self._instances.use(point))

    def finish(self, address: tuple[int, ...]) -> None:
        if self._environments.keeps:
            self._environments.kept[self._group, address] = self._instance
            self._instance = None
        self.close()

    def close(self) -> None:
        with self._instances.changed:
            instance, self._instance = self._instance, None
            self._given_up = self._given_up or "the path has ended"
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


def _difference(before: str, after: str) -> str:
    """Return the lines that only one of the two texts has, marked with − and +, for the trajectory log."""
    lines: Iterable[str] = difflib.ndiff(before.splitlines(), after.splitlines())
    return "\n".join(line for line in lines if line[:1] in "+-")[:_MAX_CHANGE_CHARS]
