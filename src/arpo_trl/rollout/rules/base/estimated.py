"""Rules that estimate the widths of a tree over the run (`arpo_trl.rollout.estimates`)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from arpo_trl.common.alarm import Alarm
from arpo_trl.common.settings import setting
from arpo_trl.rollout.estimates import DepthEstimates, depth_sums
from arpo_trl.rollout.rules.base.context import BranchContext
from arpo_trl.rollout.rules.base.planned import Planned
from arpo_trl.rollout.tree import RolloutTree


@dataclass(frozen=True, kw_only=True)
class EstimatedWidths(Planned):
    """A planned rule that learns S, v, c and η, and estimates widths for a budget of calls.

    Estimated widths are rounded at random, once per prompt and depth. The last depth splits the remaining leaves.
    Before the first estimates there are N roots, and the first results split all leaves.
    """

    learns: ClassVar[bool] = True
    alarms: ClassVar[Sequence[Alarm]] = (
        Alarm(
            metric="schedule/gain",
            limit=1.1,
            advice="At equal calls the best widths give at most {share} of what independent paths give, so branching "
            "cannot help. Set initial_rollouts to num_generations (GRPO).",
            below=True,
            count=10,
        ),
        Alarm(
            metric="schedule/budget_used",
            limit=1.25,
            advice="The trees make {share} of the calls that calls_share allows: many paths end before their results "
            "branch, and others start at the root. Raise calls_share in branch_rule_kwargs, or set initial_rollouts "
            "to num_generations (GRPO).",
            count=20,
        ),
    )

    calls_share: float | None = setting(
        None,
        "Budget of calls, as a share of those of M independent paths. None: 0.5, or the share that `widths` imply.",
        above=0,
        at_most=1,
    )
    exploration: float = setting(
        0.03, "Probability of one additional child, per prompt and depth.", at_least=0, at_most=1
    )
    memory: float = setting(0.8, "Weight of earlier steps in the estimates.", at_least=0, at_most=1)
    estimates: DepthEstimates = field(default_factory=DepthEstimates, init=False, repr=False, compare=False)

    @property
    def reads_logprobs(self) -> bool:
        """Whether the widths are estimated."""
        return True

    def plan(self, leaves: int, planned: int, context: BranchContext) -> Sequence[int]:
        widths = self.estimates.widths(leaves, self._share) or [float(planned), float(leaves)]
        factors, explored = [], 0
        for depth, (above, width) in enumerate(zip([1.0, *widths], widths, strict=False)):
            draws = context.generator(-1, depth)
            drawn = max(1, math.floor(width / above + draws.random()))
            extra = draws.random() < self.exploration
            factors.append(leaves if width >= leaves else drawn + extra)
            explored = depth if extra else explored
        if explored:
            factors[0] = min(factors[0], leaves - 1)  # leaves one to branch
        for depth in range(max(1, widths.index(leaves)), explored):
            factors[depth] = 1  # the last split, which would leave none, moves down to the explored depth
        return factors

    def expected_widths(self) -> Sequence[float]:
        """Return the number of turns at each depth, for the metrics; empty if it is not known yet."""
        return self.estimates.widths(self.estimates.leaves, self._share) or []

    def lesson(self, trees: Sequence[RolloutTree], rewards: Sequence[float]) -> Any:
        return depth_sums(trees, rewards)

    def learn(self, lessons: Sequence[Any]) -> None:
        self.estimates.update(lessons, self.memory)

    def metrics(self) -> Mapping[str, float]:
        widths = self.expected_widths()
        values = self.estimates.metrics(widths)
        if self.reads_logprobs and widths and (share := self.estimates.calls_share) is not None:
            values["budget_used"] = share / self._share
        return {f"schedule/{name}": value for name, value in values.items()}

    def state_dict(self) -> Any:
        return self.estimates.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.estimates.load_state_dict(state)

    @property
    def _share(self) -> float:
        return 0.5 if self.calls_share is None else self.calls_share
