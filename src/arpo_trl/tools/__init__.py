"""Tools that a policy can call, and the box that runs the calls."""

from arpo_trl.tools.box import PastCall, PathTool, ToolBox, ToolCall, ToolFailure, ToolResult, ToolSpec, tool_spec
from arpo_trl.tools.python import python_tool
from arpo_trl.tools.python_remote import remote_python_tool
from arpo_trl.tools.search import LocalIndex, RecordedSearch, search_tool

__all__ = [
    "LocalIndex",
    "PastCall",
    "PathTool",
    "RecordedSearch",
    "ToolBox",
    "ToolCall",
    "ToolFailure",
    "ToolResult",
    "ToolSpec",
    "python_tool",
    "remote_python_tool",
    "search_tool",
    "tool_spec",
]
