"""Environments and scripted rollouts for tests of environments: shops, and paths that put items into carts."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

from arpo_trl.errors import ToolError
from arpo_trl.rollout.batch import RolloutBatch
from arpo_trl.rollout.engines.scripted import ScriptedTurn
from arpo_trl.tools.environments.kind import environment_kind
from arpo_trl.tools.environments.state import Environments
from support import ANSWER, Scripted, search, until

OPENED: list[Any] = []
CLOSED: Counter[int] = Counter()


def forget() -> None:
    """Called before each test."""
    OPENED.clear()
    CLOSED.clear()


class Shop:
    """A cart; `put` returns what is in it."""

    def __init__(self) -> None:
        OPENED.append(self)
        self.items: list[str] = []

    def reset(self, name: str = "", **row: Any) -> str | None:
        self.items = [name]
        return None

    def put(self, item: str) -> str:
        """Put an item into the cart.

        Args:
            item: Which.
        """
        if item == "boom":
            raise ToolError("it broke")
        self.items.append(item)
        return " ".join(self.items)

    def close(self) -> None:
        CLOSED[id(self)] += 1


class ForkingShop(Shop):
    def fork(self) -> ForkingShop:
        made = type(self)()
        made.items = list(self.items)
        return made


class CopiedShop(Shop):
    copyable = True

    def __deepcopy__(self, memo: Any) -> CopiedShop:
        made = CopiedShop()
        made.items = list(self.items)
        return made


class FinalShop(Shop):
    replayable = False


def environments_of(
    kind: Any, *, timeout_s: float = 60.0, limit: int | None = None, keeps: bool = True
) -> Environments:
    made = Environments(environment_kind(kind, timeout_s), timeout_s=timeout_s, limit=limit, keeps=keeps)
    forget()  # those that were looked at
    made.start_groups({0: {"name": "a"}, 1: {"name": "b"}})
    return made


def buys(request: Any, context: str) -> ScriptedTurn:
    """Each path puts its address and depth twice, then one more item, and answers; entropy rises after the first."""
    depth = request.key[-1]
    name = "/".join(map(str, request.key[1:]))
    text = [f"<put>{name}</put>", f"<put>{name}</put>", "<put>z</put>", ANSWER][depth]
    return ScriptedTurn(text=text, entropies=[[0.5, 1.0, 0.1, 0.1][depth]])


def run(environments: Environments, script: Any = buys, groups: int = 1, **settings: Any) -> RolloutBatch:
    made = Scripted(script, tools=[search, *environments.tools], **{"leaves": 3, "at_root": 1, **settings})
    made.sampler.settings = replace(made.sampler.settings, max_completion_length=800)
    return made(groups)


def carts(environments: Environments, batch: RolloutBatch) -> list[dict[tuple[int, ...], list[str]]]:
    return [
        {leaf.address: environments.kept[group, leaf.address].value.items for leaf in tree.leaves()}  # type: ignore[union-attr]
        for group, tree in enumerate(batch.trees)
    ]


def all_closed(environments: Environments) -> bool:
    """Whether each instance is closed once, after the rewards. What hung has been released: it may take its time."""
    environments.instances.timeout_s = 60.0
    environments.close_kept()
    until(lambda: environments.instances.live == 0)
    return Counter(map(id, OPENED)) == CLOSED
