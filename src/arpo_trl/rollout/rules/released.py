"""The released code's rule: branch with probability P from the turn *before* the tool result, entropies summed.

Reads the entropies of the first k tokens of that turn and of the path's first turn, when the observation is complete.

Bias: multiplicity.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from arpo_trl.rollout.rules import register_rule
from arpo_trl.rollout.rules.base import BranchContext, BranchRule, Candidate, Moment, clipped, rise, unreachable
from arpo_trl.rollout.tree import BranchDecision


@register_rule("released")
@dataclass(frozen=True, kw_only=True)
class Released(BranchRule):
    """Fires with probability clip(α + β·ΔH′, 0, 1), with α `branch_probability` and β `entropy_weight`.

    ΔH′ compares the entropy sums, over at most k tokens, of the turn before the result and of the path's first turn.

        Released(branches_per_fork=1, branch_probability=0.5, entropy_weight=0.2)
    """

    moment: ClassVar[Moment] = Moment.RESULT

    branch_probability: float = 0.5
    entropy_weight: float = 0.2

    def why_never(self) -> str | None:
        return unreachable(
            self.branch_probability + abs(self.entropy_weight), 0.0, "Raise branch_probability or entropy_weight"
        )

    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        entropy = math.fsum(candidate.before)
        delta = rise(entropy, math.fsum(candidate.root), context.vocab_size)
        probability = clipped(self.branch_probability + self.entropy_weight * delta)
        return context.drawn(candidate, BranchDecision(entropy_nats=entropy, delta=delta, probability=probability))
