"""The metrics under `arpo/`, computed from a rollout's trees; docs/metrics.md documents the formula and range of each.

A `Tally` contains a sum and a count per name. Tallies of ranks are merged by addition, so means are exact even if the
ranks' counts differ.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from arpo_trl.logs.exchangeability import effective_leaves, tally_exchangeability
from arpo_trl.rollout.rules import mean
from arpo_trl.rollout.tree import NodeKind, RolloutTree, StopReason
from arpo_trl.tools.calls import CallSource, ToolFailure

if TYPE_CHECKING:  # not imported for viewing a run, since it imports the engines
    from arpo_trl.rollout.batch import RolloutBatch


@dataclass
class Tally:
    """The counts of a rollout, by name: `sums` (sum and count, for means), `totals`, and `spread` (for percentiles).

    tally = Tally()
    tally.add("tools/search/failed", 1.0)
    tally.add("tools/search/failed", 0.0)
    tally.values()                          # {"tools/search/failed": 0.5}
    """

    sums: dict[str, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0.0, 0.0]))
    totals: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    spread: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))

    def add(self, name: str, value: float, count: float = 1.0) -> None:
        entry = self.sums[name]
        entry[0] += float(value)  # NumPy's numbers could not be read back from a checkpoint
        entry[1] += float(count)

    def plain(self) -> dict[str, dict[str, Any]]:
        """The tally as plain data, to send to other ranks."""
        return {"sums": dict(self.sums), "totals": dict(self.totals), "spread": dict(self.spread)}

    def merge(self, other: Mapping[str, Mapping[str, Any]]) -> None:
        for name, (total, count) in other["sums"].items():
            self.add(name, total, count)
        for name, total in other["totals"].items():
            self.totals[name] += total
        for name, values in other["spread"].items():
            self.spread[name].extend(values)

    @classmethod
    def merged(cls, plain: Iterable[Mapping[str, Mapping[str, Any]]]) -> Tally:
        """The sum of the tallies of all ranks, given as `plain` data."""
        whole = cls()
        for counted in plain:
            whole.merge(counted)
        return whole

    def values(self) -> dict[str, float]:
        """Name → mean, ratio or total, sorted by name. A mean whose count is 0 is omitted."""
        values = {name: total / count for name, (total, count) in self.sums.items() if count} | self.totals
        values |= effective_leaves(values)
        for name, seconds in self.spread.items():
            if seconds:
                values[f"{name}_p50"], values[f"{name}_p95"] = (float(p) for p in np.percentile(seconds, [50, 95]))
        return {name: values[name] for name in sorted(values)}


def tally_step(rollout: RolloutBatch, rewards: Sequence[float], seconds: Mapping[str, float]) -> Tally:
    """The tally of one scored rollout.

    Args:
        rewards: One per leaf, tree by tree in leaf order; the trees have equally many leaves.
        seconds: Time of other work on the rollout, by name.
    """
    tally, size = Tally(), len(rewards) // len(rollout.trees)
    tally_rollout(rollout, tally)
    for name, spent in seconds.items():
        tally.add(f"time/{name}_s", spent)
    groups = [rewards[start : start + size] for start in range(0, len(rewards), size)]
    tally_rewards(groups, tally)
    for tree, group in zip(rollout.trees, groups, strict=True):
        tally_exchangeability(tree, group, tally)
    return tally


def tally_rollout(rollout: RolloutBatch, tally: Tally) -> None:
    """Counts one rollout into `tally`."""
    for group in rollout.groups:
        tally.add("tree/topups", group.tree.topups)
        tally.add("tree/turns_in_sequence", group.turns_in_sequence)
    tally_trees(rollout.trees, tally)
    times = rollout.times
    tally.add("time/rollout_s", times.total_s)
    tally.add("time/decode_s", times.forward_s)
    tally.add("time/tool_wait_s", times.tool_wait_s)
    tally.add("time/sync_s", times.sync_s)
    tally.add("time/sampler_share", times.own_s, times.total_s)


def tally_trees(trees: Sequence[RolloutTree], tally: Tally) -> None:
    """Counts the values that depend only on the trees in `tally`."""
    for tree in trees:
        _tally_shape(tree, tally)
        _tally_entropies(tree, tally)
        _tally_leaves(tree, tally)
    _tally_tools(trees, tally)


def tally_rewards(groups: Iterable[Sequence[float]], tally: Tally) -> None:
    """Counts the groups whose leaves all have the same reward, up to rounding; `groups` contains the rewards of each
    group's leaves.

    Groups of one leaf, as in evaluation, are not counted. NaN (no reward function applies) differs from every reward.
    """
    for rewards in groups:
        if len(rewards) > 1:
            equal = all(math.isclose(reward, rewards[0], rel_tol=1e-5, abs_tol=1e-8) for reward in rewards)
            tally.add("alarm/zero_variance_groups", float(equal))


def tally_functions(columns: Mapping[str, Iterable[float]], tally: Tally) -> None:
    """Counts the rewards of a rollout that a function gives without any difference and above 0 to none.

    Args:
        columns: Name of a reward function → its rewards in the rollout; NaN where it does not apply.
    """
    for name, column in columns.items():
        if given := [reward for reward in column if not math.isnan(reward)]:
            is_dead = given[0] <= 0 and all(reward == given[0] for reward in given)
            tally.add(f"alarm/unrewarded/{name}", len(given) * is_dead, len(given))


def branches(tree: RolloutTree) -> int:
    """The number of turns under observations beyond the first under each."""
    return sum(max(0, len(node.children) - 1) for node in tree.observations())


def _tally_shape(tree: RolloutTree, tally: Tally) -> None:
    leaves = tree.leaves()
    leaf_tokens = sum(len(leaf.ids) for leaf in leaves)
    tally.totals["tree/groups"] += 1
    tally.totals["tree/leaves"] += len(leaves)
    tally.add("tree/sharing_ratio", leaf_tokens, sum(len(node.ids) for node in tree.nodes[1:]))
    tally.add("tree/branches", branches(tree))
    tally.add("tree/generated_tokens", sum(len(node.ids) for node in tree.turns()))
    for node in tree.observations():
        if node.decision is None or node.decision.fires is None or not node.calls:
            continue
        depth = sum(step.kind is NodeKind.OBSERVATION for step in tree.path(node.index))
        tally.add(f"tree/forks_depth_{depth}", float(node.decision.granted > 0))
        tally.add("tree/fire_rate", float(node.decision.fires))
        tally.add(f"tree/fire_rate_{node.tool}", float(node.decision.fires))
        if node.decision.delta is not None:
            tally.add("entropy/delta", node.decision.delta)


def _tally_entropies(tree: RolloutTree, tally: Tally) -> None:
    for node in tree.turns():
        assert node.parent is not None
        above = tree.nodes[node.parent]
        if above.kind is NodeKind.ROOT:
            tally.add("entropy/root", mean(node.entropies))
        elif above.calls:
            tally.add(f"entropy/after_{above.tool}", mean(node.entropies))


def _tally_leaves(tree: RolloutTree, tally: Tally) -> None:
    in_tree = len(tree.calls())
    on_paths = 0
    for leaf in tree.leaves():
        calls = [*leaf.calls, *leaf.nodes[-1].unread]
        on_paths += len(calls)
        spoke = any(call.source is not CallSource.REFUSED for call in calls) or "</answer>" in leaf.turns[-1]
        tally.add("alarm/unparsed", float(not spoke))
        tally.add("alarm/truncated", float(leaf.stop is StopReason.LENGTH))
        tally.add("alarm/call_limit", float(leaf.stop is StopReason.CALL_LIMIT))
        tally.add("tools/calls_per_leaf", len(calls))
    tally.totals["tools/calls_saved_by_sharing"] += on_paths - in_tree


def _tally_tools(trees: Sequence[RolloutTree], tally: Tally) -> None:
    calls = [call for tree in trees for call in tree.calls()]
    made = [call for call in calls if call.source is not CallSource.REFUSED]
    tally.totals["tools/calls_executed"] += sum(call.source is CallSource.EXECUTED for call in made)
    tally.totals["tools/calls_distinct"] += len({(call.name, repr(sorted(call.arguments.items()))) for call in made})
    tally.totals["tools/calls_shared"] += sum(call.source is CallSource.SHARED for call in made)
    tally.totals["tools/calls_saved_by_cache"] += sum(
        call.source in (CallSource.CACHED, CallSource.JOINED) for call in made
    )
    tally.totals["tools/calls_made"] += len(made)
    tally.totals["tools/refused"] += len(calls) - len(made)
    for call in made:
        tally.add(f"tools/{call.name}/failed", float(not call.ok))
        tally.add(f"tools/{call.name}/timed_out", float(call.failure is ToolFailure.TIMEOUT))
        tally.add(f"tools/{call.name}/degraded", float(call.failure is ToolFailure.DEGRADED))
        tally.add(f"tools/{call.name}/stopped", float(call.failure is ToolFailure.STOPPED))
        tally.add(f"tools/{call.name}/cache_hits", float(call.source is CallSource.CACHED))
        if call.source is CallSource.EXECUTED:
            tally.spread[f"tools/{call.name}/seconds"].append(call.seconds)
