"""The interface of a branch rule, the data that it reads, and the budget that all rules share.

The engine measures the entropies of the first k tokens after an observation while it samples them. `H_turn` is their
mean and `H_root` that of the path's first turn. Their difference, divided by the largest entropy over V tokens, is ΔH:

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
    """When a rule decides, and hence what it can read."""

    RESULT = "result"
    """When an observation is complete, before the turn under it starts."""
    PROBE = "probe"
    """When the first k tokens of the turn under an observation are known."""
    PATHS_DONE = "paths_done"
    """When no path is live: after the first N paths have ended, and again after the branches of each decision have."""
    LEAVES_SCORED = "leaves_scored"
    """Like PATHS_DONE, with the rewards of the finished leaves."""

    @property
    def waits(self) -> bool:
        """Whether the rule decides only when no path of the group is live."""
        return self in (Moment.PATHS_DONE, Moment.LEAVES_SCORED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An observation that may branch. Entropies are in nats, one per probed token.

    `node` is the observation's index in `BranchContext.tree`, where a rule finds its calls, relatives and siblings.

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
    """An unfinished path: its last node, and the number of further tool results that it may branch at.

    LivePath(node=3, results=2)
    """

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
    """The budget left: leaves, of the M − N that do not start at the root, that no decision has used."""
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


@dataclass(frozen=True, kw_only=True)
class BranchRule(ABC):
    """A branch rule: a frozen dataclass whose fields are its settings. One object serves all groups of a run.

    Most rules define only `judge`. A rule that spends the budget differently also overrides `decide` and `supply`.

        @register_rule("always")
        @dataclass(frozen=True, kw_only=True)
        class Always(BranchRule):
            def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
                return BranchDecision(fires=True)

        Always(branches_per_fork=2)
    """

    name: ClassVar[str] = "unregistered"
    """The rule's name in the setting `branch_rule`; `register_rule` sets it."""
    moment: ClassVar[Moment] = Moment.PROBE
    entropy_triggers: ClassVar[bool] = False
    """Whether the rule fires on entropy, so that an alarm on the share of observations that fire makes sense."""

    branches_per_fork: int = 1
    """Z: the number of extra turns under an observation that branches."""

    def start(self, context: BranchContext) -> Any:
        """Return the rule's state for a new group. It is stored in `context.state`."""
        return None

    @abstractmethod
    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        """Decide whether this observation branches. `granted` of the result is ignored."""

    def decide(self, candidates: Sequence[Candidate], context: BranchContext) -> list[BranchDecision]:
        """Return one decision per candidate, with `granted` set. Their sum is at most `context.remaining`.

        The candidates are those that have reached `moment`, sorted by place in the tree. A rule that waits gets all
        observations of the tree each time, and its grants are added to the node's earlier ones.
        """
        judged = [self.judge(candidate, context) for candidate in candidates]
        wanted = [self.branches_per_fork] * len(judged)
        return grant(judged, wanted, [decision.delta or 0.0 for decision in judged], context.remaining)

    def supply(self, live: Iterable[LivePath], context: BranchContext) -> int:
        """Return how many of the remaining leaves branches can still use. The sampler starts the others at the root.

        The sampler calls this after each decision. A path that can still get r results becomes at most (1 + Z)^r
        leaves, since every branch inherits the results that are left. A rule that waits has already granted all the
        leaves it wants.
        """
        if self.moment.waits:
            return 0
        total = 0
        for path in live:
            if path.results > context.remaining:  # enough, as (1 + Z)^r − 1 ≥ r; avoids huge powers
                return context.remaining
            total += (1 + self.branches_per_fork) ** path.results - 1
            if total >= context.remaining:
                return context.remaining
        return total


def grant(
    decisions: Sequence[BranchDecision], wanted: Sequence[int], priorities: Sequence[float], remaining: int
) -> list[BranchDecision]:
    """Return the decisions with `granted` set. Those that fire get what they want, highest priority first.

    The grants end when `remaining` is used up. Of equal priorities the earlier decision in the sequence goes first.
    """
    granted = list(decisions)
    for i in sorted(range(len(granted)), key=lambda i: -priorities[i]):
        if granted[i].fires:
            taken = min(wanted[i], remaining)
            remaining -= taken
            granted[i] = replace(granted[i], granted=taken)
    return granted


def mean(values: Sequence[float]) -> float:
    """The mean; 0.0 for an empty sequence."""
    return math.fsum(values) / len(values) if values else 0.0


def rise(entropy: float, root: float, vocab_size: int) -> float:
    """ΔH of two means or sums of entropies in nats; in [−1, 1] for means."""
    return (entropy - root) / math.log(vocab_size)


def clipped(probability: float) -> float:
    """The value clipped to [0, 1]."""
    return min(max(probability, 0.0), 1.0)
