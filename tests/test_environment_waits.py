"""Slow and hanging environments: who waits for what, with which deadline, and what goes on meanwhile."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from arpo_trl.errors import ConfigError, EngineError
from arpo_trl.options import RolloutSchedule
from arpo_trl.rollout.batch import GroupRequest, RolloutBatch
from arpo_trl.rollout.engines.scripted import ScriptedTurn
from arpo_trl.rollout.rules.ranked import Ranked
from arpo_trl.tools.calls import ToolCall, ToolFailure
from arpo_trl.tools.environments.state import Environments
from arpo_trl.tools.toolbox import ToolBox, ToolResult
from shops import OPENED, ForkingShop, Shop, all_closed, buys, environments_of, forget, run
from support import ANSWER, Scripted, short_deadline

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def counted() -> None:
    forget()


def run_within(
    environments: Environments, timeout_s: float, script: Any = buys, groups: int = 1, **settings: Any
) -> RolloutBatch:
    """A rollout whose calls have that deadline."""
    made = Scripted(script, tools=environments.tools, timeout_s=timeout_s, **settings)
    made.sampler.settings = replace(made.sampler.settings, max_completion_length=800)
    return made(groups)


# Forks and replays ---------------------------------------------------------------------------------------------------


def test_after_a_hanging_fork_the_path_continues_with_errors_and_another_path_replaces_the_branch():
    release = threading.Event()

    class Stuck(ForkingShop):
        def fork(self) -> ForkingShop:
            release.wait(60)
            return super().fork()

    environments = environments_of(Stuck, timeout_s=0.3)  # for which the path's later calls wait
    made = Scripted(buys, tools=environments.tools, leaves=2, at_root=1)
    made.sampler.settings = replace(made.sampler.settings, max_completion_length=800)
    short_deadline(made.toolbox, 0.5, of=lambda call: call.arguments == {"item": "0/1"}, opening=1)
    batch = made(1)
    release.set()
    first, other = batch.trees[0].leaves()
    # The call after the branch makes the copy, or waits for the fork of the branch.
    slow, busy = "the put call took longer than 1 s.", "an earlier call of this environment is still running."
    texts = [call.text.removeprefix("Error: ") for call in first.calls]
    assert first.address == (0,) and texts in (["a 0/0", slow, busy], ["a 0/0", busy, busy])
    assert (other.address, [call.text for call in other.calls]) == ((1,), ["a 1/0", "a 1/0 1/1", "a 1/0 1/1 z"])
    assert environments.instances.take_counts().refused_forks == 1
    assert all_closed(environments)


def test_the_copy_that_is_made_before_a_call_has_a_deadline_of_its_own():
    class Slow(ForkingShop):
        def fork(self) -> ForkingShop:
            if not slept:
                slept.append("before the second call")
                time.sleep(1.2)
            return super().fork()

        def put(self, item: str) -> str:
            """Put an item.

            Args:
                item: Which.
            """
            if item == "0/1":
                time.sleep(1.2)
            return super().put(item)

    # The first copy and the call after it take 2.4 s of two times 2 s.
    slept: list[str] = []
    environments = environments_of(Slow)
    batch = run_within(environments, 2.0, leaves=2, at_root=1, rule=Ranked(branches_per_fork=1))
    assert [leaf.calls[-1].text for leaf in batch.trees[0].leaves()] == ["a 0/0 0/1 z", "a 0/0 0/1/0/1 z"]
    assert environments.instances.take_counts().forks == 3  # at both results, and one for the branch
    assert all_closed(environments)


def test_other_paths_advance_during_a_replay():
    advanced = threading.Event()
    seen: list[bool] = []

    class Late(Shop):
        def reset(self, name: str = "", **row: Any) -> str | None:
            if len(OPENED) == 3:  # for the branch
                seen.append(advanced.wait(60))
            return super().reset(name, **row)

    def script(request: Any, context: str) -> ScriptedTurn:
        *address, depth = request.key[1:]
        if address == [1] and depth == 3:
            advanced.set()
        turn = buys(request, context)
        return turn if address[0] == 0 else ScriptedTurn(text=turn.text, entropies=[0.1])

    environments = environments_of(Late)
    batch = run(environments, script, leaves=3, at_root=2, schedule=RolloutSchedule.OVERLAP, timeout_s=60.0)
    assert [leaf.address for leaf in batch.trees[0].leaves()] == [(0,), (0, 1, 0), (1,)]
    assert seen == [True] and all_closed(environments)


def test_a_replay_takes_time_of_the_tools():
    class Slow(Shop):
        def reset(self, name: str = "", **row: Any) -> str | None:
            time.sleep(0.3 if len(OPENED) == 2 else 0.0)
            return super().reset(name, **row)

    environments = environments_of(Slow)
    batch = run(environments, leaves=2)
    assert environments.instances.take_counts().replays == 1
    assert batch.times.tool_wait_s >= 0.25 and all_closed(environments)


# Slots ---------------------------------------------------------------------------------------------------------------


def test_other_paths_advance_while_a_path_waits_for_an_environment_in_closing():
    advanced = threading.Event()
    seen: list[bool] = []

    class Clinging(Shop):
        def close(self) -> None:
            if self.items[-1:] == ["0/0"]:
                seen.append(advanced.wait(30))
            super().close()

    def script(request: Any, context: str) -> ScriptedTurn:
        *address, depth = request.key[1:]
        if address == [1] and depth == 3:
            advanced.set()
        ends = address == [0] and depth == 1
        return ScriptedTurn(text=ANSWER if ends else buys(request, context).text, entropies=[0.1])

    environments = environments_of(Clinging, limit=2, keeps=False)
    batch = run(environments, script, leaves=3, at_root=3, schedule=RolloutSchedule.OVERLAP)
    assert len(batch.trees[0].leaves()) == 3 and seen == [True]
    assert environments.instances.take_counts().live_max == 2 and all_closed(environments)


@pytest.mark.parametrize("schedule", list(RolloutSchedule))
def test_an_interrupt_does_not_wait_for_an_environment_in_closing(schedule):
    release, closing = threading.Event(), threading.Event()
    seen: list[bool] = []

    class Clinging(Shop):
        def close(self) -> None:
            if self.items:  # not those that are looked at
                closing.set()
                seen.append(release.wait(60))
            super().close()

    def interrupt() -> None:
        if closing.is_set():
            raise KeyboardInterrupt

    environments = environments_of(Clinging, limit=1, keeps=False)
    made = Scripted(buys, tools=environments.tools, leaves=2, at_root=2, schedule=schedule)
    made.sampler.between_events = interrupt
    with pytest.raises(KeyboardInterrupt):
        made(1)
    release.set()
    assert all_closed(environments) and seen == [True]


class Hanging(Shop):
    """Its `close` hangs once a name was put into it."""

    release = threading.Event()

    def close(self) -> None:
        if self.items:
            self.release.wait(20)
        super().close()


def test_hanging_environments_that_use_all_slots_are_an_error_and_not_a_hang():
    Hanging.release.clear()
    environments = environments_of(Hanging, timeout_s=0.4, limit=1, keeps=False)
    with pytest.raises(EngineError, match=r"1 paths wait for a free slot .* all slots belong to states that hang"):
        run_within(environments, 0.4, leaves=2, at_root=2)
    with (
        ToolBox(environments.tools) as toolbox,
        pytest.raises(ConfigError, match="There is no free slot for the environment of a row"),
    ):
        environments.begin({1: {"name": "b"}}, toolbox, lambda: None)
    Hanging.release.set()
    assert all_closed(environments)


def test_in_a_stream_they_are_an_error_too():
    Hanging.release.clear()
    environments = environments_of(Hanging, timeout_s=0.4, limit=1, keeps=False)
    made = Scripted(buys, tools=environments.tools, timeout_s=0.4, leaves=1, at_root=1)
    prompts = [GroupRequest(id=i, prompt_ids=made.protocol.encode_prompt("what is the answer")) for i in range(2)]
    with made.toolbox, pytest.raises(EngineError, match=r"1 paths wait .* all slots belong to states that hang"):
        list(made.sampler.stream(prompts, seed=(0,), groups_at_once=2))
    Hanging.release.set()
    assert all_closed(environments)


def test_in_a_stream_hanging_environments_beside_those_of_incomplete_groups_are_an_error_too():
    """Rewards read the environments of a group's finished paths when its last path has ended."""
    release = threading.Event()

    class Flaky(Shop):
        def reset(self, name: str = "", **row: Any) -> str | None:
            if len(OPENED) <= 2:
                release.wait(60)
            return super().reset(name, **row)

    environments = environments_of(Flaky, timeout_s=0.3, limit=6, keeps=True)
    made = Scripted(buys, tools=environments.tools, timeout_s=0.3, leaves=3, at_root=2)
    made.sampler.settings = replace(made.sampler.settings, max_completion_length=800)
    with made.toolbox:
        for _ in range(2):  # of paths that have ended
            states = made.toolbox.create_states(0)
            states.start()
            assert states.admit()
            ticket = made.toolbox.open(states)
            (result,) = [result for _ in range(100) for got, result in made.toolbox.poll(0.05) if got == ticket]
            states.opened(result.failure, result.text)
            states.close()
        prompts = [GroupRequest(id=i, prompt_ids=made.protocol.encode_prompt("what is the answer")) for i in range(2)]
        with pytest.raises(EngineError, match=r"2 paths wait .* all slots belong to states that hang"):
            list(made.sampler.stream(prompts, seed=(0,), groups_at_once=2))
    release.set()
    assert all_closed(environments)


def test_a_stream_waits_for_environments_that_its_reader_closes():
    environments = environments_of(Shop, timeout_s=0.1, limit=1, keeps=True)
    made = Scripted(buys, tools=environments.tools, timeout_s=20.0, leaves=1, at_root=1)
    prompts = [GroupRequest(id=i, prompt_ids=made.protocol.encode_prompt("what is the answer")) for i in range(2)]
    with made.toolbox:
        for done in made.sampler.stream(prompts, seed=(0,), groups_at_once=2):
            assert done.error is None
            closing = threading.Timer(0.5, environments.close_groups, [{done.id}])  # after twice the deadline
            closing.start()
    closing.join()
    assert all_closed(environments)


def test_an_async_method_misses_its_deadline_also_where_a_branch_may_start():
    class Async(ForkingShop):
        async def put(self, item: str) -> str:  # type: ignore[override]
            """Put an item.

            Args:
                item: Which.
            """
            self.items.append(item)
            await asyncio.sleep(60 if item == "slow" else 0)
            return " ".join(self.items)

    environments = environments_of(Async, timeout_s=1.5)
    with ToolBox(environments.tools, timeout_s=1.5) as box:

        def done(ticket: int) -> ToolResult:
            return next(result for _ in range(600) for got, result in box.poll(0.1) if got == ticket)

        states = box.create_states(0)
        states.start()
        assert states.admit() and done(box.open(states)).ok
        at_a_result = states.fork()  # so the next call has the time of two, for the copy of the branch
        call = ToolCall(name="put", arguments={"item": "slow"})
        result = done(box.submit(call, states))
        assert (result.text, result.failure) == ("Error: the put call took longer than 1.5 s.", ToolFailure.TIMEOUT)
        states.record(call, result.failure)
        branch = states.fork()
        assert branch.admit()
        opened = done(box.open(branch))
        assert not branch.opened(opened.failure, opened.text)
        for each in (branch, at_a_result, states):
            each.close()
    assert all_closed(environments)


def test_a_branch_without_a_copy_and_without_a_replay_is_refused(caplog):
    class Final(ForkingShop):
        replayable = False

    environments = environments_of(Final, limit=1, keeps=False)
    batch = run(environments, rule=Ranked(branches_per_fork=1), leaves=2)
    assert [leaf.address for leaf in batch.trees[0].leaves()] == [(0,), (1,)]
    assert "there was no room for a copy (environment_concurrency), and it is not replayable" in caplog.text
    counts = environments.instances.take_counts()
    assert (counts.refused_forks, counts.live_max) == (1, 1) and all_closed(environments)


def test_a_path_waits_for_the_slot_of_a_creation_that_missed_its_deadline():
    release = threading.Event()
    seen: list[bool] = []

    class Late(Shop):
        def reset(self, name: str = "", **row: Any) -> str | None:
            if len(OPENED) == 1:
                seen.append(release.wait(60))
            return super().reset(name, **row)

    def script(request: Any, context: str) -> ScriptedTurn:
        if request.key[-1] == 1:
            release.set()
        return buys(request, context)

    environments = environments_of(Late, limit=1, keeps=False)
    made = Scripted(script, tools=environments.tools, leaves=2, at_root=2)
    made.sampler.settings = replace(made.sampler.settings, max_completion_length=800)
    short_deadline(made.toolbox, 0.3, opening=0)
    first, second = made(1).trees[0].leaves()
    assert not any(call.ok for call in first.calls) and second.calls[-1].text == "a 1/0 1/1 z"
    assert environments.instances.take_counts().failed == 1 and seen == [True]
    assert all_closed(environments)
