"""The advantages of leaves, as training computes them, for the parts of the study that have no trainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from arpo_trl.rollout.tree import RolloutTree

from .arms import Arm

_EPSILON = 1e-4
"""TRL's: added to the standard deviation of a group."""


def group_advantages(arm: Arm, trees: Sequence[RolloutTree], rewards: torch.Tensor) -> torch.Tensor:
    """(B,): (reward − mean) / standard deviation over each tree's leaves, as GRPO has them."""
    groups = rewards.view(len(trees), arm.leaves)
    centred = groups - groups.mean(dim=1, keepdim=True)
    return (centred / (groups.std(dim=1, keepdim=True) + _EPSILON)).flatten()
