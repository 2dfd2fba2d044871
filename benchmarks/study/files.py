"""Files of results, one per arm and seed or one with a row for each; paired confidence intervals."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from arpo_trl.common.files import write_whole
from arpo_trl.common.user_files import json_lines

_T_975 = tuple(
    map(
        float,
        "12.706 4.303 3.182 2.776 2.571 2.447 2.365 2.306 2.262 2.228 2.201 2.179 2.160 2.145 2.131 2.120 2.110 2.101 "
        "2.093 2.086 2.080 2.074 2.069 2.064 2.060 2.056 2.052 2.048 2.045".split(),
    )
)
"""Student's t at 0.975, for 1, 2, … degrees of freedom."""


_SHOWN = re.compile(r"([+-]\d+\.\d+)(?: ± (\d+\.\d+))? \((\d+)\)")


@dataclass(frozen=True, slots=True)
class Interval:
    """A mean of `n` values with the half width of its 95 % interval; NaN for one value."""

    mean: float
    half: float
    n: int

    def __str__(self) -> str:
        half = "" if math.isnan(self.half) else f" ± {self.half:.3f}"
        return f"{self.mean:+.3f}{half} ({self.n})"


def read_interval(text: str) -> Interval | None:
    """The interval that a text shows; None if it shows none."""
    if (found := _SHOWN.fullmatch(text)) is None:
        return None
    mean_, half, n = found.groups()
    return Interval(float(mean_), math.nan if half is None else float(half), int(n))


def interval(values: Sequence[float]) -> Interval:
    """The mean of independent values and its 95 % interval by Student's t."""
    n = len(values)
    if n < 2:
        return Interval(values[0], math.nan, n)
    t = _T_975[n - 2] if n - 2 < len(_T_975) else 1.96
    return Interval(mean(values), t * stdev(values) / math.sqrt(n), n)


def paired(ours: Mapping[str, float], theirs: Mapping[str, float]) -> Interval | None:
    """The mean of ours − theirs over the seeds, or other keys, that both have, with its interval; None without such a
    key."""
    keys = sorted(ours.keys() & theirs.keys())
    return interval([ours[key] - theirs[key] for key in keys]) if keys else None


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(content, indent=1) + "\n")


def read(path: Path) -> dict[str, Any] | None:
    """The content of a file; None if there is none."""
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def rows_in(path: Path) -> list[dict[str, Any]]:
    """The rows that `append` has written; none if there is no file."""
    return [row for _, row in json_lines(path)] if path.exists() else []


def append(path: Path, row: Mapping[str, Any]) -> None:
    """Append one JSON value as a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def slug(name: str) -> str:
    """A name as part of a file's name."""
    return "".join(char if char.isalnum() or char in ".-" else "_" for char in name)
