"""Enlarges the advantages of uncertain tokens: A · (1 + weight · z(H)) (AEPO, arXiv 2510.14545).

H is the policy's entropy at the token, which TRL computes in the update. z is over the trained tokens of this rank's
micro-batch, detached. AEPO takes it over the batch: the same where a step has one micro-batch and one rank.

Bias: the factor has mean 1 but follows the entropy, so decisions of high entropy weigh more than their share.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from arpo_trl.common.settings import described
from arpo_trl.rollout.credit import register_credit
from arpo_trl.rollout.credit.base import Credit
from arpo_trl.rollout.tree import RolloutTree


@register_credit("aepo")
@dataclass
class AEPO(Credit):
    weight: float = field(default=0.2, metadata=described("Weight of the entropy's z-score.", at_least=0))
    reads_entropies: bool = field(default=True, init=False)

    def __call__(
        self, trees: Sequence[RolloutTree], rewards: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return advantages, None

    def refine(self, advantages: torch.Tensor, entropies: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        trained = entropies[mask != 0]
        if trained.numel() < 2:
            return advantages
        z = (entropies - trained.mean()) / (trained.std() + torch.finfo(entropies.dtype).eps)
        per_token = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages
        return per_token * (1 + self.weight * z * (mask != 0))
