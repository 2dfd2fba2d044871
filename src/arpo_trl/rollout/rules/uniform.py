"""Tree-GRPO's expansion (arXiv 2509.21240): branch anywhere with equal probability, once the first paths are done.

Reads only the places of nodes, when no path is live. Each branch of a round draws its place, with replacement, among
the root and the observations of the tree. The paper grows a separate tree from each first path and keeps only some of
the leaves. Here the first paths share one tree and one root, and all M leaves are kept. A path that starts at the root
counts as a top-up in the metrics.

Bias: multiplicity.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arpo_trl.rollout.rules import register_rule
from arpo_trl.rollout.rules.base import BranchContext, Rounds
from arpo_trl.rollout.tree import Node


@register_rule("uniform")
@dataclass(frozen=True, kw_only=True)
class Uniform(Rounds):
    """Fires at the drawn places. With `rounds` > 1, the branches of earlier rounds add places.

    Uniform(rounds=1)
    """

    def pick(self, places: Sequence[Node], count: int, context: BranchContext) -> Sequence[int]:
        draws = context.generator(-1, context.remaining)  # fewer remain in each round
        return [draws.randrange(len(places)) for _ in range(count)]
