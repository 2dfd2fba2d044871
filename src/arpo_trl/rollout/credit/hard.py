"""A token that d leaves share gets the mean of their d advantages in each leaf.

Example: two leaves with advantages (1.0, −0.5) that share two nodes of two tokens each:

    # hard:  0.25 0.25 0.25 0.25 1.0 1.0 / 0.25 0.25 0.25 0.25 −0.5

Bias: none up to scale if multiplicity does not depend on the path.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from arpo_trl.rollout.credit import register_credit
from arpo_trl.rollout.credit.base import Credit, mean_over_leaves, shares_nodes, token_nodes
from arpo_trl.rollout.tree import RolloutTree


@register_credit("hard")
class Hard(Credit):
    """Each token gets the mean advantage of the leaves that share it."""

    def __call__(
        self, trees: Sequence[RolloutTree], rewards: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not shares_nodes(trees):
            return advantages, None
        return mean_over_leaves(advantages, token_nodes(trees).to(advantages.device), self.trained), None
