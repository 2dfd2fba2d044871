"""The parts of a quickstart task, and helpers for its files."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from arpo_trl.common.user_files import json_lines
from arpo_trl.rollout.tree import RolloutTree

N_TRAIN, N_HELDOUT, N_WATCHED = 2400, 600, 96
"""Numbers of rows: for training, for the accuracy before and after, and for evaluation during training (a subset of
the latter)."""
SFT_BATCH = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A model's answers to the held-out rows: one tree, which is a single path, and one score in [0, 1] for each row,
    in the rows' order."""

    trees: Sequence[RolloutTree]
    scores: Sequence[float]

    @property
    def accuracy(self) -> float:
        """The mean score."""
        return fmean(self.scores)


class Measure(Protocol):
    """Samples one answer of the model in a folder to each held-out row in the folder `data`."""

    def __call__(self, model: Path, data: Path, seed: int, *, temperature: float) -> Measured: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task of the quickstart.

    Attributes:
        prepare: Writes into a folder, for a seed: demonstrations.jsonl, train.jsonl, heldout.jsonl, watched.jsonl and
            the untrained model `base`.
        measure: Samples and scores answers to heldout.jsonl.
        tools: The tools after whose results the report shows entropies.
        cold_start: Flags of stage 1, in addition to those of every task.
        script: The program of stage 2: one of `arpo_trl.scripts`, or the full name of another module.
        config: The settings of stage 2.
        accuracy: The metric of stage 2 with the accuracy on watched.jsonl.
        flags: Flags of stage 2 for a folder of data, in addition to those of every task.
    """

    prepare: Callable[[Path, int], None]
    measure: Measure
    tools: tuple[str, ...]
    cold_start: tuple[str, ...] = ()
    script: str
    config: Path
    accuracy: str
    flags: Callable[[Path], Sequence[str]] = lambda data: ()


def split_rows(rows: Sequence[dict[str, Any]], n_heldout: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return training and held-out rows, which are the first of `rows`, and give each an `id`."""
    heldout, train = list(rows[:n_heldout]), list(rows[n_heldout:])
    for name, split in (("train", train), ("heldout", heldout)):
        for number, row in enumerate(split):
            row["id"] = f"{name}-{number}"
    return train, heldout


def write_inputs(
    folder: Path,
    train: Sequence[Mapping[str, Any]],
    heldout: Sequence[Mapping[str, Any]],
    demonstrations: Iterable[Mapping[str, Any]],
) -> None:
    """Write the files of rows that `Task.prepare` names."""
    folder.mkdir(parents=True, exist_ok=True)
    write_lines(folder / "train.jsonl", train)
    write_lines(folder / "heldout.jsonl", heldout)
    write_lines(folder / "watched.jsonl", heldout[:N_WATCHED])
    write_lines(folder / "demonstrations.jsonl", demonstrations)


def like_lengths_together(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Return the rows, reordered so that each batch of `SFT_BATCH` has similar lengths: a quarter less padding.

    The batches stay in random order. With transformers' `group_by_length` they would not, and this model would learn
    much less.
    """
    size, window, rng = SFT_BATCH, 50 * SFT_BATCH, random.Random(seed)
    batches = []
    for start in range(0, len(rows), window):
        near = sorted(rows[start : start + window], key=lambda row: sum(len(m["content"]) for m in row["messages"]))
        batches += [near[i : i + size] for i in range(0, len(near), size)]
    rng.shuffle(batches)
    return [row for batch in batches for row in batch]


def write_lines(path: Path, rows: Iterable[str | Mapping[str, Any]]) -> None:
    """Write one JSON value per line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def read_lines(path: str | Path) -> list[Any]:
    """Return the JSON values of a file with one per line."""
    return [value for _, value in json_lines(Path(path))]
