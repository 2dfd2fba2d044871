"""Paths of one group with the same history of calls share executions, and nothing else changes for a path."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.errors import ConfigError, ToolError, ToolSpecError
from arpo_trl.logs.metrics import Tally, tally_rollout
from arpo_trl.options import RolloutSchedule, ShareCalls
from arpo_trl.rollout.batch import GroupRequest
from arpo_trl.rollout.engines.base import SamplingParams
from arpo_trl.rollout.engines.scripted import ScriptedEngine, ScriptedTurn
from arpo_trl.rollout.protocols import ChatTemplateProtocol
from arpo_trl.rollout.rules.ranked import Ranked
from arpo_trl.rollout.tree import RolloutTree
from arpo_trl.tools.calls import CallSource, ToolCall, ToolFailure
from arpo_trl.tools.python.local import python_tool
from arpo_trl.tools.sharing import history_after, sharing_keys
from arpo_trl.tools.spec import tool_spec
from arpo_trl.tools.state import PathState
from shops import Shop, buys, environments_of
from support import ANSWER, ON_CPU, Scripted, line_tools, search, tiny_model, tokenizer

both_schedules = pytest.mark.parametrize("schedule", list(RolloutSchedule))


def sharing(script: Any, tools: Sequence[Callable[..., Any]], **settings: Any) -> Scripted:
    return Scripted(script, tools=tools, share_calls=ShareCalls.HISTORY, **settings)


def paths(*texts: Sequence[str]) -> Any:
    """A script: the i-th path at the root, and its branches, write the i-th texts turn by turn, then an answer."""

    def script(request, context):
        _, i, *_, depth = request.key
        return texts[i][depth] if depth < len(texts[i]) else ANSWER

    return script


def sources(tree: RolloutTree) -> list[list[str]]:
    return [[str(call.source) for call in leaf.calls] for leaf in tree.leaves()]


def texts(tree: RolloutTree) -> list[list[str]]:
    return [[call.text for call in leaf.calls] for leaf in tree.leaves()]


class Die:
    """A tool whose n-th execution returns n, for n in order of execution; what it is asked stands in `asked`."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        lock = threading.Lock()

        def roll(text: str) -> str:
            """Roll a die.

            Args:
                text: What for.
            """
            with lock:
                self.asked.append(text)
                return str(len(self.asked))

        roll.depends_on_calls_only = True  # type: ignore[attr-defined]
        self.tools = [roll]


# Tools without state -------------------------------------------------------------------------------------------------


@both_schedules
def test_paths_with_the_same_history_share_an_execution_and_others_do_not(schedule):
    die = Die()
    script = paths(
        ["<roll>a</roll>", "<roll>b</roll>"],
        ["<roll>a</roll>", "<roll>b</roll>"],
        ["<roll>c</roll>", "<roll>b</roll>"],
    )
    tree = sharing(script, die.tools, leaves=3, at_root=3, schedule=schedule)().trees[0]
    assert sorted(die.asked) == ["a", "b", "b", "c"]
    one, two, three = texts(tree)
    assert one == two and one[1] != three[1]
    first, second, third = sources(tree)
    assert sorted([first, second]) == [["executed", "executed"], ["shared", "shared"]]
    assert third == ["executed", "executed"]


def test_a_path_that_repeats_its_call_rolls_again():
    die = Die()
    script = paths(*[["<roll>a</roll>", "<roll>a</roll>"]] * 2)
    assert texts(sharing(script, die.tools, leaves=2, at_root=2)().trees[0]) == [["1", "2"], ["1", "2"]]


def test_groups_share_nothing_with_each_other():
    die = Die()
    rollout = sharing(paths(["<roll>a</roll>"]), die.tools, leaves=1, at_root=1)(3)
    assert die.asked == ["a"] * 3
    assert [sources(tree) for tree in rollout.trees] == [[["executed"]]] * 3


def test_a_branch_that_starts_after_its_siblings_ended_gets_the_result_that_they_got():
    # `ranked` branches once the first path has ended; the branch after the first result makes the second call.
    def script(request, context):
        text = ["<roll>a</roll>", "<roll>b</roll>", ANSWER][request.key[-1]]
        return ScriptedTurn(text=text, entropies=[[0.1, 1.0, 0.2][request.key[-1]]])

    die = Die()
    tree = sharing(script, die.tools, leaves=2, at_root=1, rule=Ranked())().trees[0]
    assert [leaf.address for leaf in tree.leaves()] == [(0,), (0, 1, 0)]
    assert (texts(tree), die.asked) == ([["1", "2"], ["1", "2"]], ["a", "b"])
    assert sources(tree) == [["executed", "executed"], ["executed", "shared"]]


@pytest.mark.parametrize("fails", [False, True])
def test_each_path_keeps_its_distribution_failures_included(fails):
    """One in two executions succeeds. A second path that tried failed calls again would succeed in 3 of 4."""
    coin = random.Random(0)

    def flip(text: str) -> str:
        """Flip a coin.

        Args:
            text: Not used.
        """
        if coin.random() < 0.5:
            return "heads"
        if fails:
            raise ToolError("tails")
        return "tails"

    flip.depends_on_calls_only = True
    rollout = sharing(paths(["<flip>x</flip>"], ["<flip>x</flip>"]), [flip], leaves=2, at_root=2)(400)
    heads = [sum(texts(tree)[path] == ["heads"] for tree in rollout.trees) for path in (0, 1)]
    assert heads[0] == heads[1]
    assert abs(heads[1] - 200) < 4 * 10  # the standard deviation of 400 flips is 10


def test_a_timeout_is_shared_too():
    began, release, executions = threading.Event(), threading.Event(), []

    def hang(text: str) -> str:
        """Hang.

        Args:
            text: Not used.
        """
        executions.append(text)
        began.set()
        release.wait(60)
        return text

    hang.depends_on_calls_only = True
    tree = sharing(paths(*[["<hang>x</hang>"]] * 3), [hang], leaves=3, at_root=3, timeout_s=0.05)().trees[0]
    assert began.wait(60)  # on a busy machine the thread of the call may begin after its deadline
    release.set()
    assert executions == ["x"]
    assert [leaf.calls[0].failure for leaf in tree.leaves()] == [ToolFailure.TIMEOUT] * 3


def test_a_refused_call_stays_refused_and_is_not_counted_as_shared():
    script = paths(*[["<roll></roll>", "<roll>a</roll>"]] * 2)
    rollout = sharing(script, Die().tools, leaves=2, at_root=2)()
    assert sorted(sources(rollout.trees[0])) == [["refused", "executed"], ["refused", "shared"]]
    tally = Tally()
    tally_rollout(rollout, tally)
    names = ("made", "executed", "shared", "saved_by_cache")
    assert [tally.totals[f"tools/calls_{name}"] for name in names] == [2, 1, 1, 0]


def test_sharing_changes_no_path_of_a_deterministic_tool():
    def lookup(query: str) -> str:
        """Look it up.

        Args:
            query: What.
        """
        return f"facts about {query}"

    def script(request, context):
        text = "<lookup>iron</lookup>" if request.key[-1] < 2 else ANSWER
        return ScriptedTurn(text=text, entropies=[float(request.key[-1])])

    lookup.deterministic = True
    plain = Scripted(script, leaves=6, at_root=2, tools=[lookup])().trees[0]
    shared = sharing(script, [lookup], leaves=6, at_root=2)().trees[0]
    assert [(leaf.address, leaf.ids) for leaf in plain.leaves()] == [
        (leaf.address, leaf.ids) for leaf in shared.leaves()
    ]
    executed = [call.source for node in shared.observations() for call in node.calls].count(CallSource.EXECUTED)
    assert executed == 2  # the first search and the second


# Tools with state ----------------------------------------------------------------------------------------------------


class Store:
    """Two tools on a list of lines; counts executions and open states."""

    def __init__(self, group_that_fails: int | None = None) -> None:
        self.written: list[str] = []
        self.open: dict[Lines, int] = {}
        self.group_that_fails = group_that_fails
        self.tools = line_tools(self.create)
        for tool in self.tools:
            tool.depends_on_calls_only = True  # type: ignore[attr-defined]

    def create(self, group: int) -> Lines:
        return Lines(self, group, [])


class Lines(PathState):
    def __init__(self, store: Store, group: int, lines: list[str]) -> None:
        self.store, self.group, self.lines = store, group, lines
        store.open[self] = group

    def write(self, text: str) -> str:
        self.store.written.append(text)
        self.lines.append(f"{text}{len(self.store.written)}")
        return "written"

    def read(self, what: str) -> str:
        return " ".join(self.lines)

    def fork(self) -> Lines:
        if self.group == self.store.group_that_fails:
            raise OSError("no second copy")
        return Lines(self.store, self.group, list(self.lines))

    def close(self) -> None:
        del self.store.open[self]


@both_schedules
def test_a_sharing_path_continues_from_the_state_after_the_shared_calls(schedule):
    store = Store()
    a, b, c, read = "<write>a</write>", "<write>b</write>", "<write>c</write>", "<read>all</read>"
    script = paths([a, b, read], [a, c, read], [a, b, read])
    tree = sharing(script, store.tools, leaves=3, at_root=3, schedule=schedule)().trees[0]
    assert sorted(store.written) == ["a", "b", "c"]
    one, two, three = (leaf.calls[-1].text.split() for leaf in tree.leaves())
    assert one == three and one[0] == two[0] == "a1"  # the same execution, whose number is in the state
    assert (one[1][0], two[1][0]) == ("b", "c")
    assert sorted(source for source, *_ in sources(tree)) == ["executed", "shared", "shared"]
    assert store.open == {}


def test_a_branch_shares_and_then_departs():
    # `ranked`: path (0,) writes a, b, c and ends; a branch after "a" writes b, as (0,) did, then reads.
    def script(request, context):
        _, *address, depth = request.key
        turns = ["<write>a</write>", "<write>b</write>", "<write>c</write>", ANSWER]
        if len(address) > 1:
            turns[2] = "<read>all</read>"
        return ScriptedTurn(text=turns[depth], entropies=[[0.0, 1.0, 0.2, 0.1][depth]])

    store = Store()
    tree = sharing(script, store.tools, leaves=2, at_root=1, rule=Ranked())().trees[0]
    assert sources(tree) == [["executed"] * 3, ["executed", "shared", "executed"]]
    assert texts(tree)[1][-1] == "a1 b2"  # without the c of the path that made the calls
    assert store.open == {}


def test_python_cells_are_shared_and_kept():
    python = python_tool(stateful=True)
    first, second = "<python>import random; x = random.random(); print(x)</python>", "<python>x > 1</python>"
    tree = sharing(paths([first, second], [first, second]), [python], leaves=2, at_root=2)().trees[0]
    assert sorted(sources(tree)) == [["executed", "executed"], ["shared", "shared"]]
    assert texts(tree)[0] == texts(tree)[1] and texts(tree)[0][1] == "False"


def test_a_finished_group_of_a_stream_keeps_no_state():
    def script(request, context):
        turns = ["<write>a</write>"] * (1 if request.key[0] == 0 else 3)
        return turns[request.key[-1]] if request.key[-1] < len(turns) else ANSWER

    store = Store()
    made = sharing(script, store.tools, leaves=2, at_root=2)
    ids = made.protocol.encode_prompt([{"role": "user", "content": "what is the answer"}])
    with made.toolbox:
        requests = [GroupRequest(id=i, prompt_ids=ids) for i in range(2)]
        stream = made.sampler.stream(requests, seed=(0,), groups_at_once=2)
        assert next(stream).id == 0
        assert set(store.open.values()) == {1}
        assert next(stream).id == 1
    assert store.open == {}


def test_a_state_that_cannot_be_forked_fails_its_group_only():
    store = Store(group_that_fails=1)
    made = sharing(paths(*[["<write>a</write>"]] * 2), store.tools, leaves=2, at_root=2)
    ids = made.protocol.encode_prompt([{"role": "user", "content": "what is the answer"}])
    with made.toolbox:
        requests = [GroupRequest(id=i, prompt_ids=ids) for i in range(3)]
        outcomes = list(made.sampler.stream(requests, seed=(0,), groups_at_once=3))
    assert {outcome.id: outcome.error for outcome in outcomes} == {0: None, 1: "OSError: no second copy", 2: None}
    assert store.open == {}


def test_an_interrupt_closes_shared_states():
    store = Store()
    made = sharing(paths(*[["<write>a</write>"] * 3] * 2), store.tools, leaves=2, at_root=2)

    def interrupt() -> None:
        if len(store.open) > 2:
            raise KeyboardInterrupt

    made.sampler.between_events = interrupt
    with pytest.raises(KeyboardInterrupt):
        made()
    assert store.open == {}


# Several calls in a turn ---------------------------------------------------------------------------------------------


def turn_of(*calls: tuple[str, str]) -> str:
    return "".join(
        f'<tool_call>\n{{"name": "{name}", "arguments": {{"text": "{text}"}}}}\n</tool_call>\n' for name, text in calls
    )


def in_template(script: Any, tools: Sequence[Callable[..., Any]]) -> RolloutTree:
    made = sharing(
        script,
        tools,
        leaves=2,
        at_root=2,
        protocol=ChatTemplateProtocol,
        template="qwen3",
        max_completion_length=900,
        max_length=2000,
    )
    return made().trees[0]


def test_turns_share_their_calls_up_to_the_first_that_differs():
    die = Die()
    same, other = [("roll", "a"), ("roll", "a"), ("roll", "b")], [("roll", "a"), ("roll", "a"), ("roll", "c")]
    tree = in_template(paths([turn_of(*same)], [turn_of(*other)]), die.tools)
    assert sorted(die.asked) == ["a", "a", "b", "c"]
    assert texts(tree)[0][:2] == texts(tree)[1][:2] and len(set(texts(tree)[0])) == 3


def test_a_turn_that_acts_on_a_state_is_shared_completely_or_not():
    store, die = Store(), Die()
    tools = [*store.tools, *die.tools]
    same = [turn_of(("write", "a"), ("roll", "b"))]
    assert sorted(sources(in_template(paths(same, same), tools))) == [["executed"] * 2, ["shared"] * 2]
    other = [turn_of(("write", "a"), ("roll", "c"))]
    assert sources(in_template(paths(same, other), tools)) == [["executed"] * 2] * 2
    assert store.open == {}


def test_histories_tell_turns_and_their_order_apart():
    a, b = (ToolCall(name="roll", arguments={"text": text}) for text in "ab")
    once = history_after(b"", [a])
    histories = [once, history_after(b"", [b]), history_after(b"", [a, b]), history_after(b"", [b, a])]
    assert len({*histories, history_after(once, [b])}) == 5
    assert history_after(b"", [ToolCall(name="roll", arguments={"text": "a"})]) == once
    assert sharing_keys(b"", [a, b], {}) == [once, histories[2]]
    in_either_order = {"text": "a", "times": 2}, {"times": 2, "text": "a"}
    assert len({history_after(b"", [ToolCall(name="roll", arguments=of)]) for of in in_either_order}) == 1


# Settings ------------------------------------------------------------------------------------------------------------


def test_a_tool_that_is_not_declared_is_an_error_that_names_it():
    with pytest.raises(ConfigError, match=r"share_calls is 'history', but tool 'search' .*search\.depends_on_calls_"):
        sharing(paths([]), [*Die().tools, search])


def trainer(folder: Path, tools: Sequence[Callable[..., Any]]) -> ARPOTrainer:
    def script(request, context):
        return ScriptedTurn(text="<roll>a</roll>" if request.key[-1] == 0 else ANSWER, entropies=[request.key[-1]])

    settings = {"num_generations": 4, "per_device_train_batch_size": 8, "max_completion_length": 80, "max_steps": 1}
    sampling = SamplingParams(eos_ids=(tokenizer().eos_token_id,), stop_strings=("</roll>",))
    return ARPOTrainer(
        tiny_model(),
        lambda completions, **_: [float(i % 4 == 0) for i in range(len(completions))],
        ARPOConfig(str(folder), share_calls="history", save_strategy="no", **settings, **ON_CPU),
        Dataset.from_list([{"prompt": "what is the answer"}] * 8),
        processing_class=tokenizer(),
        tools=list(tools),
        engine=ScriptedEngine(tokenizer(), sampling, script),
    )


def test_a_trainer_refuses_a_tool_that_is_not_declared_before_the_first_step(tmp_path):
    with pytest.raises(ConfigError, match="tool 'search'"):
        trainer(tmp_path, [*Die().tools, search])


def test_a_trainer_shares_calls_and_logs_shared_and_forked_calls(tmp_path):
    made = trainer(tmp_path, Die().tools)
    made.train()
    (logged,) = (entry for entry in made.state.log_history if "loss" in entry)
    # Two groups, each with two paths from the root that make the same call, and two branches after its result.
    names = ("made", "executed", "shared", "saved_by_cache", "saved_by_sharing")
    assert [logged[f"arpo/tools/calls_{name}"] for name in names] == [4, 2, 2, 0, 4]
    assert (logged["arpo/exchange/forks_after_roll"], logged["arpo/exchange/forks_depth_1"]) == (4, 4)
    # Leaf (0,) of each group has reward 1, the others 0: 1 − 0 at the first fork of a group, 0 − 0 at the second.
    assert logged["arpo/exchange/selected_minus_fresh"] == 0.5


def test_a_sampler_asks_for_the_declaration_when_its_settings_are_replaced():
    made = Scripted(paths([]), tools=[search])
    settings = replace(made.sampler.settings, share_calls=ShareCalls.HISTORY)
    with made.toolbox, pytest.raises(ConfigError, match="tool 'search'"):
        made.sampler.sample([], seed=(0,), settings=settings)


def test_evaluation_shares_nothing():
    die = Die()
    made = sharing(paths(*[["<roll>a</roll>"]] * 2), die.tools, leaves=2, at_root=1)
    made.sampler.settings = made.sampler.settings.without_branching(2)
    assert sources(made().trees[0]) == [["executed"], ["executed"]]


def test_a_state_that_is_created_with_the_path_is_refused():
    environments = environments_of(Shop)
    (put,) = environments.tools
    put.depends_on_calls_only = True
    with pytest.raises(
        ConfigError, match=r"the state of tool 'put' is created with the path, .* Set share_calls: off"
    ):
        Scripted(buys, tools=environments.tools, share_calls=ShareCalls.HISTORY)


def test_a_declaration_is_a_bool_and_python_is_declared():
    def odd(text: str) -> str:
        """Odd.

        Args:
            text: Not used.
        """
        return text

    assert not tool_spec(odd).depends_on_calls_only
    odd.depends_on_calls_only = "yes"
    with pytest.raises(ToolSpecError, match="attribute depends_on_calls_only is 'yes'; expected a bool"):
        tool_spec(odd)
    assert tool_spec(python_tool()).depends_on_calls_only
