"""The interface of a branch rule, what it reads, and the ways to spend the budget from which rules derive."""

from arpo_trl.rollout.rules.base.context import BranchContext, Candidate, LivePath, Moment, clipped, mean, rise
from arpo_trl.rollout.rules.base.estimated import EstimatedWidths
from arpo_trl.rollout.rules.base.planned import Planned, check_widths, checked_widths
from arpo_trl.rollout.rules.base.rounds import Rounds
from arpo_trl.rollout.rules.base.rule import (
    FIRE_RATE_COUNT,
    THRESHOLD_ALARMS,
    BranchRule,
    are_whole,
    check_attributes,
    fire_rate_alarms,
    grant,
    unreachable,
)
from arpo_trl.rollout.rules.base.split import BudgetSplit

__all__ = [
    "FIRE_RATE_COUNT",
    "THRESHOLD_ALARMS",
    "BranchContext",
    "BranchRule",
    "BudgetSplit",
    "Candidate",
    "EstimatedWidths",
    "LivePath",
    "Moment",
    "Planned",
    "Rounds",
    "are_whole",
    "check_attributes",
    "check_widths",
    "checked_widths",
    "clipped",
    "fire_rate_alarms",
    "grant",
    "mean",
    "rise",
    "unreachable",
]
