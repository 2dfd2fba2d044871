"""How a batch's rows make trees, and how whole trees get into one micro-batch.

Rows that share a prefix save work only in the same forward. TRL shuffles the rows of a generation batch, then cuts it
into micro-batches. The micro-batches of one optimizer step may be dealt anew: where its loss is a sum over rows, it
does not matter in which micro-batch a row stands.

    # 2 trees of 2 leaves; leaf = tree · 2 + its place in the tree
    # TRL's micro-batches:   leaves 2 1 | 0 3
    # dealt:                 leaves 2 3 | 0 1

Pure: torch and our errors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from arpo_trl.errors import ConfigError

LEAF = "leaf"
"""The column of a batch that tells its rows' leaves (B,), numbered tree by tree over the rank's generation batch."""


def leaves_per_tree(prompts: Sequence[Any], size: int, *, branches: bool) -> int:
    """How many of a rank's rows make one tree.

    Args:
        prompts: Of the rows in order, group after group.
        size: The rows of a group.
        branches: Whether the rollout branches, so that a tree needs its whole group. Evaluation does not, and its
            groups may lie on several ranks: each row is then a tree of its own.

    Raises:
        ConfigError: A tree would span ranks.
    """
    if len(prompts) % size == 0 and all(prompts[i] == prompts[i - i % size] for i in range(len(prompts))):
        return size
    if not branches:
        return 1
    raise ConfigError(
        f"This rank was dealt {len(prompts)} rows that are no whole groups of {size}; a tree cannot span ranks. "
        f"Set per_device_train_batch_size × steps_per_generation to a multiple of {size}, and leave "
        "accelerator_config.split_batches false."
    )


def micro_batches_of_one_step(steps_per_generation: int, gradient_accumulation_steps: int) -> int:
    """How many micro-batches in a row surely belong to one optimizer step, from any multiple of that number on.

    Optimizer steps end at multiples of `gradient_accumulation_steps`, generation batches at multiples of
    `steps_per_generation`. Blocks of their greatest common divisor cross neither.
    """
    return math.gcd(steps_per_generation, gradient_accumulation_steps)


def deal_trees(batches: Sequence[Mapping[str, Any]], size: int, leaves_of_tree: int) -> list[dict[str, Any]]:
    """The micro-batches, in blocks of `size` whose rows are dealt anew so that trees stand together; without `LEAF`.

    Trees come in the order of their first rows in the block, rows of a tree in leaf order, that is by address:
    where a tree does not fit, what branched off together stays together.

    Args:
        batches: Micro-batches of equally many rows: tensors (B, …), of which `LEAF` is one, and values without rows
            (numbers, None), of which a block's first batch has those of all.
        size: Micro-batches in a block, a divisor of their number: `micro_batches_of_one_step`.
        leaves_of_tree: How many leaves share a tree.
    """
    return [
        batch
        for start in range(0, len(batches), size)
        for batch in _dealt(batches[start : start + size], leaves_of_tree)
    ]


def _dealt(batches: Sequence[Mapping[str, Any]], leaves_of_tree: int) -> list[dict[str, Any]]:
    whole = {name: value for name, value in batches[0].items() if not _has_rows(value)}
    rows = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0] if name not in whole}
    leaves = rows.pop(LEAF).tolist()
    trees = [leaf // leaves_of_tree for leaf in leaves]
    place = {tree: i for i, tree in enumerate(dict.fromkeys(trees))}
    order = torch.tensor(sorted(range(len(leaves)), key=lambda row: (place[trees[row]], leaves[row])))
    each = len(leaves) // len(batches)
    return [whole | {name: value[part.to(value.device)] for name, value in rows.items()} for part in order.split(each)]


def _has_rows(value: Any) -> bool:
    return torch.is_tensor(value) and value.dim() > 0
