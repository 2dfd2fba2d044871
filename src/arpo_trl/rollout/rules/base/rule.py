"""The interface of a branch rule, and the budget that all rules share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any, ClassVar

from arpo_trl.common.alarm import Alarm
from arpo_trl.common.settings import check_fields, setting
from arpo_trl.errors import ConfigError
from arpo_trl.rollout.rules.base.context import BranchContext, Candidate, LivePath, Moment
from arpo_trl.rollout.tree import BranchDecision, RolloutTree

FIRE_RATE_COUNT = 200
"""Decisions after which the fire rate is checked."""


@dataclass(frozen=True, kw_only=True)
class BranchRule(ABC):
    """A branch rule: a frozen dataclass whose fields are its settings. One object serves all groups of a run.

    Most rules define only `judge`. A rule that spends the budget differently also overrides `decide`, `supply` or
    `roots`, or derives from `Rounds`, `Planned` or `BudgetSplit`. A rule that estimates something over the run sets
    `learns` and overrides the methods from `lesson` on.

        @register_rule("always")
        @dataclass(frozen=True, kw_only=True)
        class Always(BranchRule):
            def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
                return BranchDecision(fires=True)

        Always(branches_per_fork=2)
    """

    name: ClassVar[str] = "unregistered"
    """The rule's name in the setting `branch_rule`; `register_rule` sets it."""
    moment: ClassVar[Moment] = Moment.PROBE
    alarms: ClassVar[Sequence[Alarm]] = ()
    """Warnings about metrics of runs with this rule, such as those of `fire_rate_alarms`."""
    sets_branches: ClassVar[bool] = False
    """Whether the rule itself sets the number of branches of an observation, so that Z has no effect."""
    learns: ClassVar[bool] = False
    """Whether the rule learns from finished trees with rewards."""

    branches_per_fork: int = setting(1, "Z: number of extra turns under an observation that branches.", at_least=1)

    def __post_init__(self) -> None:
        """Checks the settings against the fields' metadata from `setting`."""
        check_fields(self)

    def most_branches(self, above: int = 0) -> int:
        """Return the maximum number of branches of one observation, if its path has `above` branches above it."""
        return self.branches_per_fork

    @property
    def reads_logprobs(self) -> bool:
        """Whether the rule reads the sampling logprobs of turns, so that the engine must return them."""
        return False

    def most_leaves(self, leaves: int, first_paths: int, results: int) -> int:
        """Return the maximum number of leaves that branches make of the N first paths, at most M.

        Args:
            leaves: M.
            first_paths: N.
            results: The maximum number of tool results of a path.
        """
        if self.moment.waits:  # one decision about all observations of the first paths
            return min(leaves, first_paths * (1 + self.most_branches() * results))
        most_of = {0: 1}  # branches above → the most leaves of a path
        for _ in range(results):
            before, most_of = most_of, dict(most_of)
            for above, paths in before.items():
                for more in range(1, min(self.most_branches(above), leaves) + 1):
                    most_of[above + more] = max(most_of.get(above + more, 0), paths * (1 + more))
            if most_of == before or first_paths * max(most_of.values()) >= leaves:
                break
        return min(leaves, first_paths * max(most_of.values()))

    def why_never(self) -> str | None:
        """Return why the rule never fires with its settings, and what to change; None if it can fire."""
        return None

    def first_paths(self, leaves: int) -> int:
        """Return the default of N for groups of `leaves` leaves."""
        return leaves // 2

    def check(self, leaves: int, first_paths: int, results: int | None) -> None:
        """Check that the rule can spend the budget of a run.

        Args:
            leaves: M.
            first_paths: N.
            results: The maximum number of tool results of a path; None: no limit.

        Raises:
            ConfigError: The rule cannot spend the budget, or a setting has no effect.
        """
        if self.sets_branches and self.branches_per_fork != 1:
            raise ConfigError(
                f"branches_per_fork is {self.branches_per_fork}, but the branch rule {self.name!r} sets the number of "
                "branches itself. Remove branches_per_fork."
            )
        if first_paths < leaves and (reason := self.why_never()) is not None:
            raise ConfigError(
                f"The branch rule {self.name!r} never branches: {reason}, or set initial_rollouts to num_generations, "
                "which is GRPO."
            )
        if not results or (most := self.most_leaves(leaves, first_paths, results)) >= leaves:
            return
        raise ConfigError(
            f"Under the branch rule {self.name!r} with max_tool_calling_iterations: {results}, the N = {first_paths} "
            f"first paths become at most {most} of M = {leaves} leaves, so branches cannot use the budget. Raise "
            f"initial_rollouts, max_tool_calling_iterations or the rule's number of branches."
        )

    def start(self, context: BranchContext) -> Any:
        """Return the rule's state for a new group. It is stored in `context.state`."""
        return None

    def roots(self, planned: int, context: BranchContext) -> int:
        """Return how many paths start at the root at the beginning; from 1 to M.

        The sampler calls this once per group with N < M, after `start`.

        Args:
            planned: N. `context.remaining` is M − N.
        """
        return planned

    @abstractmethod
    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        """Decide whether this observation branches.

        `granted` of the result is the number of branches that it gets if it fires and the budget suffices, at most
        `most_branches`; 0: Z.
        """

    def judged(self, candidates: Sequence[Candidate], context: BranchContext) -> list[BranchDecision]:
        """Return the decisions of `judge`.

        Raises:
            ConfigError: One is no `BranchDecision`.
        """
        decisions = [self.judge(candidate, context) for candidate in candidates]
        for decision in decisions:
            if not isinstance(decision, BranchDecision):
                raise ConfigError(
                    f"The branch rule {self.name!r} returned {decision!r} from `judge`; expected a BranchDecision."
                )
        return decisions

    def decide(self, candidates: Sequence[Candidate], context: BranchContext) -> list[BranchDecision]:
        """Return one decision per candidate, with `granted` set. Their sum is at most `context.remaining`.

        The candidates are those that have reached `moment`, sorted by place in the tree. A rule that waits gets all
        observations of the tree each time. Its grants are added to the earlier grants of the node.
        """
        judged = self.judged(candidates, context)
        wanted = [self.branches_per_fork if decision.granted == 0 else decision.granted for decision in judged]
        if wanted and not are_whole(wanted, 1, math.inf):
            raise ConfigError(
                f"The branch rule {self.name!r} returned `granted` {wanted!r} from `judge`; expected whole numbers."
            )
        granted, most = max((made.granted for made in judged if made.fires), default=0), self.most_branches()
        if granted > most:  # `supply` has planned the top-ups for `most`
            raise ConfigError(
                f"The branch rule {self.name!r} returned `granted` {granted} from `judge`, but `most_branches` "
                f"returns {most}. In the class, set `sets_branches = True` and override `most_branches`: it returns "
                "the largest number of branches of an observation."
            )
        return grant(judged, wanted, [decision.delta or 0.0 for decision in judged], context.remaining)

    def supply(self, live: Iterable[LivePath], context: BranchContext) -> int:
        """Return how many of the remaining leaves branches can still use. The sampler starts the others at the root.

        The sampler calls this after each decision. A path that can still get r results becomes at most (1 + Z)^r
        leaves, since every branch inherits the remaining results. A rule that waits has already granted all leaves
        that it wants.
        """
        if self.moment.waits:
            return 0
        total, each = 0, self.most_branches()
        for path in live:
            if path.results > context.remaining:  # enough, as (1 + Z)^r − 1 ≥ r; avoids huge powers
                return context.remaining
            total += (1 + each) ** path.results - 1
            if total >= context.remaining:
                return context.remaining
        return total

    def lesson(self, trees: Sequence[RolloutTree], rewards: Sequence[float]) -> Any:
        """Return what the rule learns from one rank's trees of a training step, as plain data. Does not change the
        rule.

        Args:
            trees: The finished trees.
            rewards: One per leaf, tree by tree in leaf order; NaN where no reward function applies.
        """
        return None

    def learn(self, lessons: Sequence[Any]) -> None:
        """Learn from the lessons of all ranks. Every rank gets the same lessons, so the rule stays equal on all
        ranks."""
        return

    def metrics(self) -> Mapping[str, float]:
        """Return values to log under `arpo/`, by name; alarms can read them too."""
        return {}

    def state_dict(self) -> Any:
        """Return a copy of the learned values, as plain data for a checkpoint."""
        return None

    def load_state_dict(self, state: Any) -> None:
        """The inverse of `state_dict`."""
        return


def check_attributes(rule: BranchRule) -> None:
    """Check the attributes of a rule that are no settings.

    Raises:
        ConfigError: `moment` is no `Moment`, or `alarms` are no `Alarm`s.
    """
    if not isinstance(rule.moment, Moment):
        raise ConfigError(
            f"`moment` of the branch rule {rule.name!r} is {rule.moment!r}; expected a Moment of "
            "arpo_trl.rollout.rules, such as Moment.RESULT."
        )
    if not (isinstance(rule.alarms, Sequence) and all(isinstance(alarm, Alarm) for alarm in rule.alarms)):
        raise ConfigError(
            f"`alarms` of the branch rule {rule.name!r} is {rule.alarms!r}; expected a list of Alarm of "
            "arpo_trl.common.alarm."
        )


def grant(
    decisions: Sequence[BranchDecision], wanted: Sequence[int], priorities: Sequence[float], remaining: int
) -> list[BranchDecision]:
    """Return the decisions with `granted` set. Decisions that fire get the branches that they want, highest priority
    first.

    The grants stop when `remaining` is used up. At equal priority, the earlier decision in the sequence comes first.
    """
    granted = [replace(decision, granted=0) for decision in decisions]
    for i in sorted(range(len(granted)), key=lambda i: -priorities[i]):
        if granted[i].fires:
            taken = min(wanted[i], remaining)
            remaining -= taken
            granted[i] = replace(granted[i], granted=taken)
    return granted


def are_whole(numbers: Any, least: int, most: float) -> bool:
    """Whether `numbers` is a sequence of at least one whole number, each within the limits."""
    return (
        isinstance(numbers, Sequence)
        and len(numbers) > 0
        and all(isinstance(number, Integral) and least <= int(number) <= most for number in numbers)
    )


def unreachable(largest: float, limit: float, advice: str) -> str | None:
    """The result of `why_never` for a rule whose P is at most `largest` and has to exceed `limit`; None if it can."""
    return f"its P is at most {largest:g}, and must exceed {limit:g}. {advice}" if largest <= limit else None


def fire_rate_alarms(*, too_often: str, too_rarely: str) -> tuple[Alarm, Alarm]:
    """The alarms of a rule that fires on entropy, if at least 90 % or at most 10 % of the tool results fire it.

    Args:
        too_often, too_rarely: How to lower the share, and how to raise it. Each completes a sentence.
    """
    return (
        Alarm(
            metric="tree/fire_rate",
            limit=0.9,
            advice="{share} of the tool results fire the branch rule, so the budget and not the entropy determines "
            f"the branches. {too_often}, or use branch_rule ranked.",
            count=FIRE_RATE_COUNT,
            again=False,
        ),
        Alarm(
            metric="tree/fire_rate",
            limit=0.1,
            advice="Only {share} of the tool results fire the branch rule, so most of the branch budget goes to "
            f"top-ups at the root. {too_rarely}, or use branch_rule ranked.",
            below=True,
            count=FIRE_RATE_COUNT,
            again=False,
        ),
    )


THRESHOLD_ALARMS = fire_rate_alarms(too_often="Raise branch_threshold", too_rarely="Lower branch_threshold")
"""The alarms of a rule that compares with `branch_threshold`."""
