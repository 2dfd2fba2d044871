"""What a branch rule is, what it reads, and the budget that all rules share.

The first k tokens after an observation are probed while they are written. Their mean entropy `H_turn`, less that of
the path's own first turn, `H_root`, normalised by the most an entropy over V tokens can be, is

    ΔH = (H_turn − H_root) / ln V                 (the paper divides by V, which makes β inert: docs/algorithm.md)
    P  = α + β·ΔH                                 (Eq 5)
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, ClassVar

from arpo_trl.rollout.tree import Address, BranchDecision, RolloutTree


class Moment(Enum):
    """When a rule decides, and so what it can know."""

    RESULT = "result"
    """When an observation is there, before the turn under it is written."""
    PROBE = "probe"
    """When the first k tokens of the turn under an observation are known."""
    PATHS_DONE = "paths_done"
    """When no path is live: once the N first paths have ended, and again whenever those of the last decision have."""
    LEAVES_SCORED = "leaves_scored"
    """As PATHS_DONE, with the rewards of the finished leaves."""

    @property
    def waits(self) -> bool:
        """Whether nothing is decided while a path of the group is live."""
        return self in (Moment.PATHS_DONE, Moment.LEAVES_SCORED)


@dataclass(frozen=True, slots=True)
class Candidate:
    """An observation that may branch. Entropies are in nats, one per probed token.

    `node` is its index in the tree, which has its siblings, its calls and all that is above and below it.
    """

    node: int
    address: Address
    """Of the path on which it was observed."""
    depth: int
    """Turns above it."""
    turn: Sequence[float]
    """Entropies of the first turn under it; empty at `Moment.RESULT`."""
    before: Sequence[float]
    """Entropies of the turn above it."""
    root: Sequence[float]
    """Entropies of the path's first turn."""


@dataclass(frozen=True, slots=True)
class LivePath:
    """A path that is not finished: the last node it has, and how many more tool results it may branch at."""

    node: int
    results: int


@dataclass(slots=True)
class BranchContext:
    """What a rule may read of one group, and what it keeps of it."""

    tree: RolloutTree
    vocab_size: int
    remaining: int
    """Leaves that are left to be given away, of the M − N that are not started at the root."""
    seed_of: Callable[[tuple[int, ...]], int]
    """The seed of a place in the tree: the same whatever finishes first."""
    rewards: Sequence[float] = ()
    """At `Moment.LEAVES_SCORED` the rewards of `tree.leaves()`, in that order."""
    state: Any = None
    """What `BranchRule.start` returned."""

    def generator(self, *place: int) -> random.Random:
        """The generator of a place in this group's tree; the same place has the same one."""
        return random.Random(self.seed_of(place))

    def coin(self, candidate: Candidate) -> float:
        """The candidate's own draw, uniform in [0, 1)."""
        return self.generator(*candidate.address, candidate.depth).random()


@dataclass(frozen=True)
class BranchRule(ABC):
    """A rule, a frozen dataclass whose fields are its settings. One object serves all groups of a run.

    Most rules define `judge` alone. `decide` and `supply` are for those that spend the budget in their own way.
    """

    name: ClassVar[str] = "unregistered"
    """What `branch_rule` calls it; `register_rule` sets it."""
    moment: ClassVar[Moment] = Moment.PROBE
    entropy_triggers: ClassVar[bool] = False
    """Whether an entropy above some bar makes an observation branch, so that the share that does is worth an alarm."""

    branches_per_fork: int = 1
    """Z: extra turns under an observation that branches."""

    def start(self, context: BranchContext) -> Any:
        """What the rule keeps of a group that begins: `context.state` from then on."""
        return None

    @abstractmethod
    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        """Whether this observation is to branch; `granted` is not looked at."""

    def decide(self, candidates: Sequence[Candidate], context: BranchContext) -> list[BranchDecision]:
        """One decision per candidate, `granted` filled in: in sum at most `context.remaining`.

        The candidates are those whose moment has come, in the order of their places in the tree. A rule that waits
        gets all observations of the tree each time; what it grants is added to what a node has.
        """
        judged = [self.judge(candidate, context) for candidate in candidates]
        wanted = [self.branches_per_fork] * len(judged)
        return grant(judged, wanted, [decision.delta or 0.0 for decision in judged], context.remaining)

    def supply(self, live: Iterable[LivePath], context: BranchContext) -> int:
        """How many of the remaining leaves branches can still take; the others are started at the root at once.

        Asked after each decision. A path with r results to come can become at most (1 + Z)^r leaves, since every
        branch inherits those that are left. A rule that waits has decided where all that it wants goes.
        """
        if self.moment.waits:
            return 0
        total = 0
        for path in live:
            if path.results > context.remaining:  # (1 + Z)^r − 1 ≥ r: enough, and no astronomic powers
                return context.remaining
            total += (1 + self.branches_per_fork) ** path.results - 1
            if total >= context.remaining:
                return context.remaining
        return total


def grant(
    decisions: Sequence[BranchDecision], wanted: Sequence[int], priorities: Sequence[float], remaining: int
) -> list[BranchDecision]:
    """The decisions with `granted` filled in: those that fire, highest priority first, what they want while it lasts.

    Ties go to the earlier decision in the sequence.
    """
    granted = list(decisions)
    for i in sorted(range(len(granted)), key=lambda i: -priorities[i]):
        if granted[i].fires:
            taken = min(wanted[i], remaining)
            remaining -= taken
            granted[i] = replace(granted[i], granted=taken)
    return granted


def mean(values: Sequence[float]) -> float:
    """The mean, 0.0 of nothing."""
    return math.fsum(values) / len(values) if values else 0.0


def rise(entropy: float, root: float, vocab_size: int) -> float:
    """ΔH of two aggregated entropies in nats, in [−1, 1] where both are means."""
    return (entropy - root) / math.log(vocab_size)


def clipped(probability: float) -> float:
    """The nearest probability there is."""
    return min(max(probability, 0.0), 1.0)
