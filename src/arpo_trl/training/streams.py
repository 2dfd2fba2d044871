"""Streamed datasets: the checks of their rows, and their distribution to ranks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from datasets import IterableDataset
from torch.utils.data import IterableDataset as TorchIterableDataset

from arpo_trl.data.loading import validate_row


def checked_stream(dataset: Any, *, needs_prompt: bool) -> Any:
    """Returns a streamed dataset, or those in a dict, so that each row is checked as it comes; any other value
    unchanged.

    Args:
        needs_prompt: Whether a row without a prompt is an error.
    """

    def checked(row: dict[str, Any], number: int) -> dict[str, Any]:
        if needs_prompt or "prompt" in row:
            validate_row(row, number)
        return row

    if isinstance(dataset, dict):
        return {name: checked_stream(each, needs_prompt=needs_prompt) for name, each in dataset.items()}
    return dataset.map(checked, with_indices=True) if isinstance(dataset, IterableDataset) else dataset


class WholeStream(TorchIterableDataset[Any]):
    """A stream that every rank reads as a whole. accelerate deals its batches to the ranks in turn.

    A `datasets.IterableDataset` with a shard for each rank would be split by shards instead. But TRL repeats rows for
    the batch of all ranks together, so such a rank would get other rows in a batch that repeats an earlier one.

        WholeStream(dataset.to_iterable_dataset(num_shards=2))
    """

    def __init__(self, dataset: IterableDataset) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Any]:
        return iter(self.dataset)

    def set_epoch(self, epoch: int) -> None:
        self.dataset.set_epoch(epoch)
