"""Wait until the first N paths have ended, then branch where H_turn is highest in the tree.

Reads the entropies of the first k tokens under each observation.

Bias: multiplicity, look-ahead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from arpo_trl.rollout.rules import register_rule
from arpo_trl.rollout.rules.base import BranchContext, BranchRule, Candidate, Moment, clipped, grant, mean
from arpo_trl.rollout.tree import BranchDecision


@register_rule("ranked")
@dataclass(frozen=True, kw_only=True)
class Ranked(BranchRule):
    """Fires on the highest `entropy_nats` first, until the budget is spent. ΔH and P are only recorded.

    Ranked(branches_per_fork=1, branch_probability=0.5, entropy_weight=0.2)
    """

    moment: ClassVar[Moment] = Moment.PATHS_DONE

    branch_probability: float = 0.5
    entropy_weight: float = 0.2

    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        entropy, delta = context.measured(candidate)
        probability = clipped(self.branch_probability + self.entropy_weight * delta)
        return BranchDecision(entropy_nats=entropy, delta=delta, probability=probability, fires=True)

    def decide(self, candidates: Sequence[Candidate], context: BranchContext) -> list[BranchDecision]:
        judged = [self.judge(candidate, context) for candidate in candidates]
        entropies = [mean(candidate.turn) for candidate in candidates]
        granted = grant(judged, [self.branches_per_fork] * len(judged), entropies, context.remaining)
        return [replace(decision, fires=decision.granted > 0) for decision in granted]
