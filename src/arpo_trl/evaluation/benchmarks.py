"""The benchmarks of the paper, and users' own: where their questions are, and how an answer is scored."""

from __future__ import annotations

import base64
import binascii
import difflib
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from arpo_trl.data.layouts import Task, convert_row, system_prompt_text
from arpo_trl.data.loading import SUFFIXES, load_arpo_dataset, read_file
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.net.hub_dataset import load_from_hub
from arpo_trl.rewards.answers import MATH, extract_answer
from arpo_trl.visible import get_logger

logger = get_logger(__name__)

SUITES = ("reasoning", "knowledge", "deepsearch")


class Scorer(StrEnum):
    MATH = "math"
    """Mathematical equality."""
    QA_F1 = "qa_f1"
    """Token F1, the best over all accepted answers."""
    JUDGE = "judge"
    """A language model; token F1, under its own name, where there is none."""

    @property
    def task(self) -> Task:
        """How rules compare answers."""
        return "math" if self is Scorer.MATH else "qa"


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A set of questions.

    `question` and `answer` name fields; None: whichever of the usual ones there is. `size` is the number of questions
    the paper reports on, `take` how many of the Hub's are taken, in order, None for all. `scorer` None: each row's
    `task` decides.
    """

    name: str
    title: str
    suite: str | None
    scorer: Scorer | None
    size: int | None = None
    hub_id: str | None = None
    split: str = "test"
    config: str | None = None
    question: str | None = None
    answer: str | None = None
    level: str | None = None
    take: int | None = None
    boxed: bool = False
    r"""The answer is the last `\boxed{…}` of a worked solution."""
    text_only: str | None = None
    """A field that is not empty in rows that need more than text; those are left out."""
    masked: bool = False
    """Prompt and answer of a row that has a `canary` are masked with it."""
    system_prompt: str | None = None
    note: str = ""
    file: str | None = None
    aliases: tuple[str, ...] = ()


_FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
_FIRST_200 = "The paper reports on 200 questions that it does not list; the first 200 are taken."

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            "aime24", "AIME 2024", "reasoning", Scorer.MATH, 30, "HuggingFaceH4/aime_2024", "train",
            question="problem", system_prompt="reasoning", note="Problems © MAA.",
        ),
        Benchmark(
            "aime25", "AIME 2025", "reasoning", Scorer.MATH, 30, "math-ai/aime25",
            question="problem", system_prompt="reasoning", note="Problems © MAA.",
        ),
        Benchmark(
            "math500", "MATH500", "reasoning", Scorer.MATH, 500, "HuggingFaceH4/MATH-500",
            question="problem", level="level", system_prompt="reasoning", note="MIT.",
        ),
        Benchmark(
            "gsm8k", "GSM8K", "reasoning", Scorer.MATH, 1319, "openai/gsm8k", config="main",
            system_prompt="reasoning", note="MIT. The gold is what follows ####.",
        ),
        Benchmark(
            "math", "MATH", "reasoning", Scorer.MATH, 5000, "DigitalLearningGmbH/MATH-lighteval",
            question="problem", answer="solution", level="level", boxed=True, system_prompt="reasoning",
            note=r"MIT. The gold is the last \boxed of the solution.",
        ),
        Benchmark(
            "hotpotqa", "HotpotQA", "knowledge", Scorer.QA_F1, 200, _FLASHRAG, "dev", "hotpotqa",
            answer="golden_answers", take=200, system_prompt="reasoning", note="CC BY-SA 4.0. " + _FIRST_200,
        ),
        Benchmark(
            "2wiki", "2WikiMultihopQA", "knowledge", Scorer.QA_F1, 200, _FLASHRAG, "dev", "2wikimultihopqa",
            answer="golden_answers", take=200, system_prompt="reasoning", note="Apache-2.0. " + _FIRST_200,
            aliases=("2wikimultihopqa",),
        ),
        Benchmark(
            "musique", "MuSiQue", "knowledge", Scorer.QA_F1, 200, _FLASHRAG, "dev", "musique",
            answer="golden_answers", take=200, system_prompt="reasoning", note="CC BY 4.0. " + _FIRST_200,
        ),
        Benchmark(
            "bamboogle", "Bamboogle", "knowledge", Scorer.QA_F1, 125, _FLASHRAG, "test", "bamboogle",
            answer="golden_answers", system_prompt="reasoning", note="MIT.",
        ),
        Benchmark(
            "webwalker", "WebWalkerQA", "deepsearch", Scorer.JUDGE, 200, "callanwu/WebWalkerQA", "main",
            take=200, system_prompt="deepsearch", note="Apache-2.0. " + _FIRST_200, aliases=("webwalkerqa",),
        ),
        Benchmark(
            "gaia", "GAIA", "deepsearch", Scorer.JUDGE, 103, "gaia-benchmark/GAIA", "validation", "2023_all",
            question="Question", answer="Final answer", level="Level", text_only="file_name",
            system_prompt="deepsearch",
            note="Gated: accept its terms on the Hub. The paper's 103 are a subset of the text-only validation rows.",
        ),
        Benchmark(
            "hle", "HLE", "deepsearch", Scorer.JUDGE, 500, "cais/hle", text_only="image", take=500,
            system_prompt="deepsearch",
            note="Gated: accept its terms on the Hub. The paper's 500 are not listed: the first text-only ones.",
        ),
        Benchmark(
            "xbench", "xbench-DeepSearch", "deepsearch", Scorer.JUDGE, 100, "xbench/DeepSearch", "train",
            question="prompt", masked=True, system_prompt="deepsearch",
            note="MIT. In Chinese; masked on the Hub, unmasked here.",
            aliases=("xbench-deepsearch",),
        ),
        Benchmark(
            "simpleqa", "SimpleQA", None, Scorer.JUDGE, 4326, "basicv8vc/SimpleQA",
            question="problem", system_prompt="deepsearch", note="MIT. Not among the paper's.",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Questions:
    """A benchmark's rows {prompt, answer, task, id, level}, and what is wrong with those that were left out."""

    benchmark: Benchmark
    rows: list[dict[str, Any]]
    bad: list[str]

    @property
    def fingerprint(self) -> str:
        """Differs where a question, a gold or their order does."""
        return hashlib.blake2b(json.dumps(self.rows, sort_keys=True).encode(), digest_size=8).hexdigest()


def find_benchmarks(names: Iterable[str], custom: Sequence[Benchmark] = ()) -> list[Benchmark]:
    """The benchmarks of these names, each once.

    Raises:
        ConfigError: a name is unknown; the nearest ones are named.
    """
    known = {benchmark.name: benchmark for benchmark in (*BENCHMARKS.values(), *custom)}
    by_alias = {alias: benchmark for benchmark in known.values() for alias in (benchmark.name, *benchmark.aliases)}
    found: dict[str, Benchmark] = {}
    for name in names:
        if name.lower() not in by_alias:
            near = difflib.get_close_matches(name.lower(), by_alias, n=3, cutoff=0.5)
            raise ConfigError(
                f"There is no benchmark {name!r}; "
                + (f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}.")
            )
        benchmark = by_alias[name.lower()]
        found[benchmark.name] = benchmark
    return list(found.values())


def suite(name: str) -> list[Benchmark]:
    """The benchmarks of a suite, or of "all" three.

    Raises:
        ConfigError: there is no such suite.
    """
    if name not in (*SUITES, "all"):
        raise ConfigError(f"suite is {name!r}; expected one of {[*SUITES, 'all']}.")
    return [b for b in BENCHMARKS.values() if b.suite is not None and name in (b.suite, "all")]


def custom_benchmark(description: Mapping[str, Any]) -> Benchmark:
    """A benchmark as a YAML file describes it: name, file, question, answer, scorer; system_prompt or level if wanted.

    Raises:
        ConfigError: a key is missing, unknown, or not text.
    """
    required, optional = ("name", "file", "question", "answer", "scorer"), ("level", "system_prompt")
    if not isinstance(description, Mapping):
        raise ConfigError(f"custom holds {description!r}; expected a benchmark with {', '.join(required)}.")
    name = description.get("name", "?")
    for key, value in description.items():
        if key not in required + optional:
            near = difflib.get_close_matches(str(key), required + optional, n=1)
            raise ConfigError(
                f"The custom benchmark {name!r} has a key {key!r}"
                + (f"; did you mean {near[0]!r}?" if near else f"; expected {', '.join(required + optional)}.")
            )
        if not isinstance(value, str) or not value.strip():
            raise ConfigError(f"The custom benchmark {name!r} has {key} {value!r}; expected text.")
    if missing := [key for key in required if key not in description]:
        raise ConfigError(f"The custom benchmark {name!r} lacks {', '.join(missing)}.")
    if description["scorer"] not in {scorer.value for scorer in Scorer}:
        raise ConfigError(
            f"The custom benchmark {name!r} has scorer {description['scorer']!r}; expected one of "
            f"{[scorer.value for scorer in Scorer]}."
        )
    if name in BENCHMARKS:
        raise ConfigError(f"The custom benchmark {name!r} has the name of one that there is. Choose another.")
    system_prompt_text(description.get("system_prompt"))
    return Benchmark(
        name, name, None, Scorer(description["scorer"]), question=description["question"],
        answer=description["answer"], level=description.get("level"),
        system_prompt=description.get("system_prompt", "reasoning"), file=description["file"],
    )  # fmt: skip


def local_names(folder: Path, custom: Sequence[Benchmark] = ()) -> list[str]:
    """Names of the benchmarks that have a file in `folder`, in the registry's order.

    Raises:
        DataError: none has.
    """
    names = [b.name for b in (*BENCHMARKS.values(), *custom) if _local_file(b, folder) is not None]
    if not names:
        raise DataError(
            f"{folder} has no file that is named after a benchmark, such as gsm8k.jsonl or aime24.parquet. Name the "
            "file itself, or rename it."
        )
    return names


def load_questions(
    benchmark: Benchmark,
    data: str | None = None,
    *,
    system_prompt: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
) -> Questions:
    """The benchmark's questions, from its file, from `data` (a folder with one for it, or a file), or from the Hub.

    Args:
        system_prompt: A name or a text instead of the benchmark's own.
        skip_bad: Leave rows out that cannot be used, with a warning.

    Raises:
        DataError: there are no questions to be had, or a row cannot be used; says how to get them.
    """
    bad: list[str] = []
    where, raws = _raw_rows(benchmark, data, bad if skip_bad else None)
    if where == benchmark.hub_id and benchmark.take is not None:
        limit = min(benchmark.take, limit or benchmark.take)
    system_text = system_prompt_text(system_prompt or benchmark.system_prompt)
    rows: list[dict[str, Any]] = []
    for number, raw in enumerate(raws):
        if limit is not None and len(rows) == limit:
            break
        if benchmark.text_only is not None and raw.get(benchmark.text_only):
            continue
        try:
            task = None if benchmark.scorer is None else benchmark.scorer.task
            row = convert_row(_mapped(raw, benchmark), number, system_text, task=task)
            if row is None:
                raise DataError("the answer is blank; expected a gold.")
        except DataError as error:
            problem = f"{where}, row {number}: {error}"
            if not skip_bad:
                raise DataError(f"{problem} To leave such rows out: --skip-bad.") from error
            bad.append(problem)
        else:
            row["task"] = (benchmark.scorer or Scorer(Scorer.MATH if row["task"] == MATH else Scorer.QA_F1)).task
            rows.append(row)
    for problem in bad:
        logger.warning("Left out: %s", problem)
    if not rows:
        raise DataError(f"{where} holds no questions that can be used; expected at least one.")
    return Questions(benchmark, rows, bad)


def load_dataset_questions(
    data: str,
    split: str,
    *,
    system_prompt: str | None = None,
    limit: int | None = None,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
) -> Questions:
    """Any dataset that `load_arpo_dataset` takes, as a benchmark named after it whose rows say how they are scored."""
    dataset = load_arpo_dataset(data, split, system_prompt=system_prompt, task=task, columns=columns)
    rows = dataset.to_list()[:limit]
    name = Path(data).stem
    return Questions(Benchmark(name, name, None, None, file=data), [{"level": None, **row} for row in rows], [])


def _raw_rows(
    benchmark: Benchmark, data: str | None, bad: list[str] | None
) -> tuple[str, Iterator[Mapping[str, Any]]]:
    """Where the rows come from, and the rows."""
    source = benchmark.file if benchmark.file is not None else data
    if source is None:
        return str(benchmark.hub_id), _from_hub(benchmark)
    path = Path(source).expanduser()
    if path.is_dir():
        file = _local_file(benchmark, path)
        if file is None:
            raise DataError(f"{path} has no {benchmark.name}.jsonl, .json or .parquet. Put it there, or omit --data.")
        path = file
    if not path.exists():
        raise DataError(f"There is no file {path} for {benchmark.title}. Check the path.")
    return str(path), read_file(path, bad)


def _local_file(benchmark: Benchmark, folder: Path) -> Path | None:
    names = (benchmark.name, *benchmark.aliases)
    candidates = (folder / f"{name}{suffix}" for name in names for suffix in SUFFIXES)
    return next((path for path in candidates if path.exists()), None)


def _from_hub(benchmark: Benchmark) -> Iterator[Mapping[str, Any]]:
    assert benchmark.hub_id is not None
    try:
        yield from load_from_hub(benchmark.hub_id, benchmark.split, benchmark.config)
    except DataError as error:
        gated = (
            "It is gated: accept its terms at https://huggingface.co/datasets/"
            f"{benchmark.hub_id} and log in with `hf auth login`, or set HF_TOKEN. "
            if benchmark.note.startswith("Gated")
            else ""
        )
        raise DataError(
            f"{benchmark.title} could not be loaded from the Hub. {gated}Or get its file elsewhere and give it by "
            f"--data FOLDER, as {benchmark.name}.jsonl. ({error})"
        ) from error


def _mapped(raw: Mapping[str, Any], benchmark: Benchmark) -> Mapping[str, Any]:
    """The row with the benchmark's fields under the names that `convert_row` knows; local files may have those."""
    row = dict(raw)
    if benchmark.masked and "canary" in row:
        row |= _unmasked(row)
    for ours, theirs in (("question", benchmark.question), ("answer", benchmark.answer), ("level", benchmark.level)):
        if theirs is not None and row.get(theirs) is not None:
            row[ours] = row[theirs]
        elif theirs is not None and benchmark.hub_id is None and ours != "level":
            raise DataError(
                f"no {theirs!r}: the row has the fields {sorted(row)}; expected the benchmark's {ours} there."
            )
    if row.get("question") is not None and isinstance(row.get("prompt"), str):
        del row["prompt"]  # the question goes first, with the benchmark's system prompt
    if benchmark.boxed and (solution := row.get("answer")) is not None and r"\boxed" in str(solution):
        row["answer"] = extract_answer(f"<answer>{solution}</answer>")
    return row


def _unmasked(row: Mapping[str, Any]) -> dict[str, str]:
    """Prompt and answer of an xbench row: base64 of the text's bytes xor the canary's, lest crawlers read them."""
    key = str(row["canary"]).encode()
    try:
        return {
            name: bytes(byte ^ key[i % len(key)] for i, byte in enumerate(base64.b64decode(row[name], validate=True)))
            .decode("utf-8")
            for name in ("prompt", "answer")
            if name in row
        }  # fmt: skip
    except (binascii.Error, ValueError, TypeError, ZeroDivisionError) as error:
        raise DataError(f"prompt or answer cannot be unmasked with the row's canary ({error}).") from error
