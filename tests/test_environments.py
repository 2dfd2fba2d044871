"""Environments: one instance per path, forked where a path branches, and closed once."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from arpo_trl.errors import ConfigError, DataError, ToolSpecError
from arpo_trl.options import RolloutSchedule
from arpo_trl.rollout.batch import GroupRequest
from arpo_trl.rollout.engines.scripted import ScriptedTurn
from arpo_trl.rollout.protocols import ChatTemplateProtocol
from arpo_trl.rollout.rules.ranked import Ranked
from arpo_trl.rollout.rules.threshold import Threshold
from arpo_trl.tools.calls import ToolFailure
from arpo_trl.tools.environments.kind import Forking, environment_kind
from arpo_trl.tools.environments.state import Environments
from arpo_trl.tools.spec import tool_spec
from arpo_trl.tools.toolbox import ToolBox
from shops import (
    CLOSED,
    OPENED,
    CopiedShop,
    FinalShop,
    ForkingShop,
    Shop,
    all_closed,
    buys,
    carts,
    environments_of,
    forget,
    run,
)
from support import ANSWER, Scripted, short_deadline


@pytest.fixture(autouse=True)
def counted() -> None:
    forget()


# Forking -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", list(RolloutSchedule))
@pytest.mark.parametrize("rule", [Threshold, Ranked])
@pytest.mark.parametrize("kind", [Shop, ForkingShop, CopiedShop])
def test_branches_start_from_the_state_of_their_prefix_and_share_nothing(kind, rule, schedule):
    environments = environments_of(kind)
    batch = run(environments, rule=rule(branches_per_fork=2), schedule=schedule, groups=2)
    expected = {
        (0,): ["0/0", "0/1", "z"],
        (0, 1, 0): ["0/0", "0/1/0/1", "z"],
        (0, 1, 1): ["0/0", "0/1/1/1", "z"],
    }
    assert carts(environments, batch) == [
        {address: [name, *items] for address, items in expected.items()} for name in ("a", "b")
    ]
    assert not CLOSED or kind is not Shop  # only copies that no branch needs any more
    assert all_closed(environments)
    counts = environments.instances.take_counts()
    # 2 groups of one path and two branches. A replay is also a reset.
    if kind is Shop:
        assert (counts.resets, counts.forks, counts.replays) == (6, 0, 4)
    else:
        assert (counts.resets, counts.replays) == (2, 0) and counts.forks >= 4


def test_a_way_to_fork_is_chosen_in_its_order():
    class Both(ForkingShop):
        copyable = True

    chosen = [environment_kind(kind, 60.0).forking for kind in (Both, CopiedShop, Shop, FinalShop)]
    assert chosen == [Forking.FORK, Forking.COPY, Forking.REPLAY, Forking.NONE]


def test_without_room_for_copies_a_branch_replays():
    # The ranked rule branches when the path has ended, and the path's instance is closed then.
    environments = environments_of(ForkingShop, limit=1, keeps=False)
    batch = run(environments, rule=Ranked(branches_per_fork=2))
    assert [leaf.calls[-1].text for leaf in batch.trees[0].leaves()] == [
        "a 0/0 0/1 z",
        "a 0/0 0/1/0/1 z",
        "a 0/0 0/1/1/1 z",
    ]
    counts = environments.instances.take_counts()
    assert counts.live_max == 1 and counts.replays == 2 and all_closed(environments)


def test_a_copy_is_dropped_for_a_path():
    # Room for two: the path and its copy at the first call. A branch replays, because the copy had to go.
    environments = environments_of(ForkingShop, limit=2, keeps=False)
    batch = run(environments, rule=Ranked(branches_per_fork=2), leaves=4, at_root=2)
    assert len(batch.trees[0].leaves()) == 4
    assert environments.instances.take_counts().live_max == 2 and all_closed(environments)


@pytest.mark.parametrize("limit", [1, 2, 3])
@pytest.mark.parametrize("schedule", list(RolloutSchedule))
def test_paths_wait_for_a_slot_and_none_waits_forever(limit, schedule):
    environments = environments_of(Shop, limit=limit, keeps=False)
    batch = run(environments, groups=2, leaves=4, at_root=3, schedule=schedule)
    assert [len(tree.leaves()) for tree in batch.trees] == [4, 4]
    assert environments.instances.take_counts().live_max == limit and all_closed(environments)


class Clock(Shop):
    """An environment whose calls depend on what a replay does not repeat."""

    ticks = 0

    def put(self, item: str) -> str:
        """Put an item.

        Args:
            item: Which.
        """
        Clock.ticks += 1
        return f"{item} at {Clock.ticks}"


class Failing(ForkingShop):
    def fork(self) -> ForkingShop:
        raise OSError("no second shop")


class Lossy(ForkingShop):
    """A fork that loses an item, which its digest shows."""

    def fork(self) -> Lossy:
        made = Lossy()
        made.items = self.items[1:]
        return made

    def digest(self) -> str:
        return "|".join(self.items)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Clock, r'put returned "0/0 at \d", but the recorded one "0/0 at 1"'),
        (Failing, "OSError: no second shop"),
        (Lossy, r"fork\(\) of Lossy has the digest '0/0', and the original 'a\|0/0'"),
    ],
)
def test_a_branch_without_its_state_is_replaced_by_a_path_from_the_root(kind, reason, caplog):
    Clock.ticks = 0
    environments = environments_of(kind)
    batch = run(environments, leaves=2)
    assert [leaf.address for leaf in batch.trees[0].leaves()] == [(0,), (1,)]
    assert batch.trees[0].topups == 1
    assert environments.instances.take_counts().refused_forks == 1
    (told,) = [record.getMessage() for record in caplog.records if "could not get the state" in record.getMessage()]
    assert re.search(reason, told)
    assert all_closed(environments)


def test_a_path_whose_call_missed_its_deadline_does_not_branch():
    class Slow(ForkingShop):
        def put(self, item: str) -> str:
            """Put an item.

            Args:
                item: Which.
            """
            time.sleep(0.4 if item == "0/0" else 0)
            return super().put(item)

    environments = environments_of(Slow)
    made = Scripted(buys, tools=environments.tools, leaves=2, at_root=1)
    short_deadline(made.toolbox, 0.2, of=lambda call: call.arguments == {"item": "0/0"})
    made.sampler.settings = replace(made.sampler.settings, max_completion_length=800)
    batch = made(1)
    assert [leaf.address for leaf in batch.trees[0].leaves()] == [(0,), (1,)]
    first = batch.trees[0].leaves()[0]
    assert first.calls[0].failure is ToolFailure.TIMEOUT
    assert environments.instances.take_counts().refused_forks == 1 and all_closed(environments)


def test_a_replay_repeats_calls_that_failed():
    def breaks(request: Any, context: str) -> ScriptedTurn:
        turn = buys(request, context)
        return ScriptedTurn(text="<put>boom</put>" if request.key[-1] == 0 else turn.text, entropies=turn.entropies)

    environments = environments_of(Shop)
    batch = run(environments, breaks, leaves=2)
    assert carts(environments, batch) == [{(0,): ["a", "0/1", "z"], (0, 1, 0): ["a", "0/1/0/1", "z"]}]
    assert environments.instances.take_counts().replays == 1


# Several calls a turn, async methods, other tools --------------------------------------------------------------------


class LateShop(Shop):
    async def put(self, item: str) -> str:  # type: ignore[override]
        """Put an item.

        Args:
            item: Which.
        """
        return Shop.put(self, item)

    async def reset(self, name: str = "", **row: Any) -> None:  # type: ignore[override]
        Shop.reset(self, name)

    async def close(self) -> None:  # type: ignore[override]
        Shop.close(self)


@pytest.mark.parametrize("kind", [Shop, LateShop])
def test_several_calls_of_a_turn_run_in_their_order(kind):
    def script(request: Any, context: str) -> ScriptedTurn:
        calls = [("put", "item", "x"), ("search", "query", "q"), ("put", "item", "y")]
        texts = [
            f'<tool_call>\n{{"name": "{name}", "arguments": {{"{key}": "{value}"}}}}\n</tool_call>'
            for name, key, value in calls
        ]
        return ScriptedTurn(text=ANSWER if request.key[-1] > 1 else "\n".join(texts), entropies=[request.key[-1]])

    environments = environments_of(kind)
    batch = run(
        environments,
        script,
        leaves=2,
        protocol=ChatTemplateProtocol,
        template="qwen3",
        max_tool_calls=6,
        max_length=4000,
    )
    texts = [call.text for call in batch.trees[0].leaves()[1].calls]
    assert texts == ["a x", "facts about q", "a x y", "a x y x", "facts about q", "a x y x y"]
    assert all_closed(environments)


def test_the_trajectory_contains_the_changes_of_a_call():
    class Described(Shop):
        def describe(self) -> str:
            return "\n".join(sorted(self.items))

    environments = environments_of(Described)
    (leaf,) = run(environments, leaves=1).trees[0].leaves()
    assert [call.changed for call in leaf.calls] == ["+ 0/0", "+ 0/1", "+ z"]
    assert "changed" not in leaf.calls[0].as_row()


def test_texts_of_an_environment_contain_no_secret_of_the_process(monkeypatch):
    monkeypatch.setenv("SHOP_API_KEY", "shop-key-0123456789")

    class Leaking(Shop):
        def reset(self, **row: Any) -> str:  # type: ignore[override]
            Shop.reset(self, "a")
            return "opened with shop-key-0123456789"

        def describe(self) -> str:
            return "\n".join(["x" * 9_990 + "shop-key-0123456789", *self.items])

    environments = environments_of(Leaking)
    with ToolBox(environments.tools) as box:
        assert environments.begin({0: {"name": "a"}}, box, lambda: None) == {0: "opened with [key]"}
    (leaf,) = run(environments, leaves=1).trees[0].leaves()
    assert "shop-key" not in json.dumps([call.changed for call in leaf.calls])


# What cannot work is an error at the start ---------------------------------------------------------------------------


def raising() -> Any:
    raise OSError("no shops today")


def hanging() -> Any:
    threading.Event().wait(60)


ONE = Shop()


class Untyped(Shop):
    def take(self, item):
        """Take an item.

        Args:
            item: Which.
        """


class Undocumented(Shop):
    def take(self, item: str) -> str:
        return item


if TYPE_CHECKING:
    from decimal import Decimal


class Inheriting(Shop):
    def put(self, item: str) -> Decimal:
        return super().put(item)


class Odd(Shop):
    copyable = "yes"


@pytest.mark.parametrize(
    ("factory", "error", "message"),
    [
        (raising, ConfigError, "environment_factory raised OSError: no shops today. Correct it"),
        (hanging, ConfigError, "environment_factory did not return within 0.2 s. .* or raise tool_timeout_s"),
        (lambda: ONE, ConfigError, "returned the same Shop twice, so paths would share its state. Return a new"),
        (lambda: None, ConfigError, "environment_factory returned None; expected an environment. Add the missing"),
        (ONE, ConfigError, "environment_factory is a Shop; expected a class, or a function"),
        (object, ToolSpecError, r"The environment object has no method reset. Define `def reset\(self, \*\*row\)`"),
        (Odd, ToolSpecError, "The environment Odd has copyable = 'yes'; expected True or False"),
    ],
)
def test_a_factory_that_cannot_work_is_an_error_at_the_start(factory, error, message):
    with pytest.raises(error, match=message):
        environment_kind(factory, 0.2 if factory is hanging else 60.0)


@pytest.mark.parametrize("kind", [Untyped, Undocumented])
def test_public_methods_without_types_or_docstring_are_an_error_at_the_start(kind):
    message = (
        f"The environment {kind.__name__} has the public method take, which is therefore a tool: no schema can be "
        "built for it: .* needs a docstring .* If the model must not call it, rename it to _take."
    )
    with pytest.raises(ToolSpecError, match=message):
        environment_kind(kind, 60.0)


def test_a_public_method_that_tags_cannot_call_may_be_a_helper():
    class Helped(Shop):
        def take(self, item: str, count: int) -> str:
            """Take items.

            Args:
                item: Which.
                count: How many.
            """
            return item * count

    (*_, take) = environments_of(Helped).tools
    with pytest.raises(ToolSpecError, match=r"'take' has the parameters .* rename it to _take if it is only a helper"):
        _ = tool_spec(take).tag_parameter


def test_a_method_has_the_docstring_of_the_one_that_it_overrides():
    parent, child = (ToolBox(environments_of(kind).tools).specs["put"].schema for kind in (Shop, Inheriting))
    assert child["function"]["parameters"] == parent["function"]["parameters"]
    assert child["function"]["description"] == parent["function"]["description"]


def test_an_environment_and_a_tool_of_one_name_are_an_error_at_the_start():
    def put(item: str) -> str:
        """Put.

        Args:
            item: Which.
        """
        return item

    with pytest.raises(ToolSpecError, match="Two tools are named 'put'"):
        ToolBox([put, *environments_of(Shop).tools])


def test_a_reset_without_row_arguments_is_an_error_at_the_start():
    class Bare(Shop):
        def reset(self) -> None:  # type: ignore[override]
            pass

    with pytest.raises(ConfigError, match=r"reset\(\) of the environment Bare does not accept .*\['name', 'prompt'\]"):
        environment_kind(Bare, 60.0).check_row(["prompt", "name"])


def test_all_async_methods_run_on_one_event_loop():
    loops = []

    class Remote(Shop):
        async def reset(self, **row: Any) -> None:  # type: ignore[override]
            loops.append(asyncio.get_running_loop())
            super().reset(**row)

        async def put(self, item: str) -> str:  # type: ignore[override]
            """Put an item.

            Args:
                item: Which.
            """
            loops.append(asyncio.get_running_loop())
            return super().put(item)

        async def close(self) -> None:  # type: ignore[override]
            loops.append(asyncio.get_running_loop())
            super().close()

    async def remote() -> Remote:
        loops.append(asyncio.get_running_loop())
        return Remote()

    for factory in (Remote, remote):
        environments = environments_of(factory)
        run(environments)
        assert all_closed(environments)
    assert len(loops) > 20 and len(set(map(id, loops))) == 1


def test_optional_methods_are_no_tools():
    class Full(Lossy):
        def describe(self) -> str:
            return ""

        def get_reward(self) -> float:
            return 1.0

        def _private(self) -> None:
            pass

    assert list(environment_kind(Full, 60.0).methods) == ["put"]


# What fails later ----------------------------------------------------------------------------------------------------


class Selfish(ForkingShop):
    def fork(self) -> Selfish:
        return self


def test_a_fork_that_is_the_original_ends_the_run():
    environments = environments_of(Selfish)
    with pytest.raises(ToolSpecError, match=r"fork\(\) of Selfish returned an object that another path already uses"):
        run(environments)
    assert all_closed(environments)


class Traced(ForkingShop):
    def fork(self) -> ForkingShop:
        return TracedCopy()


class TracedCopy(Traced):
    pass


def test_a_fork_of_a_subclass_ends_the_run():
    with pytest.raises(ToolSpecError, match=r"fork\(\) of Traced returned a TracedCopy; expected a Traced, and no"):
        run(environments_of(Traced))  # a reward belongs to one class, so the copy would have none


def test_a_factory_that_repeats_itself_later_ends_the_run():
    made = iter([Shop(), Shop(), ONE, ONE])
    environments = environments_of(lambda: next(made))
    OPENED.append(ONE)
    with pytest.raises(ToolSpecError, match="environment_factory returned an object that another path already uses"):
        run(environments, at_root=2)
    assert all_closed(environments)


def test_texts_of_one_row_that_differ_end_the_run():
    class Random(Shop):
        def reset(self, **row: Any) -> str:  # type: ignore[override]
            return f"shop {len(OPENED)}"

    environments = environments_of(Random)
    with pytest.raises(DataError, match=r"Random returned different texts for the same row: .* put a seed"):
        run(environments, at_root=2)
    assert all_closed(environments)


@pytest.mark.parametrize("hangs", [False, True])
def test_a_path_without_an_environment_reads_an_error(hangs, caplog):
    release, first = threading.Event(), threading.Event()
    resets, opened = itertools.count(), itertools.count()

    class Rare(Shop):
        def reset(self, name: str = "", **row: Any) -> None:  # type: ignore[override]
            if next(resets) == 0:
                first.set()
            elif hangs:
                release.wait(60)
            else:
                raise OSError("sold out")

    environments = environments_of(Rare)
    made = Scripted(buys, tools=environments.tools, leaves=2, at_root=2)
    if hangs:
        short_deadline(made.toolbox, 0.3, opening=1)
    start = made.toolbox.open
    made.toolbox.open = lambda states: (next(opened) and first.wait(60), start(states))[1]  # one after the other
    leaves = made(1).trees[0].leaves()
    broken = [leaf for leaf in leaves if environments.kept[0, leaf.address] is None]
    assert len(broken) == 1
    overdue = "environment_factory and reset() took longer than 60 s. Make this faster, or raise tool_timeout_s"
    reason = overdue if hangs else "OSError: sold out"
    assert broken[0].calls[0].text == "Error: the environment of this conversation is not available."
    assert f"The environment Rare of a path could not be created: {reason}." in caplog.text
    assert broken[0].calls[0].failure is ToolFailure.DEGRADED
    assert environments.instances.take_counts().failed == 1
    release.set()
    assert all_closed(environments)


def test_a_branch_that_opens_too_late_names_the_setting():
    environments = environments_of(ForkingShop)
    state = environments(0)
    assert state.admit()
    state.open()
    branch = state.fork()
    assert not branch.opened(ToolFailure.TIMEOUT, "Error: the open() call took longer than 60 s.")
    overdue = "fork() or the replay of its calls took longer than 60 s. Make this faster, or raise tool_timeout_s"
    assert branch.failure == overdue
    for each in (state, branch):
        each.close()
    assert all_closed(environments)


def test_the_creation_of_a_first_environment_is_retried():
    class Slow(Shop):
        tries = 0

        def reset(self, **row: Any) -> str:  # type: ignore[override]
            Slow.tries += 1
            if Slow.tries < fails + 1:
                raise OSError("not yet")
            return "ready"

    for fails in (2, 3):
        Slow.tries = 0
        environments = environments_of(Slow)
        with ToolBox(environments.tools) as toolbox:
            if fails == 2:
                assert environments.begin({0: {}}, toolbox, lambda: None) == {0: "ready"}
            else:
                with pytest.raises(
                    ConfigError, match="could not be created for a row in 3 attempts: OSError: not yet"
                ):
                    environments.begin({0: {}}, toolbox, lambda: None)
            assert all_closed(environments)


@pytest.mark.parametrize("kind", [Shop, ForkingShop])
def test_an_interrupt_closes_all_instances(kind):
    environments = environments_of(kind)
    made = Scripted(buys, tools=environments.tools, leaves=4, at_root=2)

    def interrupt() -> None:
        if len(OPENED) > 2:
            raise KeyboardInterrupt

    made.sampler.between_events = interrupt
    ids = made.protocol.encode_prompt("what is the answer")
    with made.toolbox, pytest.raises(KeyboardInterrupt):
        made.sampler.sample([GroupRequest(id=i, prompt_ids=ids) for i in range(2)], seed=(0,))
    assert len(OPENED) > 2 and all_closed(environments)


def test_a_close_that_fails_is_logged_once_and_frees_the_room(caplog):
    class Stuck(Shop):
        def close(self) -> None:
            super().close()
            raise OSError("stuck")

    kind = replace(environment_kind(Shop, 60.0), factory=Stuck, type=Stuck)
    environments = Environments(kind, timeout_s=60.0)
    forget()
    run(environments)
    assert all_closed(environments)
    assert sum("close() of the environment Stuck failed: OSError: stuck" in str(r.msg) for r in caplog.records) == 1


def test_a_close_whose_error_has_no_text_frees_the_room():
    class Untold(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no text")

    class Stuck(Shop):
        def close(self) -> None:
            super().close()
            raise Untold

    kind = replace(environment_kind(Shop, 60.0), factory=Stuck, type=Stuck)
    environments = Environments(kind, timeout_s=2.0)
    forget()
    run(environments)
    assert all_closed(environments)


class Hostile(ForkingShop):
    """Does what it should not wherever it can."""

    calls = 0

    async def put(self, item: str) -> Any:  # type: ignore[override]
        """Put an item.

        Args:
            item: Which.
        """
        self.items.append(item)
        Hostile.calls += 1
        if Hostile.calls == 1:
            raise SystemExit  # on the event loop of all async methods
        return {1: "\ud800", "b": "x" * 300_000} if Hostile.calls == 2 else item

    def describe(self) -> str:
        return "\n".join(f"{len(self.items)} {line}" for line in range(200_000)) + "\ud800"


def test_faulty_methods_become_error_texts_and_the_path_continues():
    Hostile.calls = 0
    environments = environments_of(Hostile)
    (leaf,) = run(environments, leaves=1, max_result_tokens=50).trees[0].leaves()
    assert leaf.calls[0].text == "Error: SystemExit" and leaf.calls[0].failure is ToolFailure.ERROR
    assert leaf.calls[1].ok and "\ufffd" not in leaf.calls[0].text and len(leaf.calls[1].text) == 100_000
    assert leaf.calls[2].text == "z"
    instance = environments.kept[0, (0,)]
    assert instance is not None and instance.value.items == ["a", "0/0", "0/1", "z"]
    assert all(len(done.outcome) < 3000 for done in instance.log)  # 300,000 characters are not kept for replays
    changed = leaf.calls[0].changed
    assert changed is not None and changed.startswith("- 1 0\n- 1 1\n") and len(changed) <= 2000
    assert all_closed(environments)


class Nan(ForkingShop):
    def digest(self) -> float:
        return float("nan")


class Refusing(ForkingShop):
    def digest(self) -> str:
        raise OSError("no digest")


@pytest.mark.parametrize(("kind", "failed"), [(Nan, 0), (Refusing, 2)])
def test_a_digest_that_raises_or_equals_nothing_leaves_no_branch_and_no_instance(kind, failed):
    environments = environments_of(kind)
    leaves = run(environments, leaves=2).trees[0].leaves()
    assert [leaf.address for leaf in leaves] == [(0,), (1,)]
    counts = environments.instances.take_counts()
    assert (counts.failed, counts.refused_forks) == (failed, 1) and all_closed(environments)


def test_a_close_that_hangs_is_waited_for_once(caplog):
    release = threading.Event()

    class Clinging(Shop):
        def close(self) -> None:
            if self.items:
                release.wait(120)
            super().close()

    environments = environments_of(Clinging)
    run(environments)
    environments.instances.timeout_s = 0.3
    environments.close_kept()
    assert "close() of an environment hangs" in caplog.text and environments.instances.live == 3
    environments.instances.timeout_s = 60.0
    start = time.perf_counter()
    environments.close_kept()
    assert time.perf_counter() - start < 30
    release.set()
    assert all_closed(environments)


def test_a_late_reset_does_not_affect_the_next_rollout():
    release = threading.Event()

    class Late(Shop):
        def reset(self, name: str = "", **row: Any) -> str:  # type: ignore[override]
            if len(OPENED) == 2:
                release.wait(60)
            return f"in {name}"

    environments = environments_of(Late)
    with ToolBox(environments.tools) as toolbox:
        assert environments.begin({0: {"name": "a"}}, toolbox, lambda: None) == {0: "in a"}
        late = environments(0), environments(0)
        assert late[1].admit()
        toolbox.open(late[1])
        while len(OPENED) < 2:
            time.sleep(0.01)
        for state in late:
            state.close()
        environments.instances.timeout_s = 0.3
        environments.close_kept()
        environments.instances.timeout_s = 60.0
        assert environments.begin({0: {"name": "b"}}, toolbox, lambda: None) == {0: "in b"}
        release.set()
        assert all_closed(environments) and environments.instances.fatal is None


class Locked(Shop):
    copyable = True

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.Lock()


class Hidden(Shop):
    def __init__(self) -> None:
        super().__init__()
        self.put = 3  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        (
            Locked,
            ConfigError,
            "Locked declares copyable = True, but copy.deepcopy of it raised TypeError: cannot pickle",
        ),
        (Hidden, ToolSpecError, "Hidden has a method put and an attribute put, a int, that hides it. Rename one"),
    ],
)
def test_a_class_with_a_false_declaration_is_an_error_at_the_start(kind, error, message):
    with pytest.raises(error, match=message):
        environment_kind(kind, 60.0)
    assert Counter(map(id, OPENED)) == CLOSED or kind is Locked


# In another process --------------------------------------------------------------------------------------------------


class Remote:
    """A client in the manner of OpenEnv's: the state is a session of a server."""

    url = ""

    def _post(self, path: str, **given: Any) -> dict[str, Any]:
        request = urllib.request.Request(self.url + path, json.dumps(given).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            return dict(json.load(answer))

    def reset(self, name: str, **row: Any) -> str:
        made = self._post("/reset", name=name)
        self.session = made["session"]
        return str(made["text"])

    def put(self, item: str) -> str:
        """Put an item.

        Args:
            item: Which.
        """
        return str(self._post("/step", session=self.session, item=item)["text"])

    def close(self) -> None:
        if hasattr(self, "session"):
            assert self._post("/close", session=self.session)["closed"]


@pytest.fixture
def server() -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, str(Path(__file__).with_name("environment_server.py"))]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        Remote.url = f"http://127.0.0.1:{process.stdout.readline().strip()}"
        yield process
        process.kill()


@pytest.mark.slow
def test_environments_of_a_server_branch_by_replay_and_are_all_closed(server):
    environments = environments_of(Remote)
    batch = run(environments, rule=Threshold(branches_per_fork=2))
    assert [leaf.calls[-1].text for leaf in batch.trees[0].leaves()] == [
        "a 0/0 0/1 z",
        "a 0/0 0/1/0/1 z",
        "a 0/0 0/1/1/1 z",
    ]
    with urllib.request.urlopen(Remote.url, timeout=60) as answer:
        assert json.load(answer)["open"] == 3
    environments.close_kept()
    with urllib.request.urlopen(Remote.url, timeout=60) as answer:
        assert json.load(answer)["open"] == 0
    assert environments.instances.live == 0


@pytest.mark.slow
def test_a_server_that_dies_becomes_text_and_no_instance_stays(server, caplog):
    def script(request: Any, context: str) -> ScriptedTurn:
        if request.key[-1] == 1:
            server.kill()
            server.wait()
        return buys(request, context)

    environments = environments_of(Remote)
    (leaf,) = run(environments, script, leaves=1).trees[0].leaves()
    assert [call.failure for call in leaf.calls] == [None, ToolFailure.ERROR, ToolFailure.ERROR]
    assert leaf.calls[1].text == "Error: URLError: <urlopen error [Errno 111] Connection refused>"
    environments.close_kept()
    assert environments.instances.live == 0
