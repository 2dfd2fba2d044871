"""Curves over the steps of a run: from its logged metrics or, without them, from its logged trees."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from arpo_trl.logs.metrics import Tally, tally_trees
from arpo_trl.logs.trajectories import LoggedTree

Points = list[tuple[int, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Panel:
    """A picture with several lines: logged metric → label. `patterns` add a line for each metric that matches.

    A label of a pattern may contain `{}` for the part of the metric's name in parentheses.
    """

    name: str
    title: str
    unit: str
    lines: Mapping[str, str] = field(default_factory=dict)
    patterns: Mapping[str, str] = field(default_factory=dict)
    note: str = ""


PANELS = (
    Panel(
        name="reward",
        title="Reward and accuracy",
        unit="mean",
        lines={
            "reward": "reward (training)", "arpo/accuracy": "accuracy (training)",
            "eval_reward": "reward (held out)", "eval_arpo/accuracy": "accuracy (held out)",
        },
        note="The reward may exceed the accuracy because of the tool bonus, and be below it because of the penalty "
             "for a bad format. Training and held-out questions differ.",
    ),
    Panel(
        name="entropy",
        title="Entropy after each tool",
        unit="nats per token",
        lines={"arpo/entropy/root": "at the root"},
        patterns={r"arpo/entropy/after_(.+)": "after {}"},
        note="Mean over the first k tokens of a turn, at the root or after a tool's result.",
    ),
    Panel(
        name="tools",
        title="Tool calls",
        unit="calls per leaf, share",
        lines={"arpo/tools/calls_per_leaf": "calls per leaf"},
        patterns={r"arpo/tools/(.+)/failed": "share of {} that failed"},
        note="Calls on the path of a leaf.",
    ),
    Panel(
        name="sharing",
        title="Shape of the trees",
        unit="per prompt",
        lines={
            "arpo/tree/branches": "branches", "arpo/tree/topups": "top-ups",
            "arpo/tree/sharing_ratio": "leaf tokens per sampled token",
        },
        note="A branch is an extra turn under a tool result. A top-up starts at the root instead.",
    ),
    Panel(
        name="phases",
        title="Time of a step",
        unit="seconds",
        lines={
            "arpo/time/decode_s": "decode", "arpo/time/tool_wait_s": "waiting for tools",
            "arpo/time/sync_s": "weights", "arpo/time/reward_s": "rewards",
            "arpo/time/logprobs_s": "logprobs", "arpo/time/update_s": "update",
        },
        note="Seconds per rollout and rank; the update is one training step without generation.",
    ),
)  # fmt: skip


def curves(panel: Panel, history: Iterable[Mapping[str, Any]]) -> dict[str, Points]:
    """Label → points (step, value) of the panel's lines with values in `history`."""
    rows = [row for row in history if isinstance(row.get("step"), int)]
    labels = dict(panel.lines)
    for key in sorted({key for row in rows for key in row}):
        for pattern, label in panel.patterns.items():
            if match := re.fullmatch(pattern, key):
                labels[key] = label.format(match[1])
    found = {
        label: [
            (row["step"], float(row[key]))
            for row in rows
            if isinstance(row.get(key), int | float) and abs(row[key]) <= sys.float_info.max
        ]
        for key, label in labels.items()
    }
    return {label: points for label, points in found.items() if points}


def whole_history(
    logged: Sequence[Mapping[str, Any]], tallies: Mapping[int, Sequence[Tally]]
) -> tuple[list[Mapping[str, Any]], int | None]:
    """The log history, continued by the tallies of logged trees for later steps, and the first of these later steps.

    A running run has saved its log history only up to its newest checkpoint. The step is None if nothing is added.
    """
    last = last_step(logged)
    # A rollout at step s, counted from 0, appears in the history at step s + 1.
    later = {step + 1: of_step for step, of_step in tallies.items() if step >= last}
    return [*logged, *history_of_tallies(later)], min(later, default=None)


def last_step(history: Iterable[Mapping[str, Any]]) -> int:
    """The last training step in the log history; 0 if there is none."""
    return max((row["step"] for row in history if "reward" in row), default=0)


def tally_logged(logged: LoggedTree, tally: Tally) -> None:
    """Counts a logged tree and its rewards into `tally`."""
    tally_trees([logged.tree], tally)
    for reward in logged.rewards:
        if reward is not None:
            tally.add("reward", reward)


def history_of_tallies(tallies: Mapping[int, Sequence[Tally]]) -> list[dict[str, Any]]:
    """The metrics from the tallies of each training step, one row per step.

    The rows have the names of the log history. They cover a sample of the trees, and no times, accuracies or top-ups.
    """
    rows = []
    for step, of_step in sorted(tallies.items()):
        values = Tally.merged(tally.plain() for tally in of_step).values()
        rows.append({"step": step} | {name if name == "reward" else f"arpo/{name}": values[name] for name in values})
    return rows
