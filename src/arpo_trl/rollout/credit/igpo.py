"""Rewards a turn for its increase of the reference answer's probability (IGPO, arXiv 2510.14967).

p = exp(mean log π(answer | path so far)), at the prompt and after each tool result. The reward of a turn is p after
its result minus p before it, and of the last turn the leaf's reward. They become z-scores over all turns of the
group. A turn's advantage is the sum of its z-score and those of later turns, discounted by `gamma` per turn.

Bias: the gradient is that of rewards plus information gain. z subtracts one mean from every turn, so a path with many
turns has the sign of its mean z-score. `advantage_baseline` and `scale_rewards` have no effect.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch

from arpo_trl.common.settings import setting
from arpo_trl.errors import ConfigError
from arpo_trl.rollout.credit import register_credit
from arpo_trl.rollout.credit.base import Credit, by_leaf, z_scores
from arpo_trl.rollout.tree import Leaf, NodeKind, RolloutTree


@register_credit("igpo")
@dataclass(kw_only=True)
class IGPO(Credit):
    gamma: float = setting(1.0, "Discount per turn.", above=0, at_most=1)
    template: str = "<answer>\\boxed{{answer}}</answer>"
    """The text with which the model would give the answer, with the placeholder {answer}."""
    reads_answers: bool = field(default=True, init=False)

    def __post_init__(self) -> None:
        if not isinstance(self.template, str) or "{answer}" not in self.template:
            raise ConfigError(f"template is {self.template!r}; expected a text with {{answer}} in it.")

    def __call__(
        self, trees: Sequence[RolloutTree], rewards: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        if not self.answer_probabilities:  # in evaluation
            return advantages, None
        of_leaf, made = iter(rewards.tolist()), []
        for tree, probability in zip(trees, self.answer_probabilities, strict=True):
            earned = [_turn_rewards(leaf, probability, next(of_leaf)) for leaf in tree.leaves()]
            scores = iter(z_scores([reward for path in earned for reward in path]))
            for path in earned:
                returns, later = [], 0.0
                for score in reversed([next(scores) for _ in path]):
                    later = score + self.gamma * later
                    returns.append(later)
                made.append(returns[::-1])
        return by_leaf(trees, advantages, made), None


def _turn_rewards(leaf: Leaf, probability: Mapping[int, float], reward: float) -> list[float]:
    """The reward of each turn of a leaf."""
    watched = [0, *(node.index for node in leaf.nodes if node.kind is NodeKind.OBSERVATION)]
    gains = [probability[after] - probability[before] for before, after in pairwise(watched)]
    return [*gains, reward]
