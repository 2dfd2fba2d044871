"""Samples and scores generation batches in a thread, while the trainer updates on an earlier batch.

    trainer's thread     start(n+1) ─▶ ┐               update on batch n                ┌ ─▶ wait(n+1)
    sampling thread                    └ one stream of groups, of up to k + 1 batches ┐ │
    a thread per batch                                         reward functions       └─┘

The sampling thread has one session of the engine, and makes no collective. The trainer's thread moves the weights.
Tools, engine and reward functions are used by one thread at a time: reward functions of different batches take turns,
and `pause` lets everything come to an end before the trainer's thread evaluates.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from arpo_trl.rollout.sampler import Finished, GroupRequest, RolloutBatch, RolloutTimes, TreeSampler
from arpo_trl.training.rewards_ahead import Scored
from arpo_trl.training.rows_ahead import Rows

ALL = 1 << 30
"""Groups that may run at a time: all that are started."""
CHECK_S = 0.2
"""Seconds between checks for an interrupt while the trainer waits."""
CLOSE_S = 5.0
"""Seconds that `close` waits for the sampling thread. After that it is left to itself: a tool may hang in it."""

Score = Callable[[Rows, list[GroupRequest], RolloutBatch], Scored]
"""(rows, requests, rollout) → rewards of the rollout's leaves. Called outside the trainer's thread."""


@dataclass(slots=True, kw_only=True)
class Sampled:
    """A finished batch. `ready_s` is the time at which it was, on the clock of `time.perf_counter`."""

    rollout: RolloutBatch
    scored: Scored
    ready_s: float


@dataclass(slots=True)
class _Batch:
    """A batch in the making: its rows, its requests, the groups that are done, and the counters at its start."""

    rows: Rows
    requests: list[GroupRequest]
    start_s: float
    forward_before_s: float
    tool_wait_before_s: float
    done: dict[int, Finished] = field(default_factory=dict)
    sampled: Sampled | None = None


class _Closed(Exception):
    """Ends the stream: nobody waits for its batches any more."""


class RolloutsAhead:
    """The batches that are sampled ahead, by number.

    ahead = RolloutsAhead(sampler, score, seed=(42, "ahead"), check=interrupts.check)
    ahead.start(0, rows, requests)
    ahead.wait(0).rollout
    ahead.close()

    Args:
        sampler: Its engine is an `EngineAhead`.
        seed: Seeds every draw, together with a request's id. Ids are unique over batches and ranks.
        check: Called while the trainer waits. An exception that it raises ends the wait.
    """

    def __init__(self, sampler: TreeSampler, score: Score, *, seed: tuple[int | str, ...], check: Callable[[], None]):
        self._sampler = copy.copy(sampler)  # with counters and a `between_events` of its own
        self._sampler.between_events = self._raise_if_closed
        self._score, self._seed, self._check = score, seed, check
        self._changed = threading.Condition()  # guards everything below
        self._batches: dict[int, _Batch] = {}
        self._batch_of: dict[int, _Batch] = {}
        """Request id → the batch that it belongs to, until its group is done."""
        self._queue: deque[GroupRequest] = deque()
        self._live = 0
        """Requests that the stream has taken and not finished."""
        self._open = self._pausing = self._closed = False
        self._error: BaseException | None = None
        self._scoring = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="arpo-rollouts-ahead", daemon=True)
        self._thread.start()

    # In the trainer's thread -----------------------------------------------------------------------------------------

    def __contains__(self, number: int) -> bool:
        """Whether the batch was started and not taken yet."""
        return number in self._batches

    def rows(self, number: int) -> Rows:
        """The rows that the batch was started with."""
        return self._batches[number].rows

    def start(self, number: int, rows: Rows, requests: list[GroupRequest]) -> None:
        """Start a batch. Returns once the session is open, so that the session has the weights of this moment."""
        with self._changed:
            self._pausing = False
            now, engine = time.perf_counter(), self._sampler.engine
            batch = _Batch(rows, requests, now, engine.forward_s, self._sampler.tool_wait_s)
            self._batches[number] = batch
            self._batch_of |= {request.id: batch for request in requests}
            self._queue.extend(requests)
            self._changed.notify_all()
        self._wait_until(lambda: self._open)

    def wait(self, number: int) -> Sampled:
        """Return the batch once it is sampled and scored. Raises the error that ended the sampling thread."""
        self._wait_until(lambda: self._batches[number].sampled is not None)
        sampled = self._batches.pop(number).sampled
        assert sampled is not None
        return sampled

    def pause(self) -> None:
        """Wait until all started batches are sampled and scored and the session is closed. `start` opens a new one."""
        with self._changed:
            self._pausing = True
            self._changed.notify_all()
        self._wait_until(
            lambda: not self._open and not self._queue and all(batch.sampled for batch in self._batches.values())
        )

    def raise_error(self) -> None:
        """Raise the error that ended the sampling thread, if one did."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Give up what is not finished, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join(CLOSE_S)

    def _wait_until(self, done: Callable[[], bool]) -> None:
        while True:
            with self._changed:
                self.raise_error()
                if done() or self._changed.wait_for(lambda: done() or self._error is not None, CHECK_S):
                    self.raise_error()
                    return
            self._check()

    # In the sampling thread ------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
            if self._closed:
                return
            try:
                for finished in self._sampler.stream(self._requests(), seed=self._seed, groups_at_once=ALL):
                    self._take(finished)
            except _Closed:
                return
            except BaseException as error:  # raised by the trainer's thread
                self._fail(error)
                return
            with self._changed:
                self._open = False
                self._changed.notify_all()

    def _requests(self) -> Iterator[GroupRequest | None]:
        """The queue. Waits if it is empty and no group runs; ends on `pause` and `close`."""
        with self._changed:
            self._open = True
            self._changed.notify_all()
        while True:
            with self._changed:
                if not self._live:
                    self._changed.wait_for(lambda: self._queue or self._pausing or self._closed)
                self._raise_if_closed()
                if not self._queue and not self._live:
                    return
                request = self._queue.popleft() if self._queue else None
                self._live += request is not None
            yield request

    def _take(self, finished: Finished) -> None:
        if finished.cause is not None:
            raise finished.cause
        self._live -= 1
        batch = self._batch_of.pop(finished.id)
        batch.done[finished.id] = finished
        if len(batch.done) == len(batch.requests):
            rollout = self._rollout_of(batch)
            threading.Thread(
                target=self._score_batch, args=(batch, rollout), name="arpo-rewards-ahead", daemon=True
            ).start()

    def _rollout_of(self, batch: _Batch) -> RolloutBatch:
        groups = [batch.done[request.id] for request in batch.requests]
        return RolloutBatch(
            trees=[group.tree for group in groups if group.tree is not None],
            times=RolloutTimes(
                total_s=time.perf_counter() - batch.start_s,
                forward_s=self._sampler.engine.forward_s - batch.forward_before_s,
                tool_wait_s=self._sampler.tool_wait_s - batch.tool_wait_before_s,
                sync_s=0.0,
            ),
            topups=[group.topups for group in groups],
            turns_in_sequence=[group.turns_in_sequence for group in groups],
            spans=[group.spans for group in groups],
        )

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise _Closed

    # In the thread of a finished batch -------------------------------------------------------------------------------

    def _score_batch(self, batch: _Batch, rollout: RolloutBatch) -> None:
        try:
            with self._scoring:
                scored = self._score(batch.rows, batch.requests, rollout)
        except BaseException as error:
            self._fail(error)
            return
        with self._changed:
            batch.sampled = Sampled(rollout=rollout, scored=scored, ready_s=time.perf_counter())
            self._changed.notify_all()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()
