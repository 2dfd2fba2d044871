"""The trajectory log: each step's trees as JSON lines, enough to rebuild every one of them.

`<output_dir>/trajectories/step-000012-rank0.jsonl`, one tree per line, one file per rollout and rank: writing a step
again after a resume replaces its file, so nothing is doubled. Which trees are kept is drawn from the run's seed.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arpo_trl.errors import DataError, EngineError
from arpo_trl.rollout.branching import BranchDecision
from arpo_trl.rollout.tree import ExecutedCall, Node, NodeKind, RolloutTree, StopReason


@dataclass(frozen=True, slots=True)
class LoggedTree:
    """A tree of a log: with `rewards` and `advantages`, one per leaf in leaf order."""

    step: int
    group: int
    prompt: str
    tree: RolloutTree
    rewards: list[float | None]
    advantages: list[float]


class TrajectoryLog:
    """Writes a seeded sample of the trees, `rate` of them, under `folder`."""

    def __init__(self, folder: Path, rate: float, seed: int, rank: int):
        self.folder, self.rate, self.seed, self.rank = folder, rate, seed, rank

    def write(self, name: str, trees: Sequence[LoggedTree]) -> Path | None:
        """The file written for this rollout, None when the draw kept no tree of it."""
        draw = random.Random(f"{self.seed} {name} {self.rank}")
        kept = [tree for tree in trees if draw.random() < self.rate]
        if not kept:
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}-rank{self.rank}.jsonl"
        partial = path.with_suffix(".partial")
        partial.write_text("".join(json.dumps(_tree_row(tree), ensure_ascii=False) + "\n" for tree in kept), "utf-8")
        partial.replace(path)  # a reader, or a crash, never sees half a file
        return path


def read_trees(path: str | Path) -> Iterator[LoggedTree]:
    """The trees of a log file, rebuilt.

    Raises:
        DataError: A line is not a logged tree; the message names file and line.
    """
    with Path(path).open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            try:
                yield _tree_from(json.loads(line))
            except (LookupError, TypeError, ValueError, AttributeError, EngineError) as error:
                raise DataError(f"{path}, line {number}: not a logged tree ({error!r}).") from error


def leaf_rows(path: Path) -> Iterator[dict[str, Any]]:
    """One flat row per leaf of a log file, as a table or a dataset viewer shows it.

    Raises:
        DataError: A line is not a logged tree.
    """
    rollout, _, rank = path.stem.rpartition("-rank")
    for logged in read_trees(path):
        leaves = logged.tree.leaves()
        for number, (leaf, reward, advantage) in enumerate(
            zip(leaves, logged.rewards, logged.advantages, strict=True)
        ):
            # Below the root come a turn, which nothing forks, and its result, from which branches go.
            first = leaf.nodes[min(1, len(leaf.nodes) - 1)].index
            yield {
                "step": logged.step,
                "rollout": rollout,
                "rank": int(rank),
                "group": logged.group,
                "leaf": number,
                "prompt": logged.prompt,
                "completion": leaf.messages,
                "reward": reward,
                "advantage": advantage,
                "stop_reason": leaf.stop.value,
                "tool_calls": [
                    call.as_row() | {"arguments": json.dumps(call.arguments, ensure_ascii=False)}
                    for call in leaf.calls
                ],
                "completion_tokens": len(leaf.ids),
                "shared_with": sum(any(node.index == first for node in other.nodes) for other in leaves),
            }


def export_rows(logs: Sequence[Path], folder: Path) -> list[str]:
    """The splits, of train and evaluation, that the rows of these log files were written to as `<split>.parquet`."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    text, number = pa.string(), pa.float64()
    message = pa.struct({"role": text, "content": text, "name": text})
    call = pa.struct(
        {"name": text, "arguments": text, "text": text, "ok": pa.bool_(), "failure": text, "seconds": number,
         "source": text}
    )  # fmt: skip
    schema = pa.schema(
        {"step": pa.int64(), "rollout": text, "rank": pa.int64(), "group": pa.int64(), "leaf": pa.int64(),
         "prompt": text, "completion": pa.list_(message), "reward": number, "advantage": number, "stop_reason": text,
         "tool_calls": pa.list_(call), "completion_tokens": pa.int64(), "shared_with": pa.int64()}
    )  # fmt: skip
    folder.mkdir(parents=True)
    splits = []
    for split, start in (("train", "step-"), ("evaluation", "eval-")):
        chosen = [log for log in logs if log.name.startswith(start)]
        if chosen:
            with pq.ParquetWriter(folder / f"{split}.parquet", schema) as writer:
                for log in chosen:
                    writer.write_table(pa.Table.from_pylist(list(leaf_rows(log)), schema))
            splits.append(split)
    return splits


def _tree_row(logged: LoggedTree) -> dict[str, Any]:
    return {
        "step": logged.step,
        "group": logged.group,
        "prompt": logged.prompt,
        "nodes": [_node_row(node) for node in logged.tree.nodes],
        "leaves": [
            {"address": leaf.address, "node": leaf.nodes[-1].index, "reward": reward, "advantage": advantage}
            for leaf, reward, advantage in zip(logged.tree.leaves(), logged.rewards, logged.advantages, strict=True)
        ],
    }


def _node_row(node: Node) -> dict[str, Any]:
    row = dataclasses.asdict(node)
    row.pop("children")
    return {key: value for key, value in row.items() if value not in (None, [])} | {"parent": node.parent}


def _tree_from(row: dict[str, Any]) -> LoggedTree:
    tree = RolloutTree(row["nodes"][0].get("ids", []))
    for node in row["nodes"][1:]:
        if NodeKind(node["kind"]) is NodeKind.TURN:
            grown = tree.add_turn(
                node["parent"], node["ids"], node["text"], node["logprobs"], node.get("entropies", [])
            )
            grown.stop = StopReason(node["stop"]) if "stop" in node else None
        else:
            calls = [ExecutedCall(**call) for call in node.get("calls", [])]
            grown = tree.add_observation(node["parent"], node["ids"], calls, node["text"])
            grown.decision = BranchDecision(**node["decision"]) if "decision" in node else None
    for leaf in row["leaves"]:
        stop = tree.nodes[leaf["node"]].stop
        if stop is None:
            raise ValueError(f"leaf {leaf['address']} never stopped")
        tree.end(leaf["node"], tuple(leaf["address"]), stop)
    rewards = [leaf["reward"] for leaf in row["leaves"]]
    return LoggedTree(
        row["step"], row["group"], row["prompt"], tree, rewards, [leaf["advantage"] for leaf in row["leaves"]]
    )
