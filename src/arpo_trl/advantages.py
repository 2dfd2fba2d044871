"""Group advantages (B,) and shared nodes → per-token advantages (B, T).

Paper §3.2. The layout of two leaves that share their first turn `a` and its tool result `t`:

    # ids:   a a t t b b      token_nodes: 1 1 2 2 3 3
    # ids:   a a t t c        token_nodes: 1 1 2 2 4 -1
    # advantages (1.0, −0.5)
    # hard:  0.25 0.25 0.25 0.25 1.0 1.0 / 0.25 0.25 0.25 0.25 −0.5 0

`token_nodes` (B, T) names for every completion token the node that holds it, unique in the batch, −1 on padding.
Pure: torch and nothing else.
"""

from __future__ import annotations

from enum import StrEnum

import torch


class AdvantageAttribution(StrEnum):
    """What a token shared by d leaves is credited with."""

    SOFT = "soft"
    """Each leaf's own advantage, everywhere. Equal ratios on shared tokens average them. The paper's default."""
    HARD = "hard"
    """The mean of the d leaves' advantages, written out."""


class SharedPrefixWeight(StrEnum):
    """How often a shared token is trained."""

    PER_LEAF = "per_leaf"
    """Once in each of its d leaves, as in the paper."""
    ONCE = "once"
    """In the first of its leaves only, with the mean advantage of all of them."""


def mean_over_leaves(advantages: torch.Tensor, token_nodes: torch.Tensor) -> torch.Tensor:
    """(B, T) advantages in which each node carries the mean over the leaves that pass through it; 0 on padding."""
    real = token_nodes >= 0
    _, node = torch.unique(token_nodes[real], return_inverse=True)
    per_token = advantages.unsqueeze(1).expand_as(token_nodes)[real]
    # A node has the same number of tokens in each of its leaves, so the mean over tokens is the mean over leaves.
    count = torch.bincount(node)
    total = torch.zeros(len(count), dtype=per_token.dtype, device=per_token.device).index_add_(0, node, per_token)
    result = torch.zeros_like(token_nodes, dtype=advantages.dtype)
    result[real] = (total / count)[node]
    return result


def first_copies(token_nodes: torch.Tensor) -> torch.Tensor:
    """(B, T) bool: True on the tokens of each node in the first row that holds it, False elsewhere and on padding."""
    real = token_nodes >= 0
    _, node = torch.unique(token_nodes[real], return_inverse=True)
    rows = torch.arange(token_nodes.size(0), device=token_nodes.device).unsqueeze(1).expand_as(token_nodes)[real]
    first = torch.full((int(node.max()) + 1 if len(node) else 0,), token_nodes.size(0), device=token_nodes.device)
    first = first.scatter_reduce(0, node, rows, reduce="amin")
    result = torch.zeros_like(token_nodes, dtype=torch.bool)
    result[real] = rows == first[node]
    return result
