"""Writes the study's page and figure from the result files, and from the page itself where that has more seeds."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from . import files
from .arms import (
    COIN,
    LEAVES,
    MAIN_BASELINES,
    OF_GOAL,
    PAPER,
    Arm,
    branching,
    compares_rules,
    frozen_arms,
    grpo,
    tabular_arms,
    trained_arms,
)
from .files import Interval, interval, paired
from .frozen import CHECKPOINTS, result_file
from .tabular import Budget
from .task import SCENARIOS

Row = dict[str, Any]
Cells = Sequence[str]
NOT_RUN = "not run"
FIGURE = "study.png"
_GRPO, _HALF = Arm(**grpo(LEAVES)).sampling, Arm(**grpo(LEAVES // 2)).sampling
_COIN = Arm(**branching(COIN)[0]).sampling
_RELATIVE = {
    "calls executed": "tool_calls_executed",
    "calls made": "tool_calls_made",
    "turns in sequence": "turns_in_sequence",
}
"""Columns of part c with ratios to GRPO, and their names in the files."""
_GOAL = f"− {_GRPO}, mean"
_COMPARED: Mapping[str, Callable[[Arm], Arm]] = {
    _GOAL: lambda arm: Arm(**grpo(LEAVES)),
    f"− {_HALF}, same baseline": lambda arm: Arm(**grpo(LEAVES // 2), baseline=arm.baseline),
    f"− {_COIN}, same baseline": lambda arm: Arm(baseline=arm.baseline),
    f"− {PAPER.sampling}, mean": lambda arm: PAPER,
}
"""Columns of part c with differences, and the arm that each arm is compared with."""
_TRAINED_HEADS = ("", "seeds", "accuracy", *_COMPARED, *_RELATIVE)
_OF_A_RUN = ("name", "seed", "planned_steps", "accuracy", "answers", *_RELATIVE.values())
"""The values of a run of part c that are kept next to the page."""
_MET = {True: "met", False: "missed"}
_MATTERS = 0.01
"""A difference of accuracies that matters, as in the goal of part c."""
_MAIN = " and ".join(f'"{name}"' for name in MAIN_BASELINES)

INTRODUCTION = f"""# The study

Which branch rules, credits and baselines improve accuracy or cost, measured in this package. The command below writes
this page from the files of its runs, and keeps the rows that have more seeds than the files. Rows with neither say
"{NOT_RUN}". Differences are paired by seed, with the half width of their 95 % interval (Student's t) and the number of
seeds in parentheses.

```
OMP_NUM_THREADS=1 python -m benchmarks.study a b c --jobs 2
```
"""
GOALS = f"""## Goals

Training: the accuracy is at most .01 below that of {_GRPO} with the mean baseline, and the lower end of the interval
at most .03 below, at ≤ .5 × its executed calls and ≤ 1.1 × its turns in sequence. Tabular: the difference of each rule
from random branches is resolved. This means that its interval does not contain 0, or that it contains no difference of
{_MATTERS} or more.
"""
PART_A = f"""## a. Tabular

A softmax policy over a few states plays the quickstart's task: two look-ups, a computation, an answer. Its accuracy is
exact. All arms take {Budget().steps} steps and execute {Budget().calls_per_step} calls in each, about two groups.
A row compares one rule, credit or baseline with another one, as the mean over all arms that differ in nothing else.
Rules are compared with the credit "soft" and the baselines {_MAIN}, credits with all rules
and these baselines, and baselines with all rules and credits.
"""
PART_B = """## b. Frozen policies

The cosine of one batch's gradient with that of many batches, at three checkpoints of the quickstart's model, and
cos² / (1 − cos²) per executed call. Calls and signal are relative to GRPO with the mean baseline, and means over the
checkpoints. The last row compares two halves of the many batches. Their cosine is far below 1, so the cosines of the
arms are too small, by about the same factor at one checkpoint.

The column of differences compares the credit and the baseline with the credit "soft" and the mean baseline on the same
rollouts, over the batches of all checkpoints. The intervals of different samplings overlap.

All policies come from one cold start, and the intervals are for these policies only: those of another cold start have
other values. The same seed gives another cold start on another CPU, which rounds differently.
"""
PART_C = f"""## c. Training

The quickstart's model on the harder task (`--hard`), from one cold start per seed. Accuracy on 1,000 held-out
questions at temperature 1. Calls and turns in sequence are relative to {_GRPO} with the mean baseline and the same
seed. Calls that are equal and run at the same time are executed once, so fewer calls are executed than made. With
shared calls (`share_calls: history`), so are equal calls after the same calls. This changes no result of these tools,
so such a row repeats the runs of the row without it: their accuracies are equal, or differ because the runs are of two
versions of the package, which round differently. The columns of differences are: the goal; branches against none at
about equal calls; the rule against random branches; the arm against the paper's rule, credit and baseline
({PAPER.name}).

Each difference is between runs from the same cold starts. Rows with different numbers of seeds can come from different
cold starts, so their accuracies must not be compared. `c --seeds 20` trains the main comparison with 20 seeds.
[study.jsonl](study.jsonl) has a line for each run of the last files.
"""
AGAIN = """
The last files have other cold starts, and fewer seeds so far for some rows of the table. Their values:
"""


def write(output: Path, path: Path) -> None:
    """Write the page to `path` and the figure next to it. `output` is the folder of the runs."""
    before = _rows(path.read_text("utf-8")) if path.exists() else {}
    effects = _merged([[name, *map(_shown, found)] for name, found in tabular_effects(output).items()], before)
    of_arms = trained_rows(output)
    of_files = _trained_table(of_arms)
    trained = _merged(of_files, before)
    fewer = [row for row, shown in zip(of_files, trained, strict=True) if row is not shown]
    again = [row for row in _merged([[f"{row[0]}, again", *row[1:]] for row in fewer], before) if _seeds(row) > 1]
    parts = [
        INTRODUCTION,
        GOALS,
        _table(["goal", "found", ""], goals(effects, trained)),
        f"\n![Effects with their 95 % intervals]({FIGURE})\n",
        PART_A,
        _table(["", *SCENARIOS], effects),
        "\n" + PART_B,
        _table(
            ["", *(f"step {step}" for step in CHECKPOINTS), "− soft, mean", "calls executed", "signal per call"],
            _merged(frozen_rows(output), before),
        ),
        "\n" + PART_C,
        _table(_TRAINED_HEADS, trained),
        *([AGAIN, _table(_TRAINED_HEADS, again)] if again else []),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(parts) + "\n", "utf-8")
    if runs := [run for of_arm in of_arms.values() for run in of_arm.values()]:
        lines = [json.dumps({name: run[name] for name in _OF_A_RUN if name in run}) + "\n" for run in runs]
        path.with_suffix(".jsonl").write_text("".join(lines), "utf-8")
    draw(effects, trained, path.parent / FIGURE)


def _rows(text: str) -> dict[tuple[str, int], Cells]:
    """The rows of a page's tables by their first cell and their number of cells, in which the tables differ."""
    rows = [line[2:-2].split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {(row[0], len(row)): row for row in rows}


def _merged(rows: Iterable[Cells], before: Mapping[tuple[str, int], Cells]) -> list[Cells]:
    """The rows, or those of the page before where they have more seeds."""
    pairs = [(row, before.get((row[0], len(row)), row)) for row in rows]
    return [old if _seeds(old) > _seeds(row) else row for row, old in pairs]


def _seeds(row: Cells) -> int:
    """The most seeds that a cell shows, in parentheses or alone; 1 without such a cell, 0 for what has not run."""
    found = [number for cell in row[1:] for number in re.findall(r"^(\d+)$|\((\d+)\)", cell)]
    ran = any(cell not in ("", "0", NOT_RUN) for cell in row[1:])
    return max([int(alone or in_cell) for alone, in_cell in found], default=1) if ran else 0


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---|" + "---:|" * (len(heads) - 1)]
    return "\n".join([*lines, *(f"| {' | '.join(row)} |" for row in rows)])


def _shown(found: Interval | None) -> str:
    return NOT_RUN if found is None else str(found)


# Part a --------------------------------------------------------------------------------------------------------------


def tabular_effects(output: Path) -> dict[str, list[Interval | None]]:
    """The effect of each rule, credit and baseline on the accuracy in each scenario."""
    found = [_tabular_accuracies(output / "a" / files.slug(scenario)) for scenario in SCENARIOS]
    arms = tabular_arms()
    samplings = dict.fromkeys(arm.sampling for arm in arms)
    effects: dict[str, list[Interval | None]] = {}

    def compare(axis: str, names: Iterable[str], base: str, only: Callable[[Arm], bool] = lambda arm: True) -> None:
        pairs = {name: _pairs([arm for arm in arms if only(arm)], axis, name, base) for name in names if name != base}
        effects.update(
            {f"{name} − {base}": [_effect(of, pairs[name]) for of in found] for name in pairs if pairs[name]}
        )

    compare("sampling", samplings, _COIN, compares_rules)
    compare("sampling", [name for name in samplings if name != _GRPO], _HALF, compares_rules)
    compare("credit", dict.fromkeys(arm.credit for arm in arms), "soft", lambda arm: arm.sampling != _GRPO)
    compare("baseline", dict.fromkeys(arm.baseline for arm in arms), "mean")
    return effects


def _tabular_accuracies(folder: Path) -> dict[str, dict[str, float]]:
    """Arm → seed → accuracy."""
    contents = [files.read(path) or {} for path in sorted(folder.glob("*.json"))]
    return {of["arm"]["name"]: {seed: run["accuracy"] for seed, run in of["runs"].items()} for of in contents}


def _pairs(arms: Sequence[Arm], axis: str, name: str, base: str) -> list[tuple[str, str]]:
    """The names of all pairs of arms that differ only on `axis`: `name` and `base`."""
    by_rest: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for arm in arms:
        rest = tuple(getattr(arm, other) for other in ("sampling", "credit", "baseline") if other != axis)
        by_rest[rest][getattr(arm, axis)] = arm.name
    return [(of[name], of[base]) for of in by_rest.values() if name in of and base in of]


def _effect(accuracies: Mapping[str, Mapping[str, float]], pairs: Sequence[tuple[str, str]]) -> Interval | None:
    """The mean difference over the finished pairs, with its interval over their common seeds."""
    run = [(accuracies[ours], accuracies[theirs]) for ours, theirs in pairs if {ours, theirs} <= accuracies.keys()]
    seeds = sorted(set.intersection(*(ours.keys() & theirs.keys() for ours, theirs in run))) if run else []
    return interval([mean(ours[seed] - theirs[seed] for ours, theirs in run) for seed in seeds]) if seeds else None


# Part b --------------------------------------------------------------------------------------------------------------


def frozen_rows(output: Path) -> list[Cells]:
    arms = frozen_arms()
    found = {arm.name: [files.read(result_file(output, step, arm)) for step in CHECKPOINTS] for arm in arms}
    whole, rows = found[Arm(**grpo(LEAVES)).name], list[Cells]()
    for arm in arms:
        of_arm, plain = found[arm.name], replace(arm, credit="soft", baseline="mean")
        cells = [
            NOT_RUN
            if of is None
            else f"{of['cosine']:.3f} ± {math.nan if of['half_width'] is None else of['half_width']:.3f}"
            for of in of_arm
        ]
        difference = "" if arm == plain else _shown(paired(_cosines(of_arm), _cosines(found[plain.name])))
        ratios = [_mean_ratio(of_arm, whole, name) for name in ("calls", "signal_per_call")]
        rows.append([arm.name, *cells, difference, *ratios])
    halves = [files.read(output / "b" / str(step) / "reference.json") for step in CHECKPOINTS]
    cells = [NOT_RUN if of is None else f"{of['cosine_of_halves']:.3f}" for of in halves]
    return [*rows, ["two halves of the reference", *cells, "", "", ""]]


def _cosines(of_arm: Sequence[Row | None]) -> dict[str, float]:
    """Checkpoint and batch → the cosine of the batch. Arms that sample in the same way have the same rollouts."""
    found = zip(CHECKPOINTS, of_arm, strict=True)
    return {f"{step} {i}": cosine for step, row in found if row for i, cosine in enumerate(row["cosines"])}


def _mean_ratio(ours: Sequence[Row | None], theirs: Sequence[Row | None], name: str) -> str:
    """The mean ratio of a value over the checkpoints at which both have it."""
    pairs = [(our[name], their[name]) for our, their in zip(ours, theirs, strict=True) if our and their]
    ratios = [our / their for our, their in pairs if our is not None and their]
    return f"{mean(ratios):.2f}" if ratios else NOT_RUN


# Part c --------------------------------------------------------------------------------------------------------------


def trained_rows(output: Path) -> dict[str, dict[str, Row]]:
    """Arm → seed → its file."""
    found: dict[str, dict[str, Row]] = defaultdict(dict)
    for path in sorted(output.glob("seed*/arms/*.json")):
        row = files.read(path)
        assert row is not None
        found[row["name"]][str(row["seed"])] = row
    return found


def column(rows: Mapping[str, Row], name: str) -> dict[str, float]:
    """Seed → value."""
    return {seed: row[name] for seed, row in rows.items()}


def _ratio(ours: Mapping[str, Row], theirs: Mapping[str, Row], name: str) -> float | None:
    seeds = ours.keys() & theirs.keys()
    return mean(ours[seed][name] / theirs[seed][name] for seed in seeds) if seeds else None


def _trained_table(trained: Mapping[str, Mapping[str, Row]]) -> list[Cells]:
    base = trained.get(Arm(**grpo(LEAVES)).name, {})
    rows: list[Cells] = []
    for arm in trained_arms():
        if not (ours := trained.get(arm.name)):
            rows.append([arm.name, "0", *[NOT_RUN] * (1 + len(_COMPARED) + len(_RELATIVE))])
            continue
        accuracy = column(ours, "accuracy")
        compared = [trained.get(with_(arm).name, {}) for with_ in _COMPARED.values()]
        ratios = [_ratio(ours, base, name) for name in _RELATIVE.values()]
        rows.append(
            [
                arm.name,
                str(len(ours)),
                f"{mean(accuracy.values()):.3f}",
                *("" if ours is of else _shown(paired(accuracy, column(of, "accuracy"))) for of in compared),
                *(NOT_RUN if ratio is None else f"{ratio:.2f}" for ratio in ratios),
            ]
        )
    return rows


# Goals and figure ----------------------------------------------------------------------------------------------------


def goals(effects: Sequence[Cells], trained: Sequence[Cells]) -> list[Cells]:
    """Rows of the goals' table: each trained arm with branches, and each rule of part a against the coin."""
    rows: list[Cells] = []
    for arm, row in zip(trained_arms(), trained, strict=True):
        found, calls, turns = (_cell(row, name) for name in (_GOAL, "calls executed", "turns in sequence"))
        of = files.read_interval(found)
        if arm.roots == arm.leaves or of is None:
            continue
        met = float(calls) <= 0.5 and float(turns) <= 1.1 and of.mean >= -_MATTERS and of.mean - of.half >= -0.03
        rows.append([arm.name, f"{found} at {calls} × the calls, {turns} × the turns", _MET[met]])
    rows = rows or [["arms with branches", NOT_RUN, ""]]
    for name, *shown in effects:
        cell = shown[list(SCENARIOS).index(OF_GOAL)]
        if name.endswith(f" − {_COIN}") and (of := files.read_interval(cell)) is not None:
            rows.append([f"tabular, {OF_GOAL}: {name}", cell, _resolved(of)])
    return rows


def _resolved(of: Interval) -> str:
    if abs(of.mean) > of.half:
        return "resolved"
    return f"resolved: less than {_MATTERS}" if abs(of.mean) + of.half < _MATTERS else "missed"


def _cell(row: Cells, name: str) -> str:
    """The cell of a row of part c in a column."""
    return row[_TRAINED_HEADS.index(name)]


def draw(effects: Sequence[Cells], trained: Sequence[Cells], path: Path) -> None:
    """Save the figure, a panel per part that has run: tabular effects by scenario, trained arms against GRPO."""
    from matplotlib.figure import Figure

    of_scenarios = {
        scenario: {name: files.read_interval(found[number]) for name, *found in effects}
        for number, scenario in enumerate(SCENARIOS)
    }
    against = {row[0]: files.read_interval(_cell(row, _GOAL)) for row in trained}
    panels = {
        "a. Tabular: change of the exact accuracy": of_scenarios,
        f"c. Training: accuracy − {_GRPO}, mean": {"": against},
    }
    run = {title: found for title, series in panels.items() if (found := _with_rows(series))}
    figure = Figure(figsize=(6 * max(len(run), 1), max(4.0, 0.22 * len(effects) + 1)), layout="constrained")
    for number, (title, series) in enumerate(run.items()):
        axes = figure.add_subplot(1, len(run), number + 1)
        for i, (label, of_names) in enumerate(series.items()):
            _intervals(axes, of_names, label, 0.2 * (i - (len(series) - 1) / 2))
        axes.set(title=title)
        if len(series) > 1:
            axes.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=120)


def _with_rows(series: Mapping[str, Mapping[str, Interval | None]]) -> dict[str, Mapping[str, Interval | None]]:
    """The series that have run, with the names that have run in any of them."""
    run = {name for found in series.values() for name, of in found.items() if of is not None}
    return {
        label: {name: of for name, of in found.items() if name in run}
        for label, found in series.items()
        if any(of is not None for of in found.values())
    }


def _intervals(axes: Any, found: Mapping[str, Interval | None], label: str, offset: float) -> None:
    places = {name: len(found) - i for i, name in enumerate(found)}
    known = {name: of for name, of in found.items() if of is not None}
    axes.errorbar(
        [of.mean for of in known.values()],
        [places[name] - offset for name in known],
        xerr=[0.0 if math.isnan(of.half) else of.half for of in known.values()],
        fmt="o",
        markersize=3,
        label=label,
    )
    axes.axvline(0.0, color="grey", linewidth=0.8)
    axes.set_yticks(list(places.values()), list(places), fontsize=7)
