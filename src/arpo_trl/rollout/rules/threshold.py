"""P > τ, the paper's rule. With α = τ it says ΔH > 0."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from arpo_trl.rollout.rules import register_rule
from arpo_trl.rollout.rules.base import BranchContext, BranchRule, Candidate, mean, rise
from arpo_trl.rollout.tree import BranchDecision


@register_rule("threshold")
@dataclass(frozen=True)
class Threshold(BranchRule):
    """Fires if P = α + β·ΔH is above τ: α `branch_probability`, β `entropy_weight`, τ `branch_threshold`."""

    entropy_triggers: ClassVar[bool] = True

    branch_probability: float = 0.5
    entropy_weight: float = 0.2
    branch_threshold: float = 0.5

    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        entropy = mean(candidate.turn)
        delta = rise(entropy, mean(candidate.root), context.vocab_size)
        probability = self.branch_probability + self.entropy_weight * delta
        return BranchDecision(entropy, delta, probability, probability > self.branch_threshold)
