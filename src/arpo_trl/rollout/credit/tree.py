"""A turn's advantage is its node's value, or that value minus the value of the node above (AT²PO, arXiv 2601.04767).

A leaf's value is its advantage. A node's value is an average: over its leaves, or over its children with equal
weights, with weights H or softmax(H). H is the child's entropy, measured as the mean −log p of its sampled tokens.

Bias: none up to scale with "leaves" and without `difference`, if multiplicity does not depend on the path. Weights of
entropy shift credit to surprising children, "children" to children with few leaves. `difference` compares a turn with
an average that includes it, which multiplies its gradient by 1 minus its share: 1 − 1/k among k equal children.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

import torch

from arpo_trl.common.settings import setting
from arpo_trl.rollout.credit import register_credit
from arpo_trl.rollout.credit.base import Credit, Segments, by_segment, cut_into_segments, shares_nodes
from arpo_trl.rollout.tree import RolloutTree


@register_credit("tree")
@dataclass(kw_only=True)
class Tree(Credit):
    average: str = setting("leaves", "How values are averaged.", choices=("leaves", "children", "entropy", "softmax"))
    difference: bool = setting(False, "Whether the value of the node above is subtracted.")

    def __post_init__(self) -> None:
        self.reads_logprobs = self.average in ("entropy", "softmax")

    def __call__(
        self, trees: Sequence[RolloutTree], rewards: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not shares_nodes(trees):
            return advantages, None
        of_leaf = advantages.tolist()

        def value(segments: Segments, segment: int, row: int) -> float:
            above = segments.above(segment) if self.difference else None
            base = 0.0 if above is None else self._value(segments, above, of_leaf)
            return self._value(segments, segment, of_leaf) - base

        return by_segment(cut_into_segments(trees, self.compared(rewards)), advantages, value), None

    def _value(self, segments: Segments, segment: int, of_leaf: Sequence[float]) -> float:
        children = [child for child in segments.below(segment) if segments.rows[child]]
        if self.average == "leaves" or not children:
            return fmean([of_leaf[row] for row in segments.rows[segment]])
        weigh = {"children": lambda h: 1.0, "entropy": lambda h: h, "softmax": math.exp}[self.average]
        known = [segments.tree.nodes[child].known_logprobs for child in children]
        weights = [weigh(-fmean(logprobs) if logprobs else 0.0) for logprobs in known]
        if not math.fsum(weights) > 0:  # all entropies are 0, or there are no logprobs
            weights = [1.0] * len(children)
        values = [self._value(segments, child, of_leaf) for child in children]
        return math.fsum(w * v for w, v in zip(weights, values, strict=True)) / math.fsum(weights)
