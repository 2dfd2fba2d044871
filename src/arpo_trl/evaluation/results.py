"""`results.json`: the aggregated results of a run's samples."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import platform
import statistics
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from arpo_trl.evaluation.benchmarks import SUITES, Benchmark
from arpo_trl.evaluation.metrics import bootstrap, majority, pass_at_k
from arpo_trl.evaluation.samples import Record, lacks_verdict
from arpo_trl.evaluation.scoring import JUDGE, main_metric
from arpo_trl.rewards.answers import MATH, exact_match, math_equal

Groups = dict[int, list[Record]]
"""The finished samples of each question, in order."""
MANY_CALLS = 10
"""Samples with at least this many calls are reported together."""


def summarise(
    benchmark: Benchmark, records: Iterable[Record], *, questions: int, samples: int, seed: int
) -> dict[str, Any]:
    """Return the scores of a benchmark with their intervals, and the cost of its answers.

    Failed samples are excluded from all scores. The score of a question is the mean over its finished samples. pass@k
    covers only questions with all `samples`.

    The judge is asked only about doubtful answers, so a mean without those that lack a verdict would be too high. As
    long as one lacks it, the judge's score is None; `judge_range` is the mean if all of them are wrong, and if all are
    right.
    """
    all_records = sorted(records, key=lambda record: (record["number"], record["sample"]))
    failed = [record for record in all_records if record["error"] is not None]
    good = [record for record in all_records if record["error"] is None]
    summary: dict[str, Any] = {
        "title": benchmark.title,
        "suite": benchmark.suite,
        "scorer": None if benchmark.scorer is None else benchmark.scorer.value,
        "questions": questions,
        "samples": len(good),
        "failed": len(failed),
        "missing": questions * samples - len(all_records),
        "unjudged": sum(map(lacks_verdict, good)),
        "judge_range": _judge_range(good),
        "failures": dict(Counter(record["error"][:200] for record in failed).most_common(5)),
    }
    if not good:
        return summary | {"metric": None, "score": None, "interval": None, "metrics": {}}
    names = list(dict.fromkeys(name for record in good for name in record["scores"]))
    mixed = len({record["task"] for record in good}) > 1
    metric = "accuracy" if mixed else main_metric(benchmark, names)
    groups = _by_question(good)
    metrics = {name: _estimate(_values(groups, name), seed) for name in names}
    if mixed:
        metrics = {"accuracy": _estimate(_values(groups, "accuracy"), seed), **metrics}
    main = metrics[metric]
    return summary | {
        "metric": metric,
        "score": main["mean"],
        "interval": None if main["mean"] is None else [main["low"], main["high"]],
        "metrics": metrics,
        **_over_samples(groups, metric, samples, seed),
        "levels": _levels(groups, metric, seed),
        "by_calls": _by_calls(good, metric),
        "tools": _tools(good),
        "tokens": {kind: _spread([record["tokens"][kind] for record in good]) for kind in good[0]["tokens"]},
        "seconds": _spread([record["seconds"] for record in good]),
        "faults": dict(Counter(record["fault"] or "none" for record in good).most_common()),
        "stops": dict(Counter(record["stop"] for record in good).most_common()),
        "no_answer": sum(record["prediction"] is None for record in good),
    }


def value_of(record: Mapping[str, Any], metric: str) -> float | None:
    """Return a sample's score by `metric`, where "accuracy" is the main score of the sample's task."""
    scores = record["scores"]
    if metric == "accuracy":
        metric = "math" if record["task"] == MATH else "f1"
    value: float | None = scores.get(metric)
    return value


def suites_of(benchmarks: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Return the mean score of each suite over its benchmarks in this run, unless one of them lacks verdicts."""
    found: dict[str, list[float]] = defaultdict(list)
    unjudged = set()
    for summary in benchmarks.values():
        if summary["score"] is not None and summary["suite"] in SUITES:
            found[summary["suite"]].append(summary["score"])
        elif lacks_verdicts(summary):
            unjudged.add(summary["suite"])
    return {name: statistics.fmean(scores) for name, scores in found.items() if name not in unjudged}


def lacks_verdicts(summary: Mapping[str, Any]) -> bool:
    """Return whether the score of a benchmark is the judge's and samples have no verdict."""
    return summary["metric"] == JUDGE and summary["unjudged"] > 0


def provenance() -> dict[str, Any]:
    """Return the versions of the packages that affect results, and the commit if the source is a git checkout."""
    names = ("arpo-trl", "torch", "transformers", "trl", "vllm", "sympy", "peft", "numpy")
    versions = {}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {"versions": {"python": platform.python_version(), **versions}, "git_commit": _git_commit()}


def _git_commit() -> str | None:
    """Return the commit of this source, with "-dirty" if files are modified; None if the source is not in git."""
    here = Path(__file__)

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(here.parent), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", here.name)  # fails in a virtual environment inside another checkout
        return git("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    except (OSError, subprocess.SubprocessError):
        return None


def _by_question(records: Sequence[Record]) -> Groups:
    groups: Groups = defaultdict(list)
    for record in records:
        groups[record["number"]].append(record)
    return groups


def _values(groups: Groups, metric: str) -> list[float]:
    """Return the mean over the samples of each question that has any scored sample; none if a verdict is missing."""
    if metric == JUDGE and any(lacks_verdict(record) for group in groups.values() for record in group):
        return []
    found = (
        [value for record in group if (value := value_of(record, metric)) is not None] for group in groups.values()
    )
    return [statistics.fmean(values) for values in found if values]


def _judge_range(records: Sequence[Record]) -> list[float] | None:
    """Return the lowest and the highest mean that the missing verdicts leave possible; None if none is missing."""
    if not any(map(lacks_verdict, records)):
        return None
    ends = []
    for verdict in (0.0, 1.0):
        decided = [
            {**record, "scores": {**record["scores"], JUDGE: verdict}} if lacks_verdict(record) else record
            for record in records
        ]
        ends.append(statistics.fmean(_values(_by_question(decided), JUDGE)))
    return ends


def _estimate(values: Sequence[float], seed: int) -> dict[str, float | None]:
    return dataclasses.asdict(bootstrap(values, seed)) if values else dict.fromkeys(("mean", "low", "high"))


def _over_samples(groups: Groups, metric: str, samples: int, seed: int) -> dict[str, Any]:
    """Return pass@k for every k ≤ n, and the score of the majority answer."""
    none: dict[str, Any] = {"pass_at_k": {}, "majority": None}
    if samples == 1 or not _values(groups, metric):
        return none
    whole = []
    for group in groups.values():
        values = [value for record in group if (value := value_of(record, metric)) is not None]
        if len(values) == samples:
            whole.append((group, values))
    if not whole:
        return none
    passes = {str(k): statistics.fmean(pass_at_k(values, k) for _, values in whole) for k in range(1, samples + 1)}
    voted = []
    for group, values in whole:
        same = math_equal if group[0]["task"] == MATH else lambda a, b: exact_match(a, [b])
        winner = majority([record["prediction"] for record in group], same)
        voted.append(0.0 if winner is None else values[winner])
    return {"pass_at_k": passes, "majority": _estimate(voted, seed), "questions_with_all_samples": len(whole)}


def _levels(groups: Groups, metric: str, seed: int) -> dict[str, Any]:
    levels: dict[str, Groups] = defaultdict(dict)
    for number, group in groups.items():
        if group[0]["level"] is not None:
            levels[group[0]["level"]][number] = group
    return {
        level: {"questions": len(members), **_estimate(_values(members, metric), seed)}
        for level, members in sorted(levels.items())
    }


def _by_calls(records: Sequence[Record], metric: str) -> list[dict[str, Any]]:
    """Return the mean score for each number of tool calls of a sample; None if a verdict is missing."""
    found: dict[int, list[float | None]] = defaultdict(list)
    for record in records:
        found[min(len(_calls(record)), MANY_CALLS)].append(value_of(record, metric))
    return [
        {
            "calls": f"{MANY_CALLS}+" if calls == MANY_CALLS else str(calls),
            "samples": len(v),
            "score": None if None in v else statistics.fmean(value for value in v if value is not None),
        }
        for calls, v in sorted(found.items())
    ]


def _tools(records: Sequence[Record]) -> dict[str, Any]:
    """Return for each tool its calls, calls per sample, failures, and the seconds of executed calls."""
    calls: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for record in records:
        for call in _calls(record):
            calls[call["name"]].append(call)
    return {
        name: {
            "calls": len(made),
            "per_sample": len(made) / len(records),
            "failures": dict(Counter(call["failure"] for call in made if call["failure"] is not None).most_common()),
            "seconds": _spread([call["seconds"] for call in made if call["source"] == "executed"]),
        }
        for name, made in sorted(calls.items())
    }


def _calls(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [call for step in record["trajectory"] for call in step.get("calls", ())]


def _spread(values: Sequence[float]) -> dict[str, float]:
    """Return the total, mean, median and 95th percentile; empty without values."""
    if not values:
        return {}
    return {
        "total": round(math.fsum(values), 3),
        "mean": round(statistics.fmean(values), 3),
        **{f"p{q}": round(float(np.percentile(values, q)), 3) for q in (50, 95)},
    }
