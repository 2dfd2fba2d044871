"""CBPO's balanced probability (arXiv 2608.24300): branch at an increase of entropy, less on paths that branched
before.

Reads the entropies of the first k tokens under an observation and of the path's first turn, and the branches above,
after those k tokens. The paper also branches inside turns, every 64 tokens. Here branches start only at observations.
The paper's entropies cover the ten most likely tokens. Here they cover all tokens.

Bias: multiplicity, look-ahead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar

from arpo_trl.common.settings import described
from arpo_trl.rollout.rules import register_rule
from arpo_trl.rollout.rules.base import BranchContext, BranchRule, Candidate, clipped, unreachable
from arpo_trl.rollout.tree import BranchDecision


@register_rule("cbpo")
@dataclass(frozen=True, kw_only=True)
class CBPO(BranchRule):
    """Fires if P = clip(`base` + `slope`·ΔH, 0, 1) / ((1 + L)^`power` · (1 + l)^`power`) > `least`.

    l is the number of branches of the observation, and L the number of branches of the path, the observation included.
    Each further branch requires P > `least` again. An observation has at most `per_node` branches, and a path at most
    `per_path`.

        CBPO(base=0.2, slope=2.0, power=0.2, least=0.25, per_node=3, per_path=4)
    """

    sets_branches: ClassVar[bool] = True

    base: float = field(default=0.2, metadata=described("P at ΔH = 0, without branches.", at_least=0, at_most=1))
    slope: float = field(default=2.0, metadata=described("Weight of ΔH."))
    power: float = field(default=0.2, metadata=described("Exponent of the penalty for earlier branches.", at_least=0))
    least: float = field(
        default=0.25, metadata=described("An observation branches if P exceeds this.", at_least=0, at_most=1)
    )
    per_node: int = field(default=3, metadata=described("Maximum number of branches of an observation.", at_least=1))
    per_path: int = field(default=4, metadata=described("Maximum number of branches along a path.", at_least=1))

    @property
    def most_branches(self) -> int:
        return self.per_node

    def first_paths(self, leaves: int) -> int:
        return max(1, leaves * 6 // 16)  # the paper's 6 of 16

    def why_never(self) -> str | None:
        return unreachable(
            clipped(self.base + abs(self.slope)),
            self.least,
            "In branch_rule_kwargs, lower least, or raise base or slope",
        )

    def most_leaves(self, leaves: int, first_paths: int, results: int) -> int:
        highest = math.copysign(1.0, self.slope)  # ΔH

        @cache
        def grown(above: int, left: int) -> int:
            """The most leaves of a path with `above` branches and `left` results to come."""
            most = self._wanted(highest, above) if left else 0
            return max([(1 + count) * grown(above + count, left - 1) for count in range(1, most + 1)], default=1)

        return min(leaves, first_paths * grown(0, min(results, self.per_path)))

    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        entropy, delta = context.measured(candidate)
        above = branches_above(candidate, context)
        probability = self.probability(delta, above, 0)
        fires = probability > self.least and above < self.per_path
        reason = f"{above} branches above"
        return BranchDecision(entropy_nats=entropy, delta=delta, probability=probability, fires=fires, reason=reason)

    def wants(self, candidate: Candidate, decision: BranchDecision, context: BranchContext) -> int:
        return self._wanted(decision.delta or 0.0, branches_above(candidate, context))

    def _wanted(self, delta: float, above: int) -> int:
        """The number of branches at an observation below `above` branches."""
        most = range(min(self.per_node, self.per_path - above))
        return sum(self.probability(delta, above + j, j) > self.least for j in most)  # P decreases with j

    def probability(self, delta: float, path: int, node: int) -> float:
        """P with L = `path` and l = `node`."""
        return clipped(self.base + self.slope * delta) / ((1 + path) * (1 + node)) ** self.power


def branches_above(candidate: Candidate, context: BranchContext) -> int:
    """The branches of the observations above on the path."""
    return sum(decision.granted for decision in context.decisions_above(candidate))
