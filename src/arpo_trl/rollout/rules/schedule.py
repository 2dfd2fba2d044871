"""Balanced widths: at its m-th result every path gets the same number of children, independent of its text.

Reads only the depth, when an observation is complete, so it has no look-ahead. `Planned` describes how the leaves of
paths that end early are replaced.

Bias: none up to scale if every path has enough results for all widths; otherwise multiplicity.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, ClassVar

from arpo_trl.common.alarm import Alarm
from arpo_trl.common.settings import described
from arpo_trl.errors import ConfigError
from arpo_trl.rollout.estimates import DepthEstimates, depth_sums
from arpo_trl.rollout.rules import register_rule
from arpo_trl.rollout.rules.base import BranchContext, Planned
from arpo_trl.rollout.tree import RolloutTree


@register_rule("schedule")
@dataclass(frozen=True, kw_only=True)
class Schedule(Planned):
    """Uses `widths`: the number of roots, then of children at each depth. Without them, it estimates widths for a
    budget of calls.

    Estimated widths (`arpo_trl.rollout.estimates`) are rounded at random, once per prompt and depth. The last
    depth splits the remaining leaves. Before the first estimates there are N roots, and the first results split all
    leaves.

        Schedule(widths=(1, 3, 2))  # 1 root, 3 children at its first result, 2 at each of their first: M = 6
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
    )

    widths: Sequence[int] = ()
    calls_share: float | None = field(
        default=None,
        metadata=described(
            "Budget of calls, as a share of those of M independent paths. None: 0.5, or the share that `widths` "
            "imply.",
            above=0,
            at_most=1,
        ),
    )
    exploration: float = field(
        default=0.03,
        metadata=described("Probability of one additional child, per prompt and depth.", at_least=0, at_most=1),
    )
    memory: float = field(
        default=0.8, metadata=described("Weight of earlier steps in the estimates.", at_least=0, at_most=1)
    )
    estimates: DepthEstimates = field(default_factory=DepthEstimates, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        valid = isinstance(self.widths, list | tuple) and all(type(k) is int and k >= 1 for k in self.widths)
        if not valid:
            raise ConfigError(f"widths is {self.widths!r}; expected integers of at least 1, such as [1, 3, 2].")
        if self.widths and self.calls_share is not None:
            raise ConfigError(
                "widths and calls_share are both set, but widths determine the calls. Remove one of them."
            )
        object.__setattr__(self, "widths", tuple(self.widths))

    @property
    def reads_logprobs(self) -> bool:
        return not self.widths

    def first_paths(self, leaves: int) -> int:
        return self.widths[0] if self.widths else super().first_paths(leaves)

    def check(self, leaves: int, first_paths: int, results: int | None) -> None:
        super().check(leaves, first_paths, results)
        if not self.widths:
            return
        if (product := math.prod(self.widths)) != leaves:
            raise ConfigError(
                f"widths is {list(self.widths)}, whose product is {product}, but num_generations (M) is {leaves}. Set "
                f"num_generations: {product}, or widths whose product is {leaves}."
            )
        if self.widths[0] != first_paths:
            raise ConfigError(
                f"widths starts with {self.widths[0]} but initial_rollouts (N) is {first_paths}. Remove "
                "initial_rollouts."
            )
        needed = max((depth for depth, width in enumerate(self.widths) if width > 1), default=0)
        if results is not None and needed > results:
            raise ConfigError(
                f"widths has children at {needed} results, but max_tool_calling_iterations allows "
                f"{results} per path. Shorten widths or raise max_tool_calling_iterations."
            )

    def plan(self, leaves: int, planned: int, context: BranchContext) -> Sequence[int]:
        return self.widths or self._drawn(leaves, planned, context)

    def _drawn(self, leaves: int, planned: int, context: BranchContext) -> list[int]:
        """Whole numbers of roots and children for one prompt."""
        widths = self.estimates.widths(leaves, self._share) or [float(planned), float(leaves)]
        factors, explores = [], False
        for depth, (above, width) in enumerate(zip([1.0, *widths], widths, strict=False)):
            draws = context.generator(-1, depth)
            factors.append(max(1, math.floor(width / above + draws.random())))
            extra = draws.random() < self.exploration
            factors[-1] += extra
            explores |= extra and depth > 0
        if explores:
            factors[0] = min(factors[0], leaves - 1)  # leaves one to branch
        return factors if len(widths) == 1 else [*factors[:-1], leaves]

    def lesson(self, trees: Sequence[RolloutTree], rewards: Sequence[float]) -> Any:
        return depth_sums(trees, rewards)

    def learn(self, lessons: Sequence[Any]) -> None:
        self.estimates.update(lessons, self.memory, self._share)

    def metrics(self) -> Mapping[str, float]:
        now = self.estimates
        widths = list(accumulate(self.widths, operator.mul)) or now.widths(now.leaves, self._share) or []
        return {f"schedule/{name}": value for name, value in now.metrics(widths).items()}

    def state_dict(self) -> Any:
        return self.estimates.state_dict()

    def load_state_dict(self, state: Any) -> None:
        self.estimates.load_state_dict(state)

    @property
    def _share(self) -> float:
        return 0.5 if self.calls_share is None else self.calls_share
