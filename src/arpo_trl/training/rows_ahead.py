"""Lets a trainer read rows before it trains on them, including rows of later epochs."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain, islice, repeat
from typing import Any

from datasets import Dataset

Rows = list[dict[str, Any]]


class RowsAhead:
    """An iterator over an epoch's micro-batches of rows that can also read later micro-batches.

    Args:
        source: The iterator of the data loader. It is read on demand.
        following: The micro-batches of the later epochs.
        skipped: The number of the epoch's micro-batches before `source`, which the resumed run has already trained.
    """

    def __init__(self, source: Iterator[Rows], following: Iterator[Rows], *, skipped: int = 0):
        self.source = source
        self.trained = 0
        """The number of trained micro-batches, which is the number of the current one."""
        self._following, self._skipped = following, skipped
        self._next = self._read = 0
        self._length: int | None = None
        """The number of micro-batches of `source`; None until its end is known."""
        self._rows: dict[int, Rows] = {}

    def __iter__(self) -> RowsAhead:
        return self

    def __next__(self) -> Rows:
        rows = self.at(self._next)
        if rows is None or self._next == self._length:
            raise StopIteration
        self._next += 1
        return rows

    def at(self, position: int) -> Rows | None:
        """The micro-batch with that number, counted from 0, of this epoch or a later one; None if there is none."""
        while self._read <= position:
            rows = next(self.source, None) if self._length is None else next(self._following, None)
            if rows is None:
                if self._length is not None:
                    return None
                self._length = self._read
                continue
            self._rows[self._read] = rows
            self._read += 1
        return self._rows[position]

    def steps_to(self, position: int, accumulated: int) -> int:
        """Optimizer steps from the current micro-batch to the one at `position`, which `at` has returned.

        Args:
            accumulated: Micro-batches per step. The last step of an epoch may have fewer.
        """

        def step(position: int) -> int:
            position += self._skipped
            if self._length is None:
                return position // accumulated
            epochs, rest = divmod(position, self._length + self._skipped)
            return epochs * -(-(self._length + self._skipped) // accumulated) + rest // accumulated

        return step(position) - step(self.trained)

    def forget_trained(self) -> None:
        """Drop the micro-batches before the current one."""
        for old in [number for number in self._rows if number < self.trained]:
            del self._rows[old]


def later_epochs(dataset: Dataset, sampler: Any, size: int, rank: int, ranks: int) -> Iterator[Rows]:
    """A rank's micro-batches of all epochs after the current epoch of `sampler`, in accelerate's order.

    It draws from a copy of the sampler's generator, and only when the first micro-batch is requested.

    Args:
        sampler: TRL's `RepeatSampler`. Its epochs are multiples of size × ranks rows.
        size: Rows of a micro-batch.
    """
    sampler = copy.copy(sampler)
    if sampler.shuffle:
        sampler.generator = sampler.generator.clone_state()
    numbers = chain.from_iterable(repeat(sampler))
    while batch := list(islice(numbers, size * ranks)):
        yield [dataset[number] for number in batch[rank * size : (rank + 1) * size]]


def epochs_are_known(dataset: Any, accelerator: Any) -> bool:
    """Whether `later_epochs` knows the rows: the dataset is not streamed, and the order is the default."""
    return isinstance(dataset, Dataset) and not (accelerator.dispatch_batches or accelerator.split_batches)
