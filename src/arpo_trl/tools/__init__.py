"""Tools that a policy can call, and the box that runs the calls."""

from arpo_trl.calls import CallSource, ToolCall, ToolFailure
from arpo_trl.tools.box import ToolBox, ToolResult, ToolSpec, tool_spec
from arpo_trl.tools.python import python_tool
from arpo_trl.tools.python_remote import remote_python_tool
from arpo_trl.tools.search import LocalIndex, RecordedSearch, search_tool
from arpo_trl.tools.search_cache import CacheMode, SearchCache
from arpo_trl.tools.search_providers import make_provider
from arpo_trl.tools.state import PathState
from arpo_trl.tools.web_search import WebSearch

__all__ = [
    "CacheMode",
    "CallSource",
    "LocalIndex",
    "PathState",
    "RecordedSearch",
    "SearchCache",
    "ToolBox",
    "ToolCall",
    "ToolFailure",
    "ToolResult",
    "ToolSpec",
    "WebSearch",
    "make_provider",
    "python_tool",
    "remote_python_tool",
    "search_tool",
    "tool_spec",
]
