"""The human-readable reports of a run, `report.md` and `report.html`.

The output of models and tools is untrusted. It is escaped everywhere, and the content security policy of the page
blocks all scripts and requests.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from arpo_trl.common.user_files import read_json, user_path
from arpo_trl.errors import DataError
from arpo_trl.evaluation.results import value_of
from arpo_trl.evaluation.samples import Key, Record
from arpo_trl.visible import visible, visible_data

SHOWN_SAMPLES = 200
"""The samples on one page. The report shows a benchmark's first page and links to the others."""
SHOWN_CHARS = 4000
"""The maximum number of characters of a turn or a tool result on the page."""

METRIC_NAMES = {
    "math": "math equality",
    "judge": "LLM judge",
    "f1": "token F1",
    "f1_paper": "token F1, the paper's",
    "em": "exact match",
    "accuracy": "accuracy by task",
}


@dataclass(frozen=True, kw_only=True)
class SamplePage:
    """One page of a benchmark's samples, in the template's format. `files` are the files of all its pages."""

    benchmark: str
    number: int
    files: list[str]
    samples: list[dict[str, Any]]

    @property
    def file(self) -> str:
        return self.files[self.number]


def sample_pages(records: Mapping[Key, Record], metrics: Mapping[str, str | None]) -> Iterator[SamplePage]:
    """Yield the pages of each benchmark, with failed samples first, then those without a verdict, then wrong ones,
    then the others.

    Each benchmark has at least one page. Page 0 is the report itself.

    Args:
        records: All samples. Those of one page are in memory at a time, if the mapping reads them when they are used.
        metrics: Benchmark → the metric of its score.
    """
    order: dict[str, list[tuple[float, Key]]] = {name: [] for name in metrics}
    for key, record in records.items():
        value = _value(record, metrics)
        place = -1.0 if record["error"] is not None else -0.5 if value is None else value
        order[record["benchmark"]].append((place, key))
    for position, (name, places) in enumerate(order.items()):
        keys = [key for _, key in sorted(places)]
        starts = range(0, max(1, len(keys)), SHOWN_SAMPLES)
        files = ["report.html", *(f"samples-{position + 1}-{number}.html" for number in range(2, len(starts) + 1))]
        for number, start in enumerate(starts):
            shown = [records[key] for key in keys[start : start + SHOWN_SAMPLES]]
            samples = [{**_shortened(record), "value": _value(record, metrics)} for record in shown]
            yield SamplePage(benchmark=name, number=number, files=files, samples=samples)


def _value(record: Record, metrics: Mapping[str, str | None]) -> float | None:
    metric = metrics[record["benchmark"]]
    return None if record["error"] is not None or metric is None else value_of(record, metric)


def html(results: Mapping[str, Any], first_pages: Mapping[str, SamplePage]) -> str:
    """Return the report as an HTML page, with the first page of each benchmark's samples."""
    shown = {visible(name): visible_data(page.samples) for name, page in first_pages.items()}
    pages = {visible(name): page.files for name, page in first_pages.items()}
    return _template("report.html.jinja").render(
        results=visible_data(results), samples=shown, pages=pages, metric_names=METRIC_NAMES
    )


def samples_html(title: str, page: SamplePage) -> str:
    """Return a further page of a benchmark's samples."""
    return _template("samples.html.jinja").render(
        title=visible(title),
        samples=visible_data(page.samples),
        files=page.files,
        current=page.number,
        metric_names=METRIC_NAMES,
    )


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("arpo_trl", "evaluation"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {"score": score, "share": _share}
    return environment.get_template(name)


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
                str(summary["failed"] + summary["missing"] + summary["unjudged"]),
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
    return pipe_table(headings, rows)


def saved_table(folder: str | Path) -> str:
    """Return the Markdown table of the results in `folder`, an output folder of `arpo-trl eval`.

    Raises:
        DataError: The folder contains no results.
    """
    path = user_path(folder, "folder") / "results.json"
    try:
        return "\n".join(table(read_json(path)))
    except (DataError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not a result of `arpo-trl eval` ({type(error).__name__}: {error}). Pass the output folder of "
            "a finished evaluation."
        ) from error


def pipe_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Return the lines of a Markdown table. The first two columns are text, the others are right-aligned."""
    marks = ["---" if i < 2 else "---:" for i in range(len(headings))]
    return ["| " + " | ".join(cells) + " |" for cells in (headings, marks, *rows)]


def p_value(p: float) -> str:
    """Format a p-value with four decimals."""
    return "< 0.0001" if p < 0.0001 else f"{p:.4f}"


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
        lines.append(
            f"- {summary['unjudged']} sample(s) without a verdict of the judge; its score is in "
            f"{interval(summary['judge_range'])}"
        )
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
            text = cut(call["text"]) if step["role"] == "tool" else "(The answer had no room for this result.)"
            short["steps"].append({"role": "tool", "name": call["name"], "failure": call["failure"], "text": text})
    return short


def cut(text: str) -> str:
    """Return the text, or the head and the tail of a text longer than `SHOWN_CHARS`."""
    if len(text) <= SHOWN_CHARS:
        return text
    return f"{text[: SHOWN_CHARS // 2]}\n[… {len(text) - SHOWN_CHARS:,} characters …]\n{text[-SHOWN_CHARS // 2 :]}"


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f}" if whole else "0"
