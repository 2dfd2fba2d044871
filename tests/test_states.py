"""Tool states during the life of a tree: each path sees its own state, and each state is closed exactly once.

`Notes` stands for an environment from outside the package: an object that its tools write to and read from.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest

from arpo_trl.errors import ToolError, ToolSpecError
from arpo_trl.options import RolloutSchedule
from arpo_trl.rollout.engines.scripted import ScriptedTurn
from arpo_trl.rollout.protocols import ChatTemplateProtocol
from arpo_trl.rollout.rules.ranked import Ranked
from arpo_trl.rollout.rules.threshold import Threshold
from arpo_trl.rollout.tree import StopReason
from arpo_trl.tools.calls import ToolCall, ToolFailure
from arpo_trl.tools.state import PathState
from support import ANSWER, Scripted, line_tools, prompts


class World:
    """Makes states and the tools that act on them, and counts both."""

    def __init__(self, failing: str = "") -> None:
        self.failing = failing
        """What raises: `create`, `fork` or `close`."""
        self.opened: list[Notes] = []
        self.closed: Counter[Notes] = Counter()
        self.tools = line_tools(self.create)

    def create(self, group: int) -> Notes:
        if self.failing == "create" and group == 1:
            raise OSError("no room for notes")
        return Notes(self, group, [])

    @property
    def forks(self) -> int:
        return sum(state.forked for state in self.opened)

    def is_closed(self) -> bool:
        """Whether each state was closed once."""
        return self.closed == Counter(self.opened)


class Notes(PathState):
    def __init__(self, world: World, group: int, lines: list[str], *, forked: bool = False) -> None:
        self.world, self.group, self.lines, self.forked = world, group, lines, forked
        world.opened.append(self)

    def write(self, text: str) -> str:
        assert not self.world.closed[self], "a call on a closed state"
        self.lines.append(text)
        if text == "boom":
            raise ToolError("the pen broke")
        return "written"

    def read(self, what: str) -> str:
        return " ".join(self.lines)

    def fork(self) -> Notes:
        if self.world.failing == "fork" and self.group == 1:
            raise OSError("no second copy")
        return Notes(self.world, self.group, list(self.lines), forked=True)

    def close(self) -> None:
        self.world.closed[self] += 1
        if self.world.failing == "close":
            raise OSError("stuck")


def writes_and_reads(request, context):
    """Each path writes its group, address and depth twice, reads, and answers; entropy rises after the first call."""
    depth = request.key[-1]
    name = "/".join(map(str, request.key[:-1])) + f":{depth}"
    text = [f"<write>{name}</write>", f"<write>{name}</write>", "<read>all</read>", ANSWER][depth]
    return ScriptedTurn(text=text, entropies=[[0.5, 1.0, 0.1, 0.1][depth]])


def read_by(tree) -> dict[tuple[int, ...], str]:
    return {leaf.address: leaf.calls[-1].text for leaf in tree.leaves()}


@pytest.mark.parametrize("schedule", list(RolloutSchedule))
@pytest.mark.parametrize("rule", [Threshold, Ranked])
def test_branches_see_the_state_as_of_their_observation_and_no_sibling_sees_anothers_writes(rule, schedule):
    # The ranked rule branches only once (0,) has written its second line and ended.
    world = World()
    made = Scripted(
        writes_and_reads,
        leaves=3,
        at_root=1,
        rule=rule(branches_per_fork=2),
        schedule=schedule,
        tools=world.tools,
    )
    assert read_by(made().trees[0]) == {
        (0,): "0/0:0 0/0:1",
        (0, 1, 0): "0/0:0 0/0/1/0:1",
        (0, 1, 1): "0/0:0 0/0/1/1:1",
    }
    assert world.is_closed()
    if rule is Ranked:  # a copy at each of three observations, and one for each of two branches
        assert (len(world.opened), world.forks) == (6, 5)


def test_paths_from_the_root_start_afresh_and_nothing_is_forked_where_nothing_can_branch():
    world = World()
    made = Scripted(writes_and_reads, leaves=2, at_root=2, tools=world.tools)
    assert read_by(made().trees[0]) == {(0,): "0/0:0 0/0:1", (1,): "0/1:0 0/1:1"}
    assert (len(world.opened), world.forks, world.is_closed()) == (2, 0, True)


def test_a_path_that_never_calls_has_no_state():
    world = World()
    Scripted(lambda r, c: ANSWER, leaves=2, at_root=2, tools=world.tools)()
    assert world.opened == []


def test_a_copy_that_no_branch_needs_is_closed():
    def falls(request, context):
        turn = writes_and_reads(request, context)
        return ScriptedTurn(text=turn.text, entropies=[1.0 - turn.entropies[0] if request.key[-1] == 0 else 0.0])

    world = World()
    tree = Scripted(falls, leaves=2, at_root=1, max_tool_calls=3, tools=world.tools)().trees[0]
    assert [leaf.address for leaf in tree.leaves()] == [(0,), (1,)]  # topped up after the third no
    assert (len(world.opened), world.forks, world.is_closed()) == (5, 3, True)


def test_a_state_outlives_a_tool_that_raises_and_is_closed_with_its_path():
    def breaks(request, context):
        return ["<write>boom</write>", "<read>all</read>", ANSWER][request.key[-1]]

    world = World()
    (leaf,) = Scripted(breaks, leaves=1, at_root=1, tools=world.tools)().trees[0].leaves()
    assert [(call.text, call.failure) for call in leaf.calls] == [
        ("the pen broke", ToolFailure.ERROR),
        ("boom", None),
    ]
    assert world.is_closed()


@pytest.mark.parametrize("stop", [StopReason.LENGTH, StopReason.CALL_LIMIT])
def test_paths_that_do_not_end_themselves_close_their_states_too(stop):
    world = World()
    limits = {"max_completion_length": 60} if stop is StopReason.LENGTH else {"max_tool_calls": 1}
    made = Scripted(lambda r, c: "<write>a</write>", leaves=2, at_root=1, tools=world.tools, **limits)
    assert {leaf.stop for leaf in made().trees[0].leaves()} == {stop}
    assert world.opened and world.is_closed()


@pytest.mark.parametrize(
    ("failing", "error"),
    [
        ("create", "OSError: no room for notes"),
        ("fork", "OSError: no second copy"),
        ("parse", "ValueError: unreadable"),
    ],
)
def test_a_failed_group_in_a_stream_closes_its_states_and_the_others_continue(failing, error):
    world = World(failing)
    made = Scripted(writes_and_reads, leaves=4, at_root=2, tools=world.tools)
    if failing == "parse":
        parse = made.protocol.parse_turn

        def breaking(text, end=None):
            if text == "<write>1/1:1</write>":
                raise ValueError("unreadable")
            return parse(text)

        made.protocol.parse_turn = breaking
    with made.toolbox:
        outcomes = list(made.sampler.stream(prompts(made, 3), seed=(0,), groups_at_once=3))
        assert {outcome.id: outcome.error for outcome in outcomes} == {0: None, 1: error, 2: None}
        assert all(len(outcome.tree.leaves()) == 4 for outcome in outcomes if outcome.tree is not None)
    assert world.is_closed()


@pytest.mark.parametrize("failing", ["create", "fork"])
def test_a_failed_creation_of_a_state_fails_the_batch_and_all_states_are_closed(failing):
    world = World(failing)
    with pytest.raises(OSError, match=r"no room|no second"):
        Scripted(writes_and_reads, leaves=4, at_root=2, tools=world.tools)(2)
    assert world.is_closed()


def test_a_fork_that_returns_the_state_itself_is_an_error(monkeypatch):
    world = World()
    monkeypatch.setattr(Notes, "fork", lambda self: self)
    with pytest.raises(ToolSpecError, match=r"fork\(\) of Notes returned the state itself, .* Return a copy"):
        Scripted(writes_and_reads, leaves=4, at_root=2, tools=world.tools)(1)
    assert world.is_closed()


def test_a_create_state_that_returns_one_state_for_all_paths_is_an_error():
    world = World()
    write, read = world.tools[:2]
    shared = write.create_state(0)
    write.create_state = read.create_state = lambda group: shared
    with pytest.raises(ToolSpecError, match=r"create_state of tool 'write' returned the state of another path"):
        Scripted(writes_and_reads, leaves=4, at_root=2, tools=world.tools)(1)


@pytest.mark.parametrize("way", ["sample", "stream"])
def test_an_interrupt_closes_all_states(way):
    world = World()
    made = Scripted(writes_and_reads, leaves=4, at_root=2, tools=world.tools)

    def interrupt():
        if world.forks:
            raise KeyboardInterrupt

    made.sampler.between_events = interrupt
    with made.toolbox, pytest.raises(KeyboardInterrupt):
        if way == "sample":
            made.sampler.sample(prompts(made, 2), seed=(0,))
        else:
            list(made.sampler.stream(prompts(made, 2), seed=(0,), groups_at_once=2))
    assert world.opened and world.is_closed()


def test_a_stream_that_is_left_closes_all_states():
    def one_is_quick(request, context):
        if request.key[0] == 0:
            return ANSWER if "written" in context else writes_and_reads(request, context)
        turn = writes_and_reads(request, context)
        return replace(turn, polls=1 << 60) if request.key[-1] else turn  # its second turns never end

    world = World()
    made = Scripted(one_is_quick, leaves=4, at_root=2, tools=world.tools, schedule=RolloutSchedule.OVERLAP)
    with made.toolbox:
        stream = made.sampler.stream(prompts(made, 2), seed=(0,), groups_at_once=2)
        assert next(stream).id == 0
        stream.close()
    assert world.is_closed()


def test_a_failed_close_of_a_state_is_logged_once_and_the_rollout_continues(caplog):
    world = World("close")
    with caplog.at_level(logging.WARNING):
        tree = Scripted(writes_and_reads, leaves=4, at_root=2, tools=world.tools)().trees[0]
    assert len(tree.leaves()) == 4 and world.is_closed() and len(world.opened) > 1
    assert [record.getMessage() for record in caplog.records if "close()" in record.getMessage()] == [
        "close() of Notes failed: OSError: stuck. The run continues, but the resources of the state "
        "may not be released. Further failures of its close() are not logged."
    ]


def _raised_in(hook: str, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> World:
    """A world in which a hook of the states of group 1 raises the error."""
    world = World()
    if hook == "create_state":
        write, read = world.tools[:2]

        def create(group: int) -> Notes:
            if group == 1:
                raise error
            return world.create(group)

        write.create_state = read.create_state = create
        return world
    usual = getattr(Notes, hook)

    def raising(self: Notes, *arguments: object) -> object:
        if self.group == 1:
            raise error
        return usual.fget(self) if isinstance(usual, property) else usual(self, *arguments)

    monkeypatch.setattr(Notes, hook, property(raising) if isinstance(usual, property) else raising)
    return world


HOOKS = ["create_state", "key", "call_steps", "bind", "record", "fork"]


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(
    "error", [SystemExit(3), GeneratorExit(), asyncio.CancelledError()], ids=lambda e: type(e).__name__
)
def test_a_hook_that_ends_the_program_fails_only_its_group(hook, error, monkeypatch):
    world = _raised_in(hook, error, monkeypatch)
    made = Scripted(writes_and_reads, leaves=4, at_root=2, tools=world.tools)
    with made.toolbox:
        outcomes = list(made.sampler.stream(prompts(made, 3), seed=(0,), groups_at_once=3))
    assert [outcome.id for outcome in outcomes if outcome.error is not None] == [1]
    (failed,) = (outcome.cause for outcome in outcomes if outcome.error is not None)
    assert isinstance(failed, ToolSpecError) and f"raised {type(error).__name__}" in str(failed)
    assert hook in str(failed) and "would end the program. Let it raise an Exception" in str(failed)
    assert world.is_closed()


@pytest.mark.parametrize("hook", [*HOOKS, "close"])
def test_ctrl_c_in_a_hook_stops_the_rollout(hook, monkeypatch):
    world = _raised_in(hook, KeyboardInterrupt(), monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        Scripted(writes_and_reads, leaves=4, at_root=2, tools=world.tools)(2)


def test_a_state_that_cannot_be_opened_at_the_root_is_an_error_and_no_endless_retry():
    class Closed(Notes):
        opening_steps = 1

        def open(self) -> None:
            raise RuntimeError("no browser here.")

    def create(group: int) -> Closed:
        return Closed(world, group, [])

    create.at_start = True  # type: ignore[attr-defined]
    world = World()
    with pytest.raises(ToolSpecError, match=r"not be opened: Error: RuntimeError: no browser here\. Correct its"):
        Scripted(writes_and_reads, leaves=2, at_root=1, tools=line_tools(create))()
    assert world.is_closed()


@pytest.mark.parametrize("hook", ["opening_steps", "admit", "will_be_admitted", "opened"])
def test_a_hook_of_the_opening_that_ends_the_program_is_an_error(hook, monkeypatch):
    class Opened(Notes):
        opening_steps = 1

        def opened(self, failure: ToolFailure | None, text: str) -> bool:
            return leave() if hook == "opened" else True

        def admit(self) -> bool:
            return leave() if hook == "admit" else hook != "will_be_admitted"

    def leave(*_: object) -> bool:
        sys.exit(3)

    if hook in ("opening_steps", "will_be_admitted"):
        monkeypatch.setattr(Opened, hook, property(leave))
    world = World()
    write, read = world.tools[:2]

    def create(group: int) -> Opened:
        return Opened(world, group, [])

    create.at_start = True
    write.create_state = read.create_state = create
    with pytest.raises(ToolSpecError, match=rf"{hook}.* raised SystemExit: 3, which would end the program"):
        Scripted(writes_and_reads, leaves=2, at_root=2, tools=world.tools)()
    assert world.is_closed()


class Unserializable:
    """Its repr differs at each call, as one with an address does between paths."""


CIRCULAR: list[object] = []
CIRCULAR.append(CIRCULAR)


@pytest.mark.parametrize(
    ("value", "got"),
    [
        ("a text", "str"),
        (3, "int"),
        ([1], "list"),
        ({"a": 1}, "dict"),
        ({1, 2}, "set"),
        (({1, 2},), r"a tuple with a value that is not JSON \(Object of type set"),
        ((Unserializable(),), r"a tuple with a value that is not JSON \(Object of type Unserializable"),
        (({1: 1, "b": 2},), r"a tuple with a value that is not JSON \('<' not supported"),
        ((CIRCULAR,), r"a tuple with a value that is not JSON \(Circular"),
    ],
)
def test_a_key_that_is_no_tuple_of_json_values_is_an_error_that_names_the_class(value, got, monkeypatch):
    world = World()
    monkeypatch.setattr(Notes, "key", property(lambda self: value))
    expected = f"key of Notes is {got}.*; expected None, or a tuple of JSON values"
    with pytest.raises(ToolSpecError, match=expected):
        Scripted(writes_and_reads, leaves=4, at_root=2, tools=world.tools)(1)
    assert world.is_closed()


@pytest.mark.parametrize(
    ("hook", "value", "message"),
    [
        (
            "call_steps",
            property(lambda self: "2"),
            "call_steps of Notes is '2'; expected a whole number of at least 1",
        ),
        ("call_steps", property(lambda self: 0), "call_steps of Notes is 0; expected a whole number of at least 1"),
        (
            "opening_steps",
            property(lambda self: None),
            "opening_steps of Notes is None; expected a whole number",
        ),
        (
            "bind",
            lambda self, tool: "text",
            r"bind\(\) of Notes returned str for the tool 'write'; expected the function",
        ),
        (
            *("write", lambda self, note: "written"),
            r"'write' takes \['text'\], but the function .* does not \(missing a required argument: 'note'\)",
        ),
        ("record", lambda self, *call: {1}, r"record\(\) of Notes returned set; expected the changes by the call as"),
    ],
)
def test_another_value_than_a_hook_may_return_is_an_error_that_names_hook_and_class(hook, value, message, monkeypatch):
    world = World()
    monkeypatch.setattr(World.create, "at_start", hook == "opening_steps", raising=False)
    monkeypatch.setattr(Notes, hook, value)
    with pytest.raises(ToolSpecError, match=message):
        Scripted(writes_and_reads, leaves=4, at_root=2, tools=world.tools)(1)
    assert world.is_closed()


class Untold(OSError):
    def __str__(self) -> str:
        raise RuntimeError("no text")


def test_a_failed_close_whose_error_has_no_text_is_logged_too(caplog, monkeypatch):
    def close(self: Notes) -> None:
        raise Untold

    monkeypatch.setattr(Notes, "close", close)
    Scripted(writes_and_reads, leaves=4, at_root=2, tools=World().tools)(1)
    assert "close() of Notes failed: Untold: (its text cannot be made)" in caplog.text


# States that are told of calls ---------------------------------------------------------------------------------------


def test_a_close_that_ends_the_program_is_logged_too(caplog, monkeypatch):
    world = World()
    monkeypatch.setattr(Notes, "close", lambda self: sys.exit(4))
    Scripted(writes_and_reads, leaves=4, at_root=2, tools=world.tools)(1)
    assert "close() of Notes failed: SystemExit: 4" in caplog.text


class Heard(PathState):
    """Shows the calls that were recorded before a call, and the call."""

    def __init__(self, heard: tuple[str, ...] = ()) -> None:
        self.heard = heard

    @property
    def key(self) -> tuple[str, ...]:
        return self.heard

    def bind(self, tool: str) -> Callable[..., str]:
        heard = self.heard

        def say(text: str) -> str:
            if text == "slow":
                time.sleep(0.05)
            if text == "fail":
                raise ToolError("failed")
            return " ".join([*heard, text])

        return say

    def record(self, call: ToolCall, failure: ToolFailure | None) -> None:
        self.heard += (f"{call.arguments['text']}:{failure}",)

    def fork(self) -> Heard:
        return Heard(self.heard)


def sayer(create_state: Callable[[int], Heard] = lambda group: Heard()) -> Callable[[str], str]:
    def say(text: str) -> str:
        """Say something.

        Args:
            text: What.
        """
        raise AssertionError("the state's own is called")

    say.create_state = create_state  # type: ignore[attr-defined]
    return say


def echo(text: str) -> str:
    """Repeat a text.

    Args:
        text: Which.
    """
    return text


def test_a_state_records_its_own_tools_calls_and_not_those_of_siblings():
    def script(request, context):
        _, *address, depth = request.key  # address (0,), or (0, 1, 0): a branch after the first call
        tool = "echo" if depth == 1 and len(address) > 1 else "say"
        text = f"<{tool}>{['set', 'fail', f'path{len(address)}', ''][depth]}</{tool}>" if depth < 3 else ANSWER
        return ScriptedTurn(text=text, entropies=[float(depth)])

    tree = Scripted(script, leaves=2, at_root=1, tools=[sayer(), echo], max_tool_calls=4)().trees[0]
    assert [[call.text for call in leaf.calls] for leaf in tree.leaves()] == [
        ["set", "failed", "set:None fail:error path1"],
        ["set", "fail", "set:None path3"],  # neither the sibling's call nor another tool's
    ]


@pytest.mark.parametrize("schedule", list(RolloutSchedule))
def test_calls_of_one_turn_see_those_of_earlier_turns_and_are_recorded_in_their_order(schedule):
    def script(request, context):
        texts = [["slow", "fail"], ["last"], []][request.key[-1]]
        calls = [
            f'<tool_call>\n{{"name": "say", "arguments": {{"text": "{text}"}}}}\n</tool_call>\n' for text in texts
        ]
        return "".join(calls) or ANSWER

    made = Scripted(
        script,
        leaves=1,
        at_root=1,
        tools=[sayer()],
        schedule=schedule,
        protocol=ChatTemplateProtocol,
        template="qwen3",
        max_completion_length=900,
        max_length=2000,
    )
    (leaf,) = made().trees[0].leaves()
    # "slow" ends last, but comes first on the path
    assert [call.text for call in leaf.calls] == ["slow", "failed", "slow:None fail:error last"]


def test_calls_that_were_refused_are_not_recorded():
    turns = ["<say>one</say>", "<say></say>", "<say>two</say>", "<say>three</say>", ANSWER]
    state = Heard()
    made = Scripted(
        lambda r, c: turns[r.key[-1]], leaves=1, at_root=1, tools=[sayer(lambda group: state)], max_tool_calls=5
    )
    made.sampler.settings = replace(made.sampler.settings, max_calls_of={"say": 2})
    (leaf,) = made().trees[0].leaves()
    failures = [call.failure for call in leaf.calls]
    assert failures == [None, ToolFailure.BAD_CALL, None, ToolFailure.CALL_LIMIT]
    assert state.heard == ("one:None", "two:None")
