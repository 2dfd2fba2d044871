"""Samples and scores generation batches in a thread, while the trainer updates on an earlier batch.

    trainer's thread     start(n+1) ─▶ ┐               update on batch n                ┌ ─▶ wait(n+1)
    sampling thread                    └ one stream of groups, of up to k + 1 batches ┐ │
    a thread per batch       environments are made             reward functions       └─┘

The sampling thread has one session of the engine, and calls no collective. The trainer's thread moves the weights.
Only one thread at a time uses the tools, the engine or the reward functions: the reward functions of different batches
run one after another, and `pause` waits until all threads are idle before the trainer's thread evaluates.
"""

from __future__ import annotations

import copy
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

from arpo_trl.rollout.batch import Finished, GroupRequest, RolloutBatch, RolloutTimes
from arpo_trl.rollout.sampler import TreeSampler
from arpo_trl.training.rewards_ahead import Scored
from arpo_trl.training.rows_ahead import Rows

ALL = 1 << 30
"""A number of groups that no run reaches: no limit."""
CHECK_S = 0.2
"""Seconds between checks for an interrupt while the trainer waits."""
CLOSE_S = 5.0
"""Seconds that `close` waits for all threads together. Then it returns anyway, since a tool or a reward function may
hang in a thread."""

ScoreBatch = Callable[[Rows, list[GroupRequest], RolloutBatch], Scored]
"""(rows, requests, rollout) → rewards of the rollout's leaves. Called outside the trainer's thread."""


Prepared = tuple[Rows, list[GroupRequest]]
"""The rows of a batch, with the model's prompts, and one request per group."""


@dataclass(slots=True, kw_only=True)
class Sampled:
    """A finished batch. `ready_s` is the time when it was finished, on the clock of `time.perf_counter`."""

    rollout: RolloutBatch
    scored: Scored
    ready_s: float


@dataclass(slots=True)
class _Batch:
    """An unfinished batch: its rows, requests, finished groups and threads, and the sampler's clock at its start."""

    rows: Rows
    start: RolloutTimes
    prepared: Prepared | None = None
    done: dict[int, Finished] = field(default_factory=dict)
    sampled: Sampled | None = None
    threads: list[threading.Thread] = field(default_factory=list)


class _Closed(Exception):
    """Stops the stream, when its batches are no longer needed."""


class RolloutsAhead:
    """The batches that the sampling thread samples ahead, by number.

    ahead = RolloutsAhead(sampler, score, seed=(42, "ahead"), check=interrupts.check)
    ahead.start(0, rows, lambda check: (rows, requests), takes_time=False)
    ahead.wait(0).rollout
    ahead.close()

    Args:
        sampler: Its engine is an `EngineAhead`.
        seed: Seeds every random draw, together with a request's id. Ids are unique across batches and ranks.
        check: Called while the trainer waits. An exception from it stops the wait.
    """

    def __init__(
        self, sampler: TreeSampler, score: ScoreBatch, *, seed: tuple[int | str, ...], check: Callable[[], None]
    ):
        self._sampler = copy.copy(sampler)  # a copy has separate counters and a separate `between_events`
        self._sampler.between_events = self._raise_if_closed
        self._score, self._seed, self._check = score, seed, check
        self._changed = threading.Condition()  # guards all attributes below
        self._batches: dict[int, _Batch] = {}
        self._batch_of: dict[int, _Batch] = {}
        """Request id → its batch, until its group is finished."""
        self._queue: deque[GroupRequest] = deque()
        self._live = 0
        """Requests that the stream has started but not finished."""
        self._preparing: set[int] = set()
        """The batches whose requests are not yet known."""
        self._open = self._pausing = self._closed = False
        self._error: BaseException | None = None
        self._scoring = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="arpo-rollouts-ahead", daemon=True)
        self._thread.start()

    # In the trainer's thread -----------------------------------------------------------------------------------------

    def __contains__(self, number: int) -> bool:
        """Whether the batch was started and not yet returned by `wait`."""
        return number in self._batches

    def rows(self, number: int) -> Rows:
        """The rows with which the batch was started."""
        return self._batches[number].rows

    def start(
        self, number: int, rows: Rows, prepare: Callable[[Callable[[], None]], Prepared], *, takes_time: bool
    ) -> None:
        """Start a batch. Returns when the session is open, so that the session has the current weights.

        Args:
            prepare: Creates the requests. It calls its argument repeatedly, which may raise an exception to stop it.
            takes_time: Whether `prepare` runs in a separate thread.
        """
        with self._changed:
            self._pausing = False
            self._batches[number] = _Batch(rows, self._sampler.clock())
            self._preparing.add(number)
            self._changed.notify_all()
        if takes_time:
            thread = threading.Thread(
                target=self._prepare, args=(number, prepare), name="arpo-rollouts-ahead-prepare", daemon=True
            )
            self._batches[number].threads.append(thread)
            thread.start()
        else:
            self._prepare(number, prepare)
        self._wait_until(lambda: self._open)

    def prepared_rows(self, number: int) -> Rows:
        """Return the rows of the batch with the model's prompts. Waits until they are known."""
        self._wait_until(lambda: self._batches[number].prepared is not None)
        prepared = self._batches[number].prepared
        assert prepared is not None
        return prepared[0]

    def wait(self, number: int) -> Sampled:
        """Return the sampled and scored batch. Waits for it. Raises the error that stopped the sampling thread."""
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

    @property
    def failed(self) -> bool:
        """Whether an error has stopped the sampling thread."""
        return self._error is not None

    def raise_error(self) -> None:
        """Raise the error that stopped the sampling thread, if there is one."""
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Cancel unfinished batches, and wait at most `CLOSE_S` for the threads. Calls no further reward function."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline = time.monotonic() + CLOSE_S
        self._thread.join(CLOSE_S)  # first: it starts threads of batches
        for batch in self._batches.values():
            for thread in batch.threads:
                thread.join(max(0.0, deadline - time.monotonic()))

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
                self._changed.wait_for(lambda: self._queue or self._preparing or self._closed)
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
        """The queue. Waits if it is empty and no group runs. Stops on `close`, and on `pause` after the started
        batches."""
        with self._changed:
            self._open = True
            self._changed.notify_all()
        while True:
            with self._changed:
                if not self._live:
                    self._changed.wait_for(self._has_news)
                self._raise_if_closed()
                if not self._queue and not self._live:
                    return
                request = self._queue.popleft() if self._queue else None
                self._live += request is not None
            yield request

    def _has_news(self) -> bool:
        return bool(self._queue or self._closed or (self._pausing and not self._preparing))

    def _take(self, finished: Finished) -> None:
        if finished.cause is not None:
            raise finished.cause
        self._live -= 1
        batch = self._batch_of.pop(finished.id)
        batch.done[finished.id] = finished
        assert batch.prepared is not None
        rows, requests = batch.prepared
        if len(batch.done) == len(requests):
            rollout = self._rollout_of(batch, requests)
            thread = threading.Thread(
                target=self._score_batch, args=(batch, rows, requests, rollout), name="arpo-rewards-ahead", daemon=True
            )
            batch.threads.append(thread)
            thread.start()

    def _rollout_of(self, batch: _Batch, requests: list[GroupRequest]) -> RolloutBatch:
        groups = [batch.done[request.id].group for request in requests]
        return RolloutBatch(
            groups=[group for group in groups if group is not None], times=self._sampler.clock() - batch.start
        )

    def _raise_if_closed(self) -> None:
        if self._closed:
            raise _Closed

    # In the threads of a batch ---------------------------------------------------------------------------------------

    def _prepare(self, number: int, prepare: Callable[[Callable[[], None]], Prepared]) -> None:
        batch = self._batches[number]
        try:
            rows, requests = prepare(self._raise_if_closed)
        except _Closed:
            return
        except BaseException as error:
            self._fail(error)
            return
        with self._changed:
            batch.prepared = rows, requests
            self._batch_of |= {request.id: batch for request in requests}
            self._queue.extend(requests)
            self._preparing.remove(number)
            self._changed.notify_all()

    def _score_batch(self, batch: _Batch, rows: Rows, requests: list[GroupRequest], rollout: RolloutBatch) -> None:
        with self._scoring:
            if self._closed or self._error is not None:
                return
            try:
                scored = self._score(rows, requests, rollout)
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
