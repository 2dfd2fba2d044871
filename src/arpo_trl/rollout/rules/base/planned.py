"""Rules that plan the numbers of children of a tree before it grows."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from arpo_trl.errors import ConfigError
from arpo_trl.rollout.rules.base.context import BranchContext, Candidate, LivePath, Moment
from arpo_trl.rollout.rules.base.rule import BranchRule, are_whole
from arpo_trl.rollout.tree import Address, BranchDecision, NodeKind


@dataclass(slots=True, kw_only=True)
class Plan:
    """The state of a group under `Planned`.

    Plan(children=[1, 3, 2], shares={(0,): 6})
    """

    children: Sequence[int]
    """The number of roots, then of children at each depth; 1 after the last."""
    shares: dict[Address, int]
    """The number of leaves that each path must still become, itself included. Paths without an entry do not branch."""


@dataclass(frozen=True, kw_only=True)
class Planned(BranchRule):
    """A rule that gives every path the same number of children at its m-th result, independent of its text.

    Each path has a share of the M leaves, which it splits evenly among its children. If a path ends before it has
    split its share, or has too few results left, new paths start at the root immediately to replace the missing
    leaves. They do not branch. So a tree has exactly M leaves. A subclass defines `plan`. If the plan needs several
    results of a path, `check` should compare it with the limit of calls.

        @register_rule("late")
        @dataclass(frozen=True, kw_only=True)
        class Late(Planned):
            def plan(self, leaves: int, planned: int, context: BranchContext) -> Sequence[int]:
                return [planned, 1, leaves]

        Late()
    """

    moment: ClassVar[Moment] = Moment.RESULT
    sets_branches: ClassVar[bool] = True

    def most_leaves(self, leaves: int, first_paths: int, results: int) -> int:
        return leaves  # `check` of the subclass compares its plan with M

    @abstractmethod
    def plan(self, leaves: int, planned: int, context: BranchContext) -> Sequence[int]:
        """Return the number of roots of a group, then the number of children at each depth, all at least 1.

        Args:
            leaves: M.
            planned: N.
        """

    def roots(self, planned: int, context: BranchContext) -> int:
        leaves = planned + context.remaining
        children = self.plan(leaves, planned, context)
        if not are_whole(children, 1, math.inf):
            raise ConfigError(
                f"The branch rule {self.name!r} planned {children!r}; expected the number of roots, then of children "
                "at each depth, all whole numbers of at least 1. Correct its `plan`."
            )
        parts = split_evenly(leaves, min(children[0], leaves))
        context.state = Plan(children=children, shares={(i,): part for i, part in enumerate(parts)})
        return len(parts)

    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        plan: Plan = context.state
        width = plan.children[candidate.depth] if candidate.depth < len(plan.children) else 1
        share = plan.shares.get(candidate.address, 1)
        children = min(width, share)
        reason = f"planned width {width}, share of leaves {share}"
        return BranchDecision(fires=children > 1, granted=children - 1, reason=reason)

    def decide(self, candidates: Sequence[Candidate], context: BranchContext) -> list[BranchDecision]:
        decisions = self.judged(candidates, context)
        shares: dict[Address, int] = context.state.shares
        for candidate, decision in zip(candidates, decisions, strict=True):
            own, *others = split_evenly(shares.get(candidate.address, 1), decision.granted + 1)
            shares[candidate.address] = own
            shares |= {(*candidate.address, candidate.depth, j): part for j, part in enumerate(others)}
        return decisions

    def supply(self, live: Iterable[LivePath], context: BranchContext) -> int:
        plan: Plan = context.state
        total = 0
        for path in live:
            depth = sum(node.kind is NodeKind.OBSERVATION for node in context.tree.path(path.node))
            most = math.prod(plan.children[depth + 1 : depth + 1 + path.results])
            total += min(plan.shares.get(path.address, 1), most) - 1
        return total


def split_evenly(leaves: int, parts: int) -> list[int]:
    """`leaves` in `parts` numbers that differ by at most 1, the larger ones first."""
    even, rest = divmod(leaves, parts)
    return [even + (i < rest) for i in range(parts)]


def checked_widths(widths: Any) -> tuple[int, ...]:
    """Widths that a user has set: the number of roots, then of children at each depth; empty for none.

    Raises:
        ConfigError: They are no list of integers of at least 1.
    """
    if not isinstance(widths, list | tuple) or not all(type(width) is int and width >= 1 for width in widths):
        raise ConfigError(f"widths is {widths!r}; expected integers of at least 1, such as [1, 3, 2].")
    return tuple(widths)


def check_widths(widths: Sequence[int], leaves: int, first_paths: int, results: int | None) -> None:
    """Check that widths give M leaves from N roots, within the limit of tool results (`BranchRule.check`).

    Raises:
        ConfigError: They do not.
    """
    if (product := math.prod(widths)) != leaves:
        raise ConfigError(
            f"widths is {list(widths)}, whose product is {product}, but num_generations (M) is {leaves}. Set "
            f"num_generations: {product}, or widths whose product is {leaves}."
        )
    if widths[0] != first_paths:
        raise ConfigError(
            f"widths starts with {widths[0]} but initial_rollouts (N) is {first_paths}. Remove initial_rollouts."
        )
    needed = max((depth for depth, width in enumerate(widths) if width > 1), default=0)
    if results is not None and needed > results:
        raise ConfigError(
            f"widths has children at {needed} results, but max_tool_calling_iterations allows {results} per path. "
            "Shorten widths or raise max_tool_calling_iterations."
        )
