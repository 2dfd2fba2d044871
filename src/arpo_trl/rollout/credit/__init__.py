"""Credits set the advantage and weight of each token. Each credit is one file; docs/algorithm.md has a table.

A credit from outside the package is a class. Set `advantage_attribution` to its import path, such as
`my_credits:Halved`, or register it under a name, and set that name:

    from arpo_trl.rollout.credit import register_credit
    from arpo_trl.rollout.credit.base import Credit

    @register_credit("halved")
    class Halved(Credit):
        def __call__(self, trees, rewards, advantages):
            return advantages / 2, None

The fields of a credit that is a dataclass are its options, which `advantage_attribution_kwargs` sets.
Listing the names does not import torch; `base` and the credits do.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import TYPE_CHECKING, Any

from arpo_trl.common.registry import Registry

if TYPE_CHECKING:
    from arpo_trl.rollout.credit.base import Credit

__all__ = ["CREDITS", "SharedPrefixWeight", "attributions", "build_credit", "register_credit"]

CREDITS: Registry[type[Credit]] = Registry("credit", __name__, __path__, "Credit", "advantage_attribution")
register_credit = CREDITS.register


class SharedPrefixWeight(StrEnum):
    """The number of leaves in which a shared token is trained."""

    PER_LEAF = "per_leaf"
    """In each of its d leaves, as in the paper."""
    ONCE = "once"
    """Only in the first of its leaves, with the mean advantage of all d."""


def attributions() -> list[str]:
    """The choices for `advantage_attribution`: all credits except "once", which `shared_prefix_weight` selects."""
    return [name for name in CREDITS.names if name != SharedPrefixWeight.ONCE]


def build_credit(attribution: str, options: Mapping[str, Any], weight: SharedPrefixWeight) -> Credit:
    """Create the credit called `attribution`, or at that import path, with options. Under "once" each node is
    trained only once.

    Raises:
        ConfigError: The credit does not exist, or does not have one of the options.
    """
    credit: Credit = CREDITS.build(attribution, options)
    if weight is SharedPrefixWeight.PER_LEAF:
        return credit
    from arpo_trl.rollout.credit.once import Once  # imports torch

    return Once(credit)
