"""Running estimates of each depth's share of the gradient's variance and of its calls, and the resulting widths.

The segment of depth m is a path's turn after m tool results. A group of M leaves has n_m planned segments at depth m,
each for M / n_m leaves. A path that ended before depth m adds 0 there. With R the reward and B the group's mean:

    S_m = E Σ_t (1 − p_t)²      squared score of the segment's tokens, from the sampling logprobs
    c_m                         valid tool calls at the end of the segment; C is their sum over m
    e_m                         probability that a path ends with the segment; the sum over m is 1
    v_m = ½ E (R_i − R_j)²      over pairs of leaves whose last common node has depth m
    δ_m² = v_m − v_{m+1}        variance of the value that the segment adds; v is 0 after the last depth
    b_m² = v_0 − v_m            E (V_m − B)², V_m the value of a node of depth m
    a_m = S_m·b_m² + δ_m²·Σ_{l≤m} S_l

The planned segments make Σ c_m·n_m calls. A path that ends at depth m becomes 1 of its M / n_m leaves. The others
start at the root, make C calls each, and do not branch. So a group makes

    T = Σ c_m·n_m + C·Σ e_m·(M − n_m) = C·M − Σ g_m·(M − n_m),    g_m = c_m − C·e_m

calls. The planned segments give a gradient of variance Σ a_m / n_m. For a given T, n_m ∝ √(a_m / g_m) minimizes it,
and n_m = M where g_m ≤ 0: fewer segments save no calls there. Depths at which n would decrease with m are pooled (pool
adjacent violators). The share ρ = Σ e_m·(M − n_m) / M of the leaves that start at the root is independent, so the
variance is about Σ a_m·((1 − ρ) / n_m + ρ / M).

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
    """Exponential moving averages of S, c, e and v by depth. They start with the first step's values.

    estimates = DepthEstimates()
    estimates.update([depth_sums(trees, rewards)], memory=0.8)
    estimates.widths(16, 0.5)  # [4.1, 9.7, 16.0], say
    """

    def __init__(self) -> None:
        self.score: list[float] = []
        self.calls: list[float] = []
        self.ends: list[float] = []
        self.variance: dict[int, float] = {}
        """v by depth, for the depths that have had forks."""
        self.made: float | None = None
        """Average of the calls made in a tree, per leaf. None before the first step."""
        self.leaves = 0
        """M of the last step."""

    def update(self, sums: Sequence[Mapping[str, Any]], memory: float) -> None:
        """Add one step's `depth_sums` of all ranks.

        Args:
            memory: The weight of the averages so far.
        """
        trees = sum(part["trees"] for part in sums)
        if not trees:
            return
        self.leaves = sum(part["leaves"] for part in sums) // trees
        made = sum(part["made"] for part in sums) / (trees * self.leaves)
        self.made = made if self.made is None else memory * self.made + (1 - memory) * made
        for name in ("score", "calls", "ends"):
            old: list[float] = getattr(self, name)
            depths = range(max(len(old), *(len(part[name]) for part in sums)))
            new = [math.fsum(part[name][m] for part in sums if m < len(part[name])) / trees for m in depths]
            before = [old[m] if m < len(old) else 0.0 for m in depths] if old else new
            setattr(self, name, [memory * a + (1 - memory) * b for a, b in zip(before, new, strict=True)])
        for m in sorted({m for part in sums for m in part["pairs"]}):
            total, count = (math.fsum(part["pairs"].get(m, (0.0, 0))[i] for part in sums) for i in (0, 1))
            self.variance[m] = memory * self.variance.get(m, total / count) + (1 - memory) * total / count

    @property
    def calls_share(self) -> float | None:
        """Calls made in a tree, as a share of those of M independent paths. None if these make none."""
        calls = math.fsum(self.calls)
        return self.made / calls if self.made is not None and calls else None

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

    def restarts(self, widths: Sequence[float], leaves: float) -> float:
        """The expected leaves of a group that start at the root, with n_m = `widths` for each depth; `leaves` is M."""
        return math.fsum(e * (leaves - n) for e, n in zip(self.ends, widths, strict=True))

    def calls_of(self, widths: Sequence[float], leaves: float) -> float:
        """T, the expected calls of a group with these widths, the restarts' calls included."""
        planned = math.fsum(c * n for c, n in zip(self.calls, widths, strict=True))
        return planned + math.fsum(self.calls) * self.restarts(widths, leaves)

    def gain_of(self, widths: Sequence[float]) -> float | None:
        """The variance of independent paths divided by that of these widths, at equal calls; restarts are included.

        None if a or c is 0. The last width is M, which depths after it have too.
        """
        a = self.variance_shares()
        if not any(a) or not any(self.calls):
            return None
        leaves = widths[-1]
        n = [widths[min(m, len(widths) - 1)] for m in range(len(a))]
        restarted = self.restarts(n, leaves) / leaves
        variance = math.fsum(x * ((1 - restarted) / width + restarted / leaves) for x, width in zip(a, n, strict=True))
        return math.fsum(a) * math.fsum(self.calls) / (variance * self.calls_of(n, leaves))

    def gain(self) -> float | None:
        """η, the largest `gain_of` of all budgets; at least 1. None if a or c is 0."""
        plans = (self.widths(self.leaves, budget / 100) for budget in range(1, 101))
        return max((gain for plan in plans if plan and (gain := self.gain_of(plan))), default=None)

    def widths(self, leaves: int, share: float) -> list[float] | None:
        """n_m for each depth, in [1, `leaves`] and non-decreasing; the last is `leaves`. None without estimates.

        Args:
            leaves: M.
            share: The limit of T, as a share of the calls of M independent paths. If no widths satisfy it, the
                result has the smallest T.
        """
        a, independent = self.variance_shares(), leaves * math.fsum(self.calls)
        if not any(a):
            return None
        ratios = [math.sqrt(ratio) for ratio in pooled(a, self.costs())]
        low, high = 0.0, leaves / min((ratio for ratio in ratios if 0 < ratio < math.inf), default=1.0)
        for _ in range(60):
            scale = (low + high) / 2
            n = [min(max(scale * ratio, 1.0), float(leaves)) for ratio in ratios[:-1]] + [float(leaves)]
            low, high = (low, scale) if self.calls_of(n, leaves) > share * independent else (scale, high)
        return n

    def costs(self) -> list[float]:
        """g_m: the calls of one more segment at depth m, less those of the paths that then need not start at the
        root. The sum over m is 0."""
        total = math.fsum(self.calls)
        return [c - total * e for c, e in zip(self.calls, self.ends, strict=True)]

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
            "calls_share": self.calls_share,
        }
        return values | {name: value for name, value in others.items() if value is not None}

    def state_dict(self) -> dict[str, Any]:
        return {
            "score": list(self.score),
            "calls": list(self.calls),
            "ends": list(self.ends),
            "variance": dict(self.variance),
            "made": self.made,
            "leaves": self.leaves,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.score, self.calls, self.ends = (list(state[name]) for name in ("score", "calls", "ends"))
        self.variance, self.made, self.leaves = dict(state["variance"]), state["made"], state["leaves"]


def pooled(a: Sequence[float], g: Sequence[float]) -> list[float]:
    """Σ a / Σ g of each depth's block of adjacent depths, pooled such that it does not decrease from block to block.
    It is infinite if Σ g is 0 or less."""
    least = 1e-9 * max(map(abs, g))  # below it Σ g is a rounding error of 0
    blocks: list[tuple[float, float, int]] = []

    def ratio(block: tuple[float, float, int]) -> float:
        return block[0] / block[1] if block[1] > least else math.inf

    for block in zip(a, g, [1] * len(a), strict=True):
        while blocks and ratio(blocks[-1]) > ratio(block):
            last = blocks.pop()
            block = last[0] + block[0], last[1] + block[1], last[2] + block[2]
        blocks.append(block)
    return [ratio(block) for block in blocks for _ in range(block[2])]


def depth_sums(trees: Sequence[RolloutTree], rewards: Sequence[float]) -> dict[str, Any]:
    """Sums over one rank's trees, as plain data for `DepthEstimates.update`.

    Score, calls and ends are those of the planned paths, with weights that add up to 1 in each tree. Leaves whose
    reward is NaN form no pairs.

    Args:
        rewards: One per leaf, tree by tree in leaf order.
    """
    depths: dict[str, list[float]] = {"score": [], "calls": [], "ends": []}
    pairs: dict[int, tuple[float, int]] = {}
    left = iter(rewards)
    leaves = made_in_trees = 0
    for tree in trees:
        group = tree.leaves()
        leaves += len(group)
        made_in_trees += _made(tree.calls())
        squares = {turn.index: turn.squared_score for turn in tree.turns()}
        for leaf in group:
            weight = _weight(leaf, tree)
            for m, (turn, made) in enumerate(_segments(leaf)):
                added = {"score": squares[turn.index], "calls": made, "ends": turn.stop is not None}
                for name, column in depths.items():
                    column += [0.0] * (m == len(column))
                    column[m] += weight * added[name]
        for (one, r), (other, s) in combinations([(leaf, next(left)) for leaf in group], 2):
            if not math.isnan(r - s):
                m = _common_depth(one, other)
                total, count = pairs.get(m, (0.0, 0))
                pairs[m] = total + (r - s) ** 2 / 2, count + 1
    return {"trees": len(trees), "leaves": leaves, "made": made_in_trees, "pairs": pairs, **depths}


def _weight(leaf: Leaf, tree: RolloutTree) -> float:
    """The leaf's share of the planned tree: each path is split evenly among its children. A path that was added at the
    root has none, since paths that end early are more often followed by such paths."""
    planned = len(tree.root.children) - tree.topups
    return (leaf.address[0] < planned) / (planned * math.prod(len(node.children) for node in leaf.nodes[:-1]))


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
