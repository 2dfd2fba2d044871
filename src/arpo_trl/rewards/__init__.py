"""Rewards: scores of answers, and the reward of a path."""

from __future__ import annotations

from typing import TYPE_CHECKING

from arpo_trl.common.lazy import lazy_names

if TYPE_CHECKING:
    from arpo_trl.rewards.answers import (
        exact_match,
        extract_answer,
        math_equal,
        paper_f1,
        spaced_f1,
        task_accuracy,
        token_f1,
    )
    from arpo_trl.rewards.hierarchical import FormatFault, HierarchicalReward, HierarchicalScore
    from arpo_trl.rewards.judge import Judgement, LLMJudge

__all__ = [
    "FormatFault",
    "HierarchicalReward",
    "HierarchicalScore",
    "Judgement",
    "LLMJudge",
    "exact_match",
    "extract_answer",
    "math_equal",
    "paper_f1",
    "spaced_f1",
    "task_accuracy",
    "token_f1",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "FormatFault": "arpo_trl.rewards.hierarchical",
        "HierarchicalReward": "arpo_trl.rewards.hierarchical",
        "HierarchicalScore": "arpo_trl.rewards.hierarchical",
        "Judgement": "arpo_trl.rewards.judge",
        "LLMJudge": "arpo_trl.rewards.judge",
        "exact_match": "arpo_trl.rewards.answers",
        "extract_answer": "arpo_trl.rewards.answers",
        "math_equal": "arpo_trl.rewards.answers",
        "paper_f1": "arpo_trl.rewards.answers",
        "spaced_f1": "arpo_trl.rewards.answers",
        "task_accuracy": "arpo_trl.rewards.answers",
        "token_f1": "arpo_trl.rewards.answers",
    },
)
