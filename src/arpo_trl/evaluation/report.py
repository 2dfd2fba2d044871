"""The human-readable reports of a run, `report.md` and `report.html`.

The output of models and tools is untrusted. It is escaped everywhere, and the content security policy of the page
blocks all scripts and requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2

from arpo_trl.common.user_files import read_json
from arpo_trl.errors import DataError
from arpo_trl.evaluation.results import value_of
from arpo_trl.evaluation.samples import Record
from arpo_trl.visible import visible, visible_data

SHOWN_SAMPLES = 200
"""The most samples of a benchmark that the page shows. All samples are in samples.jsonl."""
SHOWN_CHARS = 4000
"""The most characters of a turn or a tool result that the page shows."""

METRIC_NAMES = {
    "math": "math equality",
    "judge": "LLM judge",
    "f1": "token F1",
    "f1_paper": "token F1, the paper's",
    "em": "exact match",
    "accuracy": "accuracy by task",
}


class ShownSamples:
    """Collects the first samples of each benchmark for the page, in constant memory."""

    def __init__(self, metrics: Mapping[str, str | None]):
        self._metrics = metrics
        self.by_benchmark: dict[str, list[dict[str, Any]]] = {name: [] for name in metrics}

    def add(self, record: Record) -> None:
        shown = self.by_benchmark[record["benchmark"]]
        metric = self._metrics[record["benchmark"]]
        value = None if record["error"] is not None or metric is None else value_of(record, metric)
        shown.append({**_shortened(record), "value": value})
        if len(shown) > 2 * SHOWN_SAMPLES:
            self._trim(shown)

    def _trim(self, shown: list[dict[str, Any]]) -> None:
        shown.sort(key=lambda record: (record["number"], record["sample"]))
        del shown[SHOWN_SAMPLES:]

    def finished(self) -> dict[str, list[dict[str, Any]]]:
        for shown in self.by_benchmark.values():
            self._trim(shown)
        return self.by_benchmark


def html(results: Mapping[str, Any], samples: Mapping[str, list[dict[str, Any]]]) -> str:
    """Return the report as a self-contained HTML page."""
    results, samples = visible_data(results), visible_data(samples)
    source = files("arpo_trl.evaluation").joinpath("report.html.jinja").read_text("utf-8")
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    environment.filters |= {"score": score, "share": _share}
    return environment.from_string(source).render(
        results=results, samples=samples, metric_names=METRIC_NAMES, shown=SHOWN_SAMPLES
    )


def markdown(results: Mapping[str, Any]) -> str:
    """Return the report as a Markdown document, without samples."""
    results = visible_data(results)
    lines = ["# Evaluation", "", *table(results), ""]
    if results["suites"]:
        lines += ["Suites: " + ", ".join(f"{name} {score(mean)}" for name, mean in results["suites"].items()), ""]
    for name, summary in results["benchmarks"].items():
        lines += [f"## {cell(summary['title'])}", "", *_details(name, summary), ""]
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines += ["## Run", "", f"- versions: {versions}", f"- commit: {results['git_commit']}"]
    lines += [
        f"- {name}: {cell(str(value))}" for name, value in results["settings"].items() if value not in (None, [])
    ]
    return "\n".join(lines) + "\n"


def table(results: Mapping[str, Any]) -> list[str]:
    """Return the lines of a Markdown table with one row per benchmark."""
    rows = []
    for summary in results["benchmarks"].values():
        calls = sum(tool["per_sample"] for tool in summary.get("tools", {}).values())
        rows.append(
            (
                cell(summary["title"]),
                METRIC_NAMES.get(summary["metric"], "—"),
                score(summary["score"]),
                interval(summary["interval"]),
                str(summary["questions"]),
                str(summary["samples"]),
                str(summary["failed"] + summary["missing"]),
                f"{calls:.2f}",
            )
        )
    headings = (
        "benchmark",
        "scored by",
        "score",
        "95 % interval",
        "questions",
        "samples",
        "failed",
        "calls per sample",
    )
    return pipe_table(headings, rows, texts=2)


def saved_table(folder: Path) -> str:
    """Return the Markdown table of the results in `folder`, an output folder of `arpo-trl eval`.

    Raises:
        DataError: The folder holds no results.
    """
    path = folder / "results.json"
    try:
        return "\n".join(table(read_json(path)))
    except (DataError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a result of `arpo-trl eval` ({type(error).__name__}: {error}). Pass the output folder of "
            "a finished evaluation."
        ) from error


def pipe_table(headings: Sequence[str], rows: Iterable[Sequence[str]], *, texts: int) -> list[str]:
    """Return the lines of a Markdown table. The first `texts` columns are text, the others are right-aligned."""
    marks = ["---" if i < texts else "---:" for i in range(len(headings))]
    return ["| " + " | ".join(cells) + " |" for cells in (headings, marks, *rows)]


def score(value: float | None) -> str:
    """Format a score with three decimals; None as a dash."""
    return "—" if value is None else f"{value:.3f}"


def interval(bounds: Iterable[float] | None) -> str:
    """Format an interval; None as a dash."""
    return "—" if bounds is None else " – ".join(map(score, bounds))


def _details(name: str, summary: Mapping[str, Any]) -> list[str]:
    lines = []
    for metric, value in summary["metrics"].items():
        bounds = None if value["low"] is None else (value["low"], value["high"])
        lines.append(f"- {METRIC_NAMES[metric]}: {score(value['mean'])} ({interval(bounds)})")
    if summary.get("pass_at_k"):
        lines.append("- pass@k: " + ", ".join(f"{k}: {score(value)}" for k, value in summary["pass_at_k"].items()))
        lines.append(f"- majority vote: {score(summary['majority']['mean'])}")
    for level, value in summary.get("levels", {}).items():
        lines.append(f"- level {cell(level)}: {score(value['mean'])} on {value['questions']} questions")
    for tool, use in summary.get("tools", {}).items():
        failures = ", ".join(f"{count} {kind}" for kind, count in use["failures"].items()) or "none failed"
        lines.append(f"- {cell(tool)}: {use['calls']} calls, {use['per_sample']:.2f} per sample, {failures}")
    for error, count in summary["failures"].items():
        lines.append(f"- {count} failed: {cell(error)}")
    if summary["unjudged"]:
        lines.append(f"- {summary['unjudged']} samples without a verdict of the judge, left out of the judge's score")
    return lines


def cell(text: str) -> str:
    """Escape untrusted text for Markdown: one line of at most 300 characters, without markup or hidden characters."""
    line = " ".join(visible(text).split())
    return "".join(f"\\{char}" if char in "\\`*_{}[]<>()#+!|~&$" else char for char in line[:300])


def _shortened(record: Record) -> dict[str, Any]:
    short = {key: value for key, value in record.items() if key != "trajectory"}
    short["question"] = cut(record["question"])
    short["steps"] = []
    for step in record.get("trajectory", ()):
        if step["role"] == "assistant" or not step["calls"]:
            short["steps"].append({"role": step["role"], "name": None, "failure": None, "text": cut(step["text"])})
        for call in step.get("calls", ()):
            short["steps"].append(
                {"role": "tool", "name": call["name"], "failure": call["failure"], "text": cut(call["text"])}
            )
    return short


def cut(text: str) -> str:
    """Return the text, or the head and the tail of a text longer than `SHOWN_CHARS`."""
    if len(text) <= SHOWN_CHARS:
        return text
    return f"{text[: SHOWN_CHARS // 2]}\n[… {len(text) - SHOWN_CHARS:,} characters …]\n{text[-SHOWN_CHARS // 2 :]}"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else "0"
