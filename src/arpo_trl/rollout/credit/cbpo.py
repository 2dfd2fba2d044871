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
from dataclasses import dataclass, field

import torch

from arpo_trl.common.settings import described
from arpo_trl.rollout.credit import register_credit
from arpo_trl.rollout.credit.base import (
    Credit,
    Segments,
    are_close,
    by_segment,
    cut_into_segments,
    shares_nodes,
    z_scores,
)
from arpo_trl.rollout.tree import RolloutTree


@register_credit("cbpo")
@dataclass(kw_only=True)
class CBPO(Credit):
    weight: float = field(default=0.2, metadata=described("Weight of the branch point's value.", at_least=0))

    def __call__(
        self, trees: Sequence[RolloutTree], rewards: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        of_leaf, reward_of = advantages.tolist(), rewards.tolist()
        cut = cut_into_segments(trees) if shares_nodes(trees) else []
        spreads: dict[tuple[int, int], float] = {}  # (first row of the tree, branch point) → CBV
        for segments in cut:
            for segment in segments.rows:
                if others := segments.siblings(segment):
                    below = [reward_of[row] for member in (segment, *others) for row in segments.rows[member]]
                    known = [reward for reward in below if not math.isnan(reward)]
                    spread = statistics.pstdev(known) if known and not are_close(known) else 0.0
                    spreads[_fork(segments, segment)] = spread if known else math.nan
        values = list(spreads.values())
        everyones = self.gathered(values)  # on every rank, also without a branch point
        if not cut:
            return advantages, None
        scores = dict(zip(spreads, z_scores(values, everyones), strict=True))

        def value(segments: Segments, segment: int, row: int) -> float:
            limit = abs(of_leaf[row]) / 2
            bonus = min(max(scores.get(_fork(segments, segment), 0.0), -limit), limit)
            return of_leaf[row] + self.weight * math.copysign(1, of_leaf[row]) * bonus

        return by_segment(cut, advantages, value), None


def _fork(segments: Segments, segment: int) -> tuple[int, int]:
    """The observation that `segment` starts under, unique in the batch; node 0 at the root."""
    return segments.first_row, segments.tree.nodes[segment].parent or 0
