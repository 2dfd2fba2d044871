"""Noisy demonstrations of a scripted customer, who knows the shop and makes mistakes at known rates."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arpo_trl.quickstart.shop.environment import CATALOGUE, Shop

END = "Done."
"""The model's last turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mistakes:
    """Probabilities of the scripted customer's mistakes.

    Attributes:
        dearer: Buys the more expensive product; per shelf.
        give_up: Continues without the other product after "sold out"; per such result.
        leave: Stops before the cart is paid; per order.
    """

    dearer: float = 0.3
    give_up: float = 0.4
    leave: float = 0.15


NO_MISTAKES = Mistakes(dearer=0.0, give_up=0.0, leave=0.0)


def make_demonstrations(
    orders: Sequence[Mapping[str, Any]], seed: int, n: int, mistakes: Mistakes = Mistakes()
) -> list[dict[str, Any]]:
    """Return `n` demonstrations, rows {messages}. They cycle through `orders`, with new mistakes each time."""
    rng = random.Random(seed)
    return [{"messages": demonstrate(Shop(), orders[i % len(orders)], rng, mistakes)} for i in range(n)]


def demonstrate(shop: Shop, order: Mapping[str, Any], rng: random.Random, mistakes: Mistakes) -> list[dict[str, str]]:
    """Let the customer buy the order in `shop`. Returns the messages."""
    messages = [{"role": "user", "content": shop.reset(**order)}]

    def call(tool: str, argument: str) -> str:
        result: str = getattr(shop, tool)(argument)
        # With the space before it, a name is the same token here as in orders and results.
        space = "" if argument.isdecimal() else " "
        messages.append({"role": "assistant", "content": f"<{tool}>{space}{argument}</{tool}>"})
        messages.append({"role": "tool", "name": tool, "content": result})
        return result

    cart = ""
    for kind in order["kinds"]:
        shelf = [entry.split(" ") for entry in call("look", kind).split(", ")]
        (_, first), (_, second) = sorted(shelf, key=lambda entry: int(entry[0]))
        if rng.random() < mistakes.dearer:
            first, second = second, first
        result = call("add", first)
        if "sold out" in result and rng.random() >= mistakes.give_up:
            result = call("add", second)
        cart = result.removeprefix("Cart ") if result.startswith("Cart ") else cart
    if cart and rng.random() >= mistakes.leave:
        call("buy", cart)
    messages.append({"role": "assistant", "content": END})
    return messages


def tokenizer_texts() -> list[str]:
    """Return the training texts of the tokenizer. Names repeat, so that each becomes one token."""
    names = [*CATALOGUE, *(product for products in CATALOGUE.values() for product in products)]
    orders = ["Order: tea, bread. Budget 12", "3 Rye, 7 Pita", "Rye is sold out, try Pita", "There is no Rye"]
    carts = ["Cart 12", "The cart is paid", "The cart is empty", "The cart costs 12", "The budget is 12", "Paid 12"]
    return [*(f" {name}" for name in names), "system\nuser\nassistant\ntool", *orders, *carts, END] * 50
