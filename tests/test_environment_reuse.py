"""Objects of a class without `close` are reset for other paths, as in TRL."""

from __future__ import annotations

import gc
import threading
import weakref
from collections import Counter
from typing import Any

import pytest

from arpo_trl.rollout.batch import GroupRequest
from arpo_trl.tools.calls import ToolFailure
from arpo_trl.tools.environments.kind import environment_kind
from arpo_trl.tools.environments.state import Environments
from basket import Basket
from shops import buys, carts, environments_of, run
from support import Scripted, short_deadline, until

MADE: weakref.WeakSet[Any] = weakref.WeakSet()
RESETS: Counter[int] = Counter()
"""Resets by the id() of the object."""


@pytest.fixture(autouse=True)
def counted() -> None:
    MADE.clear()
    RESETS.clear()


class Lasting(Basket):
    """As in TRL's documentation: what `reset` does not set lasts, and there is no `close`."""

    def __init__(self) -> None:
        MADE.add(self)

    def reset(self, name: str, **row: Any) -> str:
        RESETS[id(self)] += 1
        return super().reset(name, **row)


class ForkingLasting(Lasting):
    def fork(self) -> ForkingLasting:
        made = type(self)()
        made.items = list(self.items)
        return made


def left() -> int:
    """How many objects there are. Threads that close some may still hold them for a moment."""
    gc.collect()
    return len(MADE)


def again(environments: Environments) -> None:
    """Ends a rollout, and starts the next one."""
    environments.close_kept()
    environments.start_groups({0: {"name": "a"}, 1: {"name": "b"}})


@pytest.mark.parametrize("kind", [Lasting, ForkingLasting])
def test_the_objects_of_a_rollout_are_reset_for_the_next_one(kind):
    environments = environments_of(kind)
    MADE.clear()  # without those that were looked at
    for _ in range(3):
        batch = run(environments, groups=2)
        for name, found in zip("ab", carts(environments, batch), strict=True):
            assert found == {(0,): [name, "0/0", "0/1", "z"], (0, 1, 0): [name, "0/0", "0/1/0/1", "z"], (1,): [
                name, "1/0", "1/1", "z"
            ]}  # fmt: skip
        values = [instance.value for instance in environments.kept.values() if instance is not None]
        assert len(set(map(id, values))) == 6
        del values
        again(environments)
    # 2 groups of 2 paths. Without fork() their 2 branches are resets, too. With fork() only objects of the factory
    # are reset again, and forks are released.
    assert len(RESETS) == (6 if kind is Lasting else 4)
    until(lambda: left() == len(RESETS))
    assert set(RESETS.values()) == {3} and environments.instances.live == 0


def test_an_object_whose_reset_raised_is_not_reset_again():
    class Moody(Lasting):
        def reset(self, name: str, **row: Any) -> str:
            if len(RESETS) == 1:
                RESETS[id(self)] += 1
                raise OSError("not today")
            return super().reset(name, **row)

    environments = environments_of(Moody)
    for _ in range(3):
        run(environments, leaves=2, at_root=2)
        again(environments)
    # The second object fails once; a third one replaces it in the next rollout.
    assert sorted(RESETS.values()) == [1, 2, 3]


def test_an_object_whose_call_missed_its_deadline_is_not_reset_again():
    release = threading.Event()

    class Slow(Lasting):
        def put(self, item: str) -> str:
            """Put an item.

            Args:
                item: Which.
            """
            if item == "0/0":
                release.wait(60)
            return super().put(item)

    environments = environments_of(Slow, timeout_s=0.2)  # for which the path's later calls wait
    made = Scripted(buys, tools=environments.tools, leaves=2, at_root=2)
    short_deadline(made.toolbox, 0.2, of=lambda call: call.arguments == {"item": "0/0"})
    first = made(1).trees[0].leaves()[0]
    assert first.calls[0].failure is ToolFailure.TIMEOUT
    kept = environments.kept[0, (0,)]
    assert kept is not None
    late = kept.value
    release.set()
    environments.instances.timeout_s = 60.0
    again(environments)
    assert environments.instances.live == 0
    run(environments, leaves=2, at_root=2)
    assert RESETS[id(late)] == 1 and sorted(RESETS.values()) == [1, 1, 2]


def test_objects_that_wait_for_a_reset_count_for_the_limit():
    class Other(Lasting):
        pass

    kinds = {name: environment_kind(kind, 60.0) for name, kind in (("first", Lasting), ("other", Other))}
    environments = Environments(kinds, timeout_s=60.0, limit=2, keeps=True)
    for name in ("first", "other", "first"):
        environments.start_groups({0: {"environment": name, "name": "a"}})
        made = Scripted(buys, tools=list(kinds[name].methods.values()), leaves=2, at_root=2)
        with made.toolbox:
            ids = made.protocol.encode_prompt("what is the answer")
            made.sampler.sample([GroupRequest(id=0, prompt_ids=ids)], seed=(0,))
        environments.close_kept()
        until(lambda: left() == 2)
        assert {type(each) for each in MADE} == {kinds[name].type}
