"""Shared and random states are found by `digest`, and the methods of an object run in one thread, one at a time."""

from __future__ import annotations

import random
import sqlite3
import threading
from typing import Any, ClassVar

import numpy as np
import pytest

from arpo_trl.errors import DataError, ToolSpecError
from arpo_trl.rollout.rules.ranked import Ranked
from arpo_trl.rollout.rules.threshold import Threshold
from arpo_trl.tools.calls import ToolFailure
from arpo_trl.tools.environments.differences import around_difference
from arpo_trl.training.environments import of_leaves, owned_rewards
from shops import ForkingShop, Shop, all_closed, buys, carts, environments_of, forget, run
from support import Scripted, short_deadline


@pytest.fixture(autouse=True)
def counted() -> None:
    forget()


# Digests -------------------------------------------------------------------------------------------------------------


class Digested(ForkingShop):
    def digest(self) -> Any:
        return tuple(self.items)


class Shallow(Digested):
    """A fork that has the items of its original."""

    def fork(self) -> Shallow:
        made = type(self)()
        made.items = self.items
        return made


class Common(Digested):
    """All have the same items."""

    COMMON: ClassVar[list[str]] = []

    def reset(self, name: str = "", **row: Any) -> None:
        self.items = self.COMMON
        self.items[:] = [name]


@pytest.mark.parametrize("rule", [Threshold, Ranked])
@pytest.mark.parametrize("kind", [Shallow, Common])
def test_a_state_that_paths_share_ends_the_run(kind, rule):
    environments = environments_of(kind)
    told = r"changed without a call of it: \('a'.*\) after its last call, and \('a', '.*\) now\. It shares its state"
    with pytest.raises(ToolSpecError, match=f"The digest of an environment {kind.__name__} {told}"):
        run(environments, rule=rule(branches_per_fork=2), leaves=4, at_root=2, concurrency=1)
    assert all_closed(environments)


def test_a_state_that_changed_after_the_last_call_ends_the_run_before_the_rewards():
    environments = environments_of(Digested)
    batch = run(environments)
    assert of_leaves(environments, batch.trees, 0)
    kept = environments.kept[0, (0,)]
    assert kept is not None
    kept.value.items.append("of another path")
    with pytest.raises(ToolSpecError, match=r"changed without a call of it: .*'z'.* and .*'of another path'"):
        of_leaves(environments, batch.trees, 0)
    assert all_closed(environments)


def test_a_digest_may_be_a_part_of_the_state():
    class Live(ForkingShop):
        def digest(self) -> list[str]:
            return self.items

    environments = environments_of(Live)
    batch = run(environments, rule=Ranked(branches_per_fork=2))
    assert [leaf.address for leaf in batch.trees[0].leaves()] == [(0,), (0, 1, 0), (0, 1, 1)]
    assert environments.instances.take_counts().refused_forks == 0 and all_closed(environments)


def test_a_digest_that_cannot_be_compared_ends_the_run():
    class Board(ForkingShop):
        def digest(self) -> Any:
            return np.array([len(item) for item in self.items] * 2)

    environments = environments_of(Board)
    with pytest.raises(DataError, match=r"digest\(\) of Board returned ndarray, .* such as .* array\.tobytes\(\)"):
        run(environments)
    assert all_closed(environments)


def test_a_random_start_that_the_text_does_not_show_ends_the_run():
    class Drawn(Digested):
        def reset(self, **row: Any) -> None:
            self.items = [str(random.random())]

    environments = environments_of(Drawn)
    with pytest.raises(
        DataError, match=r"reset\(\) of Drawn led to states with different digests for the same row: .* put a seed"
    ):
        run(environments, at_root=2)
    assert all_closed(environments)


def test_long_digests_are_shown_where_they_differ(caplog):
    class Long(ForkingShop):
        def fork(self) -> Long:
            made = Long()
            made.items = self.items[:-1]
            return made

        def digest(self) -> str:
            return f"{'x' * 500}{' '.join(self.items)}{'y' * 500}"

    run(environments_of(Long), leaves=2)
    cut = f"…{'x' * 99}a"
    assert f"has the digest {cut}{'y' * 100}…, and the original {cut} 0/0{'y' * 96}…" in caplog.text


def test_texts_are_shown_around_their_first_difference():
    assert around_difference("abc", "abd") == ("abc", "abd")
    assert around_difference("0123456789a", "0123456789b", width=4) == ("…89a", "…89b")
    assert around_difference("0123456789", "01x3456789", width=4) == ("0123…", "01x3…")
    assert around_difference("", "0123456789", width=4) == ("", "0123…")


# Threads -------------------------------------------------------------------------------------------------------------


class Database:
    """SQLite's connections must be used and closed in the thread that made them."""

    def __init__(self) -> None:
        self.db = sqlite3.connect(":memory:")
        self.db.execute("create table items (name)")

    def reset(self, name: str, **row: Any) -> None:
        self.db.execute("delete from items")
        self.put(name)

    def put(self, item: str) -> str:
        """Put an item.

        Args:
            item: Which.
        """
        self.db.execute("insert into items values (?)", [item])
        return " ".join(name for (name,) in self.db.execute("select name from items"))

    def get_reward(self) -> float:
        return float(len(self.put("last").split()))


class Closing(Database):
    closed: ClassVar[list[bool]] = []

    def close(self) -> None:
        self.db.close()
        self.closed.append(True)


@pytest.mark.parametrize("kind", [Database, Closing])
def test_an_object_may_need_the_thread_that_created_it(kind, caplog):
    environments = environments_of(kind)
    Closing.closed.clear()
    (reward,) = owned_rewards(environments)
    for _ in range(2):
        environments.start_groups({0: {"name": "a"}, 1: {"name": "b"}})
        batch = run(environments, groups=2)
        for name, tree in zip("ab", batch.trees, strict=True):
            assert [leaf.calls[-1].text for leaf in tree.leaves()] == [
                f"{name} 0/0 0/1 z", f"{name} 0/0 0/1/0/1 z", f"{name} 1/0 1/1 z"
            ]  # fmt: skip
        assert reward(of_leaves(environments, batch.trees, 0)) == [5.0] * 6  # also the last item
        environments.close_kept()
    assert len(Closing.closed) == (12 if kind is Closing else 0) and not caplog.records


class Forked(Database):
    def fork(self) -> Forked:
        return type(self)()  # in the thread of the original


def test_a_fork_that_needs_the_thread_of_its_original_is_named_in_a_warning(caplog):
    batch = run(environments_of(Forked))
    first, branch, other = batch.trees[0].leaves()
    assert all(call.ok for call in [*first.calls, *other.calls]) and not branch.calls[-1].ok
    (told,) = [record.getMessage() for record in caplog.records]
    assert told.startswith("A call of tool 'put' failed: ProgrammingError: SQLite objects created in a thread can")
    assert told.endswith("for example by fork(). Make what needs one thread in reset() or at the first call.")


def test_a_reward_waits_for_the_last_call_and_is_none_if_it_hangs(caplog):
    release = threading.Event()
    inside: list[str] = []

    class Slow(Shop):
        def put(self, item: str) -> str:
            """Put an item.

            Args:
                item: Which.
            """
            inside.append("put")
            release.wait(60)
            inside.append("end of put")
            return item

        def get_reward(self) -> float:
            inside.append("reward")
            return 1.0

    environments = environments_of(Slow, timeout_s=0.2)
    made = Scripted(buys, tools=environments.tools, leaves=1, at_root=1)
    short_deadline(made.toolbox, 0.2, of=lambda call: call.arguments == {"item": "0/0"})
    (leaf,) = made(1).trees[0].leaves()
    assert leaf.calls[0].failure is ToolFailure.TIMEOUT
    (reward,) = owned_rewards(environments)
    kept = environments.kept[0, (0,)]
    assert kept is not None
    assert reward([kept.value]) == [None] and "reward" not in inside
    assert "An environment Slow has no reward: Error: an earlier call of this environment is still runn" in caplog.text
    environments.instances.timeout_s = 60.0
    threading.Timer(0.1, release.set).start()
    assert reward([kept.value]) == [1.0] and inside[-2:] == ["end of put", "reward"]
    assert all_closed(environments)


# Methods that are async or return something else ---------------------------------------------------------------------


class Async(Shop):
    async def fork(self) -> Async:
        made = Async()
        made.items = list(self.items)
        return made

    async def digest(self) -> str:
        return "|".join(self.items)

    async def describe(self) -> str:
        return "\n".join(sorted(self.items))


def test_fork_digest_and_describe_may_be_async():
    environments = environments_of(Async)
    batch = run(environments, rule=Ranked(branches_per_fork=2))
    assert carts(environments, batch) == [
        {(0,): ["a", "0/0", "0/1", "z"], (0, 1, 0): ["a", "0/0", "0/1/0/1", "z"], (0, 1, 1): [
            "a", "0/0", "0/1/1/1", "z"
        ]}
    ]  # fmt: skip
    assert [call.changed for call in batch.trees[0].leaves()[0].calls] == ["+ 0/0", "+ 0/1", "+ z"]
    counts = environments.instances.take_counts()
    assert counts.forks >= 2 and (counts.replays, counts.refused_forks) == (0, 0) and all_closed(environments)


class Numbered(Shop):
    def reset(self, **row: Any) -> int:  # type: ignore[override]
        return 3


class Barren(ForkingShop):
    def fork(self) -> None:  # type: ignore[override]
        pass


class Foreign(ForkingShop):
    def fork(self) -> ForkingShop:
        return ForkingShop()


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (Numbered, DataError, r"reset\(\) of Numbered returned int; expected text for the prompt, or None"),
        (Barren, ToolSpecError, r"fork\(\) of Barren returned NoneType; expected another Barren with the same state"),
        (Foreign, ToolSpecError, r"fork\(\) of Foreign returned ForkingShop; expected another Foreign"),
    ],
)
def test_a_method_that_returns_something_else_ends_the_run(kind, error, message):
    environments = environments_of(kind)
    with pytest.raises(error, match=message):
        run(environments)
    environments.close_kept()
    assert environments.instances.live == 0
