import dataclasses
import json
import math
from pathlib import Path

import pytest

from arpo_trl.errors import DataError
from arpo_trl.logs.trajectories import LoggedTree, TrajectoryLog, _node_row, logged_trees, read_trees
from arpo_trl.rollout.engines.scripted import ScriptedTurn
from arpo_trl.rollout.rules.threshold import Threshold
from arpo_trl.rollout.tree import BranchDecision, ExecutedCall, RolloutTree, StopReason
from arpo_trl.tools.calls import CallSource, ToolFailure
from support import ANSWER, Scripted


def branching(request, context):
    """A bad call, then a search, then the answer; entropy rises after each result."""
    texts = ["<search> </search>", f"<search>iron {request.key[1]}</search>", ANSWER]
    depth = request.key[-1]
    return ScriptedTurn(text=texts[depth], entropies=[0.1 + 0.25 * depth, 0.5])


def logged(script=branching, **settings) -> LoggedTree:
    tree = Scripted(script, leaves=4, at_root=2, **settings)().trees[0]
    return LoggedTree(
        step=7,
        group=3,
        prompt="what is the answer",
        tree=tree,
        rewards=[1.0, None, -1.0, 0.25],
        advantages=[0.5, 0.0, -1.5, 1.0],
    )


def small(text: str = "hello") -> LoggedTree:
    """One leaf, made by hand: a turn, an observation, a turn."""
    tree = RolloutTree([1, 2])
    first = tree.add_turn(0, [3, 4], text, [-0.25, -1.5], [0.75])
    call = ExecutedCall(
        name="search",
        arguments={"query": text},
        text=text,
        failure=ToolFailure.TIMEOUT,
        seconds=0.125,
        source=CallSource.EXECUTED,
    )
    seen = tree.add_observation(first.index, [5], [call], text)
    seen.decision = BranchDecision(
        entropy_nats=1.5, delta=0.25, probability=0.55, fires=True, granted=0, reason="drew 0.312"
    )
    last = tree.add_turn(seen.index, [6], text, [-0.5], [1.5])
    tree.end(last.index, (0,), StopReason.EOS)
    return LoggedTree(step=0, group=0, prompt=text, tree=tree, rewards=[0.0], advantages=[0.0])


def test_a_rollouts_trees_are_logged_with_their_own_rewards_and_advantages():
    four, one = logged().tree, small().tree
    made = logged_trees(
        [four, one],
        [1.0, math.nan, 0.0, 0.5, 0.25],
        [0.1, 0.2, 0.3, 0.4, 0.0],
        step=3,
        first_group=6,
        decode=lambda ids: " ".join(map(str, ids)),
    )
    assert made[0] == LoggedTree(
        step=3,
        group=6,
        prompt=made[0].prompt,
        tree=four,
        rewards=[1.0, None, 0.0, 0.5],
        advantages=[0.1, 0.2, 0.3, 0.4],
    )
    assert made[1] == LoggedTree(step=3, group=7, prompt="1 2", tree=one, rewards=[0.25], advantages=[0.0])


def only(path: Path | None) -> LoggedTree:
    assert path is not None
    [tree] = read_trees(path)
    return tree


def log(folder: Path, rate: float = 1.0, seed: int = 0, rank: int = 0) -> TrajectoryLog:
    return TrajectoryLog(folder, rate, seed, rank)


def test_files_of_other_ranks_of_the_run_are_not_those_of_an_earlier_run(tmp_path, caplog):
    own = log(tmp_path)
    own.write("eval-000000", [])  # no tree of this rank was drawn
    log(tmp_path, rank=1).write("eval-000000", [logged()])
    own.warn_of_earlier_run()
    assert caplog.text == ""
    log(tmp_path, rank=1).write("step-000000", [logged()])
    own.warn_of_earlier_run()
    assert "contains trees of an earlier run" in caplog.text


def test_a_tree_read_back_is_the_tree_that_was_written(tmp_path):
    before = logged()
    after = only(log(tmp_path).write("step-000007", [before]))
    assert any(len(node.children) > 1 for node in before.tree.nodes[1:])  # it does branch
    assert [dataclasses.asdict(node) for node in after.tree.nodes] == [
        dataclasses.asdict(node) for node in before.tree.nodes
    ]
    assert after.tree.leaves() == before.tree.leaves()
    assert (after.step, after.group, after.prompt) == (7, 3, "what is the answer")
    assert after.rewards == [1.0, None, -1.0, 0.25]
    assert after.advantages == [0.5, 0.0, -1.5, 1.0]
    after.tree.check(4)


def test_every_field_of_a_node_survives(tmp_path):
    tree = only(log(tmp_path).write("step-000000", [small()])).tree
    assert tree.root.ids == [1, 2]
    first, seen, last = tree.nodes[1:]
    assert (first.ids, first.logprobs, first.entropies, first.stop) == ([3, 4], [-0.25, -1.5], [0.75], None)
    assert seen.calls == [
        ExecutedCall(
            name="search",
            arguments={"query": "hello"},
            text="hello",
            failure=ToolFailure.TIMEOUT,
            seconds=0.125,
            source=CallSource.EXECUTED,
        )
    ]
    assert type(seen.calls[0].failure) is ToolFailure and type(seen.calls[0].source) is CallSource
    assert seen.decision == small().tree.nodes[2].decision
    assert (last.parent, last.text, last.stop) == (2, "hello", StopReason.EOS)


def test_the_notice_at_the_limit_is_kept_and_is_not_a_call(tmp_path):
    def insists(request, context):
        return ANSWER if "No tool calls are left" in context else "<search>more</search>"

    before = logged(insists, max_tool_calls=0)
    after = only(log(tmp_path).write("step-000000", [before])).tree
    assert [node.calls for node in after.observations()] == [[]] * 4
    assert after.leaves() == before.tree.leaves()


@pytest.mark.parametrize(
    "text", ["line\nend", "carriage\rreturn", "\u2028 \u0085 \x1c", "«ünïcode» 😀", '"quoted" \\n']
)
def test_no_text_breaks_a_line(tmp_path, text):
    path = log(tmp_path).write("step-000000", [small(text), small()])
    assert path is not None
    assert path.read_bytes().count(b"\n") == 2
    assert [tree.prompt for tree in read_trees(path)] == [text, "hello"]


def test_half_of_a_surrogate_pair_is_written_as_a_question_mark(tmp_path):
    r"""A JSON escape in the model's text can contain one: \ud83d."""
    path = log(tmp_path).write("step-000000", [small("smile \ud83d")])
    assert path is not None
    assert [tree.prompt for tree in read_trees(path)] == ["smile ?"]


def test_the_log_is_plain_json_that_other_programs_can_read(tmp_path):
    path = log(tmp_path).write("step-000000", [small()])
    assert path is not None
    row = json.loads(path.read_text())
    assert sorted(row) == ["group", "leaves", "nodes", "prompt", "step"]
    assert row["leaves"] == [{"address": [0], "node": 3, "reward": 0.0, "advantage": 0.0}]
    assert [node["kind"] for node in row["nodes"]] == ["root", "turn", "observation", "turn"]


def test_a_row_has_all_of_a_nodes_fields_and_no_copy_of_its_tokens():
    for node in small().tree.nodes:
        slow = dataclasses.asdict(node)
        del slow["children"]
        for call in slow["calls"]:
            del call["changed"]
        row = _node_row(node)
        assert row == {key: value for key, value in slow.items() if value not in (None, [])} | {"parent": node.parent}
        assert row["ids"] is node.ids
        assert row.get("logprobs", node.logprobs) is node.logprobs


def test_a_decision_of_an_older_log_has_no_reason(tmp_path):
    path = log(tmp_path).write("step-000000", [small()])
    assert path is not None
    path.write_text(path.read_text().replace(', "reason": "drew 0.312"', ""))
    made = only(path).tree.nodes[2].decision
    assert made == BranchDecision(entropy_nats=1.5, delta=0.25, probability=0.55, fires=True, granted=0)


def test_a_file_is_named_after_its_rollout_and_rank(tmp_path):
    path = log(tmp_path / "new" / "folder", rank=3).write("step-000012", [small()])
    assert path == tmp_path / "new" / "folder" / "step-000012-rank3.jsonl"
    assert list(path.parent.iterdir()) == [path]  # nothing half written is left


def test_writing_a_step_again_replaces_its_file(tmp_path):
    first = log(tmp_path).write("step-000001", [small("before"), small("before")])
    again = log(tmp_path).write("step-000001", [small("after")])
    assert first == again
    assert only(again).prompt == "after"


def test_a_full_disk_is_warned_about_once_and_ends_nothing(monkeypatch, tmp_path, caplog):
    written = log(tmp_path)

    def full(path: Path, *_: object, **__: object) -> None:
        path.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        assert [written.write(f"step-00000{step}", [small()]) for step in (1, 2)] == [None, None]
    path = tmp_path / "step-000001-rank0.jsonl"
    (message,) = caplog.messages
    assert message.startswith(f"The disk is full: {path} cannot be written (No space left on device); ")
    assert message.endswith("Until then no trees are logged. Training continues.")
    assert list(tmp_path.iterdir()) == []
    assert only(written.write("step-000003", [small("later")])).prompt == "later"


def test_another_error_of_writing_is_raised(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError):
        log(tmp_path / "file").write("step-000001", [small()])


def test_rate_zero_writes_nothing_not_even_the_folder(tmp_path):
    assert log(tmp_path / "trajectories", rate=0.0).write("step-000000", [small()] * 100) is None
    assert not (tmp_path / "trajectories").exists()


def test_rate_one_writes_every_tree(tmp_path):
    path = log(tmp_path, rate=1.0).write("step-000000", [small(str(i)) for i in range(100)])
    assert path is not None
    assert [tree.prompt for tree in read_trees(path)] == [str(i) for i in range(100)]


def kept(folder: Path, name: str = "step-000000", **settings) -> list[str]:
    path = log(folder, rate=0.3, **settings).write(name, [small(str(i)) for i in range(400)])
    assert path is not None
    return [tree.prompt for tree in read_trees(path)]


def test_in_between_the_share_is_the_rate(tmp_path):
    # 400 draws at 0.3: 120 expected, standard deviation √(400·0.3·0.7) = 9.2, so 70 to 170 is beyond five of them
    assert 70 < len(kept(tmp_path)) < 170


def test_seed_rollout_and_rank_determine_the_logged_trees(tmp_path):
    chosen = kept(tmp_path)
    assert kept(tmp_path) == chosen
    assert kept(tmp_path, seed=1) != chosen
    assert kept(tmp_path, rank=1) != chosen
    assert kept(tmp_path, name="step-000001") != chosen


def broken(**changes) -> str:
    row = {
        "step": 0,
        "group": 0,
        "prompt": "",
        "nodes": [
            {"index": 0, "parent": None, "kind": "root", "ids": [1], "text": ""},
            {"index": 1, "parent": 0, "kind": "turn", "ids": [2], "text": "", "logprobs": [-0.5], "stop": "eos"},
        ],
        "leaves": [{"address": [0], "node": 1, "reward": 0.0, "advantage": 0.0}],
    }
    return json.dumps(row | changes)


def test_the_unbroken_row_is_valid(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text(broken() + "\n")
    assert only(path).tree.nodes[1].ids == [2]


ROOT = {"index": 0, "parent": None, "kind": "root", "ids": [1], "text": ""}
LEAF = {"address": [0], "node": 1, "reward": 0.0, "advantage": 0.0}
TURN = {"index": 1, "parent": 0, "kind": "turn", "ids": [2], "text": "", "logprobs": [-0.5], "stop": "eos"}


@pytest.mark.parametrize(
    "line",
    [
        "null",
        '"text"',
        "[]",
        "{}",
        broken(nodes=[]),
        broken(nodes=[ROOT, 1]),
        broken(nodes=[ROOT, TURN | {"kind": "branch"}]),
        broken(nodes=[ROOT, TURN | {"parent": 9}]),
        broken(nodes=[ROOT, TURN | {"logprobs": []}]),
        broken(nodes=[ROOT, {key: value for key, value in TURN.items() if key != "stop"}]),
        broken(leaves=[{"address": [0], "node": 5, "reward": 0.0, "advantage": 0.0}]),
        broken(leaves=[LEAF | {"node": -1}]),
        broken(leaves=[LEAF, LEAF | {"address": [1]}]),
        broken(nodes=[ROOT, TURN, TURN | {"parent": 1}]),
    ],
)
def test_a_broken_line_names_file_and_line(tmp_path, line):
    path = tmp_path / "log.jsonl"
    path.write_text(f"{broken()}\n{broken()}\n{line}\n")
    with pytest.raises(DataError, match=r"log\.jsonl, line 3: not a logged tree"):
        list(read_trees(path))


def without(node, key):
    return {name: value for name, value in node.items() if name != key}


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (broken(nodes=[ROOT, TURN | {"parent": -1}]), r"nodes\[1\].parent is -1; expected an earlier node"),
        (broken(nodes=[ROOT, TURN | {"parent": 1}]), r"nodes\[1\].parent is 1; expected an earlier node"),  # a cycle
        (broken(nodes=[ROOT, TURN | {"parent": True}]), r"nodes\[1\].parent is True; expected int"),
        (broken(nodes=[ROOT, without(TURN, "text")]), r"nodes\[1\] has no 'text'; it has \["),
        (broken(nodes=[ROOT, TURN | {"text": 5}]), r"nodes\[1\].text is 5; expected str"),
        (broken(nodes=[ROOT, TURN | {"ids": "12"}]), r"nodes\[1\].ids is '12'; expected a list"),
        (broken(nodes=[ROOT, TURN | {"ids": [1.5]}]), r"nodes\[1\].ids\[0\] is 1.5; expected int"),
        (broken(nodes=[ROOT, TURN | {"stop": "never"}]), r"'never' is not a valid StopReason"),
        (broken(nodes=[ROOT, TURN | {"calls": [{}]}]), r"nodes\[1\].calls\[0\] has no 'name'"),
        (broken(leaves=[]), "leaves lacks the end of a path"),
        (broken(leaves=[LEAF | {"reward": "good"}]), r"leaves\[0\].reward is 'good'; expected float \| None"),
        (broken(leaves=[LEAF | {"address": [0, "a"]}]), r"leaves\[0\].address\[1\] is 'a'; expected int"),
        (broken(step="\x1b[2J"), r"the line.step is '\\x1b\[2J'; expected int"),
    ],
)
def test_a_broken_line_names_the_part_too(tmp_path, line, part):
    path = tmp_path / "log.jsonl"
    path.write_text(f"{broken()}\n{line}\n")
    with pytest.raises(DataError, match=rf"log\.jsonl, line 2: not a logged tree: .*{part}"):
        list(read_trees(path))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (broken()[:-20].encode(), "line 2: not valid JSON"),
        (b"[" * 5000 + b"]" * 5000, "line 2: lists and mappings are nested more than 100 deep"),
        (b"\xff\xfe{}", r"line 2 is not UTF-8 text \(byte 0\)"),
    ],
)
def test_a_line_with_invalid_json_is_named(tmp_path, line, message):
    path = tmp_path / "log.jsonl"
    path.write_bytes(f"{broken()}\n".encode() + line + b"\n")
    with pytest.raises(DataError, match=rf"log\.jsonl, {message}"):
        list(read_trees(path))


def test_the_rule_the_answers_and_the_times_of_the_nodes_survive(tmp_path):
    rollout = Scripted(branching, leaves=4, at_root=2)()
    (made,) = logged_trees(
        rollout.trees,
        [1.0] * 4,
        [0.0] * 4,
        step=0,
        first_group=0,
        decode=str,
        rule=Threshold(branch_threshold=0.25),
        answers=[["iron", "Fe"]],
        spans=rollout.spans,
    )
    after = only(log(tmp_path).write("step-000000", [made]))
    assert after.rule == {
        **{"name": "threshold", "branches_per_fork": 1, "branch_probability": 0.5, "entropy_weight": 0.2},
        "branch_threshold": 0.25,
    }
    assert after.answers == ["iron", "Fe"]
    assert set(after.spans) == {node.index for node in after.tree.nodes[1:]}
    for node, (start, end) in after.spans.items():
        assert 0 <= start <= end
        parent = after.tree.nodes[node].parent
        assert not parent or after.spans[parent][1] <= start + 0.0001  # requested once the node above was complete


@pytest.mark.parametrize(("answer", "texts"), [(None, []), ("iron", ["iron"]), (26, ["26"]), (["a", 2], ["a", "2"])])
def test_an_answer_of_any_kind_is_logged_as_texts(answer, texts):
    tree = small().tree
    (made,) = logged_trees([tree], [0.0], [0.0], step=0, first_group=0, decode=str, answers=[answer])
    assert made.answers == texts
