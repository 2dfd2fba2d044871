"""Orders for the shop, as rows {kinds, budget, seed, id}.

The budget is the cost of the cheapest products in stock, plus at most 1. So a customer has to compare prices.
"""

from __future__ import annotations

import random
from typing import Any

from arpo_trl.quickstart.shop.environment import CATALOGUE, least_cost
from arpo_trl.quickstart.task import split_rows

KINDS_PER_ORDER = 2
_MAX_SLACK = 1


def make_orders(seed: int, n_train: int, n_heldout: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return training and held-out rows. No two rows have the same shop; the same arguments give the same rows."""
    rng = random.Random(seed)
    shops = rng.sample(range(2**31), n_train + n_heldout)
    return split_rows([_make_row(rng, shop) for shop in shops], n_heldout)


def _make_row(rng: random.Random, shop: int) -> dict[str, Any]:
    kinds = rng.sample(sorted(CATALOGUE), KINDS_PER_ORDER)
    return {"kinds": kinds, "budget": least_cost(kinds, shop) + rng.randint(0, _MAX_SLACK), "seed": shop}
