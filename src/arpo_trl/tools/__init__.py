"""Tools that a policy can call, and `ToolBox`, which runs the calls."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arpo_trl.common.lazy import lazy_names

if TYPE_CHECKING:
    from arpo_trl.tools.calls import CallSource, ToolCall, ToolFailure
    from arpo_trl.tools.mcp import mcp_tools
    from arpo_trl.tools.python.local import python_tool
    from arpo_trl.tools.python.remote import remote_python_tool
    from arpo_trl.tools.search.cache import CacheMode, SearchCache
    from arpo_trl.tools.search.index import LocalIndex, RecordedSearch, search_tool
    from arpo_trl.tools.search.providers import make_provider
    from arpo_trl.tools.search.web import WebSearch
    from arpo_trl.tools.spec import ToolSpec, tool_spec
    from arpo_trl.tools.state import PathState
    from arpo_trl.tools.toolbox import ToolBox, ToolResult
    from arpo_trl.tools.visit.pages import visit_tool

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
    "mcp_tools",
    "python_tool",
    "remote_python_tool",
    "search_tool",
    "tool_spec",
    "visit_tool",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "CacheMode": "arpo_trl.tools.search.cache",
        "CallSource": "arpo_trl.tools.calls",
        "LocalIndex": "arpo_trl.tools.search.index",
        "PathState": "arpo_trl.tools.state",
        "RecordedSearch": "arpo_trl.tools.search.index",
        "SearchCache": "arpo_trl.tools.search.cache",
        "ToolBox": "arpo_trl.tools.toolbox",
        "ToolCall": "arpo_trl.tools.calls",
        "ToolFailure": "arpo_trl.tools.calls",
        "ToolResult": "arpo_trl.tools.toolbox",
        "ToolSpec": "arpo_trl.tools.spec",
        "WebSearch": "arpo_trl.tools.search.web",
        "make_provider": "arpo_trl.tools.search.providers",
        "mcp_tools": "arpo_trl.tools.mcp",
        "python_tool": "arpo_trl.tools.python.local",
        "remote_python_tool": "arpo_trl.tools.python.remote",
        "search_tool": "arpo_trl.tools.search.index",
        "tool_spec": "arpo_trl.tools.spec",
        "visit_tool": "arpo_trl.tools.visit.pages",
    },
)
