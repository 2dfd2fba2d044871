"""A turn is compared with the other turns under the same observation (BPO, arXiv 2607.14171).

A turn under an observation that branches, and the turns after it up to the next such observation, get the mean
advantage of their leaves minus the mean of the other branches' means (leave-one-out). Turns at the root keep the mean
advantage of their leaves, which the group's baseline has already centred. The advantage of a turn with d forks after
it on its path is multiplied by `decay`**d.

Bias: none up to scale with decay 1 if multiplicity does not depend on the path, since the compared branches do not
depend on the turn. A decay below 1 (BPO: .95) makes the gradient of early turns smaller by that factor.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from arpo_trl.common.settings import setting
from arpo_trl.rollout.credit import register_credit
from arpo_trl.rollout.credit.base import Credit, Segments, by_segment, cut_into_segments, shares_nodes
from arpo_trl.rollout.tree import RolloutTree


@register_credit("siblings")
@dataclass(kw_only=True)
class Siblings(Credit):
    decay: float = setting(1.0, "Factor per later fork.", above=0, at_most=1)

    def __call__(
        self, trees: Sequence[RolloutTree], rewards: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not shares_nodes(trees):
            return advantages, None
        of_leaf = advantages.tolist()

        def value(segments: Segments, segment: int, row: int) -> float:
            def mean_of(members: Sequence[int]) -> float:
                return fmean([fmean([of_leaf[row] for row in segments.rows[member]]) for member in members])

            others = [other for other in segments.siblings(segment) if segments.rows[other]]
            path = segments.paths[row - segments.first_row]
            later = len(path) - 1 - path.index(segment)
            return self.decay**later * (mean_of([segment]) - (mean_of(others) if others else 0.0))

        return by_segment(cut_into_segments(trees, self.compared(rewards)), advantages, value), None
