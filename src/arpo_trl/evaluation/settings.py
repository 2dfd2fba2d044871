"""Settings of an evaluation. Light: `arpo-trl eval --help` is made from them and imports nothing else."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from arpo_trl.common.settings import JudgeArguments, ToolLimits, check_fields, described
from arpo_trl.errors import ConfigError


class EngineKind(StrEnum):
    TRANSFORMERS = "transformers"
    VLLM = "vllm"


GROUPS = {
    "model": "model", "benchmarks": "benchmarks", "samples": "sampling", "output": "run",
    "judge_url": "judge", "tool_protocol": "tools",
}  # fmt: skip
"""The field that each group of flags begins with, in the help text."""


@dataclass
class EvalSettings(ToolLimits, JudgeArguments):
    """What to evaluate, on what and how, by default as the paper. Each field is a flag and a key of the YAML file.

    Raises:
        ConfigError: a value, or two together, cannot work.
    """

    model: str | None = field(
        default=None,
        metadata={"help": "Folder or Hub id of the model; with --base-url of its tokenizer."},
    )
    adapter: str | None = field(default=None, metadata={"help": "Folder or Hub id of a PEFT adapter to put on it."})
    engine: str = field(
        default=EngineKind.TRANSFORMERS.value,
        metadata=described("What samples, in this process.", choices=EngineKind),
    )
    base_url: str | None = field(
        default=None,
        metadata={
            "help": "Instead: an OpenAI-compatible completions server (http://host:port/v1); its key in "
            "COMPLETIONS_API_KEY."
        },
    )
    served_model: str | None = field(default=None, metadata={"help": "The model's name there, if it serves several."})
    dtype: str = field(
        default="auto", metadata={"help": "Precision of the weights: auto, bfloat16, float16, float32."}
    )

    benchmarks: list[str] = field(
        default_factory=list,
        metadata={"help": "Names, with commas or spaces between (see --list-benchmarks)."},
    )
    suite: str | None = field(
        default=None,
        metadata={"help": "Instead: all of reasoning, knowledge or deepsearch, or all."},
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "Local questions instead of the Hub's: a folder with <benchmark>.jsonl, .json or .parquet, or"
            " one file; without --benchmarks any dataset that train.py takes."
        },
    )
    split: str = field(
        default="train", metadata={"help": "With --data alone: the split of a folder or a Hub dataset."}
    )
    task: str | None = field(
        default=None,
        metadata=described(
            "With --data alone: what all its rows are. Default: as each row says.", choices=["math", "qa"]
        ),
    )
    columns: dict[str, str] | None = field(
        default=None,
        metadata={"help": "YAML only, with data alone: fields that replace the usual ones, as in train.py."},
    )
    custom: list[dict[str, Any]] = field(
        default_factory=list,
        metadata={"help": "YAML only: benchmarks of your own (name, file, question, answer, scorer)."},
    )
    skip_bad: bool = field(
        default=False,
        metadata={"help": "Leave broken rows out with a warning instead of stopping."},
    )
    limit: int | None = field(
        default=None, metadata=described("Only the first questions of each benchmark.", at_least=1)
    )

    samples: int = field(
        default=1,
        metadata=described("Answers per question, n; gives pass@k for every k <= n and majority vote.", at_least=1),
    )
    temperature: float = field(default=0.6, metadata=described("0 is greedy.", at_least=0))
    top_p: float = field(
        default=0.95, metadata=described("Probability of the nucleus that is sampled from.", above=0, at_most=1)
    )
    context: int = field(
        default=32_768,
        metadata=described(
            "Length of prompt and answer together; less if the model has less.", at_least=2, unit="tokens"
        ),
    )
    max_completion_length: int | None = field(
        default=None,
        metadata=described("Length of an answer with its tool results.", at_least=1, unit="tokens"),
    )
    tool_call_limits: list[str] = field(
        default_factory=lambda: ["python=5", "search=10"],
        metadata={"help": "NAME=N: most calls of one tool."},
    )
    max_tool_calls: int = field(
        default=20, metadata=described("Most tool results per answer, refused calls included.", at_least=0)
    )
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "Name or text; default: what the benchmark asks for."},
    )
    seed: int = field(default=0, metadata=described("Of sampling and of the bootstrap."))

    output: str | None = field(
        default=None, metadata={"help": "Folder for results (default: a new one in runs/eval)."}
    )
    resume: bool = field(default=False, metadata={"help": "Go on with the run in --output, failed samples again."})
    concurrency: int = field(default=32, metadata=described("Answers under way at once.", at_least=1))
    self_check: bool = field(
        default=False,
        metadata={
            "help": "Run no model: score each gold as if it were predicted, and list those that do not score 1."
        },
    )
    list_benchmarks: bool = field(default=False, metadata={"help": "Show the benchmarks and leave."})

    def __post_init__(self) -> None:
        super().__post_init__()
        names: Any = self.benchmarks  # which YAML may have as a text,
        limits: Any = self.tool_call_limits  # and these by name
        names = [names] if isinstance(names, str) else names
        self.benchmarks = [name for part in names for name in part.replace(",", " ").split()]
        if isinstance(limits, dict):
            self.tool_call_limits = [f"{name}={number}" for name, number in limits.items()]
        check_fields(self)
        if self.base_url is not None and (self.adapter is not None or self.engine != EngineKind.TRANSFORMERS):
            raise ConfigError(
                "base_url names a server, which has its own engine and adapter; unset engine and adapter."
            )
        if self.benchmarks and self.suite is not None:
            raise ConfigError("benchmarks and suite are both set; expected one of them.")
        if self.resume and self.output is None:
            raise ConfigError("resume is set without output. Name the folder of the run to go on with.")
        self.call_limits()

    def call_limits(self) -> dict[str, int]:
        """`tool_call_limits` as numbers by tool."""
        limits = {}
        for text in self.tool_call_limits:
            name, _, number = text.partition("=")
            if not (name.isidentifier() and number.isdecimal()):
                raise ConfigError(f"tool_call_limits holds {text!r}; expected entries like python=5.")
            limits[name] = int(number)
        return limits

    def identity(self) -> dict[str, Any]:
        """What must be the same for samples to belong to one run: all but where and how fast they are made."""
        incidental = {
            "output", "resume", "concurrency", "tool_concurrency", "base_url", "judge_url", "judge_cache",
            "self_check", "list_benchmarks",
        }  # fmt: skip
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in incidental}
