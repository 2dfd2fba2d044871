"""The control: branch with probability α, independent of entropy.

Decides after the first k tokens under an observation, as `threshold` does. Their entropies matter only if the budget
does not suffice for all decisions that arrive together.

Bias: multiplicity.
"""

from __future__ import annotations

from dataclasses import dataclass

from arpo_trl.rollout.rules import register_rule
from arpo_trl.rollout.rules.base import BranchContext, BranchRule, Candidate, clipped, unreachable
from arpo_trl.rollout.tree import BranchDecision


@register_rule("random")
@dataclass(frozen=True, kw_only=True)
class Random(BranchRule):
    """Fires with probability α, `branch_probability`. ΔH is recorded and sets the priority for the budget.

    Random(branches_per_fork=1, branch_probability=0.5)
    """

    branch_probability: float = 0.5

    def why_never(self) -> str | None:
        return unreachable(self.branch_probability, 0.0, "Raise branch_probability")

    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        entropy, delta = context.measured(candidate)
        probability = clipped(self.branch_probability)
        return context.drawn(candidate, BranchDecision(entropy_nats=entropy, delta=delta, probability=probability))
