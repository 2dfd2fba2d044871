"""A random decision: branch with probability P.

Reads the entropies of the first k tokens under an observation and of the path's first turn, after those k tokens.

Bias: multiplicity, look-ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from arpo_trl.common.alarm import Alarm
from arpo_trl.rollout.rules import register_rule
from arpo_trl.rollout.rules.base import BranchContext, BranchRule, Candidate, clipped, fire_rate_alarms, unreachable
from arpo_trl.rollout.tree import BranchDecision


@register_rule("probability")
@dataclass(frozen=True, kw_only=True)
class Probability(BranchRule):
    """Fires with probability clip(α + β·ΔH, 0, 1), with α `branch_probability` and β `entropy_weight`.

    Probability(branches_per_fork=1, branch_probability=0.5, entropy_weight=0.2)
    """

    alarms: ClassVar[Sequence[Alarm]] = fire_rate_alarms(
        too_often="Lower branch_probability", too_rarely="Raise branch_probability"
    )

    branch_probability: float = 0.5
    entropy_weight: float = 0.2

    def why_never(self) -> str | None:
        return unreachable(
            self.branch_probability + abs(self.entropy_weight), 0.0, "Raise branch_probability or entropy_weight"
        )

    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        entropy, delta = context.measured(candidate)
        probability = clipped(self.branch_probability + self.entropy_weight * delta)
        return context.drawn(candidate, BranchDecision(entropy_nats=entropy, delta=delta, probability=probability))
