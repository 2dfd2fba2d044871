"""Balanced widths: at its m-th result every path gets the same number of children, whatever it has written.

Reads the depth only, when an observation is complete, so without look-ahead. Each path has a share of the M leaves,
which it splits evenly among its children. Where a path ends before it has split its share, or has too few results
left for it, as many paths start at the root at once, and these do not branch. So a tree has exactly M leaves.

Bias: none up to scale where all paths have as many results as there are widths; otherwise multiplicity.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar

from arpo_trl.common.settings import described
from arpo_trl.errors import ConfigError
from arpo_trl.rollout.estimates import DepthEstimates, depth_sums
from arpo_trl.rollout.rules import register_rule
from arpo_trl.rollout.rules.base import BranchContext, BranchRule, Candidate, LivePath, Moment, clipped
from arpo_trl.rollout.tree import Address, BranchDecision, NodeKind, RolloutTree


@dataclass(slots=True)
class _Plan:
    """One group's schedule."""

    factors: Sequence[int]
    """The number of roots, then of children at each depth; 1 after the last."""
    shares: dict[Address, int]
    """The leaves that each path has still to become, itself included. Paths that are not in it do not branch."""


@register_rule("schedule")
@dataclass(frozen=True, kw_only=True)
class Schedule(BranchRule):
    """`widths` roots and children by depth or, without them, widths from running estimates for a budget of calls.

    From estimates (`arpo_trl.rollout.estimates`), widths are rounded at random, once per prompt and depth. The last
    depth splits what is left. Before the first estimates there are N roots, and the first results split everything.

        Schedule(widths=(1, 3, 2))  # 1 root, 3 children at its first result, 2 at each of their first: M = 6
    """

    moment: ClassVar[Moment] = Moment.RESULT
    sets_branches: ClassVar[bool] = True
    learns: ClassVar[bool] = True

    widths: Sequence[int] = ()
    calls_share: float | None = field(
        default=None,
        metadata=described(
            "Budget of calls, as a share of those of M independent paths. None: 0.5, or what `widths` give.",
            above=0,
            at_most=1,
        ),
    )
    exploration: float = field(
        default=0.03,
        metadata=described("Probability of one child more, per prompt and depth.", at_least=0, at_most=1),
    )
    memory: float = field(
        default=0.8, metadata=described("Weight of earlier steps in the estimates.", at_least=0, at_most=1)
    )
    estimates: DepthEstimates = field(default_factory=DepthEstimates, init=False, repr=False, compare=False)
    planned: list[float] = field(default_factory=list, init=False, repr=False, compare=False)
    """The share of calls to plan for, so that `calls_share` is spent although paths that end early lead to more calls.
    At most one number; empty before the first step."""

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = isinstance(self.widths, list | tuple) and all(type(k) is int and k >= 1 for k in self.widths)
        if not valid:
            raise ConfigError(f"widths is {self.widths!r}; expected integers of at least 1, such as [1, 3, 2].")
        if self.widths and self.calls_share is not None:
            raise ConfigError("widths and calls_share are both set, but widths decide the calls. Remove one of them.")
        object.__setattr__(self, "widths", tuple(self.widths))

    def first_paths(self, leaves: int) -> int:
        return self.widths[0] if self.widths else super().first_paths(leaves)

    def check(self, leaves: int, first_paths: int, results: int | None) -> None:
        super().check(leaves, first_paths, results)
        if not self.widths:
            return
        if (product := math.prod(self.widths)) != leaves:
            raise ConfigError(
                f"widths is {list(self.widths)}, whose product is {product}, but num_generations (M) is {leaves}. Set "
                f"num_generations: {product}, or widths whose product is {leaves}."
            )
        if self.widths[0] != first_paths:
            raise ConfigError(
                f"widths starts with {self.widths[0]} but initial_rollouts (N) is {first_paths}. Remove "
                "initial_rollouts."
            )
        if results is not None and len(self.widths) - 1 > results:
            raise ConfigError(
                f"widths has children at {len(self.widths) - 1} results, but max_tool_calling_iterations allows "
                f"{results} per path. Shorten widths or raise max_tool_calling_iterations."
            )

    def roots(self, planned: int, context: BranchContext) -> int:
        leaves = planned + context.remaining
        factors = list(self.widths) or self._drawn(leaves, planned, context)
        count = min(factors[0], leaves)
        context.state = _Plan(factors, {(i,): part for i, part in enumerate(_split(leaves, count))})
        return count

    def _drawn(self, leaves: int, planned: int, context: BranchContext) -> list[int]:
        """Whole numbers of roots and children for one prompt."""
        widths = self._estimated(leaves) or [float(planned), float(leaves)]
        factors, explores = [], False
        for depth, (above, width) in enumerate(zip([1.0, *widths], widths, strict=False)):
            draws = context.generator(-1, depth)
            factors.append(max(1, math.floor(width / above + draws.random())))
            extra = draws.random() < self.exploration
            factors[-1] += extra
            explores |= extra and depth > 0
        if explores:
            factors[0] = min(factors[0], leaves - 1)  # leaves one to branch
        return factors if len(widths) == 1 else [*factors[:-1], leaves]

    def _estimated(self, leaves: int) -> list[float] | None:
        return self.estimates.widths(leaves, self.planned[0] if self.planned else self._share)

    @property
    def _share(self) -> float:
        return 0.5 if self.calls_share is None else self.calls_share

    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        plan: _Plan = context.state
        children = plan.factors[candidate.depth] if candidate.depth < len(plan.factors) else 1
        children = min(children, plan.shares.get(candidate.address, 1))
        return BranchDecision(fires=children > 1, granted=children - 1)

    def decide(self, candidates: Sequence[Candidate], context: BranchContext) -> list[BranchDecision]:
        decisions = [self.judge(candidate, context) for candidate in candidates]
        shares: dict[Address, int] = context.state.shares
        for candidate, decision in zip(candidates, decisions, strict=True):
            own, *others = _split(shares.get(candidate.address, 1), decision.granted + 1)
            shares[candidate.address] = own
            shares |= {(*candidate.address, candidate.depth, j): part for j, part in enumerate(others)}
        return decisions

    def supply(self, live: Iterable[LivePath], context: BranchContext) -> int:
        plan: _Plan = context.state
        total = 0
        for path in live:
            depth = sum(node.kind is NodeKind.OBSERVATION for node in context.tree.path(path.node))
            most = math.prod(plan.factors[depth + 1 : depth + 1 + path.results])
            total += min(plan.shares.get(path.address, 1), most) - 1
        return total

    def lesson(self, trees: Sequence[RolloutTree], rewards: Sequence[float]) -> Any:
        return depth_sums(trees, rewards)

    def learn(self, lessons: Sequence[Any]) -> None:
        self.estimates.update(lessons, self.memory)
        before, spent = (*self.planned, self._share)[0], self.estimates.spent
        if spent is not None:
            self.planned[:] = [clipped(before + (1 - self.memory) * (self._share - spent))]

    def metrics(self) -> Mapping[str, float]:
        now = self.estimates
        widths = list(accumulate(self.widths, operator.mul)) or self._estimated(now.leaves) or []
        by_depth = {"score_norm": now.score, "calls": now.calls, "width": widths}
        values = {f"{name}_depth_{m}": value for name, column in by_depth.items() for m, value in enumerate(column)}
        values |= {f"variance_depth_{m}": value for m, value in now.variance.items()}
        others = {
            "gain": now.gain(),
            "gain_of_widths": now.gain_of(widths) if widths else None,
            "calls_share": now.spent,
        }
        values |= {name: value for name, value in others.items() if value is not None}
        return {f"schedule/{name}": value for name, value in values.items()}

    def state_dict(self) -> Any:
        return self.estimates.state_dict() | {"planned": list(self.planned)}

    def load_state_dict(self, state: Any) -> None:
        self.estimates.load_state_dict(state)
        self.planned[:] = state["planned"]


def _split(leaves: int, parts: int) -> list[int]:
    """`leaves` in `parts` numbers that differ by at most 1, the larger ones first."""
    even, rest = divmod(leaves, parts)
    return [even + (i < rest) for i in range(parts)]
