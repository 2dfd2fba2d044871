"""The interface of a credit, and the layout of a batch's tokens.

The layout of two leaves that share their first turn `a` and its tool result `t`:

    # ids:   a a t t b b      token_nodes: 1 1 2 2 3 3
    # ids:   a a t t c        token_nodes: 1 1 2 2 4 -1

`token_nodes` (B, T) has for each completion token the number of its node, unique in the batch, and −1 for padding.
Pure: imports only torch and the tree.
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
    """Turns the advantages of leaves into advantages and weights of tokens."""

    name: ClassVar[str] = "unregistered"
    """The credit's name in the settings; `register_credit` sets it."""
    weighs: ClassVar[bool] = False
    """Whether the credit may return weights. The trainer then counts each batch's tokens again, over all ranks."""

    @abstractmethod
    def __call__(
        self, trees: Sequence[RolloutTree], rewards: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return advantages (B, T) and weights (B, T) for the tokens of B leaves; T is the length of the longest leaf.

        A token's loss is multiplied by its weight; None means 1 for all tokens. Values on padding are ignored. If each
        token has its leaf's advantage, return `advantages` itself: the batch then keeps TRL's layout.

        Args:
            trees: Trees with B leaves in total. The rows are `tree.leaves()` of each tree in turn.
            rewards: (B,), weighted and summed over the reward functions; NaN if none applied to a leaf.
            advantages: (B,), as GRPO computes them.
        """


def attribute(
    credit: Credit, trees: Sequence[RolloutTree], rewards: torch.Tensor, advantages: torch.Tensor, width: int
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Call `credit` and pad its (B, T) results with zeros to (B, `width`).

    Raises:
        ConfigError: A result does not have the shape (B, T).
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
            f"{subject} of shape {tuple(values.shape)}; expected (leaves, tokens of the longest leaf) = {expected}. "
            "Return tensors of the shape of `token_nodes(trees)`."
        )
    return torch.nn.functional.pad(values, (0, width - values.size(1)))


def shares_nodes(trees: Sequence[RolloutTree]) -> bool:
    """Whether several leaves share a token after the prompt."""
    return any(len(node.children) > 1 for tree in trees for node in tree.observations())


def token_nodes(trees: Sequence[RolloutTree]) -> torch.Tensor:
    """(B, T) int64: the node of each completion token, −1 for padding.

    Node indices are unique only within a tree, so those of a later tree are offset by the sizes of the earlier ones.
    """
    rows, offset = [], 0
    for tree in trees:
        rows += [torch.tensor(leaf.token_nodes) + offset for leaf in tree.leaves()]
        offset += len(tree.nodes)
    return pad_sequence(rows, batch_first=True, padding_value=-1)


def mean_over_leaves(advantages: torch.Tensor, token_nodes: torch.Tensor) -> torch.Tensor:
    """(B, T) advantages: each token has the mean over the leaves that share its node; 0 on padding."""
    real = token_nodes >= 0
    _, node = torch.unique(token_nodes[real], return_inverse=True)
    per_token = advantages.unsqueeze(1).expand_as(token_nodes)[real]
    # A node has the same number of tokens in each of its leaves, so the mean over tokens equals the mean over leaves.
    count = torch.bincount(node)
    total = torch.zeros(len(count), dtype=per_token.dtype, device=per_token.device).index_add_(0, node, per_token)
    result = torch.zeros_like(token_nodes, dtype=advantages.dtype)
    result[real] = (total / count)[node]
    return result
