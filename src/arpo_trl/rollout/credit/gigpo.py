"""A leaf's advantage, plus ω times the z-score of its return among the leaves below the same observation (GiGPO).

Equation: A + ω · z(γ^n · R), arXiv 2505.10978. The group of z consists of the leaves below one observation that
branches, the "anchor state". n is the number of turns from there to the leaf's end. Turns at the root have only A,
which already compares them.

Bias: z divides by the standard deviation of its group and includes the leaf itself, so forks with little variance get
more than their share of the gradient. The first turns lack the second term.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from arpo_trl.common.settings import setting
from arpo_trl.rollout.credit import register_credit
from arpo_trl.rollout.credit.base import Credit, Segments, by_segment, cut_into_segments, shares_nodes, z_scores
from arpo_trl.rollout.tree import NodeKind, RolloutTree


@register_credit("gigpo")
@dataclass(kw_only=True)
class GiGPO(Credit):
    omega: float = setting(1.0, "ω: weight of the comparison at forks.", at_least=0)
    gamma: float = setting(0.95, "γ: discount per turn.", above=0, at_most=1)

    def __call__(
        self, trees: Sequence[RolloutTree], rewards: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not shares_nodes(trees):
            return advantages, None
        of_leaf, reward_of = advantages.tolist(), rewards.tolist()

        def value(segments: Segments, segment: int, row: int) -> float:
            others = segments.siblings(segment)
            if not others:
                return of_leaf[row]
            rows = sorted(row for member in (segment, *others) for row in segments.rows[member])
            returns = [reward_of[row] * self.gamma ** _turns_after(segments, segment, row) for row in rows]
            return of_leaf[row] + self.omega * z_scores(returns)[rows.index(row)]

        return by_segment(cut_into_segments(trees), advantages, value), None


def _turns_after(segments: Segments, segment: int, row: int) -> int:
    """The number of turns of the row's path after the first turn under the observation above `segment`."""
    depth = len(segments.tree.path(segment))
    leaf = segments.tree.leaves()[row - segments.first_row]
    return sum(node.kind is NodeKind.TURN for node in leaf.nodes[depth:])
