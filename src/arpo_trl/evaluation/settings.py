"""Settings of an evaluation. Light: `arpo-trl eval --help` is made from them and imports nothing else."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from arpo_trl.errors import ConfigError


class EngineKind(StrEnum):
    TRANSFORMERS = "transformers"
    VLLM = "vllm"


GROUPS = {"model": "model", "benchmarks": "benchmarks", "samples": "sampling", "judge_url": "judge", "output": "run"}
"""The field that each group of flags begins with, in the help text."""


@dataclass
class EvalSettings:
    """What to evaluate, on what and how, by default as the paper. Each field is a flag and a key of the YAML file.

    Raises:
        ConfigError: a value, or two together, cannot work.
    """

    model: str | None = field(
        default=None,
        metadata={"help": "folder or Hub id of the model; with --base_url of its tokenizer"},
    )
    adapter: str | None = field(default=None, metadata={"help": "folder or Hub id of a PEFT adapter to put on it"})
    engine: str = field(
        default=EngineKind.TRANSFORMERS.value,
        metadata={"help": "what samples: transformers or vllm, in this process"},
    )
    base_url: str | None = field(
        default=None,
        metadata={
            "help": "instead: an OpenAI-compatible completions server (http://host:port/v1); its key in "
            "COMPLETIONS_API_KEY"
        },
    )
    served_model: str | None = field(default=None, metadata={"help": "the model's name there, if it serves several"})
    dtype: str = field(default="auto", metadata={"help": "precision of the weights: auto, bfloat16, float16, float32"})

    benchmarks: list[str] = field(
        default_factory=list,
        metadata={"help": "names, with commas or spaces between (see --list-benchmarks)"},
    )
    suite: str | None = field(
        default=None,
        metadata={"help": "instead: all of reasoning, knowledge or deepsearch, or all"},
    )
    data: str | None = field(
        default=None,
        metadata={
            "help": "local questions instead of the Hub's: a folder with <benchmark>.jsonl, .json or .parquet, or"
            " one file; without --benchmarks any dataset that train.py takes"
        },
    )
    split: str = field(default="train", metadata={"help": "with --data alone: the split of a folder or a Hub dataset"})
    custom: list[dict[str, Any]] = field(
        default_factory=list,
        metadata={"help": "YAML only: benchmarks of your own (name, file, question, answer, scorer)"},
    )
    skip_bad: bool = field(
        default=False,
        metadata={"help": "leave broken rows out with a warning instead of stopping"},
    )
    limit: int | None = field(default=None, metadata={"help": "only the first questions of each benchmark"})

    samples: int = field(
        default=1,
        metadata={"help": "answers per question, n; gives pass@k for every k <= n and majority vote"},
    )
    temperature: float = field(default=0.6, metadata={"help": "0 is greedy"})
    top_p: float = field(default=0.95, metadata={"help": "nucleus"})
    context: int = field(
        default=32_768,
        metadata={"help": "most tokens of prompt and answer together; less if the model has less"},
    )
    max_completion_length: int | None = field(
        default=None,
        metadata={"help": "most tokens of an answer with its tool results"},
    )
    tool_call_limits: list[str] = field(
        default_factory=lambda: ["python=5", "search=10"],
        metadata={"help": "NAME=N: most calls of one tool"},
    )
    max_tool_calls: int = field(default=20, metadata={"help": "most tool results per answer, refused calls included"})
    max_tool_result_tokens: int | None = field(default=None, metadata={"help": "longer results keep head and tail"})
    tool_protocol: str = field(default="tags", metadata={"help": "how the model calls tools: tags or chat_template"})
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "name or text; default: what the benchmark asks for"},
    )
    seed: int = field(default=0, metadata={"help": "of sampling and of the bootstrap"})

    judge_url: str | None = field(
        default=None,
        metadata={
            "help": "OpenAI-compatible server of the judge; its key in JUDGE_API_KEY. Without one answers are "
            "scored by rule, and the score is named so"
        },
    )
    judge_model: str | None = field(
        default=None,
        metadata={"help": "the judge's name there (the paper's: Qwen/Qwen2.5-72B-Instruct)"},
    )
    judge_cache: str | None = field(default=None, metadata={"help": "JSONL file of its verdicts, shared by runs"})

    output: str | None = field(default=None, metadata={"help": "folder for results (default: a new one in runs/eval)"})
    resume: bool = field(default=False, metadata={"help": "go on with the run in --output, failed samples again"})
    concurrency: int = field(default=32, metadata={"help": "answers under way at once"})
    tool_timeout_s: float = field(default=20.0, metadata={"help": "seconds after which a tool call fails"})
    tool_concurrency: int = field(default=32, metadata={"help": "tool calls that run at once"})
    self_check: bool = field(
        default=False,
        metadata={"help": "run no model: score each gold as if it were predicted, and list those that do not score 1"},
    )
    list_benchmarks: bool = field(default=False, metadata={"help": "show the benchmarks and leave"})

    def __post_init__(self) -> None:
        names = [self.benchmarks] if isinstance(self.benchmarks, str) else self.benchmarks  # YAML may say either
        self.benchmarks = [name for part in names for name in part.replace(",", " ").split()]
        if isinstance(self.tool_call_limits, dict):
            self.tool_call_limits = [f"{name}={number}" for name, number in self.tool_call_limits.items()]
        for name, least in (
            ("limit", 1), ("samples", 1), ("context", 2), ("max_completion_length", 1), ("max_tool_calls", 0),
            ("max_tool_result_tokens", 16), ("concurrency", 1), ("tool_concurrency", 1),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not (isinstance(value, int) and value >= least):
                raise ConfigError(f"{name} is {value!r}; expected an integer of at least {least}.")
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ConfigError(f"temperature is {self.temperature}; expected a number ≥ 0, where 0 is greedy.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; expected a number in (0, 1].")
        if not self.tool_timeout_s > 0:
            raise ConfigError(f"tool_timeout_s is {self.tool_timeout_s}; expected more than 0 seconds.")
        if self.engine not in {kind.value for kind in EngineKind}:
            raise ConfigError(f"engine is {self.engine!r}; expected one of {[kind.value for kind in EngineKind]}.")
        if self.base_url is not None and (self.adapter is not None or self.engine != EngineKind.TRANSFORMERS):
            raise ConfigError(
                "base_url names a server, which has its own engine and adapter; unset engine and adapter."
            )
        if self.benchmarks and self.suite is not None:
            raise ConfigError("benchmarks and suite are both set; expected one of them.")
        if (self.judge_url is None) != (self.judge_model is None):
            raise ConfigError("Of judge_url and judge_model one is set; expected both or neither.")
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
