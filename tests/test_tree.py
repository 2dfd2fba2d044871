import pytest

from arpo_trl.errors import EngineError
from arpo_trl.rollout.tree import ExecutedCall, NodeKind, RolloutTree, StopReason, address_text
from arpo_trl.tools.calls import CallSource, ToolFailure

CALL = ExecutedCall(
    name="search", arguments={"query": "iron"}, text="a metal", failure=None, seconds=0.1, source=CallSource.EXECUTED
)


def small_tree() -> RolloutTree:
    """Two leaves that share a turn and its observation.

    # node:   0 0 | 1 1 | 2 | 3        ids of leaf (0,):      10 11 | 20 | 30
    #         0 0 | 1 1 | 2 | 4 4      ids of leaf (0, 1, 0): 10 11 | 20 | 40 41
    """
    tree = RolloutTree([1, 2])
    turn = tree.add_turn(0, [10, 11], "<search>iron</search>", [-0.1, -0.2], [0.5, 0.25])
    seen = tree.add_observation(turn.index, [20], [CALL], "a metal")
    first = tree.add_turn(seen.index, [30], "yes", [-0.3], [0.1])
    second = tree.add_turn(seen.index, [40, 41], "no", [-0.4, -0.5], [0.2])
    tree.end(second.index, (0, 1, 0), StopReason.LENGTH)
    tree.end(first.index, (0,), StopReason.EOS)
    return tree


def test_each_node_stores_only_the_tokens_it_adds():
    tree = small_tree()
    assert [node.ids for node in tree.nodes] == [[1, 2], [10, 11], [20], [30], [40, 41]]
    assert tree.ids_to(2) == [1, 2, 10, 11, 20]
    assert tree.ids_to(0) == [1, 2]


def test_a_leaf_is_a_view_of_its_path():
    first, second = small_tree().leaves()
    assert (first.address, second.address) == ((0,), (0, 1, 0))  # by address, not by who ended first
    assert (first.ids, second.ids) == ([10, 11, 20, 30], [10, 11, 20, 40, 41])
    assert second.mask == [1, 1, 0, 1, 1]
    assert second.logprobs == [-0.1, -0.2, 0.0, -0.4, -0.5]
    assert second.token_nodes == [1, 1, 2, 4, 4]
    assert second.turns == ["<search>iron</search>", "no"]
    assert second.calls == [CALL]
    assert (first.stop, second.stop) == (StopReason.EOS, StopReason.LENGTH)


def test_a_node_is_written_by_the_path_whose_branches_share_it():
    assert small_tree().writers() == {1: (0,), 2: (0,), 3: (0,), 4: (0, 1, 0)}
    assert address_text((0, 1, 0)) == "0,1,0"


def test_a_finished_tree_has_exactly_its_leaves():
    tree = small_tree()
    tree.check(2)
    for wrong in (1, 3):
        with pytest.raises(EngineError, match="2 distinct leaves"):
            tree.check(wrong)


def test_two_addresses_cannot_end_in_one_node():
    tree = small_tree()
    tree.end(3, (1,), StopReason.EOS)
    with pytest.raises(EngineError, match="2 distinct leaves; expected 3"):
        tree.check(3)


def test_a_turn_never_splits():
    tree = small_tree()
    tree.add_observation(1, [21], [CALL], "again")
    with pytest.raises(EngineError, match="has 2 children; expected at most one"):
        tree.check(2)


def test_kinds_alternate_along_a_path():
    tree = small_tree()
    tree.add_turn(3, [50], "more", [-0.1], [])
    with pytest.raises(EngineError, match="is a turn under a turn"):
        tree.check(2)


def test_a_turn_has_a_logprob_for_each_of_its_tokens_and_at_least_one():
    tree = RolloutTree([1])
    with pytest.raises(EngineError, match="2 tokens with 1 logprobs"):
        tree.add_turn(0, [10, 11], "", [-0.1], [])
    tree.end(tree.add_turn(0, [], "", [], []).index, (0,), StopReason.EOS)
    with pytest.raises(EngineError, match="has no tokens"):
        tree.check(1)


def test_a_failed_call_is_not_ok_and_rows_are_plain():
    failed = ExecutedCall(
        name="python",
        arguments={"code": "1/0"},
        text="ZeroDivisionError",
        failure=ToolFailure.ERROR,
        seconds=0.2,
        source=CallSource.EXECUTED,
    )
    assert (CALL.ok, failed.ok) == (True, False)
    assert failed.as_row() == {
        "name": "python",
        "arguments": {"code": "1/0"},
        "text": "ZeroDivisionError",
        "ok": False,
        "failure": "error",
        "seconds": 0.2,
        "source": "executed",
    }


def test_nodes_differ_by_kind():
    tree = small_tree()
    assert [node.kind for node in tree.nodes[:3]] == [NodeKind.ROOT, NodeKind.TURN, NodeKind.OBSERVATION]
    assert [node.index for node in tree.turns()] == [1, 3, 4]
    assert [node.index for node in tree.observations()] == [2]
