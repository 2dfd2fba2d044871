"""Comparison of two runs on the same questions: is the difference significant?"""

from __future__ import annotations

import shlex
import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from arpo_trl.common.user_files import expect, read_json, shown, user_path
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.evaluation.metrics import Difference, McNemar, mcnemar, paired_bootstrap
from arpo_trl.evaluation.results import value_of
from arpo_trl.evaluation.samples import Records, lacks_verdict
from arpo_trl.evaluation.scoring import JUDGE
from arpo_trl.logs.picture import literal, save

_SUBJECTS = frozenset(
    "model adapter served_model benchmarks suite data split columns custom skip_bad limit system_prompt".split()
)
"""Settings that name the model or the questions, and `system_prompt`: `system_prompts` has what it leads to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Run B against run A on one benchmark, over the questions in both runs.

    Example: `compare(Path("runs/eval/a"), Path("runs/eval/b"))[0].difference.mean`.

    Attributes:
        benchmark: The name of the benchmark.
        metric: The score that both runs use for it.
        questions: The number of questions in both runs.
        unpaired: The number of questions in only one of the runs.
        other_golds: The number of questions in both runs whose accepted answers differ.
        other_prompts: The number of questions in both runs whose whole prompts differ.
        a: The mean score of run A.
        b: The mean score of run B.
        difference: B − A.
        mcnemar: McNemar's test. A question counts as right if its mean over the samples is at least one half.
    """

    benchmark: str
    metric: str
    questions: int
    unpaired: int
    other_golds: int
    other_prompts: int
    a: float
    b: float
    difference: Difference
    mcnemar: McNemar


def compare(a: str | Path, b: str | Path, *, seed: int = 0) -> list[Comparison]:
    """Return one comparison for each benchmark in both runs.

    Raises:
        DataError: A folder contains no finished run.
        ConfigError: The runs have no benchmark or question in common, or score a benchmark differently, or one has no
            finished sample of a benchmark, or samples of a benchmark that a judge scores have no verdict.
    """
    a, b = user_path(a, "a"), user_path(b, "b")
    results = [_results(folder) for folder in (a, b)]
    shared = [name for name in results[0]["benchmarks"] if name in results[1]["benchmarks"]]
    if not shared:
        raise ConfigError(
            f"The runs have no benchmark in common: {sorted(results[0]['benchmarks'])} in {a}, "
            f"{sorted(results[1]['benchmarks'])} in {b}."
        )
    compared = []
    metrics = {}
    for name in shared:
        ours, theirs = (result["benchmarks"][name]["metric"] for result in results)
        for folder, metric in ((a, ours), (b, theirs)):
            if metric is None:
                raise ConfigError(
                    f"{folder} has no finished sample of {name}; expected at least one. {_resuming(folder)}"
                )
        if ours != theirs:
            raise ConfigError(
                f"{name} is scored by {ours} in {a} and by {theirs} in {b}; expected the same score in both. Evaluate "
                "one of them again with the settings of the other."
            )
        metrics[name] = ours
    questions_a, questions_b = (_questions(folder, metrics) for folder in (a, b))
    for name, metric in metrics.items():
        of_a, of_b = questions_a[name], questions_b[name]
        both = sorted(of_a.keys() & of_b.keys())
        if not both:
            raise ConfigError(f"The runs have no question of {name} in common.")
        values_a, values_b = ([statistics.fmean(of[key].values) for key in both] for of in (of_a, of_b))
        compared.append(
            Comparison(
                benchmark=name,
                metric=metric,
                questions=len(both),
                unpaired=len(of_a) + len(of_b) - 2 * len(both),
                other_golds=sum(of_a[key].golds != of_b[key].golds for key in both),
                # records of older versions have no hash
                other_prompts=sum(len({of_a[key].prompt_hash, of_b[key].prompt_hash} - {None}) == 2 for key in both),
                a=statistics.fmean(values_a),
                b=statistics.fmean(values_b),
                difference=paired_bootstrap(values_a, values_b, seed),
                mcnemar=mcnemar([value >= 0.5 for value in values_a], [value >= 0.5 for value in values_b]),
            )
        )
    return compared


def differing_settings(a: str | Path, b: str | Path) -> list[str]:
    """Return one line for each setting, version and system prompt in which the runs differ, apart from the settings of
    the model and the questions.

    Raises:
        DataError: A folder contains no finished run.
    """
    ours, theirs = (_results(user_path(folder, name)) for folder, name in ((a, "a"), (b, "b")))
    found = []
    for kind in ("settings", "tools", "versions"):
        of_a, of_b = ours.get(kind, {}), theirs.get(kind, {})
        found += [
            f"{name}: {shown(value)} in A, {shown(of_b[name])} in B"
            for name, value in of_a.items()
            if name in of_b and name not in _SUBJECTS and value != of_b[name]
        ]
    if (commit := ours.get("git_commit")) != (other := theirs.get("git_commit")):
        found.append(f"git_commit: {shown(commit)} in A, {shown(other)} in B")
    of_a, of_b = ours.get("system_prompts", {}), theirs.get("system_prompts", {})
    found += [
        f"system prompt of {name}: {shown(of_a[name])} in A, {shown(of_b[name])} in B (whole in results.json)"
        for name in of_a
        if name in of_b and of_a[name] != of_b[name]
    ]
    return found


def draw(comparisons: list[Comparison], names: Sequence[str], path: Path) -> None:
    """Save a plot of each benchmark's difference B − A with its interval."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 1.2 + 0.5 * len(comparisons)), layout="constrained")
    axes = figure.subplots()
    for y, one in enumerate(reversed(comparisons)):
        difference = one.difference
        errors = [[difference.mean - difference.low], [difference.high - difference.mean]]
        certain = difference.low > 0 or difference.high < 0
        axes.errorbar(difference.mean, y, xerr=errors, fmt="o", capsize=4, color="tab:blue" if certain else "grey")
    axes.axvline(0, color="black", linewidth=0.8)
    rows = [literal(f"{one.benchmark} ({one.metric})") for one in reversed(comparisons)]
    axes.set_yticks(range(len(comparisons)), rows)
    axes.set_ylim(-0.5, len(comparisons) - 0.5)
    axes.set_xlabel(literal(f"{names[1]} minus {names[0]}, 95 % interval"))
    save(figure, path, dpi=150)


def _results(folder: Path) -> dict[str, Any]:
    path = folder / "results.json"
    try:
        results = read_json(path)
        described = {f"{kind}?": dict for kind in ("settings", "tools", "versions", "system_prompts")}
        expect(results, {"benchmarks": dict, **described}, str(path))
        for name, summary in results["benchmarks"].items():
            expect(summary, {"metric": str | None}, f"{path}, benchmarks.{name}")
    except DataError as error:
        raise DataError(
            f"{folder} contains no results.json of a finished evaluation: {error} Pass the output folder of "
            "`arpo-trl eval`."
        ) from error
    return dict(results)


@dataclass(frozen=True, slots=True)
class _Question:
    """A question of a run, with the scores of its finished samples."""

    text: str
    golds: frozenset[str]
    prompt_hash: str | None
    values: list[float]


def _questions(folder: Path, metrics: Mapping[str, str]) -> dict[str, dict[tuple[str, int], _Question]]:
    """Return the questions with a score, by benchmark, then by text and occurrence.

    The key of the n-th question with a text is (text, n). So questions with the same text stay apart, and a row that
    only one of the files has leaves the keys of the rows after it as they are.
    """
    found: dict[str, dict[int, _Question]] = {name: {} for name in metrics}
    unjudged: Counter[str] = Counter()
    for record in Records(folder / "samples.jsonl").values():
        name = record["benchmark"]
        if name not in metrics:
            continue
        unjudged[name] += metrics[name] == JUDGE and lacks_verdict(record)
        new = _Question(record["question"], frozenset(record["golds"]), record.get("prompt_hash"), [])
        question = found[name].setdefault(record["number"], new)
        if record["error"] is None and (value := value_of(record, metrics[name])) is not None:
            question.values.append(value)
    for name, count in unjudged.items():
        if count:
            raise ConfigError(
                f"{count} sample(s) of {name} in {folder} have no verdict of the judge; expected one for each. "
                f"{_resuming(folder)}"
            )
    keyed: dict[str, dict[tuple[str, int], _Question]] = {name: {} for name in metrics}
    for name, questions in found.items():
        occurrence: Counter[str] = Counter()
        for _, question in sorted(questions.items()):
            occurrence[question.text] += 1
            if question.values:
                keyed[name][question.text, occurrence[question.text]] = question
    return keyed


def _resuming(folder: Path) -> str:
    return f"Run `arpo-trl eval` with --output {shlex.quote(str(folder))} --resume."
