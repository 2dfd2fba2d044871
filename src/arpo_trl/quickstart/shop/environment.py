"""A shop, an environment with a state: shelves with prices, stock, a cart and a budget.

    Order: tea, bread. Budget 9
    look ▶ tea       3 Assam, 7 Sencha
    add ▶ Assam      Assam is sold out, try Sencha
    add ▶ Sencha     Cart 7
    …
    buy ▶ 9          Paid 9

Prices and stock differ from row to row. A customer sees that a product is sold out only when adding it. The shop takes
nothing back, so that a wrong choice costs the reward.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

CATALOGUE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "tea": ("Assam", "Sencha", "Rooibos", "Matcha"),
        "bread": ("Rye", "Naan", "Pita", "Baguette"),
        "cheese": ("Gouda", "Brie", "Feta", "Cheddar"),
        "fruit": ("Mango", "Papaya", "Cherry", "Melon"),
        "pasta": ("Penne", "Fusilli", "Ravioli", "Orzo"),
        "fish": ("Salmon", "Tuna", "Trout", "Cod"),
        "herb": ("Basil", "Thyme", "Mint", "Dill"),
        "nut": ("Almond", "Cashew", "Pecan", "Walnut"),
        "wood": ("Oak", "Pine", "Teak", "Maple"),
        "cloth": ("Linen", "Silk", "Denim", "Velvet"),
        "colour": ("Ochre", "Umber", "Indigo", "Crimson"),
        "flower": ("Tulip", "Aster", "Dahlia", "Iris"),
    }
)
"""Kind → its products. A shop has two of them on the shelf, a cheap one and an expensive one."""

_CHEAP, _DEAR = range(1, 5), range(6, 10)
_SOLD_OUT_SHARE = 0.3
_MAX_STOCK = 3


class Shop:
    """A shop in which the customer must buy an order within a budget.

    Args:
        reset_seconds: The duration of `reset` in seconds, to simulate an environment that is slow to set up, such as a
            browser.
    """

    def __init__(self, reset_seconds: float = 0.0):
        self._reset_seconds = reset_seconds
        self._kinds: tuple[str, ...] = ()
        self._budget = 0
        self._prices: dict[str, dict[str, int]] = {}
        self._stock: dict[str, int] = {}
        self._cart: list[str] = []
        self._paid = False

    def reset(self, kinds: Sequence[str], budget: int, seed: int, **row: Any) -> str:
        """Fill the shelves. Returns the order, for the prompt.

        Args:
            kinds: What to buy, one product of each kind.
            budget: The most that the cart may cost.
            seed: Determines shelves, prices and stock.
            row: Other columns, which are ignored.
        """
        time.sleep(self._reset_seconds)
        self._kinds, self._budget = tuple(kinds), budget
        self._prices, self._stock = _shelves(seed)
        self._cart, self._paid = [], False
        return f"Order: {', '.join(self._kinds)}. Budget {budget}"

    def look(self, kind: str) -> str:
        """Shows the shelf of a kind of product, with prices.

        Args:
            kind: The kind, such as tea.
        """
        if kind not in self._prices:
            return f"There is no {kind}"
        return ", ".join(f"{price} {product}" for product, price in self._prices[kind].items())

    def add(self, product: str) -> str:
        """Puts one piece of a product into the cart. The shop takes nothing back.

        Args:
            product: The name on the shelf.
        """
        if product not in self._stock:
            return f"There is no {product}"
        if self._paid:
            return "The cart is paid"
        if self._stock[product] == 0:
            shelf = next(shelf for shelf in self._prices.values() if product in shelf)
            left = next((other for other in shelf if self._stock[other]), None)
            return f"{product} is sold out" + (f", try {left}" if left else "")
        self._stock[product] -= 1
        self._cart.append(product)
        return f"Cart {self._total}"

    def buy(self, amount: str) -> str:
        """Pays for the cart.

        Args:
            amount: What the cart costs, in digits.
        """
        if self._paid:
            return "The cart is paid"
        if not self._cart:
            return "The cart is empty"
        if amount != str(self._total):
            return f"The cart costs {self._total}"
        if self._total > self._budget:
            return f"The budget is {self._budget}"
        self._paid = True
        return f"Paid {self._total}"

    def get_reward(self) -> float:
        """Return 1.0 if the cart is paid and has one product of each kind of the order and nothing else, otherwise
        0.0."""
        kinds = sorted(kind for product in self._cart for kind, shelf in self._prices.items() if product in shelf)
        return float(self._paid and kinds == sorted(self._kinds))

    def fork(self) -> Shop:
        """Return a shop in the same state. Prices never change, so both shops share them."""
        other = Shop(self._reset_seconds)
        other._kinds, other._budget, other._prices, other._paid = self._kinds, self._budget, self._prices, self._paid
        other._stock, other._cart = dict(self._stock), list(self._cart)
        return other

    def digest(self) -> tuple[Any, ...]:
        """Return a value that is equal for equal states."""
        prices = tuple(item for shelf in self._prices.values() for item in shelf.items())
        return self._kinds, self._budget, prices, tuple(self._stock.items()), tuple(self._cart), self._paid

    def describe(self) -> str:
        """Return the state that a customer changes: the remaining stock, the cart and whether it is paid."""
        stock = [f"stock of {product}: {count}" for product, count in self._stock.items()]
        return "\n".join([*stock, f"cart: {', '.join(self._cart)}", f"paid: {self._paid}"])

    @property
    def _total(self) -> int:
        return sum(shelf[product] for product in self._cart for shelf in self._prices.values() if product in shelf)


def least_cost(kinds: Sequence[str], seed: int) -> int:
    """Return the cost of an order with the cheapest product in stock of each kind, in the shop with this seed."""
    prices, stock = _shelves(seed)
    return sum(min(price for product, price in prices[kind].items() if stock[product]) for kind in kinds)


def _shelves(seed: int) -> tuple[dict[str, dict[str, int]], dict[str, int]]:
    """Return kind → product → price, and product → pieces. At most one product of a shelf is sold out."""
    rng = random.Random(seed)
    prices: dict[str, dict[str, int]] = {}
    stock: dict[str, int] = {}
    for kind, products in CATALOGUE.items():
        shelf = rng.sample(products, 2)
        shelf_prices = [rng.choice(_CHEAP), rng.choice(_DEAR)]
        rng.shuffle(shelf_prices)
        prices[kind] = dict(zip(shelf, shelf_prices, strict=True))
        stock |= {product: rng.randint(1, _MAX_STOCK) for product in shelf}
        if rng.random() < _SOLD_OUT_SHARE:
            stock[rng.choice(shelf)] = 0
    return prices, stock
