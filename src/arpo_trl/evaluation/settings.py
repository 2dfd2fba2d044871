"""Settings of an evaluation. They generate `arpo-trl eval --help`. Few imports keep that command fast."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from arpo_trl.common.settings import JudgeArguments, ToolLimits, check_fields, setting, template_arguments
from arpo_trl.common.user_files import model_name
from arpo_trl.errors import ConfigError


class EngineKind(StrEnum):
    TRANSFORMERS = "transformers"
    VLLM = "vllm"


GROUPS = {
    "model": "model", "benchmarks": "benchmarks", "samples": "sampling", "output": "run",
    "judge_url": "judge", "tool_protocol": "tools",
}  # fmt: skip
"""First field → title of each group of flags in the help text."""


@dataclass
class EvalSettings(ToolLimits, JudgeArguments):
    """Settings of an evaluation, by default the paper's. Each field is a flag and a key of the YAML file.

    Raises:
        ConfigError: A value is out of its range, or two values contradict each other.
        DataError: The model or the adapter is in the home directory of an unknown user.
    """

    model: str | None = setting(None, "Folder or Hub id of the model; with --base-url, of its tokenizer.")
    adapter: str | None = setting(None, "Folder or Hub id of a PEFT adapter of the model.")
    engine: str = setting(
        EngineKind.TRANSFORMERS.value, "The engine that samples, in this process.", choices=EngineKind
    )
    base_url: str | None = setting(
        None,
        "Sample on an OpenAI-compatible completions server instead (http://host:port/v1). Its key is in "
        "COMPLETIONS_API_KEY.",
    )
    served_model: str | None = setting(None, "The model's name on the server, if it serves several models.")
    trust_remote_code: bool = setting(
        False, "Allow the model's repository to run code of its own. Never taken from a run's settings."
    )
    dtype: str = setting("auto", "Precision of the weights.", choices=["auto", "bfloat16", "float16", "float32"])

    benchmarks: list[str] = setting(
        list, "Names of benchmarks, separated by commas or spaces (see --list-benchmarks)."
    )
    suite: str | None = setting(None, "A suite instead of benchmarks: reasoning, knowledge, deepsearch or all.")
    data: str | None = setting(
        None,
        "Local questions instead of the Hub's: a folder with <benchmark>.jsonl, .json or .parquet, or"
        " one file; without --benchmarks, any dataset that train.py accepts.",
    )
    split: str = setting("train", "With --data alone: the split of a folder or a Hub dataset.")
    task: str | None = setting(
        None, "With --data alone: the task of all rows. Default: the task in each row.", choices=["math", "qa"]
    )
    columns: dict[str, str] | None = setting(
        None, "YAML only, with data alone: names of fields that replace the usual ones, as in train.py."
    )
    custom: list[dict[str, Any]] = setting(
        list, "YAML only: custom benchmarks (name, file, question, answer, scorer)."
    )
    skip_bad: bool = setting(False, "Exclude unusable rows, with a warning, instead of stopping.")
    limit: int | None = setting(None, "Only the first questions of each benchmark.", at_least=1)

    samples: int = setting(
        1, "Answers per question, n. With several: pass@k for every k <= n, and majority vote.", at_least=1
    )
    temperature: float = setting(0.6, "Sampling temperature; 0 is greedy.", at_least=0)
    top_p: float = setting(0.95, "Probability mass of nucleus sampling.", above=0, at_most=1)
    context: int = setting(
        32_768,
        "Maximum length of prompt and answer together, further limited by the model's context.",
        at_least=2,
        unit="tokens",
    )
    max_completion_length: int | None = setting(
        None, "Maximum length of an answer, tool results included.", at_least=1, unit="tokens"
    )
    tool_call_limits: list[str] = setting(
        lambda: ["python=5", "search=10"],
        "NAME=N: maximum number of calls of one tool per answer; none: no such limits.",
    )
    max_tool_calls: int | None = setting(
        20, "Maximum number of tool results per answer, refused calls included. None: no limit.", at_least=0
    )
    system_prompt: str | None = setting(
        None,
        'Name or text of the system prompt, or "" for none. Default: the benchmark\'s, and for '
        "plain questions of data one that describes the tools.",
    )
    chat_template_kwargs: dict[str, Any] | str | None = setting(
        None, 'Arguments for the chat template, as JSON such as {"enable_thinking": false}.'
    )
    seed: int = setting(0, "Seed of sampling and of the bootstrap.")

    output: str | None = setting(None, "Folder for results (default: a new one in runs/eval).")
    resume: bool = setting(False, "Continue the run in --output; failed samples are retried.")
    concurrency: int = setting(32, "Maximum number of answers that are generated at the same time.", at_least=1)
    self_check: bool = setting(
        False, "Run no model: score each gold as the prediction, and list the golds that do not score 1."
    )
    list_benchmarks: bool = setting(False, "Show the benchmarks and exit.")

    def __post_init__(self) -> None:
        super().__post_init__()
        names: Any = self.benchmarks  # in YAML possibly a single text
        limits: Any = self.tool_call_limits  # in YAML possibly a mapping
        names = [names] if isinstance(names, str) else names
        if isinstance(names, list) and all(isinstance(part, str) for part in names):
            names = [name for part in names for name in part.replace(",", " ").split()]
        self.benchmarks = names
        if isinstance(limits, dict):
            self.tool_call_limits = [f"{name}={number}" for name, number in limits.items()]
        elif limits in ("none", ["none"]):
            self.tool_call_limits = []
        check_fields(self, {"chat_template_kwargs": {"options": True}})
        self.model = None if self.model is None else model_name(self.model, "model")
        self.adapter = None if self.adapter is None else model_name(self.adapter, "adapter")
        self.chat_template_kwargs = template_arguments(self.chat_template_kwargs)
        if self.base_url is not None and (self.adapter is not None or self.engine != EngineKind.TRANSFORMERS):
            raise ConfigError(
                "base_url is set together with engine or adapter; expected base_url alone, because the server has "
                "loaded its model. Unset engine and adapter."
            )
        if self.benchmarks and self.suite is not None:
            raise ConfigError("benchmarks and suite are both set; expected one of them. Unset the other.")
        if self.resume and self.output is None:
            raise ConfigError("resume is set without output. Set output to the folder of the run to continue.")
        self.call_limits()

    def call_limits(self) -> dict[str, int]:
        """Return `tool_call_limits` as a dict {tool: limit}."""
        limits = {}
        for text in self.tool_call_limits:
            name, _, number = text.partition("=")
            if not (name.isidentifier() and number.isdecimal()):
                raise ConfigError(f"tool_call_limits contains {text!r}; expected entries like python=5.")
            limits[name] = int(number)
        return limits

    def identity(self) -> dict[str, Any]:
        """Return the settings that must be equal for samples to belong to the same run.

        It omits the run's folder, the addresses of its services and the settings of its speed.
        """
        incidental = {
            "output", "resume", "concurrency", "tool_concurrency", "base_url", "judge_url", "judge_cache",
            "self_check", "list_benchmarks", "trust_remote_code",
        }  # fmt: skip
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in incidental}
