"""The paper's rule: branch if P > τ. With α = τ this is ΔH > 0.

Reads the entropies of the first k tokens under an observation and of the path's first turn, after those k tokens.

Bias: multiplicity, look-ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from arpo_trl.common.alarm import Alarm
from arpo_trl.rollout.rules import register_rule
from arpo_trl.rollout.rules.base import THRESHOLD_ALARMS, BranchContext, BranchRule, Candidate, unreachable
from arpo_trl.rollout.tree import BranchDecision


@register_rule("threshold")
@dataclass(frozen=True, kw_only=True)
class Threshold(BranchRule):
    """Fires if P = α + β·ΔH > τ, with α `branch_probability`, β `entropy_weight` and τ `branch_threshold`.

    Threshold(branches_per_fork=1, branch_probability=0.5, entropy_weight=0.2, branch_threshold=0.5)
    """

    alarms: ClassVar[Sequence[Alarm]] = THRESHOLD_ALARMS

    branch_probability: float = 0.5
    entropy_weight: float = 0.2
    branch_threshold: float = 0.5

    def why_never(self) -> str | None:
        return unreachable(
            self.branch_probability + abs(self.entropy_weight),
            self.branch_threshold,
            "Lower branch_threshold, or raise branch_probability or entropy_weight",
        )

    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        entropy, delta = context.measured(candidate)
        probability = self.branch_probability + self.entropy_weight * delta
        return BranchDecision(
            entropy_nats=entropy, delta=delta, probability=probability, fires=probability > self.branch_threshold
        )
