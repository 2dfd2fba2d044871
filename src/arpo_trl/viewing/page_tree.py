"""A logged tree as data for the page: what the list of groups shows, and the tree itself as JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Any

from arpo_trl.logs.metrics import branches
from arpo_trl.logs.trajectories import LogFile, LoggedTree
from arpo_trl.rollout.rules.base import mean
from arpo_trl.rollout.tree import Node, NodeKind, address_text
from arpo_trl.visible import visible_data

PROMPT_CHARS = 400
"""The number of characters of a prompt's end in the list of groups."""


@dataclass(frozen=True, slots=True)
class PageTree:
    """A tree on the page: its `summary` and its data as `json`, which is much smaller than the tree itself."""

    summary: dict[str, Any]
    json: str

    @classmethod
    def of(cls, file: LogFile, number: int, logged: LoggedTree) -> PageTree:
        """The tree with this number in the file."""
        return cls(summary(file, number, logged), as_json(tree_data(logged)))

    @property
    def leaves(self) -> int:
        return len(self.summary["rewards"])


def as_json(value: Any) -> str:
    r"""The value as JSON for a script element: visible characters only, and `<` as \u003c."""
    value = visible_data(value)
    try:
        text = _dumped(value)
    except ValueError:  # NaN or infinity in the arguments of a call: JavaScript cannot parse them
        text = _dumped(json.loads(json.dumps(value), parse_constant=str))
    return text.replace("<", "\\u003c")


def _dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def summary(file: LogFile, number: int, logged: LoggedTree) -> dict[str, Any]:
    """The values that the list of groups shows, filters by and sorts by."""
    tree = logged.tree
    calls = tree.calls()
    return {
        "key": f"{file.path.name}:{number}",
        "file": file.path.name,
        "kind": file.kind,
        "step": logged.step,
        "group": logged.group,
        "prompt": logged.prompt[-PROMPT_CHARS:],
        "rewards": [_rounded(reward) for reward in logged.rewards],
        "branches": branches(tree),
        "calls": len(calls),
        "failed": sum(not call.ok for call in calls),
        "tokens": sum(len(node.ids) for node in tree.turns()),
        "highest": _rounded(max((mean(node.entropies) for node in tree.turns()), default=0.0)),
    }


def tree_data(logged: LoggedTree) -> dict[str, Any]:
    """A tree as data for the page: texts, counts of tokens, entropies, decisions, calls and outcomes."""
    tree = logged.tree
    ends = {
        leaf.nodes[-1].index: {
            "address": leaf.address,
            "reward": _rounded(reward),
            "advantage": _rounded(advantage),
            "tokens": len(leaf.ids),
        }
        for leaf, reward, advantage in logged.scored_leaves()
    }
    writers = {node: address_text(address) for node, address in tree.writers().items()}
    return {
        "prompt": logged.prompt,
        "prompt_tokens": len(tree.root.ids),
        "answers": logged.answers,
        "rule": dict(logged.rule),
        "leaf_tokens": sum(end["tokens"] for end in ends.values()),
        "nodes": [_node_data(node, logged) | {"end": ends.get(node.index), "path": writers.get(node.index)}
                  for node in tree.nodes],
    }  # fmt: skip


def _node_data(node: Node, logged: LoggedTree) -> dict[str, Any]:
    data: dict[str, Any] = {"parent": node.parent, "kind": node.kind.value, "tokens": len(node.ids)}
    if not node.calls:
        data["text"] = node.text  # that of an observation otherwise repeats the texts of its calls
    if node.index in logged.spans:
        start, end = logged.spans[node.index]
        data["span"] = [round(start, 3), round(end, 3)]
    if node.kind is NodeKind.TURN:
        data["entropies"] = [_rounded(entropy) for entropy in node.entropies]
        data["stop"] = None if node.stop is None else node.stop.value
    if node.unread:
        data["unread"] = [call.name for call in node.unread]
    if node.calls:
        data["calls"] = [{**call.as_row(), "seconds": round(call.seconds, 3)} for call in node.calls]
    if node.decision is not None:
        data["decision"] = {
            name: value if isinstance(value, int | str) else _rounded(value, 7)
            for name, value in dataclasses.asdict(node.decision).items()
        }
    return data


def _rounded(value: float | None, digits: int = 5) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, digits)
