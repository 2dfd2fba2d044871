"""Enlarges advantages after forks whose branches end differently (CBPO, arXiv 2608.24300).

The value of a branch point (CBV) is the standard deviation of the rewards of the leaves below the observation. With z
computed over the branch points of the batch on all ranks, the advantage of a token between one branch point and the
next is

    A + weight · sign(A) · clip(z(CBV), −|A| / 2, |A| / 2)

Tokens before the first branch point keep A. CBPO trains copied prefixes once, as with `shared_prefix_weight: once`.

Bias: the factor depends on the rewards of the leaf and its siblings. The factor is up to 1 + weight / 2 for turns
after forks with varied outcomes, and down to 1 − weight / 2 for turns after forks with similar outcomes.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from arpo_trl.common.settings import setting
from arpo_trl.rollout.credit import register_credit
from arpo_trl.rollout.credit.base import Credit, Segments, are_close, by_segment, cut_into_segments, z_scores
from arpo_trl.rollout.tree import RolloutTree


@register_credit("cbpo")
@dataclass(kw_only=True)
class CBPO(Credit):
    weight: float = setting(0.2, "Weight of the branch point's value.", at_least=0)

    def __call__(
        self, trees: Sequence[RolloutTree], rewards: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        of_leaf, reward_of = advantages.tolist(), rewards.tolist()
        cut = cut_into_segments(trees)
        spreads: dict[tuple[int, int], float] = {}  # (first row of the tree, branch point) → CBV
        for segments in cut:
            for fork, rows in segments.forks().items():
                if known := [reward_of[row] for row in rows if not math.isnan(reward_of[row])]:
                    spreads[segments.first_row, fork] = 0.0 if are_close(known) else statistics.pstdev(known)
        values = list(spreads.values())
        scores = dict(zip(spreads, z_scores(values, self.gathered(values)), strict=True))  # on every rank

        def value(segments: Segments, segment: int, row: int) -> float:
            limit = abs(of_leaf[row]) / 2
            score = scores.get((segments.first_row, segments.fork(segment)), 0.0)
            return of_leaf[row] + self.weight * math.copysign(1, of_leaf[row]) * min(max(score, -limit), limit)

        return by_segment(cut, advantages, value) if spreads else advantages, None
