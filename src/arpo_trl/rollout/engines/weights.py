"""The interface through which an engine gets the trained weights, and the comparison that checks them."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import pstdev
from typing import Protocol


class Weights(Protocol):
    """An engine's copy of the weights that training changes."""

    def sync(self) -> None:
        """Send the trainer's current weights to the engine, unless it already has them.

        A collective: every rank calls it when its session opens.

        Raises:
            EngineError: The transfer failed, or the engine's logprobs differ from the trainer's after it.
        """


class FixedWeights:
    """The engine's initial weights. They do not change, for example in an evaluation."""

    def sync(self) -> None:
        """Do nothing."""


def mean_difference(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The mean absolute difference of logprobs, in nats, or in standard deviations of `ours` if that exceeds 1 nat.

    Rounding errors grow with the logits. With a very confident model or a very unlikely text, two precisions of the
    same model differ by more nats than with a model that spreads its probability.
    """
    scale = max(1.0, pstdev(ours))
    return sum(abs(a - b) for a, b in zip(ours, theirs, strict=True)) / len(ours) / scale
