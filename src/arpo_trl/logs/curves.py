"""The curves over the steps of a run: which logged metrics each panel shows, and their points."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

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
