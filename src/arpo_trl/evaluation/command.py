"""The commands `arpo-trl eval` and `arpo-trl compare`, after parsing of their settings."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from arpo_trl.common.files import write_whole
from arpo_trl.common.user_files import check_picture, repeated, short_names, user_path
from arpo_trl.data.prompts import default_system_prompt
from arpo_trl.errors import ConfigError, DataError, EngineError
from arpo_trl.evaluation import report, self_check
from arpo_trl.evaluation.benchmarks import (
    BENCHMARKS,
    Benchmark,
    Questions,
    custom_benchmark,
    find_benchmarks,
    load_dataset_questions,
    load_questions,
    local_benchmarks,
    suite,
)
from arpo_trl.evaluation.comparison import compare, differing_settings, draw
from arpo_trl.evaluation.engines import fingerprint, load_tokenizer, make_sampler
from arpo_trl.evaluation.results import provenance, suites_of, summarise
from arpo_trl.evaluation.runner import Evaluator, RunFolder, run_benchmark
from arpo_trl.evaluation.samples import Record, Records, counted, lacks_verdict
from arpo_trl.evaluation.scoring import main_metric
from arpo_trl.evaluation.settings import EvalSettings
from arpo_trl.logs.progress import show_log
from arpo_trl.options import ProtocolKind
from arpo_trl.rewards.judge import LLMJudge
from arpo_trl.rollout.engines.base import lacks_embedding
from arpo_trl.rollout.engines.completions import CompletionsEngine
from arpo_trl.tools.builtin import ToolArguments, build_tools
from arpo_trl.tools.toolbox import ToolBox
from arpo_trl.visible import get_logger, visible

logger = get_logger(__name__)

DONE, SOME_FAILED = 0, 1


def evaluate(settings: EvalSettings, tool_arguments: ToolArguments) -> int:
    """Run the evaluation described by `settings`, print the table, and return the exit status.

    Raises:
        ArpoError: The settings, the data or the model cannot be used. Raised before the first sample.
    """
    show_log()
    console = Console()
    if settings.list_benchmarks:
        console.print(_registry_table())
        return DONE
    if settings.self_check:
        return _self_check(load_all(settings), settings, console)
    if settings.output is not None:
        return _evaluated(settings, tool_arguments, user_path(settings.output, "output"), console)
    output = _new_folder(settings)
    try:
        return _evaluated(settings, tool_arguments, output, console)
    finally:
        with contextlib.suppress(OSError):  # something was written
            output.rmdir()


def _evaluated(settings: EvalSettings, tool_arguments: ToolArguments, output: Path, console: Console) -> int:
    tools = cache(partial(build_tools, tool_arguments, run=str(output)))
    tags = settings.tool_protocol == ProtocolKind.TAGS
    chosen = load_all(settings, partial(default_system_prompt, tool_arguments.offered, tools, tags=tags))
    judge = None
    if settings.judge_url is not None and settings.judge_model is not None:
        judge = LLMJudge(settings.judge_url, settings.judge_model, cache=settings.judge_cache)
    tokenizer = load_tokenizer(settings)
    with ToolBox(tools(), timeout_s=settings.tool_timeout_s, concurrency=settings.tool_concurrency) as toolbox:
        for name in settings.call_limits():
            if name not in toolbox.names and name not in ("python", "search"):  # the defaults may have no such tool
                raise ConfigError(
                    f"tool_call_limits names {name!r}, but the tools are {list(toolbox.names)}. Remove it, or add the "
                    "tool."
                )
        sampler = make_sampler(settings, toolbox, tokenizer)
        _check_template(sampler, chosen)
        evaluator = Evaluator(
            sampler, samples=settings.samples, seed=settings.seed, concurrency=settings.concurrency, judge=judge
        )
        described = describe(settings, tool_arguments, toolbox.names)
        if isinstance(sampler.engine, CompletionsEngine):
            described["settings"]["served_model"] = sampler.engine.model
        identity = {**described, "questions": {each.benchmark.name: each.fingerprint for each in chosen}}
        with RunFolder(output, identity, resume=settings.resume) as folder:
            ended_early = _run_all(evaluator, chosen, folder)
            results = write_results(output, described, chosen, settings)
    _print(console, *report.table(results), "", f"{output / 'report.html'}   {output / 'results.json'}")
    if ended_early is not None:
        _print(console, f"{ended_early} Finished samples are kept.")
    short = sum(b["failed"] + b["missing"] for b in results["benchmarks"].values())
    unjudged = sum(b["unjudged"] for b in results["benchmarks"].values())
    said = [f"{short} sample(s) failed or are missing."] if short else []
    if unjudged:
        said.append(f"{unjudged} sample(s) have no verdict of the judge, so its score is open.")
    if said:
        again = f"--output {shlex.quote(str(output))} --resume"
        _print(console, f"{' '.join(said)} To try again, run the command with: {again}")
    return SOME_FAILED if said else DONE


def load_all(settings: EvalSettings, of_questions: Callable[[], str] = lambda: "reasoning") -> list[Questions]:
    """Load the questions of every benchmark in the settings.

    Args:
        of_questions: Returns the system message of plain questions and of benchmarks without one: a name or a text.

    Raises:
        ConfigError: The settings name no benchmark, or an unknown one.
        DataError: Questions cannot be loaded.
    """
    custom = [custom_benchmark(description) for description in settings.custom]
    if twice := repeated(benchmark.name.lower() for benchmark in custom):
        raise ConfigError(f"custom has two benchmarks with the name {twice[0]!r}. Rename one of them.")
    if settings.suite is not None:
        benchmarks = suite(settings.suite)
    elif settings.benchmarks:
        benchmarks = find_benchmarks(settings.benchmarks, custom)
    elif settings.data is not None and (local := local_benchmarks(settings.data, custom)):
        benchmarks = local
    elif settings.data is not None:
        if settings.skip_bad:
            raise ConfigError(
                "skip_bad is set, but it applies to benchmarks only, and data names a file of questions. Remove it, "
                "and correct the rows that errors name."
            )
        return [
            load_dataset_questions(
                settings.data,
                settings.split,
                system_prompt=settings.system_prompt,
                limit=settings.limit,
                task=settings.task,
                columns=settings.columns,
                default_system_prompt=of_questions(),
            )
        ]
    elif custom:
        benchmarks = custom
    else:
        raise ConfigError("No benchmark is selected. Pass --benchmarks, --suite or --data.")
    if settings.task is not None or settings.columns is not None:
        raise ConfigError(
            "task or columns is set together with benchmarks, which define the format of their rows. Remove the "
            "benchmarks, or describe the file under custom."
        )
    if settings.data is not None and len(benchmarks) > 1 and user_path(settings.data, "data").is_file():
        raise ConfigError(
            f"data is the file {settings.data}, but {len(benchmarks)} benchmarks are selected; expected one. Name one "
            "benchmark, or pass a folder."
        )
    return [
        load_questions(
            benchmark,
            settings.data,
            system_prompt=settings.system_prompt,
            limit=settings.limit,
            skip_bad=settings.skip_bad,
            default_system_prompt=of_questions() if benchmark.system_prompt is None else "reasoning",
        )
        for benchmark in benchmarks
    ]


def describe(settings: EvalSettings, tool_arguments: ToolArguments, tools: Sequence[str]) -> dict[str, Any]:
    """Return the settings that determine the samples of a run.

    Server addresses and the commands of MCP servers are omitted, because they may contain secrets.
    """
    tool_settings = {
        name: value
        for name, value in dataclasses.asdict(tool_arguments).items()
        if not name.endswith("_url") and name not in ("mcp_servers", "search_cache")
    }
    return {
        "model": settings.model,
        "weights": fingerprint(settings),
        "settings": settings.identity(),
        "tools": {**tool_settings, "offered": list(tools)},
    }


def write_results(
    output: Path, described: dict[str, Any], chosen: Sequence[Questions], settings: EvalSettings
) -> dict[str, Any]:
    """Read the samples of a run, write results.json, report.md and report.html, and return the results."""
    saved = Records(output / "samples.jsonl")
    records: dict[str, list[Record]] = {each.benchmark.name: [] for each in chosen}
    for record in saved.values():
        records[record["benchmark"]].append(counted(record))
    benchmarks = {
        each.benchmark.name: summarise(
            each.benchmark,
            records[each.benchmark.name],
            questions=len(each.rows),
            samples=settings.samples,
            seed=settings.seed,
        )
        for each in chosen
    }
    results = {
        **described,
        **provenance(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "left_out": {each.benchmark.name: each.bad for each in chosen if each.bad},
        "suites": suites_of(benchmarks),
        "system_prompts": {each.benchmark.name: _system_prompt(each) for each in chosen},
        "benchmarks": benchmarks,
    }
    metrics = {name: summary["metric"] for name, summary in benchmarks.items()}
    first = {}
    for page in report.sample_pages(saved, metrics):
        if page.number == 0:
            first[page.benchmark] = page
        else:
            title = benchmarks[page.benchmark]["title"]
            write_whole(output / page.file, report.samples_html(title, page), errors="replace")
    for name, text in (
        ("results.json", json.dumps(results, indent=2, ensure_ascii=False) + "\n"),
        ("report.md", report.markdown(results)),
        ("report.html", report.html(results, first)),
    ):
        write_whole(output / name, text, errors="replace")
    return results


def _system_prompt(questions: Questions) -> str | None:
    first = questions.rows[0]["prompt"][0] if questions.rows else {"role": "user"}
    return first["content"] if first["role"] == "system" else None


def compare_runs(a: Path, b: Path, picture: Path | None) -> int:
    """Print and plot the difference of run B from run A. Return the exit status."""
    if picture is not None:
        check_picture(picture, "--plot")
    comparisons = compare(a, b)
    console = Console()
    headings = ["benchmark", "scored by", "questions", "A", "B", "B − A", "95 % interval", "p"]
    headings += ["only A right", "only B right", "McNemar p"]
    rows = [
        (
            report.cell(one.benchmark), report.METRIC_NAMES[one.metric], str(one.questions), report.score(one.a),
            report.score(one.b), f"{one.difference.mean:+.3f}",
            f"{one.difference.low:+.3f} – {one.difference.high:+.3f}", report.p_value(one.difference.p),
            str(one.mcnemar.only_a), str(one.mcnemar.only_b), report.p_value(one.mcnemar.p),
        )
        for one in comparisons
    ]  # fmt: skip
    _print(console, f"A is {a}, B is {b}.", "", *report.pipe_table(headings, rows))
    if unpaired := sum(one.unpaired for one in comparisons):
        _print(console, f"{unpaired} question(s) are in only one of the runs and are excluded.")
    different = differing_settings(a, b) + [
        f"{what} of {one.benchmark}: different for {count} of {one.questions} common question(s)"
        for one in comparisons
        for what, count in (("golds", one.other_golds), ("prompts", one.other_prompts))
        if count
    ]
    if different:
        _print(console, "", "The runs also differ in the following, which can be the reason for a difference:")
        _print(console, *(f"- {line}" for line in different))
    picture = picture or b / f"against-{a.resolve().name}.png"
    draw(comparisons, short_names([a, b]), picture)
    _print(console, "", str(picture))
    return DONE


def _run_all(evaluator: Evaluator, chosen: Sequence[Questions], folder: RunFolder) -> str | None:
    """Run the benchmarks one after the other. Return why they stopped early, or None."""
    columns = (
        TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
        TextColumn("{task.fields[score]}"),
    )  # fmt: skip
    with Progress(*columns, console=Console(stderr=True)) as progress:
        try:
            for questions in chosen:
                keys = evaluator.keys(questions)
                done = sum(key in folder.done for key in keys)
                title = visible(questions.benchmark.title)
                task = progress.add_task(title, total=len(keys), completed=done, score="")
                run_benchmark(evaluator, questions, folder, _ProgressBar(progress, task, questions.benchmark).add)
        except EngineError as error:
            return f"EngineError: {error}"
        except KeyboardInterrupt:
            return "Interrupted."
    return None


class _ProgressBar:
    """The progress bar of a benchmark, with the score and the failures of this invocation's samples so far."""

    def __init__(self, progress: Progress, task: TaskID, benchmark: Benchmark):
        self._progress, self._task, self._benchmark = progress, task, benchmark
        self._sum = 0.0
        self._scored = self._open = self._failed = self._unjudged = 0

    def add(self, record: Record) -> None:
        if record["error"] is not None:
            self._failed += 1
        else:
            value = record["scores"][main_metric(self._benchmark, list(record["scores"]))]
            self._sum += value or 0.0
            self._scored += value is not None
            self._open += value is None
            self._unjudged += lacks_verdict(record)
        shown = f"score {self._sum / self._scored:.3f}" if self._scored and not self._open else ""
        if self._failed:
            shown += f" [red]{self._failed} failed[/]"
        if self._unjudged:
            shown += f" [red]{self._unjudged} without a verdict[/]"
        self._progress.update(self._task, advance=1, score=shown)


def _check_template(sampler: Any, chosen: Sequence[Questions]) -> None:
    """Check once that the chat template can render a prompt with all its messages, and that the model can read it, so
    that not every question fails."""
    prompt = chosen[0].rows[0]["prompt"]
    try:
        sampler.protocol.check_shown(prompt)
    except ConfigError:
        raise
    except DataError as error:
        raise ConfigError(f"The first question: {error} The setting system_prompt sets the system message.") from error
    except Exception as error:
        raise ConfigError(
            f"The tokenizer's chat template cannot render the first question as a prompt ({type(error).__name__}: "
            f"{error}). Set another template, or another system_prompt."
        ) from error
    engine, last = sampler.engine, max(sampler.protocol.encode_prompt(prompt), default=-1)
    if last >= engine.vocab_size and not isinstance(engine, CompletionsEngine):  # a server has its own vocabulary
        told = lacks_embedding(sampler.protocol.tokenizer, last, engine.vocab_size)
        raise ConfigError(f"The prompt of the first question {told}")


def _new_folder(settings: EvalSettings) -> Path:
    """Create a folder for the results. Of several evaluations in the same second, each gets its own."""
    name = Path(urlsplit(str(settings.model)).path).name or "model"
    first = path = Path("runs/eval") / f"{name}-{datetime.now().strftime('%Y%m%d-%H%M%S')}"
    path.parent.mkdir(parents=True, exist_ok=True)
    number = 1
    while True:
        try:
            path.mkdir()
            return path
        except FileExistsError:
            number += 1
            path = first.with_name(f"{first.name}-{number}")


def _registry_table() -> Table:
    """The benchmarks. Each id has its own line, so that a terminal of 80 columns does not wrap it."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for b in BENCHMARKS.values():
        what = f"{b.title}: {b.size} questions, scored by {b.scorer}" + (f", suite {b.suite}" if b.suite else "")
        where = " ".join(part for part in (b.hub_id, b.config, b.split) if part)
        table.add_row(b.name, Text("\n".join(part for part in (what, where, b.note) if part)))
    return table


def _self_check(chosen: Sequence[Questions], settings: EvalSettings, console: Console) -> int:
    rows: list[tuple[str, ...]] = []
    malformed: list[self_check.Malformed] = []
    text_only: list[self_check.TextOnly] = []
    for questions in chosen:
        checks, found, texts = self_check.check(questions, settings.seed)
        malformed += found
        text_only += texts
        for c in checks:
            means = ("—" if mean is None else f"{mean:.4f}" for mean in (c.gold, c.wrong, c.rewritten, c.changed))
            rows.append((report.cell(c.benchmark), report.METRIC_NAMES[c.scorer], str(c.items), *means))
    headings = (
        "benchmark", "scored by", "items", "gold as prediction", "wrong answer", "gold rewritten", "gold made wrong"
    )  # fmt: skip
    _print(console, *report.pipe_table(headings, rows))
    for item in malformed:
        names = ", ".join(report.METRIC_NAMES[name] for name in item.scorers)
        verdict = "does not score 1" if item.equal else "scores 1"
        written = "" if item.prediction is None else f"written {item.prediction[:200]!r} "
        _print(console, f"{item.benchmark}, question {item.number}: {item.gold[:200]!r} {written}{verdict} by {names}")
    for text in text_only:
        _print(console, f"{text.benchmark}, question {text.number}: only equal text matches {text.gold[:200]!r}")
    return SOME_FAILED if malformed else DONE


def _print(console: Console, *lines: str) -> None:
    """Print lines without interpreting markup and without wrapping, with hidden characters as symbols."""
    for line in lines:
        console.print(Text(visible(line)), soft_wrap=True)
