"""Every token gets its leaf's advantage. On shared tokens, equal ratios average the advantages. The paper's default.

Bias: none up to scale if multiplicity does not depend on the path.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from arpo_trl.rollout.credit import register_credit
from arpo_trl.rollout.credit.base import Credit
from arpo_trl.rollout.tree import RolloutTree


@register_credit("soft")
class Soft(Credit):
    """Each token gets its leaf's advantage."""

    def __call__(
        self, trees: Sequence[RolloutTree], rewards: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return advantages, None
