"""Enlarges the advantages of uncertain tokens: A · (1 + weight · z(H)) (AEPO, arXiv 2510.14545).

H is the entropy of the sampling policy at the token. z is computed over the batch's trained tokens on all ranks.

Bias: the factor has mean 1 but increases with the entropy, so decisions with high entropy get more than their share of
the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from arpo_trl.common.settings import setting
from arpo_trl.rollout.credit import register_credit
from arpo_trl.rollout.credit.base import Credit
from arpo_trl.rollout.tree import RolloutTree


@register_credit("aepo")
@dataclass(kw_only=True)
class AEPO(Credit):
    weight: float = setting(0.2, "Weight of the entropy's z-score.", at_least=0)
    reads_entropies: bool = field(default=True, init=False)

    def __call__(
        self, trees: Sequence[RolloutTree], rewards: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if self.entropy_scores is None:  # in evaluation
            return advantages, None
        return advantages.unsqueeze(1) * (1 + self.weight * self.entropy_scores), None
