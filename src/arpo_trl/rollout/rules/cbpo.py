"""CBPO's balanced probability (arXiv 2608.24300): branch at an increase of entropy, less after earlier branches.

Reads the entropies of the first k tokens under an observation and of the path's first turn, and the branches above.

Bias: multiplicity, look-ahead.
"""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import ClassVar

from arpo_trl.common.settings import setting
from arpo_trl.rollout.rules import register_rule
from arpo_trl.rollout.rules.base import BranchContext, BranchRule, Candidate, clipped, unreachable
from arpo_trl.rollout.tree import BranchDecision


@register_rule("cbpo")
@dataclass(frozen=True, kw_only=True)
class CBPO(BranchRule):
    """Branches while P = clip(`base` + `slope`·ΔH, 0, 1) / ((1 + L)^`power` · (1 + l)^`power`) > `least`. l is the
    current number of branches of the observation, and L that of its path, the observation included.

        CBPO(base=0.2, slope=2.0, power=0.2, least=0.25, per_node=3, per_path=4)
    """

    sets_branches: ClassVar[bool] = True
    base: float = setting(0.2, "P at ΔH = 0, without branches.", at_least=0, at_most=1)
    slope: float = setting(2.0, "Weight of ΔH.")
    power: float = setting(0.2, "Exponent of the penalty for earlier branches.", at_least=0)
    least: float = setting(0.25, "An observation branches if P exceeds this.", at_least=0, at_most=1)
    per_node: int = setting(3, "Maximum number of branches of an observation.", at_least=1)
    per_path: int = setting(4, "Maximum number of branches along a path.", at_least=1)

    def first_paths(self, leaves: int) -> int:
        return max(1, leaves * 6 // 16)  # the paper's 6 of 16

    def why_never(self) -> str | None:
        largest = clipped(self.base + abs(self.slope))
        return unreachable(largest, self.least, "In branch_rule_kwargs, lower least, or raise base or slope")

    def most_branches(self, above: int = 0) -> int:
        return self._wanted(1.0 if self.slope > 0 else -1.0, above)

    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        (entropy, delta), above = context.measured(candidate), context.branches_above(candidate)
        wanted, probability = self._wanted(delta, above), self.probability(delta, above, 0)
        decision = BranchDecision(entropy_nats=entropy, delta=delta, probability=probability)
        return replace(decision, fires=wanted > 0, granted=wanted, reason=f"{above} branches above")

    def _wanted(self, delta: float, above: int) -> int:
        """The number of branches at an observation below `above` branches. P decreases with each."""
        most = range(min(self.per_node, self.per_path - above))
        return bisect_left(most, True, key=lambda j: self.probability(delta, above + j, j) <= self.least)

    def probability(self, delta: float, path: int, node: int) -> float:
        """P with L = `path` and l = `node`."""
        return clipped(self.base + self.slope * delta) * ((1 + path) * (1 + node)) ** -self.power
