"""One self-contained page that shows a run: its curves, its groups and their trees.

The page contains all data as JSON: one block for the index, and one per tree, which the page parses when the tree is
opened. Text of models and tools is untrusted. It is embedded as JSON without any `<`, and the script inserts it into
the document only as text. The content security policy allows only the page's own script, by its hash. It allows no
requests, except to the page's own server for a live run.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from importlib.resources import files
from typing import Any

import jinja2

from arpo_trl.logs.trajectories import LoggedTree
from arpo_trl.rollout.rules.base import mean
from arpo_trl.rollout.tree import Node, NodeKind, address_text
from arpo_trl.viewing.curves import PANELS, curves, whole_history
from arpo_trl.viewing.run import LogFile, RunReader
from arpo_trl.visible import visible, visible_data

MAX_LEAVES = 20_000
"""The default maximum number of leaves on a page. The newest steps come first."""
PROMPT_CHARS = 400
"""The number of characters of a prompt's end in the list of groups."""


def page(reader: RunReader, *, live: bool = False, max_leaves: int = MAX_LEAVES) -> str:
    """The page of the run as HTML. `live`: the page requests updates from its own server."""
    chosen, left_out = newest(reader.trees(), max_leaves)
    index = index_of(reader) | {"left_out": left_out, "live": live}
    trees = [(key_of(file, number), tree) for file, number, tree in chosen]
    index["groups"] = [summary(file, number, tree) for file, number, tree in chosen]
    source = files("arpo_trl.viewing")
    script = source.joinpath("page.js").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    return environment.from_string(source.joinpath("page.html.jinja").read_text("utf-8")).render(
        title=visible(index["name"]),
        style=source.joinpath("page.css").read_text("utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        live=live,
        index=as_json(index),
        trees=[(key, as_json(tree_data(tree))) for key, tree in trees],
    )


def changes(reader: RunReader, after: int, max_leaves: int) -> dict[str, Any]:
    """The changes since the revision `after`: index, existing files, and new groups with their trees. Without changes
    only the revision."""
    if after == reader.revision:
        return {"revision": after}
    chosen, left_out = newest(reader.trees(), max_leaves)
    if after > reader.revision:  # that of a server on which the clock was ahead
        after = 0
    new = [(file, number, tree) for file, number, tree in chosen if reader.files[file][0] > after]
    return index_of(reader) | {
        "left_out": left_out,
        "files": [file.path.name for file in sorted(reader.files)],
        "groups": [summary(file, number, tree) | {"tree": tree_data(tree)} for file, number, tree in new],
    }


def newest(
    trees: Mapping[LogFile, Sequence[LoggedTree]], max_leaves: int
) -> tuple[list[tuple[LogFile, int, LoggedTree]], int]:
    """The newest trees, at least one, with at most `max_leaves` leaves in total, each with its file and its number in
    it, in the order of the files; and the number of omitted trees."""
    every = [(file, number, tree) for file, of_file in trees.items() for number, tree in enumerate(of_file)]
    start, leaves = len(every), 0
    while start and (leaves + len(every[start - 1][2].rewards) <= max_leaves or not leaves):
        start -= 1
        leaves += len(every[start][2].rewards)
    return every[start:], start


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


def key_of(file: LogFile, number: int) -> str:
    """The name of a tree in its page."""
    return f"{file.path.name}:{number}"


def index_of(reader: RunReader) -> dict[str, Any]:
    """Name, revision and curves of the run."""
    return _index_at(reader, reader.revision)


@lru_cache(maxsize=1)  # one computation for all pages that a server updates
def _index_at(reader: RunReader, revision: int) -> dict[str, Any]:
    by_step: dict[int, list[LoggedTree]] = {}
    for file, trees in reader.trees().items():
        if file.kind == "step":
            by_step.setdefault(file.step, []).extend(trees)
    history, first_of_trees = whole_history(reader.history, by_step)
    drawn = [(panel, curves(panel, history)) for panel in PANELS]
    return {
        "name": reader.run.resolve().name if reader.run.name in ("", ".", "..") else str(reader.run),
        "revision": revision,
        "trees_from": first_of_trees,
        "panels": [
            {"title": panel.title, "unit": panel.unit, "note": panel.note, "lines": lines}
            for panel, lines in drawn
            if lines
        ],
    }


def summary(file: LogFile, number: int, logged: LoggedTree) -> dict[str, Any]:
    """The values that the list of groups shows, filters by and sorts by."""
    tree = logged.tree
    calls = tree.calls()
    return {
        "key": key_of(file, number),
        "file": file.path.name,
        "kind": file.kind,
        "step": logged.step,
        "group": logged.group,
        "prompt": logged.prompt[-PROMPT_CHARS:],
        "rewards": [_rounded(reward) for reward in logged.rewards],
        "branches": sum(max(0, len(node.children) - 1) for node in tree.observations()),
        "calls": len(calls),
        "failed": sum(not call.ok for call in calls),
        "tokens": sum(len(node.ids) for node in tree.turns()),
        "highest": _rounded(max((mean(node.entropies) for node in tree.turns()), default=0.0)),
    }


def tree_data(logged: LoggedTree) -> dict[str, Any]:
    """A tree as data for the page: texts, counts of tokens, entropies, decisions, calls and outcomes."""
    tree = logged.tree
    leaves = tree.leaves()
    ends = {
        leaf.nodes[-1].index: {
            "address": leaf.address,
            "reward": _rounded(reward),
            "advantage": _rounded(advantage),
            "tokens": len(leaf.ids),
        }
        for leaf, reward, advantage in zip(leaves, logged.rewards, logged.advantages, strict=True)
    }
    writers = {node: address_text(address) for node, address in tree.writers().items()}
    return {
        "prompt": logged.prompt,
        "prompt_tokens": len(tree.root.ids),
        "answers": logged.answers,
        "rule": dict(logged.rule),
        "leaf_tokens": sum(len(leaf.ids) for leaf in leaves),
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
