"""What a branch rule reads: an observation that may branch, and its group.

The engine measures the entropies of the first k tokens after an observation while it samples them. `H_turn` is their
mean and `H_root` that of the path's first turn. Their difference, divided by the largest entropy over V tokens, is ΔH:

    ΔH = (H_turn − H_root) / ln V                 (the paper divides by V, which makes β inert: docs/algorithm.md)
    P  = α + β·ΔH                                 (Eq 5)
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from itertools import takewhile
from typing import Any

from arpo_trl.rollout.tree import Address, BranchDecision, NodeKind, RolloutTree


class Moment(Enum):
    """When a rule decides. This determines the data that it can read."""

    RESULT = "result"
    """When an observation is complete, before the turn under it starts."""
    PROBE = "probe"
    """When the first k tokens of the turn under an observation are known."""
    PATHS_DONE = "paths_done"
    """When no path is live: after the first N paths have ended, and again after the branches of each decision have
    ended."""
    LEAVES_SCORED = "leaves_scored"
    """Like PATHS_DONE, with the rewards of the finished leaves."""

    @property
    def waits(self) -> bool:
        """Whether the rule decides only when no path of the group is live."""
        return self in (Moment.PATHS_DONE, Moment.LEAVES_SCORED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An observation that may branch. Entropies are in nats, one per probed token.

    `node` is the observation's index in `BranchContext.tree`, from which a rule can read its calls, ancestors and
    siblings.

        Candidate(node=2, address=(0,), depth=1, turn=[1.3, 0.2], before=[0.9], root=[0.9])
    """

    node: int
    address: Address
    """The address of the observation's path."""
    depth: int
    """The number of turns above the observation."""
    turn: Sequence[float]
    """Entropies of the first turn under the observation; empty at `Moment.RESULT`."""
    before: Sequence[float]
    """Entropies of the turn above the observation."""
    root: Sequence[float]
    """Entropies of the path's first turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePath:
    """An unfinished path: its address, its last node, and the number of further tool results at which it may branch.

    LivePath(address=(0,), node=3, results=2)
    """

    address: Address
    node: int
    results: int


@dataclass(slots=True, kw_only=True)
class BranchContext:
    """The data of one group that a rule can read, and the rule's state for this group.

    BranchContext(tree=RolloutTree([50, 51]), vocab_size=151_936, remaining=8, seed_of=lambda place: hash(place))
    """

    tree: RolloutTree
    vocab_size: int
    remaining: int
    """The remaining budget: of the M − N leaves that do not start at the root, the number that no decision has
    used."""
    seed_of: Callable[[tuple[int, ...]], int]
    """The seed of a place in the tree. It does not depend on the order in which paths finish."""
    rewards: Sequence[float] = ()
    """The rewards of `tree.leaves()`, in that order; only at `Moment.LEAVES_SCORED`."""
    state: Any = None
    """The return value of `BranchRule.start`."""

    def generator(self, *place: int) -> random.Random:
        """A new random generator for a place in this group's tree. The same place gives the same numbers."""
        return random.Random(self.seed_of(place))

    def coin(self, candidate: Candidate) -> float:
        """The candidate's random number, uniform in [0, 1)."""
        return self.generator(*candidate.address, candidate.depth).random()

    def drawn(self, candidate: Candidate, decision: BranchDecision) -> BranchDecision:
        """The decision of a rule that fires with the decision's probability."""
        coin = self.coin(candidate)
        assert decision.probability is not None
        return replace(decision, fires=coin < decision.probability, reason=f"drew {coin:.3f}")

    def measured(self, candidate: Candidate) -> tuple[float, float]:
        """The candidate's H_turn in nats, and its ΔH."""
        entropy = mean(candidate.turn)
        return entropy, rise(entropy, mean(candidate.root), self.vocab_size)

    def decisions_above(self, candidate: Candidate) -> list[BranchDecision]:
        """The decisions at the observations above the candidate on its path, nearest first."""
        above = [node for node in self.tree.path(candidate.node)[:-1] if node.kind is NodeKind.OBSERVATION]
        return [node.decision or BranchDecision(fires=False) for node in reversed(above)]

    def branches_above(self, candidate: Candidate) -> int:
        """The number of branches at the observations above the candidate on its path."""
        return sum(decision.granted for decision in self.decisions_above(candidate))

    def consecutive(self, candidate: Candidate) -> int:
        """The number of observations directly above the candidate that branch, without a gap."""
        return len(list(takewhile(lambda decision: decision.granted, self.decisions_above(candidate))))


def mean(values: Sequence[float]) -> float:
    """The mean; 0.0 for an empty sequence."""
    return math.fsum(values) / len(values) if values else 0.0


def rise(entropy: float, root: float, vocab_size: int) -> float:
    """ΔH of two means or sums of entropies in nats; in [−1, 1] for means."""
    return (entropy - root) / math.log(vocab_size)


def clipped(probability: float) -> float:
    """The value clipped to [0, 1]."""
    return min(max(probability, 0.0), 1.0)
