"""Branch rules decide whether an observation branches. Each rule is one file; docs/algorithm.md has a table.

A rule from outside the package is a class. Set `branch_rule` to its import path, such as `my_rules:Always`, or
register it under a name, and set that name:

    from arpo_trl.rollout.rules import BranchContext, BranchDecision, BranchRule, Candidate, register_rule

    @register_rule("always")
    @dataclass(frozen=True, kw_only=True)
    class Always(BranchRule):
        def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
            return BranchDecision(fires=True)

Pure: imports no trl, no engine and no network code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from arpo_trl.common.registry import Registry
from arpo_trl.rollout.rules.base import (
    BranchContext,
    BranchRule,
    BudgetSplit,
    Candidate,
    LivePath,
    Moment,
    Planned,
    Rounds,
    check_attributes,
    fire_rate_alarms,
    grant,
    mean,
)
from arpo_trl.rollout.tree import BranchDecision

__all__ = [
    "RULES",
    "BranchContext",
    "BranchDecision",
    "BranchRule",
    "BudgetSplit",
    "Candidate",
    "LivePath",
    "Moment",
    "Planned",
    "Rounds",
    "build_rule",
    "fire_rate_alarms",
    "grant",
    "mean",
    "register_rule",
]

RULES: Registry[type[BranchRule]] = Registry("branch rule", __name__, __path__, "BranchRule", "branch_rule")
register_rule = RULES.register


def build_rule(name: str, settings: Mapping[str, Any], options: Mapping[str, Any]) -> BranchRule:
    """Create the rule called `name`, or at that import path.

    Args:
        settings: Values that several rules share. The rule gets the values for which it has fields.
        options: Values for the rule's other fields.

    Raises:
        ConfigError: The rule does not exist, has no field for an option, has a required field without a value, or has
            another kind of `moment` or `alarms`.
    """
    rule: BranchRule = RULES.build(name, options, settings)
    check_attributes(rule)
    return rule
