"""Statistics of rewards and branching: exchangeability of siblings, similarity of leaves, position of forks.

A fork is an observation with two or more turns under it. One of them continues the original path, the *incumbent*. The
others are branches, the *fresh* siblings. A rule that reads the incumbent's tokens, like `threshold`, selects forks by
a quantity that may correlate with the reward. Then the incumbent is not exchangeable with its fresh siblings.

Only leaves with a finite reward count. A tree contributes to a metric only if it has the pairs of leaves that the
metric compares. If nothing branches, no metric is logged. docs/metrics.md gives the formulas. Pure.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import TYPE_CHECKING

from arpo_trl.rollout.tree import Address, Node, NodeKind, RolloutTree

if TYPE_CHECKING:
    from arpo_trl.logs.metrics import Tally

CORRELATION = "exchange/intraclass_correlation"
SHARING = "exchange/leaves_sharing_a_root_turn"


def tally_exchangeability(tree: RolloutTree, rewards: Sequence[float], tally: Tally) -> None:
    """Count one tree into `tally`; `rewards` are those of its leaves, in leaf order. Reads each pair of leaves once.
    Pairs at a fork are averaged per fork, the others per tree.
    """
    below = _rewards_below(tree, rewards)
    writers = tree.writers()
    for node in tree.observations():
        if len(node.children) > 1:
            # A branch's address extends the incumbent's, and branches are numbered: the incumbent comes first.
            children = sorted(node.children, key=lambda child: writers.get(child, ()))
            _tally_fork(tree, node, [below[child] for child in children], tally)
    _tally_correlation([list(below[turn].values()) for turn in tree.root.children], tally)
    _tally_random_nodes(tree, below, tally)


def effective_leaves(values: Mapping[str, float]) -> dict[str, float]:
    """Return the metric derived from merged metrics: the number of independent leaves whose mean is equally precise.

    With M leaves and intraclass correlation ρ, if a leaf shares its first turn with s others on average:
    M / (1 + max(ρ, 0)·s). In expectation ρ ≥ 0, since leaves under one turn are sampled alike and independently.
    """
    if CORRELATION not in values:
        return {}
    size = values["tree/leaves"] / values["tree/groups"]
    return {"exchange/effective_leaves": size / (1 + max(values[CORRELATION], 0.0) * values[SHARING])}


def _rewards_below(tree: RolloutTree, rewards: Sequence[float]) -> dict[int, dict[Address, float]]:
    """Return for each node the finite rewards of the leaves below it, by the leaves' address, in address order."""
    below: dict[int, dict[Address, float]] = defaultdict(dict)
    for leaf, reward in zip(tree.leaves(), rewards, strict=True):
        if math.isfinite(reward):
            for node in leaf.nodes:
                below[node.index][leaf.address] = reward
    return below


def _tally_fork(tree: RolloutTree, fork: Node, children: Sequence[Mapping[Address, float]], tally: Tally) -> None:
    """Count the position of the fork, and the differences below it."""
    depth = sum(step.kind is NodeKind.OBSERVATION for step in tree.path(fork.index))
    for name in ("forks", f"forks_depth_{depth}", f"forks_after_{fork.tool}"):
        tally.totals[f"exchange/{name}"] += 1
    total, pairs = _half_squares([list(child.values()) for child in children])
    if pairs:
        tally.add("exchange/variance_below_forks", total / pairs)
    if not all(children):
        return  # a child without rewards
    incumbent, *fresh = [fmean(child.values()) for child in children]
    tally.add("exchange/selected_minus_fresh", incumbent - fmean(fresh))
    if len(fresh) > 1:
        tally.add("exchange/fresh_minus_fresh", fresh[0] - fmean(fresh[1:]))


def _tally_correlation(by_root_turn: Sequence[Sequence[float]], tally: Tally) -> None:
    """Count the intraclass correlation of leaves that share their first turn: 1 − v_within / v_between.

    Each v is the mean of (r_i − r_j)² / 2 over the pairs of leaves with the same first turn, or with different ones.
    Sums over trees of v_between − v_within and of v_between merge over ranks; their ratio is the correlation.
    """
    inside = [_half_squares([[reward] for reward in rewards]) for rewards in by_root_turn]
    within, pairs_within = sum(total for total, _ in inside), sum(pairs for _, pairs in inside)
    between, pairs_between = _half_squares(by_root_turn)
    if pairs_within and pairs_between:
        v_between = between / pairs_between
        tally.add(CORRELATION, v_between - within / pairs_within, v_between)
        tally.add(SHARING, 2 * pairs_within, sum(map(len, by_root_turn)))


def _tally_random_nodes(tree: RolloutTree, below: Mapping[int, Mapping[Address, float]], tally: Tally) -> None:
    """Count the reward variance below nodes that no rule chose.

    A single node without a fork has only one leaf. So observations of different paths count as one node if all their
    calls and results are equal.
    """
    # A history's key is its last call and the number of the history before it, so keys do not grow with depth.
    numbers: dict[tuple[int, str, str, str], int] = {}
    history = {tree.root.index: 0}
    alike: dict[int, list[list[float]]] = defaultdict(list)
    for node in tree.nodes[1:]:  # a parent precedes its children
        assert node.parent is not None
        number = history[node.parent]
        for call in node.calls:
            last = (number, call.name, repr(sorted(call.arguments.items())), call.text)
            number = numbers.setdefault(last, len(numbers) + 1)
        history[node.index] = number
        if node.calls and node.index in below:
            alike[number].append(list(below[node.index].values()))
    for rewards in alike.values():
        total, pairs = _half_squares(rewards)
        if pairs:
            tally.add("exchange/variance_below_random", total / pairs)


def _half_squares(parts: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Return the sum of (x − y)² / 2 over all pairs of values from two different parts, and the number of pairs."""
    total, pairs = 0.0, 0
    for i, part in enumerate(parts):
        for other in parts[:i]:
            total += sum((x - y) ** 2 for x in part for y in other) / 2
            pairs += len(part) * len(other)
    return total, pairs
