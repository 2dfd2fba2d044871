"""Balanced widths: at its m-th result every path gets the same number of children, independent of its text.

Reads only the depth, when an observation is complete, so it has no look-ahead. `Planned` describes how the leaves of
paths that end early are replaced.

Bias: none up to scale if every path has enough results for all widths; otherwise multiplicity.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from arpo_trl.common.settings import changed
from arpo_trl.errors import ConfigError
from arpo_trl.rollout.rules import register_rule
from arpo_trl.rollout.rules.base import BranchContext, EstimatedWidths, check_widths, checked_widths


@register_rule("schedule")
@dataclass(frozen=True, kw_only=True)
class Schedule(EstimatedWidths):
    """Uses `widths`: the number of roots, then of children at each depth. Without them, it estimates widths for a
    budget of calls.

        Schedule(widths=(1, 3, 2))  # 1 root, 3 children at its first result, 2 at each of their first: M = 6
    """

    widths: Sequence[int] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.widths and (unused := [name for name in changed(self) if name in ("calls_share", "exploration")]):
            raise ConfigError(f"widths and {unused[0]} are both set, but widths determine the calls. Remove one.")
        object.__setattr__(self, "widths", checked_widths(self.widths))

    @property
    def reads_logprobs(self) -> bool:
        return not self.widths

    def first_paths(self, leaves: int) -> int:
        return self.widths[0] if self.widths else super().first_paths(leaves)

    def check(self, leaves: int, first_paths: int, results: int | None) -> None:
        super().check(leaves, first_paths, results)
        if self.widths:
            check_widths(self.widths, leaves, first_paths, results)

    def plan(self, leaves: int, planned: int, context: BranchContext) -> Sequence[int]:
        return self.widths or super().plan(leaves, planned, context)

    def expected_widths(self) -> Sequence[float]:
        return list(accumulate(self.widths, operator.mul)) or super().expected_widths()
