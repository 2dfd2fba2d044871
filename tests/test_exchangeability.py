import math
from collections import Counter
from dataclasses import replace

import pytest

from arpo_trl.logs.metrics import Tally, tally_step
from arpo_trl.rollout.batch import RolloutBatch, RolloutTimes, SampledGroup
from arpo_trl.rollout.tree import Address, ExecutedCall, RolloutTree, StopReason
from arpo_trl.tools.calls import CallSource
from support import ANSWER

TIMES = RolloutTimes(total_s=10.0, forward_s=6.0, tool_wait_s=2.0, sync_s=1.5)
NAN = math.nan


class Growing:
    """A tree that grows call by call."""

    def __init__(self) -> None:
        self.tree = RolloutTree([0])

    def calls(self, parent: int, query: str, name: str = "search") -> int:
        """A turn under `parent` with a call, and its result, whose index is returned."""
        call = ExecutedCall(
            name=name,
            arguments={"query": query},
            text=f"facts about {query}",
            failure=None,
            seconds=0.0,
            source=CallSource.EXECUTED,
        )
        turn = self.tree.add_turn(parent, [1], "words", [-0.5], [0.1])
        return self.tree.add_observation(turn.index, [2], [call], call.text).index

    def ends(self, parent: int, *address: int) -> None:
        self.tree.end(self.tree.add_turn(parent, [1], ANSWER, [-0.5], [0.1]).index, Address(address), StopReason.EOS)


def forked() -> RolloutTree:
    """Five leaves; the branches at the first result end before the path that was there first.

    root ── turn ── iron ──┬─ turn                        (0, 1, 1)
                           ├─ turn                        (0, 1, 0)
                           └─ turn ── python ──┬─ turn    (0,)
                                               └─ turn    (0, 2, 0)
         ── turn ── gold ──── turn                        (1,)
    """
    grown = Growing()
    iron = grown.calls(0, "iron")
    grown.ends(iron, 0, 1, 1)
    grown.ends(iron, 0, 1, 0)
    computed = grown.calls(iron, "1", "python")
    grown.ends(computed, 0)
    grown.ends(computed, 0, 2, 0)
    grown.ends(grown.calls(0, "gold"), 1)
    grown.tree.check(5)
    return grown.tree


def counted(*groups: tuple[RolloutTree, list[float]]) -> Tally:
    trees = [tree for tree, _ in groups]
    sampled = [SampledGroup(tree=tree, turns_in_sequence=3) for tree in trees]
    rollout = RolloutBatch(groups=sampled, times=TIMES)
    return tally_step(rollout, [reward for _, rewards in groups for reward in rewards], {})


def exchange(*groups: tuple[RolloutTree, list[float]]) -> dict[str, float]:
    values = counted(*groups).values()
    return {name.removeprefix("exchange/"): value for name, value in values.items() if name.startswith("exchange/")}


def test_every_metric_of_a_small_tree_equals_the_value_by_hand():
    # Leaves in order of address: (0,) 1.0, (0, 1, 0) 0.5, (0, 1, 1) 0.0, (0, 2, 0) 0.0, (1,) 1.0
    values = exchange((forked(), [1.0, 0.5, 0.0, 0.0, 1.0]))
    assert values == pytest.approx(
        {
            "forks": 2,
            "forks_depth_1": 1,
            "forks_depth_2": 1,
            "forks_after_search": 1,
            "forks_after_python": 1,
            # At the first result the incumbent's leaves are (0,) and (0, 2, 0), mean 0.5, against fresh means of 0.5
            # and 0; at the second 1 against 0.
            "selected_minus_fresh": ((0.5 - 0.25) + (1.0 - 0.0)) / 2,
            "fresh_minus_fresh": 0.5 - 0.0,
            # Pairs that part at the first result: (1, .5) (0, .5) (1, 0) (0, 0) (.5, 0), squares .25 .25 1 0 .25,
            # half their mean 1.75 / 10; at the second (1, 0): 1 / 2.
            "variance_below_forks": (0.175 + 0.5) / 2,
            # Within the first turn's four leaves 1 .5 0 0: squares .25 1 1 .25 .25 0, half their mean 2.75 / 12.
            # Between them and the 1 of the other: 0 .25 1 1, half their mean 2.25 / 8.
            "intraclass_correlation": 1 - (2.75 / 12) / (2.25 / 8),
            # four leaves have three others each, the fifth has none
            "leaves_sharing_a_root_turn": 12 / 5,
            "effective_leaves": 5 / (1 + (1 - (2.75 / 12) / (2.25 / 8)) * 12 / 5),
        }
    )


def test_ratios_of_several_ranks_are_those_of_all_their_trees():
    one, two = (forked(), [1.0, 0.5, 0.0, 0.0, 1.0]), (forked(), [0.0, 0.0, 0.0, 1.0, 1.0])
    merged = Tally.merged([counted(one).plain(), counted(two).plain()]).values()
    assert {name: value for name, value in merged.items() if name.startswith("exchange/")} == pytest.approx(
        {f"exchange/{name}": value for name, value in exchange(one, two).items()}
    )
    # The second tree: within (0, 0, 0, 1) half the mean square is 3 / 12, between it and 1 it is 3 / 8.
    within, between = 2.75 / 12 + 3 / 12, 2.25 / 8 + 3 / 8
    correlation = 1 - within / between
    assert merged["exchange/intraclass_correlation"] == pytest.approx(correlation)
    assert merged["exchange/effective_leaves"] == pytest.approx(5 / (1 + correlation * 12 / 5))


def test_fresh_branches_are_compared_in_the_order_of_their_addresses():
    # at the first result (0, 1, 0) with .75 against (0, 1, 1) with .25
    assert exchange((forked(), [1.0, 0.75, 0.25, 0.0, 1.0]))["fresh_minus_fresh"] == 0.5


def test_leaves_of_one_first_turn_with_equal_rewards_count_once():
    grown = Growing()
    for i in range(2):
        result = grown.calls(0, str(i))
        grown.ends(result, i)
        grown.ends(result, i, 1, 0)
    values = exchange((grown.tree, [0.0, 0.0, 1.0, 1.0]))
    # within 0, between 1 / 2: ρ = 1; each leaf has one other: 4 / (1 + 1)
    assert values["intraclass_correlation"] == 1
    assert values["effective_leaves"] == 2


def test_effective_leaves_are_at_most_the_leaves():
    grown = Growing()
    for i in range(2):
        result = grown.calls(0, str(i))
        grown.ends(result, i)
        grown.ends(result, i, 1, 0)
    values = exchange((grown.tree, [0.0, 1.0, 0.0, 1.0]))
    # within 1 / 2, between (0, 0) (0, 1) (1, 0) (1, 1) 1 / 4: ρ = −1 by chance
    assert values["intraclass_correlation"] == -1
    assert values["effective_leaves"] == 4


def test_paths_with_equal_calls_and_results_stand_in_for_a_node_without_a_fork():
    grown = Growing()
    for i, query in enumerate(["iron", "iron", "iron", "gold"]):
        grown.ends(grown.calls(0, query), i)
    # Three paths search for iron, with rewards 1 0 1: half the mean of the squares 1 0 1. Gold has one path.
    assert exchange((grown.tree, [1.0, 0.0, 1.0, 0.0])) == pytest.approx({"variance_below_random": 1 / 3})


def test_histories_are_equal_call_by_call_at_any_depth():
    reads = []

    class Counted(dict):
        def items(self):
            reads.append(self)
            return super().items()

    grown = Growing()
    for i, last in enumerate(["iron", "iron", "gold"]):
        result = 0
        for query in (*"abcd", last):
            result = grown.calls(result, query)
            call = grown.tree.nodes[result].calls[0]
            grown.tree.nodes[result].calls[0] = replace(call, arguments=Counted(call.arguments))
        grown.ends(result, i)
    # At each of four depths (1, 0, 0) have mean squares 2 / 6, and at the fifth (1, 0) has 1 / 2.
    assert exchange((grown.tree, [1.0, 0.0, 0.0])) == pytest.approx({"variance_below_random": (4 / 3 + 1 / 2) / 5})
    assert len(set(Counter(map(id, reads)).values())) == 1  # no call is read once for each result below it
    several = Growing()
    for i, turns in enumerate([["a", "b"], ["ab"]]):  # two calls in two turns, or in one
        result = 0
        for queries in turns:
            made = several.calls(result, queries[0])
            several.tree.nodes[made].calls += [
                replace(several.tree.nodes[made].calls[0], arguments={"query": query}, text=f"facts about {query}")
                for query in queries[1:]
            ]
            result = made
        several.ends(result, i)
    assert exchange((several.tree, [1.0, 0.0])) == {"variance_below_random": 0.5}


@pytest.mark.parametrize("rewards", [[1.0, 0.0], [NAN, NAN]])
def test_no_metric_is_logged_if_nothing_branches_and_no_path_repeats_another(rewards):
    grown = Growing()
    for i in range(2):
        grown.ends(grown.calls(0, str(i)), i)
    assert exchange((grown.tree, rewards)) == {}


def test_without_rewards_only_the_places_of_forks_are_counted():
    assert exchange((forked(), [NAN] * 5)) == {
        "forks": 2,
        "forks_after_python": 1,
        "forks_after_search": 1,
        "forks_depth_1": 1,
        "forks_depth_2": 1,
    }


def test_the_incumbent_is_the_path_that_came_first_also_if_its_own_leaf_has_no_reward():
    # The incumbent's leaves are (0,), without a reward, and (0, 2, 0) with .5; the fresh ones have 1 and 0.
    values = exchange((forked(), [math.nan, 1.0, 0.0, 0.5, 1.0]))
    assert values["selected_minus_fresh"] == pytest.approx(0.5 - 0.5)
    assert values["fresh_minus_fresh"] == pytest.approx(1.0 - 0.0)


def test_leaves_without_a_reward_are_left_out():
    # Without (0,) and (0, 1, 1): below the first result the incumbent's only leaf is (0, 2, 0), but one of the fresh
    # ones has none, and below the second the incumbent has none, so nothing is compared.
    values = exchange((forked(), [NAN, 0.5, NAN, 0.0, 1.0]))
    assert "selected_minus_fresh" not in values and "fresh_minus_fresh" not in values
    assert values["variance_below_forks"] == pytest.approx(0.25 / 2)  # 0 and .5
    # within 0 and .5: 1 / 8; between them and 1: (1 + 1 / 4) / 4
    assert values["intraclass_correlation"] == pytest.approx(1 - (1 / 8) / (5 / 16))
    assert all(math.isfinite(value) for value in values.values())


def test_equal_rewards_have_no_correlation():
    values = exchange((forked(), [1.0] * 5))
    assert "intraclass_correlation" not in values and "effective_leaves" not in values
    assert (values["selected_minus_fresh"], values["variance_below_forks"]) == (0, 0)
