"""AEPO's budget split and penalty for consecutive branches, as in its released code.

Reads the entropies of the first k tokens of turns, and the decisions above, after the k tokens under an observation.
`BudgetSplit` describes when paths start at the root.

Approximations: those of `aepo`. The released code counts consecutive rounds of the whole prompt, so its decisions
depend on the order in which paths finish.

Bias: multiplicity, look-ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from arpo_trl.common.alarm import Alarm
from arpo_trl.common.settings import setting
from arpo_trl.rollout.rules import register_rule
from arpo_trl.rollout.rules.base import THRESHOLD_ALARMS, BranchContext, BudgetSplit, Candidate, clipped, unreachable
from arpo_trl.rollout.tree import BranchDecision


@register_rule("aepo_released")
@dataclass(frozen=True, kw_only=True)
class ReleasedAEPO(BudgetSplit):
    """Fires if (u + γ·ΔH)·s ≥ τ, with u uniform in [0, 1), s = max(0, 1 − `penalty`·l) after l consecutive branchings
    above, γ `entropy_weight` and τ `branch_threshold`. m is rounded down, plus 1.

        ReleasedAEPO(split_weight=0.5, penalty=0.05)
    """

    alarms: ClassVar[Sequence[Alarm]] = THRESHOLD_ALARMS

    entropy_weight: float = 0.2
    branch_threshold: float = 0.5
    penalty: float = setting(0.05, "Penalty for a consecutive branching.", at_least=0)

    def why_never(self) -> str | None:
        advice = "Lower branch_threshold, or raise entropy_weight"
        return unreachable(1 + abs(self.entropy_weight), self.branch_threshold, advice)

    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        (entropy, delta), above = context.measured(candidate), context.consecutive(candidate)
        left, coin = max(0.0, 1 - self.penalty * above), context.coin(candidate)
        change = self.entropy_weight * delta
        probability = clipped(1 + change - self.branch_threshold / left) if left else 0.0
        fires = (coin + change) * left >= self.branch_threshold
        reason = f"{above} consecutive branches above, drew {coin:.3f}"
        return BranchDecision(entropy_nats=entropy, delta=delta, probability=probability, fires=fires, reason=reason)

    def paths_at_root(self, share: float) -> int:
        return int(share) + 1
