"""A leaf's advantage in its prompt's group, plus its z-score within its own tree (Tree-GRPO, arXiv 2509.21240).

Tree-GRPO samples several trees per prompt. Here a prompt has one tree, and the subtree of each turn at the root takes
the role of one of those trees. A subtree with one leaf, or with equal rewards, adds nothing.

Bias: z divides by the standard deviation of a subtree and includes the leaf itself. Paths from subtrees with little
variance get more than their share of the gradient.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from arpo_trl.rollout.credit import register_credit
from arpo_trl.rollout.credit.base import Credit, Segments, by_segment, cut_into_segments, shares_nodes, z_scores
from arpo_trl.rollout.tree import RolloutTree


@register_credit("tree_grpo")
class TreeGRPO(Credit):
    """Adds the z-score of the leaf's reward within the subtree of the path's first turn."""

    def __call__(
        self, trees: Sequence[RolloutTree], rewards: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not shares_nodes(trees):
            return advantages, None
        of_leaf, reward_of = advantages.tolist(), rewards.tolist()

        def value(segments: Segments, segment: int, row: int) -> float:
            root, *_ = segments.paths[row - segments.first_row]
            rows = segments.rows[root]
            return of_leaf[row] + z_scores([reward_of[row] for row in rows])[rows.index(row)]

        return by_segment(cut_into_segments(trees), advantages, value), None
