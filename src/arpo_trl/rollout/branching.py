"""From the entropies after a tool result to extra turns: the rule, and the budget of one group.

The first k tokens after an observation are probed while they are written. Their mean entropy `H_turn`, less that of
the path's own first turn, `H_root`, normalised by the most an entropy over V tokens can be, is

    ΔH = (H_turn − H_root) / ln V                 (the paper divides by V, which makes β inert: docs/algorithm.md)
    P  = α + β·ΔH                                 (Eq 5)

and the rule decides from P whether the observation gets Z extra turns. Pure: no trl, no engine, no network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum


class BranchRule(StrEnum):
    """What makes an observation branch."""

    THRESHOLD = "threshold"
    """P > τ, the paper's rule. With α = τ it says ΔH > 0."""
    PROBABILITY = "probability"
    """A coin that falls on "branch" with probability P."""
    RANDOM = "random"
    """A coin with probability α, blind to entropy: the control."""
    RANKED = "ranked"
    """Wait until the first N paths are done, then branch where H_turn was highest, wherever that is."""
    RELEASED = "released"
    """The public code's rule: a coin with P from the turn *before* the tool result, entropies summed over k tokens."""


@dataclass(frozen=True, slots=True)
class BranchDecision:
    """What was decided for one observation. `granted` < Z on a firing decision means the budget ran out."""

    entropy_nats: float
    delta: float
    probability: float
    fires: bool
    granted: int = 0


@dataclass(frozen=True, slots=True)
class BranchPolicy:
    """The settings of a rule: α `probability`, β `entropy_weight`, τ `threshold`, Z `branches_per_fork`."""

    rule: BranchRule = BranchRule.THRESHOLD
    probability: float = 0.5
    entropy_weight: float = 0.2
    threshold: float = 0.5
    branches_per_fork: int = 1

    def decide(self, turn: Sequence[float], root: Sequence[float], vocab_size: int, coin: float) -> BranchDecision:
        """The decision from the probe entropies (nats) of a turn and of its path's first turn; `coin` is in [0, 1).

        Under RELEASED `turn` is the turn before the tool result, and both are summed instead of averaged. A RANKED
        decision fires only when `rank` grants it.
        """
        aggregate = math.fsum if self.rule is BranchRule.RELEASED else mean
        entropy = aggregate(turn)
        delta = (entropy - aggregate(root)) / math.log(vocab_size)
        probability = self.probability
        if self.rule is not BranchRule.RANDOM:
            probability += self.entropy_weight * delta
        if self.rule is BranchRule.THRESHOLD:
            fires = probability > self.threshold
        else:
            probability = min(max(probability, 0.0), 1.0)
            fires = self.rule is not BranchRule.RANKED and coin < probability
        return BranchDecision(entropy, delta, probability, fires)


def mean(values: Sequence[float]) -> float:
    """The mean, 0.0 of nothing."""
    return math.fsum(values) / len(values) if values else 0.0


class BranchBudget:
    """The M − N leaves of one group that are not started at the root, and who gets them."""

    def __init__(self, leaves: int, branches_per_fork: int):
        self.remaining = leaves
        self.branches_per_fork = branches_per_fork

    def serve(self, decisions: Sequence[BranchDecision]) -> list[BranchDecision]:
        """The same decisions with `granted` filled in: firing ones, highest ΔH first, Z each while the budget lasts.

        Ties go to the earlier decision in the sequence.
        """
        served = list(decisions)
        for i in sorted(range(len(served)), key=lambda i: -served[i].delta):
            if served[i].fires:
                served[i] = replace(served[i], granted=self._take(self.branches_per_fork))
        return served

    def rank(self, decisions: Sequence[BranchDecision]) -> list[BranchDecision]:
        """The same decisions, those with the highest `entropy_nats` firing, Z each, until the budget is spent."""
        ranked = list(decisions)
        for i in sorted(range(len(ranked)), key=lambda i: -ranked[i].entropy_nats):
            granted = self._take(self.branches_per_fork)
            ranked[i] = replace(ranked[i], fires=granted > 0, granted=granted)
        return ranked

    def top_up(self, possible_results: Iterable[int]) -> int:
        """How many leaves no branch can supply any more, taken from the budget: start them at the root at once.

        `possible_results` holds, for each live path, how many tool results it may still branch at. A path with r of
        them can become at most (1 + Z)^r leaves, since every branch inherits those that are left.
        """
        capacity = 0
        for results in possible_results:
            if results > self.remaining:  # (1 + Z)^r − 1 ≥ r: enough, and no astronomic powers
                return 0
            capacity += (1 + self.branches_per_fork) ** results - 1
            if capacity >= self.remaining:
                return 0
        return self._take(self.remaining - capacity)

    def _take(self, wanted: int) -> int:
        taken = min(wanted, self.remaining)
        self.remaining -= taken
        return taken
