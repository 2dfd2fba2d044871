"""The tools that a configuration file names, built."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from arpo_trl.errors import ConfigError
from arpo_trl.tools.python import ISOLATIONS, python_tool
from arpo_trl.tools.python_remote import remote_python_tool
from arpo_trl.tools.search import LocalIndex, RecordedSearch, search_tool

BUILT_IN = ("search", "python")


@dataclass
class ToolArguments:
    """Which of the built-in tools the policy has, and what they stand on."""

    tools: list[str] = field(
        default_factory=lambda: list(BUILT_IN), metadata={"help": f"Built-in tools to offer, of {list(BUILT_IN)}."}
    )
    search_index: str | None = field(
        default=None,
        metadata={"help": "Local BM25 search: a JSONL file of passages, or a folder saved by LocalIndex.save."},
    )
    search_recorded: str | None = field(
        default=None, metadata={"help": "Recorded search: a JSON file {query: result text}."}
    )
    search_top_k: int = field(default=10, metadata={"help": "Results per search. The paper's setting is 10."})
    search_max_chars: int = field(
        default=1000, metadata={"help": "Characters per search result. The paper's setting is 1,000."}
    )
    python_timeout_s: float = field(
        default=5.0, metadata={"help": "Seconds a python call may run, of wall and of CPU time."}
    )
    python_isolation: str = field(
        default="auto",
        metadata={"help": "How model-written python is kept apart: 'auto' takes the first of the others that holds on "
                  "this machine.", "choices": list(ISOLATIONS)},
    )  # fmt: skip
    python_stateful: bool = field(
        default=False,
        metadata={"help": "Whether a python call sees the variables of its path's earlier calls. They are run again "
                  "before it, within the same python_timeout_s."},
    )  # fmt: skip
    python_executor_url: str | None = field(
        default=None,
        metadata={"help": "Run python at this SandboxFusion server instead of on this machine: http://HOST:PORT."},
    )
    allow_unsafe: bool = field(
        default=False,
        metadata={"help": "Run model-written python without a sandbox where none can be had. Dangerous."},
    )


def build_tools(arguments: ToolArguments) -> list[Callable[..., Any]]:
    """The tools as functions, in the order they were named.

    Raises:
        ConfigError: An unknown tool, or a search without exactly one thing to search in.
        SandboxError: python was asked for and cannot be isolated.
    """
    unknown = [name for name in arguments.tools if name not in BUILT_IN]
    if unknown:
        raise ConfigError(f"tools names {unknown}; expected some of {list(BUILT_IN)}.")
    makers = {"search": _build_search, "python": _build_python}
    return [makers[name](arguments) for name in arguments.tools]


def _build_search(arguments: ToolArguments) -> Callable[..., Any]:
    if (arguments.search_index is None) == (arguments.search_recorded is None):
        raise ConfigError(
            f"The search tool has search_index={arguments.search_index!r} and search_recorded="
            f"{arguments.search_recorded!r}; expected exactly one of them. Set one, or take search out of tools."
        )
    source: LocalIndex | RecordedSearch
    if arguments.search_index is None:
        source = RecordedSearch(str(arguments.search_recorded))
    elif arguments.search_index.endswith(".jsonl"):
        source = LocalIndex.from_jsonl(arguments.search_index)
    else:
        source = LocalIndex.load(arguments.search_index)
    return search_tool(source, top_k=arguments.search_top_k, max_chars=arguments.search_max_chars)


def _build_python(arguments: ToolArguments) -> Callable[..., Any]:
    python: Any
    if arguments.python_executor_url is not None:
        python = remote_python_tool(
            arguments.python_executor_url, timeout_s=arguments.python_timeout_s, stateful=arguments.python_stateful
        )
    else:
        python = python_tool(
            timeout_s=arguments.python_timeout_s,
            allow_unsafe=arguments.allow_unsafe,
            isolation=arguments.python_isolation,
            stateful=arguments.python_stateful,
        )
    if os.environ.get("RANK", "0") == "0":  # once, however many processes train
        print(python.isolation, file=sys.stderr)
    return python
