"""An engine that several ranks share, as in a tensor parallel group, while each rank samples different rollouts.

Such an engine must get the same requests in the same order, step by step, on every rank. But the ranks' samplers run
independently: one waits for a tool while another has turns to decode. So each rank runs the engine in a thread, and
the threads run in rounds:

    gather    each rank's new requests, its "done" flag, and the events of the last step
    submit    all requests to the engine, in rank order, so that the order is the same on every rank
    step      the engine; only the events of the group's first rank are used, and each goes to the rank of its request

So a rank without live paths, or one whose paths all wait for tools, still takes part in every step. A session closes
when all ranks are done.
"""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist

from arpo_trl.common.queues import drained
from arpo_trl.errors import EngineError, Interrupted
from arpo_trl.rollout.engines.base import Engine, Event, Probe, Turn, TurnRequest

IDLE_S = 0.002
"""Seconds between two rounds while no rank has a turn to decode."""


@dataclass(frozen=True, slots=True)
class _Round:
    """What one rank sends to the others in a round."""

    requests: list[TurnRequest]
    events: Sequence[Event]
    done: bool
    problem: str | None


class LockstepEngine:
    """An engine whose steps all ranks of `group` run together. `group` must support objects (gloo)."""

    def __init__(self, inner: Engine, group: dist.ProcessGroup):
        self.vocab_size, self.max_length = inner.vocab_size, inner.max_length
        self.forward_s = 0.0
        self.has_logprobs = True
        self._inner = inner
        self._group = group
        self._rank, self._size = dist.get_rank(group), dist.get_world_size(group)
        self._requests: queue.SimpleQueue[TurnRequest] = queue.SimpleQueue()
        self._events: queue.SimpleQueue[Event | EngineError] = queue.SimpleQueue()
        self._pending = 0
        self._done = False
        self._problem: str | None = None

    @contextmanager
    def session(self) -> Iterator[None]:
        with self._inner.session():
            self._requests, self._events = queue.SimpleQueue(), queue.SimpleQueue()
            self._done, self._problem = False, None
            thread = threading.Thread(target=self._run, args=(_current_stream(),), name="lockstep", daemon=True)
            thread.start()
            try:
                yield
            except Interrupted:  # the other ranks are told too, and stop at their own next check
                raise
            except BaseException as error:
                self._problem = f"{type(error).__name__} on rank {dist.get_rank()}: {error}"
                raise
            finally:
                self._done = True
                thread.join()
                self._pending = 0
        for event in drained(self._events):  # another rank may fail after this one is done
            if isinstance(event, EngineError):
                raise event

    def submit(self, request: TurnRequest) -> None:
        self._pending += 1
        self._requests.put(request)

    def poll(self, timeout_s: float = 0.0) -> list[Event]:
        if not self._pending:
            return []
        events: list[Event] = []
        for event in drained(self._events, timeout_s):
            if isinstance(event, EngineError):
                raise event
            events.append(event)
            self._pending -= isinstance(event, Turn)
        return events

    # In the engine's thread ------------------------------------------------------------------------------------------

    def _run(self, stream: torch.cuda.Stream | None) -> None:
        if stream is not None:  # of the session's thread: vLLM would create another for this thread, with its memory
            torch.cuda.set_device(stream.device)
            torch.cuda.set_stream(stream)
        mine: Sequence[Event] = []
        writing = 0  # unfinished turns of all ranks
        while True:
            done = self._done  # read before the requests: after `done` no more are submitted
            rounds: list[_Round | None] = [None] * self._size
            requests = list(drained(self._requests))
            try:
                dist.all_gather_object(rounds, _Round(requests, mine, done, self._problem), self._group)
            except Exception as error:  # without an event for this error the sampler would wait forever
                self._events.put(
                    EngineError(
                        f"A rank of the tensor parallel group is lost ({type(error).__name__}: {error}). Check the "
                        "ranks' logs, and resume."
                    )
                )
                return
            gathered = [each for each in rounds if each is not None]
            if problems := [each.problem for each in gathered if each.problem is not None]:
                self._events.put(EngineError(f"The tensor parallel group stopped: {problems[0]}"))
                return
            self._deliver(gathered[0].events)
            if _ids(gathered[0].events) != _ids(mine):
                self._problem = f"rank {dist.get_rank()} sampled other tokens than the group's first rank"
            if all(each.done for each in gathered):
                return
            mine = []
            try:
                for rank, each in enumerate(gathered):
                    for request in each.requests:
                        self._inner.submit(self._shared(request, rank))
                        writing += 1
                if writing:
                    mine = self._inner.poll(0.0)
                    writing -= sum(not isinstance(event, Probe) for event in mine)
                    self.forward_s = self._inner.forward_s
                else:
                    time.sleep(IDLE_S)
            except Exception as error:  # sent to all ranks in the next round
                self._problem = f"{type(error).__name__} on rank {dist.get_rank()}: {error}"

    def _shared(self, request: TurnRequest, rank: int) -> TurnRequest:
        """The request with ids that are unique across all ranks."""
        after = None if request.after is None else request.after * self._size + rank
        return replace(request, id=request.id * self._size + rank, after=after)

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.id % self._size == self._rank:
                self._events.put(replace(event, id=event.id // self._size))


def _ids(events: Sequence[Event]) -> list[tuple[int, list[int]]]:
    return [(event.id, event.ids if isinstance(event, Turn) else []) for event in events]


def _current_stream() -> torch.cuda.Stream | None:
    return torch.cuda.current_stream() if torch.cuda.is_available() else None
