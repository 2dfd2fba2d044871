"""The advantages of leaves, as training computes them, for the part of the study that has no trainer."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from arpo_trl import ARPOConfig
from arpo_trl.rollout.tree import RolloutTree
from arpo_trl.training.baselines import ScoredLeaves, advantages_of, make_baseline

_EPSILON = 1e-4
"""TRL's: added to the standard deviation of a group."""


class GroupAdvantages:
    """(reward − baseline) / standard deviation of the group, with the baseline that the settings choose."""

    def __init__(self, config: ARPOConfig):
        self._size, self._scale = config.num_generations, config.scale_rewards
        self._baseline = make_baseline(config)

    def __call__(self, trees: Sequence[RolloutTree], rewards: torch.Tensor) -> torch.Tensor:
        """(B,): one advantage per leaf."""
        if self._baseline is not None:
            scored = ScoredLeaves(
                leaves=[leaf for tree in trees for leaf in tree.leaves()],
                rewards=rewards,
                of_all_ranks=rewards,
                trained=torch.ones(len(rewards), dtype=torch.bool),
                size=self._size,
            )
            return advantages_of(scored, self._baseline(scored), self._scale)
        groups = rewards.view(-1, self._size)
        centred = groups - groups.mean(dim=1, keepdim=True)
        return (centred / (groups.std(dim=1, keepdim=True) + _EPSILON)).flatten()
