"""Credit: what each token of a tree is trained with. One way is one file; docs/algorithm.md has the table.

A way from outside the package is registered by name, and `advantage_attribution` then takes that name:

    from arpo_trl.rollout.credit import register_credit
    from arpo_trl.rollout.credit.base import Credit, token_nodes

Listing the names imports no torch; `base` and the ways themselves do.
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
    """How often a shared token is trained."""

    PER_LEAF = "per_leaf"
    """Once in each of its d leaves, as in the paper."""
    ONCE = "once"
    """In the first of its leaves only, with the mean advantage of all of them."""


def attributions() -> list[str]:
    """What `advantage_attribution` may be: every credit but that of `shared_prefix_weight`."""
    return [name for name in CREDITS.names if name != SharedPrefixWeight.ONCE]


def credit_name(attribution: str, weight: str) -> str:
    """The credit that the two settings choose: "once" wins, since the attributions coincide under it."""
    return weight if weight == SharedPrefixWeight.ONCE else attribution
