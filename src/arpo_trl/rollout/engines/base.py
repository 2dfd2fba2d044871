"""The seam between the sampler and whatever produces tokens.

An engine takes requests for single turns and reports events: a `Probe` once the first k tokens of a turn are there,
and the `Turn` when it ended, or `TurnFailed` where one request can fail by itself. It knows nothing of trees, tools or
branching. Inside a session it may need no other rank, so a rank with no live path and one with two hundred both just
run.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import StrEnum
from typing import Protocol


class TurnStop(StrEnum):
    """Why a turn ended."""

    EOS = "eos"
    STOP_STRING = "stop_string"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """The distribution to sample from, in transformers' terms; temperature 0 is greedy.

    `stop_strings` end a turn as soon as its text contains one; the ids stay exactly as sampled, also where the last
    token carries characters beyond the stop string.
    """

    eos_ids: tuple[int, ...]
    stop_strings: tuple[str, ...] = ()
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float | None = None
    repetition_penalty: float = 1.0


@dataclass(frozen=True, slots=True)
class TurnRequest:
    """One turn to be written after `ids` (prompt and path so far), of at most `max_tokens` tokens.

    `probe_tokens` is k. `seed` alone determines the random numbers of the turn, whatever else is in the batch. `key`
    is the turn's place, (group, *address, depth), for scripts and logs. `after` is the id of the earlier turn that
    `ids` continues, None at the root: an engine that still has that turn's state need not read it again.
    """

    id: int
    ids: list[int]
    max_tokens: int
    probe_tokens: int
    seed: int
    key: tuple[int, ...]
    after: int | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """The first k tokens of a turn are written; their entropies in nats. Sent only while the turn goes on."""

    id: int
    entropies: list[float]


@dataclass(frozen=True, slots=True)
class Turn:
    """A finished turn: at least one token, one logprob per token, entropies of the first k (or fewer) tokens."""

    id: int
    ids: list[int]
    logprobs: list[float]
    entropies: list[float]
    stop: TurnStop


@dataclass(frozen=True, slots=True)
class TurnFailed:
    """A turn that was given up, while others go on: the server cannot answer this one request."""

    id: int
    reason: str


Event = Probe | Turn | TurnFailed


class Engine(Protocol):
    """What the sampler needs."""

    vocab_size: int
    """V of ln V, the width of the distribution sampled from."""
    forward_s: float
    """Seconds spent in model forwards since the engine was made."""

    @property
    def max_length(self) -> int | None:
        """Most tokens of prompt and path together that the engine can hold; None: it knows of no bound."""

    def session(self) -> AbstractContextManager[None]:
        """Weights in place until it closes: synced or gathered once, the only collective of a rollout."""

    def submit(self, request: TurnRequest) -> None:
        """Queues a turn; never blocks."""

    def poll(self, timeout_s: float) -> Sequence[Event]:
        """What happened since the last call, waiting at most about `timeout_s` for the first event."""
