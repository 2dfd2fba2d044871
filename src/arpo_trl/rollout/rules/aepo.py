"""AEPO's budget split and penalty for consecutive branches, as in the paper (arXiv 2510.14545).

Reads the entropies of the first k tokens of turns, and the decisions above, after the k tokens under an observation.
`BudgetSplit` describes when paths start at the root.

Approximations: H_root and H_tool come from the few first paths and the first k tokens of turns, and are divided by
ln V. Consecutive branches are counted along the path.

Bias: multiplicity, look-ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from arpo_trl.common.alarm import Alarm
from arpo_trl.common.settings import setting
from arpo_trl.rollout.rules import register_rule
from arpo_trl.rollout.rules.base import THRESHOLD_ALARMS, BranchContext, BudgetSplit, Candidate, unreachable
from arpo_trl.rollout.tree import BranchDecision


@register_rule("aepo")
@dataclass(frozen=True, kw_only=True)
class AEPO(BudgetSplit):
    """Fires if (α + γ·ΔH)·s > τ, with s = max(0, 1 − `penalty`·l) after l consecutive branchings above, α
    `branch_probability`, γ `entropy_weight` and τ `branch_threshold`. m is rounded.

        AEPO(split_weight=0.5, penalty=0.05)
    """

    alarms: ClassVar[Sequence[Alarm]] = THRESHOLD_ALARMS

    branch_probability: float = 0.5
    entropy_weight: float = 0.2
    branch_threshold: float = 0.5
    penalty: float | None = setting(None, "Penalty for a consecutive branching. None: entropy_weight.", at_least=0)

    def why_never(self) -> str | None:
        largest = self.branch_probability + abs(self.entropy_weight)
        advice = "Lower branch_threshold, or raise branch_probability or entropy_weight"
        return unreachable(largest, self.branch_threshold, advice)

    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        (entropy, delta), above = context.measured(candidate), context.consecutive(candidate)
        left = max(0.0, 1 - (self.entropy_weight if self.penalty is None else self.penalty) * above)
        probability = (self.branch_probability + self.entropy_weight * delta) * left
        reason = f"{above} consecutive branches above"
        fires = probability > self.branch_threshold
        return BranchDecision(entropy_nats=entropy, delta=delta, probability=probability, fires=fires, reason=reason)

    def paths_at_root(self, share: float) -> int:
        return round(share)
