"""Running estimates of each depth's share of the gradient's variance and cost, and the resulting widths.

The segment of depth m is a path's turn after m tool results. Each path has one planned segment at each depth m. A path
that ended before depth m adds 0. Over a group of M leaves, with R the reward and B the group's mean:

    S_m = E Σ_t (1 − p_t)²      squared score of the segment's tokens, from the sampling logprobs
    v_m = ½ E (R_i − R_j)²      over pairs of leaves whose last common node has depth m
    c_m                         valid tool calls at the end of the segment
    δ_m² = v_m − v_{m+1}        variance of the value that the segment adds; v is 0 after the last depth
    b_m² = v_0 − v_m            E (V_m − B)², V_m the value of a node of depth m
    a_m = S_m·b_m² + δ_m²·Σ_{l≤m} S_l

n_m segments at depth m give a gradient of variance Σ a_m / n_m for Σ c_m·n_m calls. For a given number of calls, n_m ∝
√(a_m / c_m) minimizes this variance. Depths at which n would decrease with m are pooled (pool adjacent violators).

Pure: no torch, no engine, no network.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, combinations
from typing import Any

import numpy as np

from arpo_trl.rollout.tree import ExecutedCall, Leaf, Node, NodeKind, RolloutTree
from arpo_trl.tools.calls import CallSource


class DepthEstimates:
    """Exponential moving averages of S, v and c by depth. They start with the first step's values.

    estimates = DepthEstimates()
    estimates.update([depth_sums(trees, rewards)], memory=0.8, share=0.5)
    estimates.widths(16, 0.5)  # [4.1, 9.7, 16.0], say
    """

    def __init__(self) -> None:
        self.score: list[float] = []
        self.calls: list[float] = []
        self.variance: dict[int, float] = {}
        """v by depth, for the depths that have had forks."""
        self.leaves = 0
        """M of the last step."""
        self.spent: float | None = None
        """Calls made in the last step's trees, as a share of those on all paths; None if there were none."""
        self.planned: float | None = None
        """The planned share of calls. It makes the actual share equal the target, although paths that end early lead
        to more calls. None before the first step."""

    def update(self, sums: Sequence[Mapping[str, Any]], memory: float, share: float) -> None:
        """Add one step's `depth_sums` of all ranks.

        Args:
            memory: The weight of the averages so far.
            share: The target share of calls, as in `widths`. If the actual share was higher, the plan is lowered, and
                vice versa.
        """
        leaves = sum(part["leaves"] for part in sums)
        if not leaves:
            return
        self.leaves = leaves // sum(part["trees"] for part in sums)
        on_paths = math.fsum(math.fsum(part["calls"]) for part in sums)
        self.spent = sum(part["made"] for part in sums) / on_paths if on_paths else None
        if self.spent is not None:
            planned = share if self.planned is None else self.planned
            self.planned = min(max(planned + (1 - memory) * (share - self.spent), 0.0), 1.0)
        for name in ("score", "calls"):
            old: list[float] = getattr(self, name)
            depths = range(max(len(old), *(len(part[name]) for part in sums)))
            new = [math.fsum(part[name][m] for part in sums if m < len(part[name])) / leaves for m in depths]
            before = [old[m] if m < len(old) else 0.0 for m in depths] if old else new
            setattr(self, name, [memory * a + (1 - memory) * b for a, b in zip(before, new, strict=True)])
        for m in sorted({m for part in sums for m in part["pairs"]}):
            total, count = (math.fsum(part["pairs"].get(m, (0.0, 0))[i] for part in sums) for i in (0, 1))
            self.variance[m] = memory * self.variance.get(m, total / count) + (1 - memory) * total / count

    def variance_shares(self) -> list[float]:
        """a_m. A v without a fork at its depth so far is interpolated from other depths; 0 if no v is known."""
        ends = len(self.score)
        if not self.variance:
            return [0.0] * ends
        known = {m: v for m, v in sorted(self.variance.items()) if m < ends} | {ends: 0.0}
        v = np.interp(range(ends + 1), list(known), list(known.values())).tolist()
        added = [max(0.0, v[m] - v[m + 1]) for m in range(ends)]
        above = list(accumulate(self.score))
        return [self.score[m] * max(0.0, v[0] - v[m]) + added[m] * above[m] for m in range(ends)]

    def gain(self) -> float | None:
        """η = (Σ a)(Σ c) / (Σ √(a·c))² over pooled depths: the variance of independent paths divided by the minimum,
        at equal calls.

        None if a or c is 0. It is an upper bound, since it does not limit the number of leaves.
        """
        blocks = pooled(self.variance_shares(), self.calls)
        root = math.fsum(math.sqrt(a * c) for a, c, _ in blocks)
        return math.fsum(a for a, _, _ in blocks) * math.fsum(c for _, c, _ in blocks) / root**2 if root else None

    def gain_of(self, widths: Sequence[float]) -> float | None:
        """Like `gain`, for these widths n_m. Depths after the last one have its width."""
        shares = self.variance_shares()
        n = [widths[min(m, len(widths) - 1)] for m in range(len(shares))]
        variance = math.fsum(a / width for a, width in zip(shares, n, strict=True))
        calls = math.fsum(c * width for c, width in zip(self.calls, n, strict=True))
        return math.fsum(shares) * math.fsum(self.calls) / (variance * calls) if variance and calls else None

    def widths(self, leaves: int, share: float) -> list[float] | None:
        """n_m for each depth, in [1, `leaves`] and non-decreasing; the last is `leaves`. None without estimates.

        Args:
            leaves: M.
            share: Σ c_m·n_m as a share of the calls of M independent paths, before the first step. Then `planned`.
        """
        share = share if self.planned is None else self.planned
        blocks = pooled(self.variance_shares(), self.calls)
        if not any(a for a, _, _ in blocks):
            return None
        # Depths without calls cost nothing, so they get all leaves, for any scale above 0.
        ratios = [math.sqrt(a / c) if c else math.inf for a, c, size in blocks for _ in range(size)]
        low, high = 0.0, leaves / min((ratio for ratio in ratios if 0 < ratio < math.inf), default=1.0)
        for _ in range(60):
            scale = (low + high) / 2
            n = [min(max(scale * ratio, 1.0), float(leaves)) for ratio in ratios]
            spent = math.fsum(c * width for c, width in zip(self.calls, n, strict=True))
            low, high = (low, scale) if spent > share * leaves * math.fsum(self.calls) else (scale, high)
        return [*n[:-1], float(leaves)]

    def metrics(self, widths: Sequence[float]) -> dict[str, float]:
        """The estimates by depth, the gain of `widths`, and the share of calls used. Unknown values are omitted."""
        by_depth = {
            "score_norm": dict(enumerate(self.score)),
            "calls": dict(enumerate(self.calls)),
            "width": dict(enumerate(widths)),
            "variance": self.variance,
        }
        values = {f"{name}_depth_{m}": value for name, column in by_depth.items() for m, value in column.items()}
        others = {
            "gain": self.gain(),
            "gain_of_widths": self.gain_of(widths) if widths else None,
            "calls_share": self.spent,
        }
        return values | {name: value for name, value in others.items() if value is not None}

    def state_dict(self) -> dict[str, Any]:
        return {
            "score": list(self.score),
            "calls": list(self.calls),
            "variance": dict(self.variance),
            "leaves": self.leaves,
            "spent": self.spent,
            "planned": self.planned,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.score, self.calls = list(state["score"]), list(state["calls"])
        self.variance, self.leaves = dict(state["variance"]), state["leaves"]
        self.spent, self.planned = state["spent"], state["planned"]


def pooled(a: Sequence[float], c: Sequence[float]) -> list[tuple[float, float, int]]:
    """Blocks (Σ a, Σ c, number of depths) of adjacent depths, such that a / c does not decrease from block to
    block. A depth with a = c = 0 joins a neighbour."""
    blocks: list[tuple[float, float, int]] = []
    for block in zip(a, c, [1] * len(a), strict=True):
        while blocks and (blocks[-1][0] * block[1] > block[0] * blocks[-1][1] or _is_empty(block, blocks[-1])):
            last = blocks.pop()
            block = last[0] + block[0], last[1] + block[1], last[2] + block[2]
        blocks.append(block)
    return blocks


def _is_empty(*blocks: tuple[float, float, int]) -> bool:
    """Whether a of one of the blocks, and its c, is 0."""
    return any(not a and not c for a, c, _ in blocks)


def depth_sums(trees: Sequence[RolloutTree], rewards: Sequence[float]) -> dict[str, Any]:
    """Sums over one rank's trees, as plain data for `DepthEstimates.update`.

    Leaves whose reward is NaN form no pairs.

    Args:
        rewards: One per leaf, tree by tree in leaf order.
    """
    score: list[float] = []
    calls: list[float] = []
    pairs: dict[int, tuple[float, int]] = {}
    left = iter(rewards)
    leaves = made_in_trees = 0
    for tree in trees:
        group = tree.leaves()
        leaves += len(group)
        made_in_trees += _made(tree.calls())
        squares = {turn.index: turn.squared_score for turn in tree.turns()}
        for leaf in group:
            for m, (turn, made) in enumerate(_segments(leaf)):
                if m == len(score):
                    score.append(0.0)
                    calls.append(0.0)
                score[m] += squares[turn.index]
                calls[m] += made
        for (one, r), (other, s) in combinations([(leaf, next(left)) for leaf in group], 2):
            if not math.isnan(r - s):
                m = _common_depth(one, other)
                total, count = pairs.get(m, (0.0, 0))
                pairs[m] = total + (r - s) ** 2 / 2, count + 1
    counts = {"trees": len(trees), "leaves": leaves, "made": made_in_trees}
    return {**counts, "score": score, "calls": calls, "pairs": pairs}


def _segments(leaf: Leaf) -> Iterator[tuple[Node, int]]:
    """Each turn of the path, with the number of its valid calls."""
    for i, node in enumerate(leaf.nodes):
        if node.kind is NodeKind.TURN:
            yield node, _made(leaf.nodes[i + 1].calls if i + 1 < len(leaf.nodes) else node.unread)


def _made(calls: Sequence[ExecutedCall]) -> int:
    """The number of valid calls."""
    return sum(call.source is not CallSource.REFUSED for call in calls)


def _common_depth(one: Leaf, other: Leaf) -> int:
    """The number of observations that two leaves share."""
    shared = 0
    for a, b in zip(one.nodes, other.nodes, strict=False):
        if a.index != b.index:
            break
        shared += a.kind is NodeKind.OBSERVATION
    return shared
