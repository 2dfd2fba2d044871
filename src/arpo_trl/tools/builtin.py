"""Creates the tools named in a configuration file."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from arpo_trl.common.imports import is_import_path, load_callable
from arpo_trl.common.settings import changed, check_fields, setting
from arpo_trl.common.waiting import is_first_rank
from arpo_trl.errors import ConfigError
from arpo_trl.tools.python.local import ISOLATIONS, python_tool
from arpo_trl.tools.python.remote import remote_python_tool
from arpo_trl.tools.search.cache import CacheMode, SearchCache
from arpo_trl.tools.search.index import LocalIndex, RecordedSearch, Searchable, search_tool
from arpo_trl.tools.search.providers import FIELDS, LOCAL_SOURCES, PROVIDERS, make_provider
from arpo_trl.tools.search.web import WebSearch
from arpo_trl.visible import get_logger, say

logger = get_logger(__name__)

BUILT_IN = ("search", "python", "visit")


@dataclass
class ToolArguments:
    """The tools of the policy, and their settings.

    Raises:
        ConfigError: A value is not of its field's type, range or choices.
    """

    tools: list[str] = setting(
        lambda: ["search", "python"],
        f"Tools to offer to the model: {', '.join(BUILT_IN)}, or the import path of a function, "
        "such as my_tools:weather.",
    )
    search_index: str | None = setting(
        None,
        "Local BM25 search: a JSONL file of passages, a folder of them, a Hub dataset, or a folder "
        "saved by LocalIndex.save.",
    )
    search_recorded: str | None = setting(None, "Recorded search: a JSON file {query: result text}.")
    search_top_k: int = setting(10, "Results per search. The paper's setting is 10.", at_least=1)
    search_max_chars: int = setting(
        1000, "Maximum length of a search result. The paper's setting is 1,000.", at_least=10, unit="characters"
    )
    python_timeout_s: float = setting(
        5.0, "Maximum time of a python call, in wall time and in CPU time.", above=0, unit="seconds"
    )
    python_isolation: str = setting(
        "auto",
        "How model-written python is isolated. 'auto' selects the first other choice that works on this machine.",
        choices=ISOLATIONS,
    )
    python_stateful: bool = setting(
        False,
        "Whether a python call sees the variables of its path's earlier calls. The earlier calls "
        "run again before it, within the same python_timeout_s.",
    )
    python_executor_url: str | None = setting(
        None, "Run python on this SandboxFusion server instead of this machine: http://HOST:PORT."
    )
    allow_unsafe: bool = setting(
        False, "Run model-written python without a sandbox if this machine supports none. Dangerous."
    )

    # Parameters that control search with a service. Its key comes from the environment
    search_provider: str | None = setting(
        None,
        f"Search provider: {', '.join([*LOCAL_SOURCES, *PROVIDERS.own])}, or a registered name. "
        "None: local if search_index is set, recorded if search_recorded is set.",
    )
    search_url: str | None = setting(
        None, "Address of the search service, if it is not the default (a gateway, your own server)."
    )
    search_zone: str | None = setting(None, "Bright Data: the name of your SERP API zone.")
    search_fields: list[str] = setting(lambda: list(FIELDS), "Parts of a result that the model sees.", choices=FIELDS)
    search_cache: str = setting(
        "search_cache.sqlite",
        "File that caches a service's answers and counts requests. All processes of a machine share "
        "it. Keep it on a local disk.",
    )
    search_cache_mode: str = setting(
        CacheMode.CACHE.value,
        "'cache': send a request only if the file lacks the answer. 'live': always send a request. 'record': "
        "always send a request, and write the answer. 'replay': send no requests; answer with the nearest "
        "recorded query. 'offline': send no requests; an unrecorded query fails.",
        choices=CacheMode,
    )
    search_timeout_s: float = setting(
        15.0,
        "Maximum time of a search, including retries. It should be less than tool_timeout_s.",
        above=0,
        unit="seconds",
    )
    search_rate: float | None = setting(
        None, "Maximum requests per second to the service, summed over all processes.", above=0
    )
    search_max_calls: int | None = setting(
        None,
        "Maximum requests to the service per run (output_dir), summed over all processes. Beyond it the model "
        "gets a notice instead of results.",
        at_least=1,
    )

    # Parameters that control the reading of pages
    visit_timeout_s: float = setting(15.0, "Maximum time of a visit.", above=0, unit="seconds")
    visit_max_chars: int = setting(4000, "Maximum length of the text of a page.", at_least=200, unit="characters")
    visit_allowed_hosts: list[str] = setting(
        list, "host or host:port that may be visited even if it is not on the public internet."
    )
    visit_summary_url: str | None = setting(
        None,
        "OpenAI-compatible server (…/v1) whose model summarises pages. Put its key, if it needs "
        "one, in VISIT_SUMMARY_API_KEY.",
    )
    visit_summary_model: str | None = setting(None, "Name of the model that summarises pages.")

    # Parameters that control the tools of MCP servers
    mcp_servers: list[dict[str, Any]] | None = setting(
        None,
        "MCP servers whose tools are also offered. Each has command, args and env (names of "
        "variables), or url and token_env. tools limits which of its tools are offered, and per_path gives "
        "each path its own session.",
    )
    mcp_timeout_s: float = setting(15.0, "Maximum time of a call of an MCP tool.", above=0, unit="seconds")

    @property
    def offered(self) -> list[Any]:
        """The names of tools, then the MCP servers."""
        return [*self.tools, *(self.mcp_servers or [])]

    def __post_init__(self) -> None:
        if not isinstance(self.tools, list) or not all(t in BUILT_IN or is_import_path(str(t)) for t in self.tools):
            raise ConfigError(
                f"tools is {self.tools!r}; expected a list of some of {list(BUILT_IN)} and of import paths of "
                "functions, such as my_tools:weather."
            )
        check_fields(self)


def build_tools(arguments: ToolArguments, *, run: str = "default") -> list[Callable[..., Any]]:
    """Return the tools as functions, in the order of `tools`, then the tools of MCP servers.

    Args:
        run: The name under which `search_max_calls` counts requests; the same on all ranks.

    Raises:
        ConfigError: A setting is missing, settings contradict each other, a key is not in the environment, a function
            cannot be imported, or an MCP server does not start.
        SandboxError: The python tool is enabled and its code cannot be isolated.
    """
    for tool, name in _unread(arguments):
        logger.warning(f"{name} is set, but tools is {arguments.tools}, without {tool}. Add {tool} to tools.")
    makers = {
        "search": lambda: _build_search(arguments, run),
        "python": lambda: _build_python(arguments),
        "visit": lambda: _build_visit(arguments),
    }
    # First, because their modules may register search providers.
    own = {name: load_callable(name, "tools") for name in arguments.tools if name not in makers}
    tools = [makers[name]() if name in makers else own[name] for name in arguments.tools]
    if arguments.mcp_servers:
        from arpo_trl.tools.mcp import mcp_tools

        tools += mcp_tools(arguments.mcp_servers, timeout_s=arguments.mcp_timeout_s)
    return tools


def _unread(arguments: ToolArguments) -> Iterator[tuple[str, str]]:
    """Yield the changed settings of built-in tools that are not offered, with the tool."""
    for name in changed(arguments):
        tool = name.partition("_")[0]
        if tool in BUILT_IN and tool not in arguments.tools:
            yield tool, name


def _build_search(arguments: ToolArguments, run: str) -> Callable[..., Any]:
    source = _search_source(arguments, run)
    return search_tool(source, top_k=arguments.search_top_k, max_chars=arguments.search_max_chars)


def _search_source(arguments: ToolArguments, run: str) -> Searchable:
    given = [name for name, needed in LOCAL_SOURCES.items() if getattr(arguments, needed) is not None]
    provider = arguments.search_provider or (given[0] if len(given) == 1 else None)
    if provider is None or given not in ([], [provider]) or (provider in LOCAL_SOURCES and not given):
        by_default, remedy = "", "remove search from tools"
        if "tools" not in changed(arguments):
            by_default = f"tools is {arguments.tools}, its default. "
            remedy = "set tools (arpo-trl ask and eval: --tools, to those of the model's training)"
        raise ConfigError(
            f"{by_default}The search tool has search_provider={arguments.search_provider!r}, search_index="
            f"{arguments.search_index!r} and search_recorded={arguments.search_recorded!r}; expected exactly one of "
            f"them, or search_provider with the setting that it requires. Set one, or {remedy}."
        )
    if provider == "local":
        return LocalIndex.open(str(arguments.search_index))
    if provider == "recorded":
        return RecordedSearch(str(arguments.search_recorded))
    if provider not in PROVIDERS.names:
        raise ConfigError(
            f"search_provider is {provider!r}; expected one of {[*LOCAL_SOURCES, *PROVIDERS.names]}. A provider of "
            "your own is known after its module has been imported: name a function of that module in tools, such as "
            "my_tools:lookup."
        )
    mode = CacheMode(arguments.search_cache_mode)
    return WebSearch(
        make_provider(provider, url=arguments.search_url, zone=arguments.search_zone),
        SearchCache(arguments.search_cache, writes=mode.asks),
        mode,
        fields=arguments.search_fields,
        timeout_s=arguments.search_timeout_s,
        per_second=arguments.search_rate,
        max_requests=arguments.search_max_calls,
        run=run,
    )


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
    if is_first_rank():  # once per run, not once per process
        _print_once(python.isolation)
    return python


@functools.cache
def _print_once(line: str) -> None:
    """Prints a line to standard error that this process has not printed yet."""
    say(line, to=sys.stderr)


def _build_visit(arguments: ToolArguments) -> Callable[..., Any]:
    from arpo_trl.net.chat_model import ChatModel
    from arpo_trl.tools.visit.pages import SUMMARY_KEY_VARIABLE, visit_tool

    if (arguments.visit_summary_url is None) != (arguments.visit_summary_model is None):
        raise ConfigError("Only one of visit_summary_url and visit_summary_model is set; expected both or neither.")
    summariser = None
    if arguments.visit_summary_url is not None:
        model = str(arguments.visit_summary_model)
        summariser = ChatModel(
            url=arguments.visit_summary_url,
            model=model,
            key_variable=SUMMARY_KEY_VARIABLE,
            setting="visit_summary_url",
        )
    return visit_tool(
        timeout_s=arguments.visit_timeout_s,
        max_chars=arguments.visit_max_chars,
        allowed_hosts=arguments.visit_allowed_hosts,
        summariser=summariser,
    )
