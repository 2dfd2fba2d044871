"""Asks a branch rule, and checks its answers. Rules and scores from outside the package may return anything."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from arpo_trl.errors import ConfigError
from arpo_trl.rollout.rules.base import BranchContext, BranchRule, Candidate, LivePath
from arpo_trl.rollout.tree import BranchDecision

T = TypeVar("T")


def checked_roots(rule: BranchRule, planned: int, leaves: int, context: BranchContext) -> int:
    """The number of paths that start at the root.

    Raises:
        ConfigError: The rule returned another value than 1 to `leaves`.
    """
    roots = _whole(rule.roots(planned, context), rule, "roots")
    if not 1 <= roots <= leaves:
        raise ConfigError(
            f"The branch rule {rule.name!r} starts {roots} paths at the root; expected 1 to {leaves}. Correct its "
            "`roots`."
        )
    return roots


def checked_supply(rule: BranchRule, live: Iterable[LivePath], context: BranchContext) -> int:
    """The number of leaves that branches of the live paths can still supply.

    Raises:
        ConfigError: The rule returned no whole number.
    """
    return _whole(_with_budget_kept(lambda: rule.supply(live, context), rule, context), rule, "supply")


def checked_decisions(
    rule: BranchRule, candidates: Sequence[Candidate], context: BranchContext
) -> list[BranchDecision]:
    """The rule's decisions, one per candidate.

    Raises:
        ConfigError: A decision is not valid, or together they grant more leaves than remain.
    """
    decided: Any = _with_budget_kept(lambda: rule.decide(candidates, context), rule, context)
    if not isinstance(decided, Iterable):
        raise ConfigError(
            f"The branch rule {rule.name!r} returned {decided!r} from `decide`; expected one BranchDecision for each "
            f"of {len(candidates)} observations."
        )
    decisions = [_plain(decision, rule) for decision in decided]
    granted = [decision.granted for decision in decisions]
    if len(granted) != len(candidates) or min(granted, default=0) < 0 or sum(granted) > context.remaining:
        raise ConfigError(
            f"The branch rule {rule.name!r} granted {granted} leaves for {len(candidates)} observations; expected "
            f"one number ≥ 0 for each, with a sum of at most {context.remaining}. Correct its `decide`."
        )
    return decisions


def checked_rewards(rewards: Any, leaves: int) -> list[float]:
    """The rewards of a tree's finished leaves, from the `score` of a sampler.

    Raises:
        ConfigError: It is not one number per leaf.
    """
    try:
        numbers = [] if isinstance(rewards, str) else [float(reward) for reward in rewards]
    except (TypeError, ValueError, RuntimeError):  # the last from a tensor with several elements
        numbers = []
    if len(numbers) != leaves:
        raise ConfigError(f"`score` of a TreeSampler returned {rewards!r}; expected {leaves} numbers, one per leaf.")
    return numbers


def _with_budget_kept(ask: Callable[[], T], rule: BranchRule, context: BranchContext) -> T:
    """The answer of a rule.

    Raises:
        ConfigError: The rule changed the remaining leaves, which only the sampler counts.
    """
    before = context.remaining
    answer = ask()
    if context.remaining != before:
        raise ConfigError(
            f"The branch rule {rule.name!r} changed context.remaining from {before} to {context.remaining}, but only "
            "the sampler may change it. Set `granted` of the decisions instead."
        )
    return answer


def _plain(decision: BranchDecision, rule: BranchRule) -> BranchDecision:
    """The decision with Python's own numbers, which can be logged and saved. Numbers that are not finite become None.

    Raises:
        ConfigError: It is no decision, or a field has a value of another type.
    """

    def number(value: Any) -> float | None:
        return None if value is None or not math.isfinite(value) else float(value)

    try:
        if decision.fires not in (True, False, None) or not isinstance(decision.reason, str):
            raise TypeError
        return replace(
            decision,
            entropy_nats=number(decision.entropy_nats),
            delta=number(decision.delta),
            probability=number(decision.probability),
            fires=None if decision.fires is None else bool(decision.fires),
            granted=operator.index(decision.granted),
        )
    except (TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise ConfigError(
            f"The branch rule {rule.name!r} decided {decision!r}; expected a BranchDecision with `fires` True, "
            "False or None, a whole number `granted`, numbers or None, and a text as `reason`."
        ) from error


def _whole(count: Any, rule: BranchRule, method: str) -> int:
    """The number of paths that a rule's method returned.

    Raises:
        ConfigError: It is no whole number.
    """
    try:
        return operator.index(count)
    except TypeError:
        raise ConfigError(
            f"The branch rule {rule.name!r} returned {count!r} from `{method}`; expected a whole number."
        ) from None
