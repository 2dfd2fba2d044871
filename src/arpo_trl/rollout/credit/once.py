"""A shared token is trained only in the first of its leaves, with the mean advantage of all of them.

It wraps the credit that computes the advantages. `shared_prefix_weight: once` selects it for any credit.

Bias: early turns weigh less relative to late ones than in independent paths, by N/M at the root.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from arpo_trl.rollout.credit import register_credit
from arpo_trl.rollout.credit.base import Credit, counted_nodes, mean_over_leaves, shares_nodes, token_nodes
from arpo_trl.rollout.credit.soft import Soft
from arpo_trl.rollout.tree import RolloutTree


@register_credit("once")
class Once(Credit):
    """Wraps a credit: a shared token is trained in the first of its leaves only."""

    weighs = True

    def __init__(self, credit: Credit | None = None):
        """`credit` computes the advantages; None: "soft". Its weights apply to the first copies."""
        self._credit = credit or Soft()
        self.reads_logprobs = self._credit.reads_logprobs
        self.reads_entropies = self._credit.reads_entropies
        self.reads_answers = self._credit.reads_answers
        self.template = self._credit.template

    def __call__(
        self, trees: Sequence[RolloutTree], rewards: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self._credit.answer_probabilities = self.answer_probabilities
        self._credit.entropy_scores = self.entropy_scores
        self._credit.trained, self._credit.gathered = self.trained, self.gathered
        made, weights = self._credit(trees, rewards, advantages)
        if not shares_nodes(trees):
            return made, weights
        nodes = token_nodes(trees).to(advantages.device)
        kept = first_copies(nodes, self.trained)
        return mean_over_leaves(made, nodes, self.trained), kept if weights is None else kept * weights


def first_copies(token_nodes: torch.Tensor, trained: torch.Tensor | None = None) -> torch.Tensor:
    """(B, T) bool: True for each node's tokens in the first row in the loss (`trained`) that contains the node; False
    elsewhere and on padding."""
    real, node = counted_nodes(token_nodes, trained)
    rows = torch.arange(token_nodes.size(0), device=token_nodes.device).unsqueeze(1).expand_as(token_nodes)[real]
    first = torch.full((int(node.max()) + 1 if len(node) else 0,), token_nodes.size(0), device=token_nodes.device)
    first = first.scatter_reduce(0, node, rows, reduce="amin")
    result = torch.zeros_like(token_nodes, dtype=torch.bool)
    result[real] = rows == first[node]
    return result
