"""Converts the trajectory log to a dataset with one flat row per leaf, for tables and the Hub's viewer."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from arpo_trl.logs.trajectories import LogFile, read_trees

_TEXT, _INTEGER, _NUMBER = pa.string(), pa.int64(), pa.float64()
_MESSAGE = pa.struct({"role": _TEXT, "content": _TEXT, "name": _TEXT})
_CALL = pa.struct(
    {
        **{"name": _TEXT, "arguments": _TEXT, "text": _TEXT, "ok": pa.bool_(), "failure": _TEXT},
        **{"seconds": _NUMBER, "source": _TEXT},
    }
)
TRAJECTORY_SCHEMA = pa.schema(
    {
        **{"step": _INTEGER, "rollout": _TEXT, "rank": _INTEGER, "group": _INTEGER, "leaf": _INTEGER},
        **{"prompt": _TEXT, "completion": pa.list_(_MESSAGE), "reward": _NUMBER, "advantage": _NUMBER},
        **{"stop_reason": _TEXT, "tool_calls": pa.list_(_CALL), "completion_tokens": _INTEGER},
        "shared_with": _INTEGER,
    }
)
SPLITS = {"train": "step", "evaluation": "eval"}
"""Split of the dataset → kind of its log files."""


def export_rows(logs: Sequence[LogFile], folder: Path) -> list[str]:
    """Writes the rows of these log files to `<split>.parquet` in the new `folder`; returns the names of the splits.

    Raises:
        DataError: A file is not a trajectory log.
    """
    folder.mkdir(parents=True)
    splits = []
    for split, kind in SPLITS.items():
        chosen = [log for log in logs if log.kind == kind]
        if chosen:
            with pq.ParquetWriter(folder / f"{split}.parquet", TRAJECTORY_SCHEMA) as writer:
                for log in chosen:
                    writer.write_table(pa.Table.from_pylist(list(leaf_rows(log)), TRAJECTORY_SCHEMA))
            splits.append(split)
    return splits


def leaf_rows(log: LogFile) -> Iterator[dict[str, Any]]:
    """Yields one flat row per leaf of a log file.

    Raises:
        DataError: A line is not a logged tree.
    """
    for logged in read_trees(log.path):
        leaves = logged.tree.leaves()
        for number, (leaf, reward, advantage) in enumerate(logged.scored_leaves()):
            # Below the root there is a turn, which never forks, and then its tool result, at which branches start.
            first = leaf.nodes[min(1, len(leaf.nodes) - 1)].index
            yield {
                "step": logged.step,
                "rollout": log.rollout,
                "rank": log.rank,
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


def dataset_card(repo_id: str, splits: Sequence[str]) -> str:
    """The README.md of a dataset with these splits."""
    files = "".join(f"\n  - split: {split}\n    path: data/{split}.parquet" for split in splits)
    return f"""---
tags: [arpo-trl, agent, tool-use, trajectories]
configs:
- config_name: default
  data_files:{files}
---

# Trajectories

Trajectories that a policy sampled during training with Agentic Reinforced Policy Optimization (`arpo-trl`): one row
per leaf of a tree. Rows with the same `rollout` and `group` answer the same prompt, and `advantage` compares them with
one another. `shared_with` counts the rows of the group, this one included, that share this row's first tool result.

```python
from datasets import load_dataset

trajectories = load_dataset("{repo_id}", split="{splits[0]}")
```
"""
