"""Creates, forks, counts and closes the instances of an environment's class. Each path has its own instance.

A branch starts from a `Point`: the state of an instance between two of its calls. While the instance is in that state,
a branch forks it directly. Before the instance's next call it is copied, but only if a branch may still start there
and the class can fork or copy. Without a copy, a branch replays the calls on a new instance.

    instance ── call ── point ── call ──▶ …
                          ├─ fork ─▶ instance of a branch       the instance is still in the state
                          └─ copy ── fork ─▶ another branch     the instance has moved on

The methods of an object run in one thread, one at a time: objects may need the thread that created them. Async
methods run on an event loop that all objects share.

An object of a class without `close` is reset again for another path when its path has ended, as in TRL.
"""

from __future__ import annotations

import copy
import hashlib
import json
import threading
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from arpo_trl.common.user_code import text_of
from arpo_trl.errors import ArpoError, DataError, ToolError, ToolOverdue, ToolSpecError
from arpo_trl.tools.environments.differences import around_difference
from arpo_trl.tools.environments.kind import EnvironmentKind, Forking
from arpo_trl.tools.environments.worker import GRACE_S, NoResult, Worker, result_of
from arpo_trl.tools.texts import for_models
from arpo_trl.visible import get_logger

logger = get_logger(__name__)


_MAX_OUTCOME_CHARS = 2000
_MAX_DESCRIBED_CHARS = 10_000


class ForkRefused(Exception):
    """A branch cannot get the state of its prefix. The message contains the reason."""


class StillRunning(ToolError):
    """A method of an object cannot run, because an earlier one has not returned."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Done:
    """A call that an instance ran, and its outcome as comparable text."""

    name: str
    arguments: dict[str, Any]
    outcome: str


@dataclass(eq=False, slots=True, kw_only=True)
class Start:
    """The start of all paths of a group: the class of their environments, and the row of the group."""

    kind: EnvironmentKind
    row: Mapping[str, Any]
    """The columns that `reset` receives."""
    text: str | None = None
    """The return value of `reset` for the group's first path."""
    digest: Any = None
    """The value of `digest()` after that reset; None if the class has no such method."""
    is_known: bool = False
    """Whether `text` and `digest` are known."""


@dataclass(eq=False, slots=True)
class Instance:
    """An object of the user's class."""

    value: Any
    start: Start
    worker: Worker
    """Runs the methods of the object."""
    reusable: bool = False
    """Whether the object can be reset for another path: the factory made it, and its class has no `close`."""
    log: list[Done] = field(default_factory=list)
    """The calls since the reset, also those of the path before the instance was forked."""
    digest: Any = None
    """A copy of the value of `digest()` after the last call; None if the class has no such method."""
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
        """Acquire the lock. Raises `StillRunning` if an earlier call still runs after `timeout_s`."""
        if not self.lock.acquire(timeout=timeout_s):
            raise StillRunning("Error: an earlier call of this environment is still running.")
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
        self.limit = limit
        self.changed = threading.Condition()
        """Guards all attributes below, the fields of points, and the fields of states that several threads use."""
        self.live = 0
        """The number of instances that are not closed, including those in creation."""
        self._closing: dict[Instance, float] = {}
        """The instances in closing, and when it began, on the clock of `time.monotonic`."""
        self._making: dict[Hashable, float | None] = {}
        """Each running creation, and the time since which no path waits for its instance; None: a path waits."""
        self._hanging: set[Hashable] = set()
        """The creations and closings for which `settle` has waited without success."""
        self._objects: dict[int, Instance] = {}
        """The live and the idle instances by the id() of their object, which also keeps the objects alive."""
        self._idle: list[Instance] = []
        """Instances without a path, whose objects will be reset for other paths. They have no slot."""
        self._workers: list[Worker] = []
        """Workers without an object."""
        self._copies: dict[Point, None] = {}  # the points with a copy, oldest first
        self._counts = Counts()
        self._told: set[str] = set()
        self.fatal: ArpoError | None = None
        """An error of the class after which the run cannot continue: paths would share a state, or differ in
        prompt."""

    # Room ------------------------------------------------------------------------------------------------------------

    @property
    def in_use(self) -> int:
        """The number of instances that are neither in creation nor in closing."""
        with self.changed:
            return self.live - len(self._making) - len(self._closing)

    def reserve(self, *, for_copy: bool = False) -> bool:
        """Reserve a slot for one instance, and return whether one was free.

        If there is none for a path, a copy for branches is closed, unless an instance in closing will free a slot
        anyway. A copy uses only a free slot.
        """
        with self.changed:
            if not self._has_room:
                if not (for_copy or self._frees_room) and self._copies:
                    self._drop_copy(next(iter(self._copies)))
                return False
            self.live += 1
            self._counts.live_max = max(self._counts.live_max, self.live)
            return True

    @property
    def will_have_room(self) -> bool:
        """Whether a slot is free, or becomes free when an instance is closed, or when a creation that no path waits
        for ends. Hanging creations and closings do not count."""
        with self.changed:
            return self._has_room or self._frees_room

    def all_hang(self, *, besides: int) -> bool:
        """Whether no slot is free, and each but `besides` belongs to a creation or closing that hangs."""
        with self.changed:
            abandoned = sum(since is not None for since in self._making.values())
            hanging = abandoned + len(self._closing)
            return not self._has_room and not self._frees_room and self.live == hanging + besides

    @property
    def _has_room(self) -> bool:
        return self.limit is None or self.live < self.limit

    @property
    def _frees_room(self) -> bool:
        latest = time.monotonic() - 2 * self.timeout_s
        return any(since is not None and since > latest for since in (*self._closing.values(), *self._making.values()))

    @contextmanager
    def making(self, state: Hashable) -> Iterator[None]:
        """A context in which an instance is created for a path's state, and in which `settle` waits."""
        with self.changed:
            self._making[state] = None
        try:
            yield
        finally:
            with self.changed:
                del self._making[state]
                self.changed.notify_all()

    def abandon(self, state: Hashable) -> None:
        """Record that nobody waits for the creation of the state's instance, if it still runs."""
        with self.changed:
            if state in self._making:
                self._making[state] = time.monotonic()

    def release(self) -> None:
        """Release a slot for which no instance was created."""
        with self.changed:
            self.live -= 1
            self.changed.notify_all()

    # Creation and forks, in threads of the tools. The caller has reserved the slot -----------------------------------

    def fresh(self, start: Start) -> Instance:
        """Return a new instance, reset with the group's row.

        Raises:
            ToolSpecError: The factory returned an object that another path already uses.
            DataError: `reset` returned a different text than for the group's first path, or a value that is not text.
        """
        started_s = time.perf_counter()
        instance = self._idle_one(start) or self._new_one(start)
        try:
            text = self._called(instance, "reset", copy.deepcopy(dict(start.row)))
            self._check_text(start, text)
            self.observe(instance)
            self._check_start(start, for_models(text) if isinstance(text, str) else text, instance.digest)
        except BaseException:
            self._discard(instance)
            raise
        with self.changed:
            self._counts.resets += 1
            self._counts.reset_s += time.perf_counter() - started_s
        return instance

    def _idle_one(self, start: Start) -> Instance | None:
        with self.changed:
            for idle in self._idle:
                if idle.start.kind is start.kind:
                    self._idle.remove(idle)
                    return self._registered(Instance(idle.value, start, idle.worker, reusable=True))
        return None

    def _new_one(self, start: Start) -> Instance:
        worker, kind = self._worker(), start.kind
        value = self._finished(worker.run(kind.factory), "environment_factory")
        return self._adopted(value, start, "environment_factory", worker, reusable=not kind.offers("close"))

    def _worker(self) -> Worker:
        """Return a worker for a new object. If there would be more objects than `limit`, drop idle ones."""
        with self.changed:
            while self._idle and self.limit is not None and self.live + len(self._idle) > self.limit:
                self._forget(self._idle.pop(0), is_free=True)
            return self._workers.pop() if self._workers else Worker()

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
                    self.check_unchanged(source)
                    return self._forked(source, point)
        if point.doubt:  # the problem of its copy
            raise ForkRefused(point.doubt)
        if not point.start.kind.replayable:
            raise ForkRefused("there was no room for a copy (environment_concurrency), and it is not replayable")
        return self._replayed(point)

    def _forked(self, source: Instance, point: Point) -> Instance:
        started_s, kind = time.perf_counter(), point.start.kind
        if kind.forking is Forking.FORK:
            value, made_by = self._called(source, "fork"), f"fork() of {kind.name}"
        else:
            value, made_by = source.worker.run(lambda: copy.deepcopy(source.value)), f"a deepcopy of {kind.name}"
        if not isinstance(value, kind.type):
            raise self._final(
                ToolSpecError(
                    f"{made_by} returned {type(value).__name__}; expected another {kind.name} with the same state."
                )
            )
        instance = self._adopted(value, point.start, made_by, self._worker())
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
                    returned, recorded = around_difference(outcome, call.outcome)
                    raise ForkRefused(
                        f"the replayed call {call.name} returned {returned}, but the recorded one {recorded}"
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

    def _adopted(self, value: Any, start: Start, made_by: str, worker: Worker, *, reusable: bool = False) -> Instance:
        if not start.kind.made(value):
            raise self._final(
                ToolSpecError(
                    f"{made_by} returned a {type(value).__name__}; expected a {start.kind.name}, and no object of a "
                    "subclass: tools and rewards belong to one class. Return an object of type(self) from fork(), and "
                    "of one class from environment_factory."
                )
            )
        with self.changed:
            if id(value) in self._objects:
                raise self._final(
                    ToolSpecError(
                        f"{made_by} returned an object that another path already uses, so both would share its state. "
                        f"It must return a new {start.kind.name} at each call."
                    )
                )
            return self._registered(Instance(value, start, worker, reusable=reusable))

    def _registered(self, instance: Instance) -> Instance:
        self._objects[id(instance.value)] = instance
        return instance

    def _check_text(self, start: Start, text: Any) -> None:
        if text is not None and not isinstance(text, str):
            got = f"reset() of {start.kind.name} returned {type(text).__name__}"
            raise self._final(DataError(f"{got}; expected text for the prompt, or None."))

    def _check_start(self, start: Start, text: str | None, digest: Any) -> None:
        """Check that the reset of a path gave the same text and state as that of the group's first path."""
        with self.changed:
            if not start.is_known:
                self._check_comparable(start, digest)
                start.text, start.digest, start.is_known = text, digest, True
        if text != start.text:
            what, first, other = "returned different texts", repr(start.text), repr(text)
        elif _has_changed(start.digest, digest):
            what, first, other = "led to states with different digests", repr(start.digest), repr(digest)
        else:
            return
        first, other = around_difference(first, other)
        raise self._final(
            DataError(
                f"reset() of {start.kind.name} {what} for the same row: {first} and {other}. All paths of a group "
                f"share one prompt and start in one state, which must depend only on the row: put a seed into a "
                f"column, and draw from random.Random(seed)."
            )
        )

    def _check_comparable(self, start: Start, digest: Any) -> None:
        try:
            bool(digest == copy.copy(digest))
        except Exception as error:  # of an array, for example
            raise self._final(
                DataError(
                    f"digest() of {start.kind.name} returned {type(digest).__name__}, and a comparison of two such "
                    f"values raised {type(error).__name__}: {text_of(error)}. Return a value that == compares as a "
                    "whole, such as a text, a tuple, array.tobytes() or array.tolist()."
                )
            ) from error

    def _check_digest(self, instance: Instance, point: Point, made_by: str) -> None:
        if instance.digest != point.digest:
            digest, original = around_difference(repr(instance.digest), repr(point.digest))
            raise ForkRefused(f"{made_by} has the digest {digest}, and the original {original}")

    def check_unchanged(self, instance: Instance) -> None:
        """Check that the state of an instance is the one after its last call, if the class has `digest`. The caller
        has the instance's turn.

        Raises:
            ToolSpecError: The state is another one.
        """
        kind = instance.start.kind
        if instance.doubt or not kind.offers("digest"):
            return
        try:
            now = self._called(instance, "digest")
        except BaseException as error:
            instance.doubt = f"digest() raised {as_reason(error)}"
            return
        if _has_changed(instance.digest, now):
            before, after = around_difference(repr(instance.digest), repr(now))
            raise self._final(
                ToolSpecError(
                    f"The digest of an environment {kind.name} changed without a call of it: {before} after its last "
                    f"call, and {after} now. It shares its state with another path, for example because fork() copies "
                    f"references only, or because the state is in a class attribute. Give each object its own state. "
                    f"If the state may change by itself, leave the part that does out of digest()."
                )
            )

    # Calls, under the lock of the instance -----------------------------------------------------------------------

    def called(self, instance: Instance, name: str, arguments: Mapping[str, Any]) -> tuple[str, Callable[[], Any]]:
        """Call a method and log the call. Return its outcome as comparable text, and a function that returns it."""
        given = copy.deepcopy(dict(arguments))
        error: BaseException | None = None
        value: Any = None
        try:
            value = self._called(instance, name, copy.deepcopy(given))
            outcome = _comparable(value)
        except BaseException as raised:
            error, outcome = raised, f"{type(raised).__name__}: {text_of(raised)}"
        instance.log.append(Done(name=name, arguments=given, outcome=outcome))

        def result() -> Any:
            if error is not None:
                raise error
            return value

        return outcome, result

    def observe(self, instance: Instance) -> None:
        """Update the digest and the description of an instance, if the class has these methods."""
        kind = instance.start.kind
        if kind.offers("digest"):
            instance.digest = copy.deepcopy(self._called(instance, "digest"))  # it may be a part of the state
        if kind.offers("describe"):
            instance.description = for_models(str(self._called(instance, "describe")))[:_MAX_DESCRIBED_CHARS]

    def check_all_unchanged(self, instances: Sequence[Instance]) -> None:
        """Run `check_unchanged` for instances whose paths have ended, except those whose last call still runs."""
        for instance in instances:
            if not instance.doubt:
                with suppress(StillRunning), instance.turn(self.timeout_s):
                    self.check_unchanged(instance)

    def reward_of(self, value: Any) -> Any:
        """Return the result of `get_reward` of an object; None if an earlier call of the object still runs."""
        with self.changed:
            instance = self._objects.get(id(value))
        if instance is None:  # not of this run
            return result_of(value.get_reward(), None)
        try:
            with instance.turn(self.timeout_s):
                return result_of(instance.worker.run(lambda: value.get_reward()), None)
        except StillRunning as error:
            self.tell_once(
                f"An environment {instance.start.kind.name} has no reward", f"{as_reason(error)} Its reward is None."
            )
            return None

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
            # If the path was closed meanwhile, its instance is the point's copy.
            if made is not None and point.users and point.copy is None:
                point.copy = made
                self._copies[point] = None
                made = None
        if made is not None:
            self.close(made)

    def _called(self, instance: Instance, method: str, arguments: Mapping[str, Any] | None = None) -> Any:
        """Call a method in the thread of the object, and return its result."""
        value = instance.worker.run(lambda: getattr(instance.value, method)(**(arguments or {})))
        return self._finished(value, method)

    def _finished(self, value: Any, method: str) -> Any:
        """Like `result_of` for the value that a method returned, with the deadline of a call.

        Raises:
            ToolOverdue: There was no result in time. The method is cancelled.
        """
        try:
            return result_of(value, self.timeout_s + GRACE_S)
        except NoResult:
            raise ToolOverdue.of(method, self.timeout_s) from None

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
            self._closing[instance] = time.monotonic()
        threading.Thread(target=self._close, args=(instance,), name="arpo-environment-close", daemon=True).start()

    def _close(self, instance: Instance) -> None:
        is_free = self._close_value(instance)
        with self.changed:
            if is_free and instance.reusable and not instance.doubt:
                self._idle.append(instance)
            else:
                self._forget(instance, is_free)
            del self._closing[instance]
            self.live -= 1
            self.changed.notify_all()

    def _discard(self, instance: Instance) -> None:
        """Close an instance that no path uses, and do not reuse its object. The caller keeps its slot."""
        is_free = self._close_value(instance)
        with self.changed:
            self._forget(instance, is_free)

    def _forget(self, instance: Instance, is_free: bool) -> None:
        del self._objects[id(instance.value)]
        if is_free:
            self._workers.append(instance.worker)

    def _close_value(self, instance: Instance) -> bool:
        """Close an object, and return whether none of its methods runs any more."""
        held = instance.lock.acquire(timeout=self.timeout_s)
        instance.closed = True
        try:
            if instance.start.kind.offers("close"):
                if held:
                    self._called(instance, "close")
                else:  # its thread still runs another method
                    self._finished(instance.value.close(), "close")
        except BaseException as error:
            self.tell_once(
                f"close() of the environment {instance.start.kind.name} failed",
                f"{as_reason(error)}. Its resources may not be released.",
            )
        finally:
            if held:
                instance.lock.release()
        return held

    def settle(self) -> bool:
        """Wait until no instance is in creation or closing. Return False if the deadline passes first.

        Instances for which an earlier call has waited without success are ignored.
        """
        with self.changed:
            settled = self.changed.wait_for(lambda: self._unsettled <= self._hanging, 2 * self.timeout_s)
            self._hanging = self._unsettled
            return settled

    @property
    def _unsettled(self) -> set[Hashable]:
        return {*self._making, *self._closing}

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
            taken, self._counts = self._counts, Counts(live_max=self.live)
            return taken


def as_reason(error: BaseException) -> str:
    """Return an exception as part of a sentence."""
    text = text_of(error)
    if isinstance(error, ForkRefused | ToolError):
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _has_changed(before: Any, now: Any) -> bool:
    """Whether two digests differ. False for values that cannot be compared, such as NaN."""
    try:
        return bool(before == copy.copy(before)) and bool(before != now)
    except Exception:
        return False


def _comparable(value: Any) -> str:
    """Return the result of a method as text. Two long texts are equal only if the values are equal, up to a hash."""
    try:
        text = json.dumps(value, ensure_ascii=False, sort_keys=True, default=str)
    except Exception:  # not JSON, keys of several types, or contains itself
        text = repr(value)
    if len(text) <= _MAX_OUTCOME_CHARS:
        return text
    return f"{text[:_MAX_OUTCOME_CHARS]}… {hashlib.sha256(text.encode('utf-8', 'surrogatepass')).hexdigest()}"
