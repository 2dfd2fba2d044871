"""Baselines: a baseline is subtracted from a leaf's reward, and the result is scaled to an advantage.

TRL subtracts the mean of the group. `make_baseline` then returns None, and TRL's advantages stay bit for bit. Other
baselines replace it in training:

    A_i = (R_i − b) / (σ + 1e-4)          σ: TRL's `scale_rewards` (of the group, of the batch, or no division)

A group's mean is the best single baseline only if the gradient norm of a path does not depend on its reward. Wrong
paths are often long and uncertain, so their norms are larger. The variance-optimal baseline weights each reward by the
squared norm of its path's score: b* = E[‖s‖² R] / E[‖s‖²]. `ScoreNorm` estimates it from the sampling logprobs.

Pure: torch, the tree and the settings; no model and no engine.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from arpo_trl.config import ARPOConfig
from arpo_trl.logs.metrics import Tally
from arpo_trl.options import AdvantageBaseline
from arpo_trl.rollout.credit.base import ROUNDING
from arpo_trl.rollout.tree import Leaf
from arpo_trl.trl_seam import nanstd

EPSILON = 1e-4
"""TRL adds this to a standard deviation."""
MEAN_OVER_SEQUENCE = ("grpo", "sapo")
"""TRL's loss types that divide a row's loss by its number of tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScoredLeaves:
    """The leaves of this rank, group after group, with their rewards.

    ScoredLeaves(leaves=leaves, rewards=rewards, of_all_ranks=rewards, trained=torch.ones(8, dtype=torch.bool), size=8)
    """

    leaves: Sequence[Leaf]
    rewards: torch.Tensor
    """(B,); NaN if no reward function applies to a leaf."""
    of_all_ranks: torch.Tensor
    """The rewards of all ranks, rank after rank."""
    trained: torch.Tensor
    """(B,) bool: whether the leaf has tokens in the loss."""
    size: int
    """M, the number of leaves of a group."""


class Baseline(ABC):
    """Computes a baseline for each leaf of a rollout. Its state may depend on earlier rollouts."""

    reads_logprobs: ClassVar[bool] = False
    """Whether the baseline needs the engine's sampling logprobs."""
    state: float | None = None
    """The state on which the next baselines depend. It is equal on all ranks, and checkpoints contain it."""

    @abstractmethod
    def __call__(self, scored: ScoredLeaves) -> torch.Tensor:
        """Return b (B,), one per leaf. Called once per rollout in training, with the same order on all ranks."""


class BatchMean(Baseline):
    """The mean reward of the whole batch: with `scale_rewards` "batch" the advantages are REINFORCE++'s z-scores."""

    def __call__(self, scored: ScoredLeaves) -> torch.Tensor:
        return scored.of_all_ranks.nanmean().expand_as(scored.rewards)


class Running(Baseline):
    """An exponential moving average of the mean rewards of earlier rollouts, which does not depend on this rollout's
    actions.

    It starts with the mean of the first rollout, which that rollout uses, too.
    """

    def __init__(self, decay: float):
        self._decay = decay

    def __call__(self, scored: ScoredLeaves) -> torch.Tensor:
        new = float(scored.of_all_ranks.nanmean())
        if math.isnan(new):  # no reward function applies to any leaf
            return torch.zeros_like(scored.rewards)
        before = new if self.state is None else self.state
        self.state = self._decay * before + (1 - self._decay) * new
        return torch.full_like(scored.rewards, before)


class ScoreNorm(Baseline):
    """The mean of the group's rewards, weighted by estimates of each leaf's squared score norm.

    w_i = Σ (1 − p)² over the sampled tokens of leaf i, with p the sampling probability of the token. (1 − p)² is the
    part of ‖e_a − p‖² that belongs to the sampled token; the sum correlates with the squared norm of the full score.

    Args:
        per_sequence: Whether the loss averages over each leaf's T tokens. Then its score is divided by T, and w_i by
            T².
        cap: Limits each w_i to this multiple of the median over the leaves of its group that count, the lower one of
            the two middle weights if their number is even. None: no limit.
    """

    reads_logprobs: ClassVar[bool] = True

    def __init__(self, *, per_sequence: bool, cap: float | None):
        self._per_sequence = per_sequence
        self._cap = cap

    def __call__(self, scored: ScoredLeaves) -> torch.Tensor:
        norms = [squared_score(leaf, per_sequence=self._per_sequence) for leaf in scored.leaves]
        weights = (torch.tensor(norms) * scored.trained).view(-1, scored.size)
        if self._cap is not None:
            counts = (scored.trained & ~scored.rewards.isnan()).view(-1, scored.size)
            medians = weights.masked_fill(~counts, math.nan).nanmedian(dim=1, keepdim=True).values
            weights = weights.minimum(self._cap * medians.nan_to_num())
        return weighted_means(scored.rewards.view(-1, scored.size), weights).repeat_interleave(scored.size)


def make_baseline(args: ARPOConfig) -> Baseline | None:
    """The baseline that the settings select; None for TRL's."""
    match AdvantageBaseline(args.advantage_baseline):
        case AdvantageBaseline.MEAN:
            return None
        case AdvantageBaseline.BATCH:
            return BatchMean()
        case AdvantageBaseline.RUNNING:
            return Running(args.running_baseline_decay)
        case AdvantageBaseline.SCORE_NORM:
            return ScoreNorm(per_sequence=args.loss_type in MEAN_OVER_SEQUENCE, cap=args.score_norm_cap)


def squared_score(leaf: Leaf, *, per_sequence: bool) -> float:
    """w of one leaf. A token whose logprob the engine could not compute (NaN) adds nothing."""
    total = math.fsum(node.squared_score for node in leaf.nodes)
    return total / sum(leaf.mask) ** 2 if per_sequence else total


def weighted_means(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(G,) means of (G, M) rewards with (G, M) weights. NaN rewards are skipped.

    The mean of equal rewards is exactly that reward. If all weights are 0, the mean is unweighted. Without rewards it
    is NaN.
    """
    known = ~rewards.isnan()
    weights = weights.to(rewards) * known
    weights = torch.where(weights.sum(dim=1, keepdim=True) > 0, weights, known.to(rewards))
    # Computed relative to one reward of the group, the mean of equal rewards has no rounding error.
    least = rewards.nan_to_num(nan=math.inf).amin(dim=1, keepdim=True)
    above = torch.where(known, rewards - least, 0.0)
    return ((weights * above).sum(dim=1) / weights.sum(dim=1)) + least.squeeze(1)


def advantages_of(scored: ScoredLeaves, baselines: torch.Tensor, scale: str) -> torch.Tensor:
    """(B,) advantages of the leaves, like TRL's but with these (B,) `baselines`; 0 if the reward is NaN.

    Args:
        scale: TRL's `scale_rewards`: "group", "batch" or "none". If all rewards of the group or batch are equal, up to
            rounding, its deviation is 0, and so are the advantages.
    """
    advantages = scored.rewards - baselines
    if scale != "none":
        compared = scored.rewards.view(-1, scored.size) if scale == "group" else scored.of_all_ranks.unsqueeze(0)
        # Of equal rewards, nanstd is a rounding error, and a baseline that differs from them would be divided by it.
        scaled = advantages.view(len(compared), -1) / (nanstd(compared, dim=1) + EPSILON).unsqueeze(1)
        advantages = torch.where(are_equal(compared).unsqueeze(1), 0.0, scaled).flatten()
    return advantages.nan_to_num(nan=0.0)


def are_equal(rewards: torch.Tensor) -> torch.Tensor:
    """(…,) bool: whether the known rewards along the last dimension are equal up to rounding. NaN is not known."""
    known = ~rewards.isnan()
    least = torch.where(known, rewards, torch.inf).amin(dim=-1)
    most = torch.where(known, rewards, -torch.inf).amax(dim=-1)
    return (least >= most) | torch.isclose(least, most, rtol=ROUNDING)


def tally_baseline(scored: ScoredLeaves, baselines: torch.Tensor, advantages: torch.Tensor, tally: Tally) -> None:
    """Counts each group's mean b and its sign, and the reinforced leaves below their group's mean reward."""
    groups = (values.view(-1, scored.size) for values in (scored.rewards, baselines, advantages))
    for rewards, b, given in zip(*groups, strict=True):
        known = ~rewards.isnan()
        if not known.any():
            continue
        mean = float(b[known].mean())
        tally.add("baseline/value", mean)
        tally.add("baseline/negative", float(mean < 0))
        below = known & (rewards < rewards.nanmean() - EPSILON)  # by more than the rounding of a mean
        tally.add("baseline/reinforced_below_mean", float((below & (given > 0)).sum()), float(below.sum()))
