"""Rewards: how right an answer is, and what a path earns for it."""

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
