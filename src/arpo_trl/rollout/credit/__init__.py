"""Credits, which set the advantage and weight of each token. Each credit is one file; docs/algorithm.md has a table.

Register a credit from outside the package under a name, and set `advantage_attribution` to that name:

    from arpo_trl.rollout.credit import register_credit
    from arpo_trl.rollout.credit.base import Credit

    @register_credit("halved")
    class Halved(Credit):
        def __call__(self, trees, rewards, advantages):
            return advantages / 2, None

Listing the names does not import torch; `base` and the credits do.
"""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

from arpo_trl.common.registry import Registry

if TYPE_CHECKING:
    from arpo_trl.rollout.credit.base import Credit

__all__ = ["CREDITS", "SharedPrefixWeight", "attributions", "credit_name", "register_credit"]

CREDITS: Registry[type[Credit]] = Registry("credit", __name__, __path__)
register_credit = CREDITS.register


class SharedPrefixWeight(StrEnum):
    """In how many leaves a shared token is trained."""

    PER_LEAF = "per_leaf"
    """In each of its d leaves, as in the paper."""
    ONCE = "once"
    """Only in the first of its leaves, with the mean advantage of all d."""


def attributions() -> list[str]:
    """The choices for `advantage_attribution`: all credits but "once", which `shared_prefix_weight` selects."""
    return [name for name in CREDITS.names if name != SharedPrefixWeight.ONCE]


def credit_name(attribution: str, weight: str) -> str:
    """The name of the credit that the two settings select. "once" wins: attributions do not differ under it."""
    return weight if weight == SharedPrefixWeight.ONCE else attribution
