"""The public code's rule: a coin with P from the turn *before* the tool result, entropies summed over k tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from arpo_trl.rollout.rules import register_rule
from arpo_trl.rollout.rules.base import BranchContext, BranchRule, Candidate, Moment, clipped, rise
from arpo_trl.rollout.tree import BranchDecision


@register_rule("released")
@dataclass(frozen=True)
class Released(BranchRule):
    """Fires with probability clip(α + β·ΔH′, 0, 1): α `branch_probability`, β `entropy_weight`."""

    moment: ClassVar[Moment] = Moment.RESULT

    branch_probability: float = 0.5
    entropy_weight: float = 0.2

    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        entropy = math.fsum(candidate.before)
        delta = rise(entropy, math.fsum(candidate.root), context.vocab_size)
        probability = clipped(self.branch_probability + self.entropy_weight * delta)
        return BranchDecision(entropy, delta, probability, context.coin(candidate) < probability)
