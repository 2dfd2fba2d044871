"""How an engine gets the weights that training changes, and the check that they have arrived."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import pstdev
from typing import Protocol


class Weights(Protocol):
    """An engine's own copy of the weights that training changes."""

    def sync(self) -> None:
        """Returns once the engine holds the trainer's current weights; moves nothing where it does already.

        A collective: every rank calls it when its session opens.

        Raises:
            EngineError: The weights could not be moved, or the engine's logprobs differ from the trainer's afterwards.
        """


class FixedWeights:
    """Weights that stay what the engine was started with, as in an evaluation."""

    def sync(self) -> None:
        """There is nothing to move."""


def mean_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The mean |difference| of logprobs, in nats, or in their standard deviations where those are larger than a nat.

    Rounding grows with the logits: a model that is very sure of itself, or reads a text it finds very unlikely,
    differs from itself in another precision by more nats than one that spreads its probability.
    """
    scale = max(1.0, pstdev(ours))
    return sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(ours) / scale
