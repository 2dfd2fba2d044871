"""A base of environments for tests: a basket that the model puts items into."""

from __future__ import annotations

from typing import Any


class Basket:
    """The name of its row, then the items that were put into it."""

    items: list[str]

    def reset(self, name: str, **row: Any) -> str:
        self.items = [name]
        return f" in {name}"

    def put(self, item: str) -> str:
        """Put an item into the cart.

        Args:
            item: Which.
        """
        self.items.append(item)
        return " ".join(self.items)
