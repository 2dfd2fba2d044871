"""Sends logged trees to trackio as traces: one per leaf, as the messages of its path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arpo_trl.logs.trajectories import LoggedTree
from arpo_trl.rollout.tree import address_text
from arpo_trl.visible import visible_data

TREES_AT_ONCE = 1
"""The maximum number of trees sent per rollout."""


def leaf_traces(logged: LoggedTree) -> list[dict[str, Any]]:
    """The `messages` and `metadata` of each leaf's trace, in leaf order, with visible characters only."""
    prompt = {"role": "user", "content": logged.prompt}
    traces = []
    for leaf, reward, advantage in logged.scored_leaves():
        metadata = {
            "step": logged.step,
            "group": logged.group,
            "path": address_text(leaf.address),
            "reward": reward,
            "advantage": advantage,
            "stop_reason": leaf.stop.value,
            "tool_calls": len(leaf.calls),
            "tokens": len(leaf.ids),
            "answers": logged.answers,
        }
        traces.append({"messages": [prompt, *leaf.messages], "metadata": metadata})
    return list(visible_data(traces))


def send_traces(trees: Sequence[LoggedTree]) -> None:
    """Sends the first trees to trackio's current run; does nothing without trees."""
    import trackio

    traces = [trackio.Trace(**trace) for tree in trees[:TREES_AT_ONCE] for trace in leaf_traces(tree)]
    if traces:
        trackio.log({"trees": traces, "train/global_step": trees[0].step})
