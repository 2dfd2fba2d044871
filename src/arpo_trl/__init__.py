"""Agentic Reinforced Policy Optimization as a TRL trainer.

    from arpo_trl import ARPOConfig, ARPOTrainer

| name | use |
|---|---|
| `ARPOTrainer`, `ARPOConfig` | training: `GRPOTrainer` and `GRPOConfig` with trees |
| `load_arpo_dataset`, `tags_system_prompt` | data: rows in published layouts, a system prompt for your tools |
| `python_tool`, `remote_python_tool`, `search_tool`, `visit_tool`, `mcp_tools` | built-in tools |
| `LocalIndex`, `WebSearch` | sources for `search_tool` |
| `Provider`, `Hit`, `register_provider` | custom search services |
| `PathState` | the state on which a tool's calls act, one per path |
| `ToolError`, `ToolUnavailable` | errors that a tool can raise: a failed call, an unavailable service |
| `HierarchicalReward`, `LLMJudge`, `math_equal`, `token_f1` | rewards |
| `BranchRule`, `BranchDecision`, `register_rule` | custom branch rules |
| `Credit`, `register_credit` | custom credits |
| `ScriptedEngine`, `ScriptedTurn`, `SamplingParams` | an engine that returns scripted turns, for tests |
| `EvaluationCallback` | evaluation on benchmarks during training |

Everything else is internal and may change without notice, except the names in the examples of the documentation.
docs/architecture.md explains how to extend each part.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING

from arpo_trl.common.lazy import lazy_names

if TYPE_CHECKING:
    from arpo_trl.config import ARPOConfig
    from arpo_trl.data.loading import load_arpo_dataset
    from arpo_trl.data.prompts import tags_system_prompt
    from arpo_trl.errors import ToolError, ToolUnavailable
    from arpo_trl.evaluation.callback import EvaluationCallback
    from arpo_trl.rewards.answers import math_equal, token_f1
    from arpo_trl.rewards.hierarchical import HierarchicalReward
    from arpo_trl.rewards.judge import LLMJudge
    from arpo_trl.rollout.credit import register_credit
    from arpo_trl.rollout.credit.base import Credit
    from arpo_trl.rollout.engines.base import SamplingParams
    from arpo_trl.rollout.engines.scripted import ScriptedEngine, ScriptedTurn
    from arpo_trl.rollout.rules import register_rule
    from arpo_trl.rollout.rules.base import BranchRule
    from arpo_trl.rollout.tree import BranchDecision
    from arpo_trl.tools.mcp import mcp_tools
    from arpo_trl.tools.python.local import python_tool
    from arpo_trl.tools.python.remote import remote_python_tool
    from arpo_trl.tools.search.index import LocalIndex, search_tool
    from arpo_trl.tools.search.providers import register_provider
    from arpo_trl.tools.search.providers.base import Hit, Provider
    from arpo_trl.tools.search.web import WebSearch
    from arpo_trl.tools.state import PathState
    from arpo_trl.tools.visit.pages import visit_tool
    from arpo_trl.training.trainer import ARPOTrainer

__version__ = version("arpo-trl")
__all__ = [
    "ARPOConfig",
    "ARPOTrainer",
    "BranchDecision",
    "BranchRule",
    "Credit",
    "EvaluationCallback",
    "HierarchicalReward",
    "Hit",
    "LLMJudge",
    "LocalIndex",
    "PathState",
    "Provider",
    "SamplingParams",
    "ScriptedEngine",
    "ScriptedTurn",
    "ToolError",
    "ToolUnavailable",
    "WebSearch",
    "load_arpo_dataset",
    "math_equal",
    "mcp_tools",
    "python_tool",
    "register_credit",
    "register_provider",
    "register_rule",
    "remote_python_tool",
    "search_tool",
    "tags_system_prompt",
    "token_f1",
    "visit_tool",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "ARPOConfig": "arpo_trl.config",
        "ARPOTrainer": "arpo_trl.training.trainer",
        "BranchDecision": "arpo_trl.rollout.tree",
        "BranchRule": "arpo_trl.rollout.rules.base",
        "Credit": "arpo_trl.rollout.credit.base",
        "EvaluationCallback": "arpo_trl.evaluation.callback",
        "HierarchicalReward": "arpo_trl.rewards.hierarchical",
        "Hit": "arpo_trl.tools.search.providers.base",
        "LLMJudge": "arpo_trl.rewards.judge",
        "LocalIndex": "arpo_trl.tools.search.index",
        "PathState": "arpo_trl.tools.state",
        "Provider": "arpo_trl.tools.search.providers.base",
        "SamplingParams": "arpo_trl.rollout.engines.base",
        "ScriptedEngine": "arpo_trl.rollout.engines.scripted",
        "ScriptedTurn": "arpo_trl.rollout.engines.scripted",
        "ToolError": "arpo_trl.errors",
        "ToolUnavailable": "arpo_trl.errors",
        "WebSearch": "arpo_trl.tools.search.web",
        "load_arpo_dataset": "arpo_trl.data.loading",
        "math_equal": "arpo_trl.rewards.answers",
        "mcp_tools": "arpo_trl.tools.mcp",
        "python_tool": "arpo_trl.tools.python.local",
        "register_credit": "arpo_trl.rollout.credit",
        "register_provider": "arpo_trl.tools.search.providers",
        "register_rule": "arpo_trl.rollout.rules",
        "remote_python_tool": "arpo_trl.tools.python.remote",
        "search_tool": "arpo_trl.tools.search.index",
        "tags_system_prompt": "arpo_trl.data.prompts",
        "token_f1": "arpo_trl.rewards.answers",
        "visit_tool": "arpo_trl.tools.visit.pages",
    },
)
