"""Finds the rows of a batch that form a tree, and moves the rows of a tree into the same micro-batch.

Shared prefixes save computation only within one forward. TRL shuffles the rows of a generation batch and then splits
it into micro-batches. `deal_trees` redistributes rows among the micro-batches of one optimizer step. This does not
change the step if its loss is a sum over rows.

    # 2 trees of 2 leaves; leaf = tree · 2 + its position in the tree
    # TRL's micro-batches:   leaves 2 1 | 0 3
    # redistributed:         leaves 2 3 | 0 1

Pure: torch and this package's errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from arpo_trl.errors import ConfigError

LEAF = "leaf"
"""The batch's column of leaf numbers (B,), counted tree by tree over the rank's generation batch."""


def leaves_per_tree(prompts: Sequence[Any], size: int, *, branches: bool) -> int:
    """The number of a rank's rows that form one tree.

    Args:
        prompts: One per row, group after group.
        size: Rows per group.
        branches: Whether the rollout branches. This requires each group to be on a single rank. An evaluation does not
            branch, and its groups may be spread over ranks. Then each row is a separate tree.

    Raises:
        ConfigError: A tree would span ranks.
    """
    if len(prompts) % size == 0 and all(prompts[i] == prompts[i - i % size] for i in range(len(prompts))):
        return size
    if not branches:
        return 1
    raise ConfigError(
        f"This rank received {len(prompts)} rows, which is not a multiple of the group size {size}; a tree cannot "
        f"span ranks. Set per_device_train_batch_size × steps_per_generation to a multiple of {size}, and leave "
        "accelerator_config.split_batches false."
    )


def micro_batches_of_one_step(steps_per_generation: int, gradient_accumulation_steps: int) -> int:
    """The largest block size such that every block of micro-batches is within one optimizer step.

    Optimizer steps end at multiples of `gradient_accumulation_steps`, generation batches at multiples of
    `steps_per_generation`. Blocks of the greatest common divisor cross neither boundary.
    """
    return math.gcd(steps_per_generation, gradient_accumulation_steps)


def deal_trees(batches: Sequence[Mapping[str, Any]], size: int, leaves_of_tree: int) -> list[dict[str, Any]]:
    """The micro-batches after moving rows within blocks of `size`, so that trees stay together; without `LEAF`.

    Trees keep the order of their first rows in the block. The rows of a tree are in leaf order, which is the order of
    their addresses: if a tree spans two micro-batches, leaves with a common branch still stay together.

    Args:
        batches: Micro-batches with equal numbers of rows. They contain tensors (B, …), including `LEAF`, lists of B
            values, as TRL splits them, and values without rows (numbers, None), which are equal in all batches of a
            block.
        size: Micro-batches per block, a divisor of their number: `micro_batches_of_one_step`.
        leaves_of_tree: Leaves per tree.
    """
    return [
        batch
        for start in range(0, len(batches), size)
        for batch in _dealt(batches[start : start + size], leaves_of_tree)
    ]


def _dealt(batches: Sequence[Mapping[str, Any]], leaves_of_tree: int) -> list[dict[str, Any]]:
    whole = {name: value for name, value in batches[0].items() if not _has_rows(value)}
    rows = {name: _joined([batch[name] for batch in batches]) for name in batches[0] if name not in whole}
    leaves = rows.pop(LEAF).tolist()
    trees = [leaf // leaves_of_tree for leaf in leaves]
    place = {tree: i for i, tree in enumerate(dict.fromkeys(trees))}
    order = torch.tensor(sorted(range(len(leaves)), key=lambda row: (place[trees[row]], leaves[row])))
    each = len(leaves) // len(batches)
    return [whole | {name: _chosen(value, part) for name, value in rows.items()} for part in order.split(each)]


def _has_rows(value: Any) -> bool:
    return isinstance(value, list) or (torch.is_tensor(value) and value.dim() > 0)


def _joined(parts: Sequence[Any]) -> Any:
    return [value for part in parts for value in part] if isinstance(parts[0], list) else torch.cat(list(parts))


def _chosen(column: Any, rows: torch.Tensor) -> Any:
    return [column[row] for row in rows.tolist()] if isinstance(column, list) else column[rows.to(column.device)]
