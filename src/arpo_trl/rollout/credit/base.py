"""What a credit is, and the layout in which it sees the trees of a batch.

The layout of two leaves that share their first turn `a` and its tool result `t`:

    # ids:   a a t t b b      token_nodes: 1 1 2 2 3 3
    # ids:   a a t t c        token_nodes: 1 1 2 2 4 -1

`token_nodes` (B, T) names for every completion token the node that holds it, unique in the batch, −1 on padding.
Pure: torch and the tree.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch.nn.utils.rnn import pad_sequence

from arpo_trl.errors import ConfigError
from arpo_trl.rollout.tree import RolloutTree


class Credit(ABC):
    """One way to turn a group's advantages into those of its tokens."""

    name: ClassVar[str] = "unregistered"
    """What the settings call it; `register_credit` sets it."""
    weighs: ClassVar[bool] = False
    """Whether it may return weights. The batch's tokens are then counted anew, over all ranks, in every step."""

    @abstractmethod
    def __call__(
        self, trees: Sequence[RolloutTree], rewards: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Advantages and weights (B, T) of the tokens of B leaves, the longest of which has T.

        A weight is what a token's loss is multiplied by; None: 1 everywhere. What stands on padding is not read. Where
        each token's advantage is its leaf's, `advantages` are returned as they came, and the batch stays TRL's own.

        Args:
            trees: B leaves in all; the rows are `tree.leaves()` of one tree after the other.
            rewards: (B,), weighted and summed over the reward functions; NaN where none applied.
            advantages: (B,), GRPO's.
        """


def attribute(
    credit: Credit, trees: Sequence[RolloutTree], rewards: torch.Tensor, advantages: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What `credit` returns, (B, T) padded with zeros to (B, `width`).

    Raises:
        ConfigError: The credit returned another shape.
    """
    made, weights = credit(trees, rewards, advantages)
    if made is not advantages:
        made = _padded(made, trees, width, f"The credit {credit.name!r} returned advantages")
    if weights is not None:
        weights = _padded(weights, trees, width, f"The credit {credit.name!r} returned weights")
    return made, weights


def _padded(values: torch.Tensor, trees: Sequence[RolloutTree], width: int, subject: str) -> torch.Tensor:
    lengths = [len(leaf.ids) for tree in trees for leaf in tree.leaves()]
    expected = len(lengths), max(lengths)
    if values.shape != expected:
        raise ConfigError(
            f"{subject} of shape {tuple(values.shape)}; expected (leaves, tokens of the longest leaf), {expected}, "
            "the shape of `token_nodes`."
        )
    return torch.nn.functional.pad(values, (0, width - values.size(1)))


def shares_nodes(trees: Sequence[RolloutTree]) -> bool:
    """Whether some token stands in several leaves."""
    return any(len(node.children) > 1 for tree in trees for node in tree.observations())


def token_nodes(trees: Sequence[RolloutTree]) -> torch.Tensor:
    """(B, T) int64: each completion token's node. A node's number is unique in its tree only, so trees are laid end
    to end."""
    rows, offset = [], 0
    for tree in trees:
        rows += [torch.tensor(leaf.token_nodes) + offset for leaf in tree.leaves()]
        offset += len(tree.nodes)
    return pad_sequence(rows, batch_first=True, padding_value=-1)


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
