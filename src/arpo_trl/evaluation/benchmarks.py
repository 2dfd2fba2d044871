"""The benchmarks of the paper and of users: the sources of the questions, and the scorers of the answers."""

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

from arpo_trl.common.flags import nearest
from arpo_trl.common.user_files import user_path
from arpo_trl.data.fields import SUFFIXES, is_blank
from arpo_trl.data.files import Places, numbered, read_file
from arpo_trl.data.golds import HIDDEN_ANSWER
from arpo_trl.data.layouts import convert_row, system_prompt_text
from arpo_trl.data.loading import load_arpo_dataset
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.net.hub_dataset import load_from_hub
from arpo_trl.rewards.answers import MATH, Task
from arpo_trl.visible import get_logger

logger = get_logger(__name__)

SUITES = ("reasoning", "knowledge", "deepsearch")


class Scorer(StrEnum):
    MATH = "math"
    """Mathematical equality."""
    QA_F1 = "qa_f1"
    """Token F1, the best over all accepted answers."""
    JUDGE = "judge"
    """A language model as judge. Without a judge, token F1 is reported under its own name."""

    @property
    def task(self) -> Task:
        """The task, which determines how the rules compare answers."""
        return "math" if self is Scorer.MATH else "qa"


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """A set of questions and the scorer of their answers.

    Example: `Benchmark(name="mine", title="Mine", suite=None, scorer=Scorer.MATH, file="mine.jsonl")`.
    """

    name: str
    """The name in commands and file names."""
    title: str
    """The name in tables and reports."""
    suite: str | None
    """One of `SUITES`, or None."""
    scorer: Scorer | None
    """None: the `task` of each row decides."""
    size: int | None = None
    """The number of questions in the paper."""
    hub_id: str | None = None
    split: str = "test"
    config: str | None = None
    """The configuration of the Hub's data set."""
    question: str | None = None
    """The field with the question; None: one of the usual names."""
    answer: str | None = None
    """The field with the answer; None: one of the usual names."""
    level: str | None = None
    """The field with the difficulty level, if there is one."""
    take: int | None = None
    """Use only the first rows of the Hub's data set, this many; None: all."""
    text_only: str | None = None
    """A field that is not empty in rows that need more than text. Those rows are excluded."""
    masked: bool = False
    """If a row has a `canary`, its prompt and answer are masked with it."""
    system_prompt: str | None = None
    """The name or the text of the system prompt."""
    note: str = ""
    """The licence, and how the questions differ from the paper's."""
    file: str | Path | None = None
    """A local file with the questions. It is used instead of the Hub."""
    aliases: tuple[str, ...] = ()
    """Other names that commands and file names may use."""


_FLASHRAG = "RUC-NLPIR/FlashRAG_datasets"
_FIRST_200 = "The paper uses 200 questions but does not list them; these are the first 200."

BENCHMARKS: dict[str, Benchmark] = {
    benchmark.name: benchmark
    for benchmark in (
        Benchmark(
            name="aime24", title="AIME 2024", suite="reasoning", scorer=Scorer.MATH, size=30,
            hub_id="HuggingFaceH4/aime_2024", split="train",
            question="problem",
            system_prompt="reasoning",
            note="Problems © MAA.",
        ),
        Benchmark(
            name="aime25", title="AIME 2025", suite="reasoning", scorer=Scorer.MATH, size=30,
            hub_id="math-ai/aime25",
            question="problem",
            system_prompt="reasoning",
            note="Problems © MAA.",
        ),
        Benchmark(
            name="math500", title="MATH500", suite="reasoning", scorer=Scorer.MATH, size=500,
            hub_id="HuggingFaceH4/MATH-500",
            question="problem", level="level",
            system_prompt="reasoning",
            note="MIT.",
        ),
        Benchmark(
            name="gsm8k", title="GSM8K", suite="reasoning", scorer=Scorer.MATH, size=1319,
            hub_id="openai/gsm8k", config="main",
            system_prompt="reasoning",
            note="MIT. The gold is the text after ####.",
        ),
        Benchmark(
            name="math", title="MATH", suite="reasoning", scorer=Scorer.MATH, size=5000,
            hub_id="DigitalLearningGmbH/MATH-lighteval",
            question="problem", level="level",
            system_prompt="reasoning",
            note=r"MIT. The gold is the last \boxed of the solution.",
        ),
        Benchmark(
            name="hotpotqa", title="HotpotQA", suite="knowledge", scorer=Scorer.QA_F1, size=200,
            hub_id=_FLASHRAG, config="hotpotqa", split="dev", take=200,
            answer="golden_answers",
            system_prompt="reasoning",
            note="CC BY-SA 4.0. " + _FIRST_200,
        ),
        Benchmark(
            name="2wiki", title="2WikiMultihopQA", suite="knowledge", scorer=Scorer.QA_F1, size=200,
            hub_id=_FLASHRAG, config="2wikimultihopqa", split="dev", take=200,
            answer="golden_answers",
            system_prompt="reasoning",
            aliases=("2wikimultihopqa",),
            note="Apache-2.0. " + _FIRST_200,
        ),
        Benchmark(
            name="musique", title="MuSiQue", suite="knowledge", scorer=Scorer.QA_F1, size=200,
            hub_id=_FLASHRAG, config="musique", split="dev", take=200,
            answer="golden_answers",
            system_prompt="reasoning",
            note="CC BY 4.0. " + _FIRST_200,
        ),
        Benchmark(
            name="bamboogle", title="Bamboogle", suite="knowledge", scorer=Scorer.QA_F1, size=125,
            hub_id=_FLASHRAG, config="bamboogle", split="test",
            answer="golden_answers",
            system_prompt="reasoning",
            note="MIT.",
        ),
        Benchmark(
            name="webwalker", title="WebWalkerQA", suite="deepsearch", scorer=Scorer.JUDGE, size=200,
            hub_id="callanwu/WebWalkerQA", split="main", take=200,
            system_prompt="deepsearch",
            aliases=("webwalkerqa",),
            note="Apache-2.0. " + _FIRST_200,
        ),
        Benchmark(
            name="gaia", title="GAIA", suite="deepsearch", scorer=Scorer.JUDGE, size=103,
            hub_id="gaia-benchmark/GAIA", config="2023_all", split="validation",
            question="Question", answer="Final answer", level="Level", text_only="file_name",
            system_prompt="deepsearch",
            note="Gated: accept its terms on the Hub. The paper's 103 are a subset of the text-only validation rows.",
        ),
        Benchmark(
            name="hle", title="HLE", suite="deepsearch", scorer=Scorer.JUDGE, size=500,
            hub_id="cais/hle", take=500,
            text_only="image",
            system_prompt="deepsearch",
            note="Gated: accept its terms on the Hub. The paper does not list its 500; these are the first text-only "
                 "rows.",
        ),
        Benchmark(
            name="xbench", title="xbench-DeepSearch", suite="deepsearch", scorer=Scorer.JUDGE, size=100,
            hub_id="xbench/DeepSearch", split="train",
            question="prompt", masked=True,
            system_prompt="deepsearch",
            aliases=("xbench-deepsearch",),
            note="MIT. In Chinese; masked on the Hub, unmasked here.",
        ),
        Benchmark(
            name="simpleqa", title="SimpleQA", suite=None, scorer=Scorer.JUDGE, size=4326,
            hub_id="basicv8vc/SimpleQA",
            question="problem",
            system_prompt="deepsearch",
            note="MIT. The paper does not use it.",
        ),
    )
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Questions:
    """The questions of a benchmark.

    Example: `Questions(benchmark=BENCHMARKS["gsm8k"], rows=[{"prompt": "1+1?", "answer": ["2"], "task": "math", "id":
    "0", "level": None}], bad=[])`.

    Attributes:
        benchmark: The benchmark of the questions.
        rows: Dicts {prompt, answer, task, id, level}.
        bad: One error text for each excluded row.
    """

    benchmark: Benchmark
    rows: list[dict[str, Any]]
    bad: list[str]

    @property
    def fingerprint(self) -> str:
        """A hash of the questions, the golds and their order."""
        return hash_of(self.rows)


def hash_of(value: Any) -> str:
    """A hash of a value that JSON can express."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=8).hexdigest()


def find_benchmarks(names: Iterable[str], custom: Sequence[Benchmark] = ()) -> list[Benchmark]:
    """Return the benchmarks with these names, each once.

    Raises:
        ConfigError: A name is unknown. The message suggests similar names.
    """
    known = {benchmark.name: benchmark for benchmark in (*BENCHMARKS.values(), *custom)}
    by_alias = {
        alias.lower(): benchmark for benchmark in known.values() for alias in (benchmark.name, *benchmark.aliases)
    }
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
    """Return the benchmarks of a suite, or with "all" the benchmarks of the three suites.

    Raises:
        ConfigError: There is no such suite.
    """
    if name not in (*SUITES, "all"):
        raise ConfigError(f"suite is {name!r}; expected one of {[*SUITES, 'all']}.")
    return [b for b in BENCHMARKS.values() if b.suite is not None and name in (b.suite, "all")]


def custom_benchmark(description: Mapping[str, Any]) -> Benchmark:
    """Return the benchmark that a YAML file describes.

    The keys name, file, question, answer and scorer are required; system_prompt and level are optional.

    Raises:
        ConfigError: A key is missing or unknown, or its value is not text.
    """
    required, optional = ("name", "file", "question", "answer", "scorer"), ("level", "system_prompt")
    if not isinstance(description, Mapping):
        raise ConfigError(f"custom contains {description!r}; expected a benchmark with {', '.join(required)}.")
    name = description.get("name", "?")
    for key, value in description.items():
        if key not in required + optional:
            near = nearest(str(key), required + optional)
            raise ConfigError(
                f"The custom benchmark {name!r} has a key {key!r}"
                + (f"; did you mean {near!r}?" if near else f"; expected {', '.join(required + optional)}.")
            )
        if key == "file" and isinstance(value, Path):
            continue
        if not isinstance(value, str) or not (value.strip() or key == "system_prompt"):
            raise ConfigError(f"The custom benchmark {name!r} has {key} {value!r}; expected text.")
    if missing := [key for key in required if key not in description]:
        raise ConfigError(f"The custom benchmark {name!r} lacks {', '.join(missing)}.")
    if description["scorer"] not in {scorer.value for scorer in Scorer}:
        raise ConfigError(
            f"The custom benchmark {name!r} has scorer {description['scorer']!r}; expected one of "
            f"{[scorer.value for scorer in Scorer]}."
        )
    if any(name.lower() in (known.name, *known.aliases) for known in BENCHMARKS.values()):
        raise ConfigError(f"The custom benchmark {name!r} has the name of a built-in benchmark. Choose another name.")
    system_prompt_text(description.get("system_prompt"))
    return Benchmark(
        name=name,
        title=name,
        suite=None,
        scorer=Scorer(description["scorer"]),
        question=description["question"],
        answer=description["answer"],
        level=description.get("level"),
        system_prompt=description.get("system_prompt"),
        file=description["file"],
    )


def local_benchmarks(data: str | Path, custom: Sequence[Benchmark] = ()) -> list[Benchmark]:
    """Return the benchmarks that have a file in the folder `data`, in the order of `BENCHMARKS`; none for a file.

    Raises:
        DataError: A benchmark has two files, or the system refuses the path.
    """
    folder = user_path(data, "data")
    return [b for b in (*BENCHMARKS.values(), *custom) if _local_file(b, folder) is not None]


def load_questions(
    benchmark: Benchmark,
    data: str | Path | None = None,
    *,
    system_prompt: str | None = None,
    limit: int | None = None,
    skip_bad: bool = False,
    default_system_prompt: str = "reasoning",
) -> Questions:
    """Load the questions of a benchmark.

    The source is the benchmark's `file`. Without it, `data`. Without both, the Hub.

    Rows that need more than text are excluded. The log has their number.

    Args:
        data: A file, or a folder with a file named after the benchmark.
        system_prompt: A name or a text that replaces the benchmark's system prompt. "": no system message.
        limit: The maximum number of questions to load.
        skip_bad: Exclude unusable rows, with a warning.
        default_system_prompt: A name or a text, for a benchmark without a system prompt of its own.

    Raises:
        DataError: There are no questions, or a row cannot be used. The message says how to get them.
    """
    bad: list[str] = []
    source, raws = _raw_rows(benchmark, data, bad if skip_bad else None)
    if source == benchmark.hub_id and benchmark.take is not None:
        limit = min(benchmark.take, limit or benchmark.take)
    chosen = (system_prompt, benchmark.system_prompt, default_system_prompt)
    system_text = system_prompt_text(next(prompt for prompt in chosen if prompt is not None))
    rows: list[dict[str, Any]] = []
    left_out = 0
    for number, (where, raw) in enumerate(raws):
        if limit is not None and len(rows) == limit:
            break
        if benchmark.text_only is not None and not is_blank(raw.get(benchmark.text_only)):
            left_out += 1
            continue
        try:
            task = None if benchmark.scorer is None else benchmark.scorer.task
            # A benchmark of a configuration names its fields, so that no others count.
            columns = {"question": "question", "answer": "answer"} if benchmark.hub_id is None else None
            row = convert_row(_mapped(raw, benchmark), number, system_text, task=task, columns=columns)
            if row is None:
                raise DataError("the answer is blank or not published; expected a gold.")
        except DataError as error:
            problem = f"{where}: {error}"
            if not skip_bad:
                raise DataError(f"{problem} To exclude such rows: --skip-bad.") from error
            bad.append(problem)
        else:
            row["task"] = (benchmark.scorer or Scorer(Scorer.MATH if row["task"] == MATH else Scorer.QA_F1)).task
            rows.append(row)
    for problem in bad:
        logger.warning("Excluded: %s", problem)
    if left_out:
        logger.warning(
            "%s: %d row(s) of %s excluded, since they need more than text: their field %r is not empty.",
            benchmark.title,
            left_out,
            source,
            benchmark.text_only,
        )
    if not rows:
        raise DataError(f"{source} contains no usable questions; expected at least one.")
    return Questions(benchmark=benchmark, rows=rows, bad=bad)


def load_dataset_questions(
    data: str | Path,
    split: str,
    *,
    system_prompt: str | None = None,
    limit: int | None = None,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    default_system_prompt: str = "reasoning",
) -> Questions:
    """Load a dataset that `load_arpo_dataset` accepts as a benchmark. The `task` of each row selects its scorer."""
    dataset = load_arpo_dataset(
        data,
        split,
        system_prompt=system_prompt,
        task=task,
        columns=columns,
        default_system_prompt=default_system_prompt,
    )
    rows = dataset.to_list()[:limit]
    name = Path(data).stem
    benchmark = Benchmark(name=name, title=name, suite=None, scorer=None, file=str(data))
    return Questions(benchmark=benchmark, rows=[{"level": None, **row} for row in rows], bad=[])


def _raw_rows(benchmark: Benchmark, data: str | Path | None, bad: list[str] | None) -> tuple[str, Places]:
    """Return the name of the source, for messages, and the rows with their places."""
    setting, source = ("data", data) if benchmark.file is None else ("file", benchmark.file)
    if source is None:
        return str(benchmark.hub_id), numbered(str(benchmark.hub_id), _from_hub(benchmark))
    path = user_path(source, setting)
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
    found = [path for path in sorted(folder.glob("*")) if path.stem in names and path.suffix in SUFFIXES]
    if len(found) > 1:
        raise DataError(
            f"{folder} has {found[0].name} and {found[1].name} for {benchmark.title}; expected one file. Remove one "
            "of them, or pass the path of one."
        )
    return found[0] if found else None


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
            f"{benchmark.title} could not be loaded from the Hub. {gated}Or get its file elsewhere, save it as "
            f"{benchmark.name}.jsonl in a folder, and pass --data FOLDER. ({error})"
        ) from error


def _mapped(raw: Mapping[str, Any], benchmark: Benchmark) -> Mapping[str, Any]:
    """Return the row with the field names that `convert_row` reads. Rows of local files may already have them."""
    row = dict(raw)
    if benchmark.masked and "canary" in row:
        row |= _unmasked(row)
    for ours, theirs in (("question", benchmark.question), ("answer", benchmark.answer), ("level", benchmark.level)):
        if theirs is None:
            continue
        value = row.get(theirs)
        if (theirs, value) == HIDDEN_ANSWER and benchmark.hub_id is not None:
            continue  # `convert_row` knows it by its field
        if value is not None and not (ours == "question" and is_blank(value)):
            row[ours] = value
        elif benchmark.hub_id is None and ours != "level":
            raise DataError(
                f"no {theirs!r}: the row has the fields {sorted(row)}; expected the benchmark's {ours} in {theirs!r}."
            )
    if row.get("question") is not None and isinstance(row.get("prompt"), str):
        del row["prompt"]  # `question` takes precedence: it gets the benchmark's system prompt
    return row


def _unmasked(row: Mapping[str, Any]) -> dict[str, str]:
    """Return the prompt and the answer of an xbench row, unmasked.

    They are base64 of the text's bytes XOR the canary's bytes, so that crawlers cannot read the questions.
    """
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
