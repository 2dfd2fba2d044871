"""Creates, forks, counts and closes the instances of an environment's class. Each path has its own instance.

A branch starts from a `Point`: the state of an instance between two of its calls. While the instance is in that state,
a branch forks it directly. Before the instance's next call it is copied, but only if a branch may still start there
and the class can fork or copy. Without a copy, a branch replays the calls on a new instance.

    instance ── call ── point ── call ──▶ …
                          ├─ fork ─▶ instance of a branch       the instance is still in the state
                          └─ copy ── fork ─▶ another branch     the instance has moved on

All calls of user code run in the threads of the tools. Each instance runs one method at a time.
"""

from __future__ import annotations

import asyncio
import copy
import hashlib
import inspect
import json
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from arpo_trl.errors import ArpoError, DataError, ToolError, ToolSpecError
from arpo_trl.net.background import LoopThread
from arpo_trl.tools.environments.kind import EnvironmentKind, Forking
from arpo_trl.tools.toolbox import encodable
from arpo_trl.visible import get_logger

logger = get_logger(__name__)


_MAX_OUTCOME_CHARS = 2000
_MAX_DESCRIBED_CHARS = 10_000
_GRACE_S = 1.0
"""Seconds that an async method may take beyond the deadline of its call, so that the deadline passes first."""


class ForkRefused(Exception):
    """A branch cannot get the state of its prefix. The message contains the reason."""


@dataclass(frozen=True, slots=True)
class Done:
    """A call that an instance ran, and its outcome as comparable text."""

    name: str
    arguments: dict[str, Any]
    outcome: str


@dataclass(eq=False, slots=True)
class Start:
    """The start of all paths of a group: the class of their environments, and the row of the group."""

    kind: EnvironmentKind
    row: Mapping[str, Any]
    """The columns that `reset` receives."""
    text: str | None = None
    """The return value of `reset` for the group's first path."""
    is_known: bool = False
    """Whether `text` is known."""


@dataclass(eq=False, slots=True)
class Instance:
    """An object of the user's class."""

    value: Any
    start: Start
    log: list[Done] = field(default_factory=list)
    """The calls since the reset, also those of the path before the instance was forked."""
    digest: Any = None
    """The value of `digest()` after the last call; None if the class has no such method."""
    description: str = ""
    """The value of `describe()` after the last call, likewise."""
    doubt: str = ""
    """The reason why the state is unknown; empty if it is known."""
    point: Point | None = None
    """The current point of the instance, if a branch may start there."""
    closed: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)
    """Locked while a method of the object runs."""

    @contextmanager
    def turn(self, timeout_s: float) -> Iterator[None]:
        """Acquire the lock. Raises `ToolError` if an earlier call still runs after `timeout_s`."""
        if not self.lock.acquire(timeout=timeout_s):
            raise ToolError("Error: an earlier call of this environment is still running.")
        try:
            yield
        finally:
            self.lock.release()


@dataclass(eq=False, slots=True)
class Point:
    """The state of an instance between two calls, from which branches may start."""

    start: Start
    log: list[Done]
    digest: Any
    doubt: str
    origin: Instance | None
    """The instance, while it is at the point."""
    copy: Instance | None = None
    """A copy of the instance, made before its next call."""
    users: int = 0
    """The number of states that may still start a branch here."""


@dataclass(slots=True)
class Counts:
    """Counts of events since the last reading. Seconds are sums over threads."""

    resets: int = 0
    forks: int = 0
    replays: int = 0
    refused_forks: int = 0
    failed: int = 0
    reset_s: float = 0.0
    fork_s: float = 0.0
    replay_s: float = 0.0
    live_max: int = 0


class Instances:
    """The live instances of a run.

    Args:
        timeout_s: Longest wait for an earlier call of an instance, for an async method, and for closing.
        limit: The maximum number of live instances; None: no maximum.
    """

    def __init__(self, timeout_s: float, limit: int | None):
        self.timeout_s = timeout_s
        self._limit = limit
        self.changed = threading.Condition()
        """Guards all attributes below, the fields of points, and the fields of states that several threads use."""
        self._live = 0
        self._closing = 0
        self._making = 0
        self._hanging = 0
        """The number of instances in creation or closing for which `settle` has waited without success."""
        self._objects: dict[int, Any] = {}  # the objects of live instances by their id(), which also keeps them alive
        self._copies: dict[Point, None] = {}  # the points with a copy, oldest first
        self._counts = Counts()
        self._loop: LoopThread | None = None
        self._told: set[str] = set()
        self.fatal: ArpoError | None = None
        """An error of the class after which the run cannot continue: paths would share a state, or differ in
        prompt."""

    # Room ------------------------------------------------------------------------------------------------------------

    @property
    def live(self) -> int:
        """The number of instances that are not closed, including those in creation."""
        with self.changed:
            return self._live

    @property
    def in_use(self) -> int:
        """The number of instances that are neither in creation nor in closing."""
        with self.changed:
            return self._live - self._making - self._closing

    def reserve(self, *, for_copy: bool = False) -> bool:
        """Reserve a slot for one instance, and return whether one was free.

        For a path, this drops copies for branches if necessary, and waits for instances in closing. So the result does
        not depend on the duration of closing. A copy uses only a free slot.
        """
        with self.changed:
            if self._limit is not None and self._live >= self._limit and not for_copy:
                if self._copies:
                    self._drop_copy(next(iter(self._copies)))
                self.changed.wait_for(lambda: self._has_room or self._closing <= self._hanging, self.timeout_s)
            if not self._has_room:
                return False
            self._live += 1
            self._counts.live_max = max(self._counts.live_max, self._live)
            return True

    @property
    def _has_room(self) -> bool:
        return self._limit is None or self._live < self._limit

    @contextmanager
    def making(self) -> Iterator[None]:
        """A context in which `settle` waits."""
        with self.changed:
            self._making += 1
        try:
            yield
        finally:
            with self.changed:
                self._making -= 1
                self.changed.notify_all()

    def release(self) -> None:
        """Release a slot for which no instance was created."""
        with self.changed:
            self._live -= 1
            self.changed.notify_all()

    # Creation and forks, in threads of the tools. The caller has reserved the slot -----------------------------------

    def fresh(self, start: Start) -> Instance:
        """Return a new instance, reset with the group's row.

        Raises:
            ToolSpecError: The factory returned an object that another path already uses.
            DataError: `reset` returned a different text than for the group's first path, or a value that is not text.
        """
        started_s = time.perf_counter()
        instance = self._adopted(self.finished(start.kind.factory()), start, "environment_factory")
        try:
            text = self.finished(instance.value.reset(**copy.deepcopy(dict(start.row))))
            self._check_text(start, encodable(text) if isinstance(text, str) else text)
            self.observe(instance)
        except BaseException:
            self._discard(instance)
            raise
        with self.changed:
            self._counts.resets += 1
            self._counts.reset_s += time.perf_counter() - started_s
        return instance

    def branch(self, point: Point) -> Instance:
        """Return an instance in the state of `point`.

        Raises:
            ForkRefused: No instance can get that state.
            ToolSpecError: `fork` returned an object that another path already uses.
        """
        if point.doubt:
            raise ForkRefused(point.doubt)
        while point.start.kind.copies:
            with self.changed:
                source = point.copy or point.origin
            if source is None:
                break
            with source.turn(self.timeout_s):
                with self.changed:
                    is_there = source in (point.copy, point.origin)
                if is_there:
                    return self._forked(source, point)
        if point.doubt:  # the problem of its copy
            raise ForkRefused(point.doubt)
        if not point.start.kind.replayable:
            raise ForkRefused("there was no room for a copy (environment_concurrency), and it is not replayable")
        return self._replayed(point)

    def _forked(self, source: Instance, point: Point) -> Instance:
        started_s, kind = time.perf_counter(), point.start.kind
        if kind.forking is Forking.FORK:
            value, made_by = self.finished(source.value.fork()), f"fork() of {kind.name}"
        else:
            value, made_by = copy.deepcopy(source.value), f"a deepcopy of {kind.name}"
        if not isinstance(value, kind.type):
            raise self._final(
                ToolSpecError(
                    f"{made_by} returned {type(value).__name__}; expected another {kind.name} with the same state."
                )
            )
        instance = self._adopted(value, point.start, made_by)
        try:
            instance.log = list(point.log)
            self.observe(instance)
            self._check_digest(instance, point, made_by)
        except BaseException:
            self._discard(instance)
            raise
        with self.changed:
            self._counts.forks += 1
            self._counts.fork_s += time.perf_counter() - started_s
        return instance

    def _replayed(self, point: Point) -> Instance:
        started_s = time.perf_counter()
        instance = self.fresh(point.start)
        try:
            for call in point.log:
                outcome, _ = self.called(instance, call.name, call.arguments)
                if outcome != call.outcome:
                    raise ForkRefused(
                        f"the replayed call {call.name} returned {outcome[:200]}, but the recorded one "
                        f"{call.outcome[:200]}"
                    )
            self.observe(instance)
            self._check_digest(instance, point, "a replay")
        except BaseException:
            self._discard(instance)
            raise
        with self.changed:
            self._counts.replays += 1
            self._counts.replay_s += time.perf_counter() - started_s
        return instance

    def _adopted(self, value: Any, start: Start, made_by: str) -> Instance:
        if not isinstance(value, start.kind.type):
            error = ToolSpecError(f"{made_by} returned {type(value).__name__}; expected a {start.kind.name}.")
            raise self._final(error)
        with self.changed:
            if id(value) in self._objects:
                raise self._final(
                    ToolSpecError(
                        f"{made_by} returned an object that another path already uses, so both would share its state. "
                        f"It must "
                        f"return a new {start.kind.name} at each call."
                    )
                )
            self._objects[id(value)] = value
        return Instance(value, start)

    def _check_text(self, start: Start, text: Any) -> None:
        if text is not None and not isinstance(text, str):
            got = f"reset() of {start.kind.name} returned {type(text).__name__}"
            raise self._final(DataError(f"{got}; expected text for the prompt, or None."))
        with self.changed:
            if not start.is_known:
                start.text, start.is_known = text, True
        if text != (first := start.text):
            raise self._final(
                DataError(
                    f"reset() of {start.kind.name} returned different texts for the same row: {first!r:.200} and "
                    f"{text!r:.200}. All paths of a group share one prompt. The text must depend only on the row: put "
                    f"a seed into a column, and draw from random.Random(seed)."
                )
            )

    def _check_digest(self, instance: Instance, point: Point, made_by: str) -> None:
        if instance.digest != point.digest:
            raise ForkRefused(
                f"{made_by} has the digest {instance.digest!r:.100}, and the original {point.digest!r:.100}"
            )

    # Calls, under the lock of the instance -----------------------------------------------------------------------

    def called(self, instance: Instance, name: str, arguments: Mapping[str, Any]) -> tuple[str, Callable[[], Any]]:
        """Call a method and log the call. Return its outcome as comparable text, and a function that returns it."""
        given = copy.deepcopy(dict(arguments))
        error: BaseException | None = None
        value: Any = None
        try:
            value = self.finished(getattr(instance.value, name)(**copy.deepcopy(given)))
            outcome = _comparable(value)
        except BaseException as raised:
            error, outcome = raised, f"{type(raised).__name__}: {raised}"
        instance.log.append(Done(name, given, outcome))

        def result() -> Any:
            if error is not None:
                raise error
            return value

        return outcome, result

    def observe(self, instance: Instance) -> None:
        """Update the digest and the description of an instance, if the class has these methods."""
        kind = instance.start.kind
        if kind.offers("digest"):
            instance.digest = self.finished(instance.value.digest())
        if kind.offers("describe"):
            instance.description = str(self.finished(instance.value.describe()))[:_MAX_DESCRIBED_CHARS]

    def leave_point(self, instance: Instance) -> None:
        """Copy the instance for branches that may still start in its current state. Runs before its next call."""
        point = instance.point
        if point is None:
            return
        with self.changed:
            wanted = point.users > 0 and point.start.kind.copies and not point.doubt
        made = None
        if wanted and self.reserve(for_copy=True):
            try:
                made = self._forked(instance, point)
            except BaseException as error:
                self.release()
                point.doubt = as_reason(error)
        with self.changed:
            instance.point = point.origin = None
            if made is not None and point.users:
                point.copy = made
                self._copies[point] = None
                made = None
        if made is not None:
            self.close(made)

    def finished(self, value: Any) -> Any:
        """Like `result_of`, with the deadline of a call."""
        return self.result_of(value, self.timeout_s + _GRACE_S)

    def result_of(self, value: Any, timeout_s: float | None) -> Any:
        """Return `value`, or its result if it is awaitable. Awaitables of environments run on a separate event
        loop."""
        if not inspect.isawaitable(value):
            return value
        with self.changed:
            self._loop = self._loop or LoopThread("arpo-environments")
        future = self._loop.start(_awaited(value))
        try:
            returned, error = future.result(timeout_s)
        except TimeoutError:
            future.cancel()
            raise
        if error is not None:
            raise error
        return returned

    # Points ----------------------------------------------------------------------------------------------------------

    def point_of(self, instance: Instance) -> Point:
        """Return the current point of the instance. None of its calls is running."""
        with self.changed:
            if instance.point is None:
                instance.point = Point(
                    instance.start, list(instance.log), instance.digest, instance.doubt, origin=instance
                )
            return instance.point

    def use(self, point: Point) -> Point:
        """Record that one more state may start a branch at the point."""
        with self.changed:
            point.users += 1
        return point

    def leave(self, point: Point) -> None:
        """Record that a state of the point has ended. After the last one, close the point's copy."""
        with self.changed:
            point.users -= 1
            if not point.users and point in self._copies:
                self._drop_copy(point)

    def _drop_copy(self, point: Point) -> None:
        del self._copies[point]
        made, point.copy = point.copy, None
        assert made is not None
        self.close(made)

    # Closing ---------------------------------------------------------------------------------------------------------

    def close(self, instance: Instance) -> None:
        """Close an instance in a thread, when its running call has ended. Then its slot is free.

        If a branch may still start in its current state, the instance becomes the copy of that point and stays open.
        """
        with self.changed:
            if (point := instance.point) is not None:
                instance.point = point.origin = None
                if point.users and point.start.kind.copies and not point.doubt:
                    point.copy = instance
                    self._copies[point] = None
                    return
            self._closing += 1
        threading.Thread(target=self._close, args=(instance,), name="arpo-environment-close", daemon=True).start()

    def _close(self, instance: Instance) -> None:
        try:
            self._close_value(instance)
        finally:
            with self.changed:
                self._closing -= 1
                self._live -= 1
                self.changed.notify_all()

    def _discard(self, instance: Instance) -> None:
        """Close an instance that no path uses. The caller keeps its slot."""
        self._close_value(instance)

    def _close_value(self, instance: Instance) -> None:
        held = instance.lock.acquire(timeout=self.timeout_s)
        instance.closed = True
        try:
            if instance.start.kind.offers("close"):
                self.finished(instance.value.close())
        except BaseException as error:
            self.tell_once(
                f"close() of the environment {instance.start.kind.name} failed",
                f"{as_reason(error)}. Its resources may not be released.",
            )
        finally:
            if held:
                instance.lock.release()
            with self.changed:
                del self._objects[id(instance.value)]

    def settle(self) -> bool:
        """Wait until no instance is in creation or closing. Return False if the deadline passes first.

        Instances for which an earlier call has waited without success are ignored.
        """
        with self.changed:
            settled = self.changed.wait_for(lambda: self._making + self._closing <= self._hanging, 2 * self.timeout_s)
            self._hanging = self._making + self._closing
            return settled

    # Counts ----------------------------------------------------------------------------------------------------------

    def count_refused(self, kind: EnvironmentKind, reason: str) -> None:
        """Count a branch that did not get its state, and log the first one."""
        with self.changed:
            self._counts.refused_forks += 1
        self.tell_once(
            f"A branch could not get the state of its prefix in the environment {kind.name}",
            f"{reason}. A path from the root replaces it. Such branches are counted as environments/refused_forks.",
        )

    def count_failed(self, kind: EnvironmentKind, reason: str) -> None:
        """Count a path whose environment could not be created, and log the first one."""
        with self.changed:
            self._counts.failed += 1
        self.tell_once(
            f"The environment {kind.name} of a path could not be created",
            f"{reason}. The model reads this error at each call. Such paths are counted as environments/failed.",
        )

    def _final(self, error: ArpoError) -> ArpoError:
        """Store an error after which the run cannot continue, and return it."""
        self.fatal = self.fatal or error
        return error

    def tell_once(self, subject: str, reason: str) -> None:
        if subject not in self._told:
            self._told.add(subject)
            logger.warning(f"{subject}: {reason}")

    def take_counts(self) -> Counts:
        """Return the counts since the last call."""
        with self.changed:
            taken, self._counts = self._counts, Counts(live_max=self._live)
            return taken


def as_reason(error: BaseException) -> str:
    """Return an exception as part of a sentence."""
    if isinstance(error, ForkRefused | ToolError):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _comparable(value: Any) -> str:
    """Return the result of a method as text. Two long texts are equal only if the values are equal, up to a hash."""
    try:
        text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    except Exception:  # not JSON, keys of several types, or contains itself
        text = repr(value)
    if len(text) <= _MAX_OUTCOME_CHARS:
        return text
    return f"{text[:_MAX_OUTCOME_CHARS]}… {hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"


async def _awaited(value: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """Return the result or the exception of `value`. An uncaught SystemExit would stop the event loop."""
    try:
        return await value, None
    except asyncio.CancelledError:
        raise
    except BaseException as error:
        return None, error
