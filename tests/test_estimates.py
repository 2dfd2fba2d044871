import math
import random

import pytest

from arpo_trl.rollout.estimates import DepthEstimates, depth_sums, pooled
from arpo_trl.rollout.tree import ExecutedCall, RolloutTree, StopReason
from arpo_trl.tools.calls import CallSource, ToolFailure


def call(source: CallSource = CallSource.EXECUTED) -> ExecutedCall:
    failure = ToolFailure.BAD_CALL if source is CallSource.REFUSED else None
    return ExecutedCall(name="search", arguments={}, text="", failure=failure, seconds=0.0, source=source)


def tree_of_three() -> RolloutTree:
    """Leaves B and C under one result, and D, which answers at once."""
    tree = RolloutTree([0])
    first = tree.add_turn(0, [1, 1], "", [math.log(0.5)] * 2, [])
    result = tree.add_observation(first.index, [2], [call(), call(CallSource.REFUSED)], "")
    for address, p in (((0,), 0.8), ((0, 1, 0), 0.2)):
        tree.end(tree.add_turn(result.index, [3], "", [math.log(p)], []).index, address, StopReason.EOS)
    tree.end(tree.add_turn(0, [4], "", [math.log(0.9)], []).index, (1,), StopReason.EOS)
    return tree


def estimates(score: list[float], calls: list[float], variance: dict[int, float]) -> DepthEstimates:
    made = DepthEstimates()
    made.load_state_dict(
        {"score": score, "calls": calls, "variance": variance, "leaves": 8, "spent": None, "planned": None}
    )
    return made


def test_sums_are_per_leaf_and_a_path_that_ended_earlier_adds_nothing():
    sums = depth_sums([tree_of_three()], [1.0, 0.0, 0.0])
    assert (sums["trees"], sums["leaves"]) == (1, 3)
    # depth 0: B and C each 2 · (1 − .5)² = .5, D (1 − .9)² = .01; depth 1: (1 − .8)² + (1 − .2)² = .04 + .64
    assert sums["score"] == pytest.approx([1.01, 0.68])
    # the one valid call is on the paths of B and C; the refused one costs nothing
    assert (sums["calls"], sums["made"]) == ([2, 0], 1)
    # B and C part below the result: ½ (1 − 0)²; D parts from them at the root: ½ (1 − 0)² + ½ (0 − 0)²
    assert sums["pairs"] == {0: (0.5, 2), 1: (0.5, 1)}


def test_calls_without_room_for_their_result_are_counted_at_the_end_of_their_turn():
    tree = RolloutTree([0])
    turn = tree.add_turn(0, [1], "", [0.0], [])
    tree.end(turn.index, (0,), StopReason.LENGTH, [call(), call(CallSource.REFUSED)])
    sums = depth_sums([tree], [1.0])
    assert (sums["calls"], sums["made"]) == ([1], 1)


def test_a_leaf_without_a_reward_forms_no_pair():
    # only B and D are left, which part at the root
    assert depth_sums([tree_of_three()], [1.0, math.nan, 0.0])["pairs"] == {0: (0.5, 1)}


def test_averages_start_with_the_first_step_and_then_remember():
    made = DepthEstimates()
    made.update([depth_sums([tree_of_three()], [1.0, 0.0, 0.0])], memory=0.75, share=0.5)
    assert made.score == pytest.approx([1.01 / 3, 0.68 / 3])
    assert made.calls == pytest.approx([2 / 3, 0])
    assert made.variance == {0: 0.25, 1: 0.5}
    # v_0: ½ (1 + 1) / 2 = .5, so .75 · .25 + .25 · .5; v_1: 0, so .75 · .5
    made.update([depth_sums([tree_of_three()], [1.0, 1.0, 0.0])], memory=0.75, share=0.5)
    assert made.variance == pytest.approx({0: 0.3125, 1: 0.375})


def test_ranks_together_are_one_batch():
    apart, together = DepthEstimates(), DepthEstimates()
    apart.update([depth_sums([tree_of_three()], [1.0, 0.0, 0.0]), depth_sums([tree_of_three()], [0.0] * 3)], 0.8, 0.5)
    together.update([depth_sums([tree_of_three(), tree_of_three()], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0])], 0.8, 0.5)
    assert apart.score == pytest.approx(together.score)
    assert (apart.calls, apart.variance, apart.leaves) == (together.calls, together.variance, 3)


def test_variance_shares_widths_and_gains_are_those_worked_out_by_hand():
    made = estimates([1.0, 2.0], [1.0, 0.5], {0: 0.2, 1: 0.15})
    # δ² = .05, .15 (v_2 = 0); b² = 0, .05; a = 1·0 + .05·1 = .05 and 2·.05 + .15·(1 + 2) = .55
    assert made.variance_shares() == pytest.approx([0.05, 0.55])
    # η = .6 · 1.5 / (√.05 + √.275)² = .9 / (.05 + .275 + 2 · √.01375) = .9 / .559521
    assert made.gain() == pytest.approx(0.9 / 0.559521, rel=1e-5)
    # budget .5 · 8 · 1.5 = 6 = 1 · n_0 + .5 · 8 with n_1 at its limit of 8: n_0 = 2
    assert made.widths(8, 0.5) == pytest.approx([2.0, 8.0])
    # variance .05 / 2 + .55 / 8 = .09375 for 6 calls; 6 calls are 6 / 1.5 = 4 independent paths: .6 / 4 = .15
    assert made.gain_of([2.0, 8.0]) == pytest.approx(0.15 / 0.09375)


def test_widths_are_in_the_ratio_of_the_roots_while_no_limit_binds():
    # v = .4, .3, .1 and 0: δ² = .1, .2, .1; b² = 0, .1, .3; S = 1: a = .1, .1 + .2·2 = .5, .3 + .1·3 = .6
    made = estimates([1.0, 1.0, 1.0], [0.4, 0.5, 0.0], {0: 0.4, 1: 0.3, 2: 0.1})
    assert made.variance_shares() == pytest.approx([0.1, 0.5, 0.6])
    # ratios √(a/c): .5, 1, free. budget ⅓ · 8 · .9 = 2.4 = .4 · .5s + .5 · s = .7 s
    assert made.widths(8, 1 / 3) == pytest.approx([0.5 * 2.4 / 0.7, 2.4 / 0.7, 8.0])


def test_a_depth_without_forks_lies_between_its_neighbours():
    made = estimates([1.0, 1.0, 1.0], [1.0, 1.0, 0.0], {0: 0.3, 2: 0.1})
    # v_1 = .2: δ² = .1 each; b² = 0, .1, .2; a = .1, .1 + .1·2, .2 + .1·3
    assert made.variance_shares() == pytest.approx([0.1, 0.3, 0.5])


def test_where_width_would_fall_depths_are_pooled_and_branching_gains_nothing():
    assert pooled([4.0, 1.0], [1.0, 4.0]) == [(5.0, 5.0, 2)]
    assert pooled([1.0, 3.0, 1.0], [1.0, 1.0, 1.0]) == [(1.0, 1.0, 1), (4.0, 2.0, 2)]
    made = estimates([1.0, 0.01], [0.0, 1.0], {0: 0.2, 1: 0.0})
    # δ² = .2, 0; b² = 0, .2: a = .2, .01·.2 = .002. Late calls, early variance: one block, η = 1
    assert made.variance_shares() == pytest.approx([0.2, 0.002])
    assert made.gain() == pytest.approx(1.0)
    assert made.widths(8, 0.5) == pytest.approx([4.0, 8.0])


def test_without_variance_there_is_nothing_to_say():
    empty, equal = DepthEstimates(), estimates([1.0, 1.0], [1.0, 0.0], {0: 0.0, 1: 0.0})
    no_pair = estimates([1.0, 1.0], [1.0, 0.0], {})  # no two leaves of a group have a reward
    for made in (empty, equal, no_pair):
        assert made.gain() is None
        assert made.widths(8, 0.5) is None
        assert made.gain_of([2.0, 8.0]) is None


@pytest.mark.parametrize(
    ("score", "calls", "variance", "expected"),
    [
        # without calls all depths are free, as after a step of malformed calls
        ([1.0, 2.0], [0.0, 0.0], {0: 0.2, 1: 0.15}, [8.0, 8.0]),
        ([0.0, 1.0, 2.0], [0.0, 0.0, 0.0], {0: 0.2, 1: 0.2, 2: 0.1}, [8.0, 8.0, 8.0]),
        # a = 0, .45 + .15: depth 0 has no share and depth 1 no cost
        ([0.0, 3.0], [0.5, 0.0], {0: 0.2, 1: 0.2}, [1.0, 8.0]),
        # depth 0 has neither, so it joins depth 1: √(.6 / 1) · scale = .5 · 8 calls
        ([0.0, 3.0], [0.0, 1.0], {0: 0.2, 1: 0.2}, [4.0, 8.0]),
    ],
)
def test_depths_without_calls_have_finite_widths(score, calls, variance, expected):
    assert estimates(score, calls, variance).widths(8, 0.5) == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(50))
def test_widths_never_decrease_and_are_between_1_and_m(seed):
    draws = random.Random(seed)
    depths = draws.randint(1, 6)
    score, calls = ([draws.choice([0.0, 0.0, draws.random()]) for _ in range(depths)] for _ in range(2))
    made = estimates(score, calls, {m: draws.choice([0.0, draws.random()]) for m in range(depths)})
    widths = made.widths(8, 0.5)
    if widths is not None:
        assert widths == sorted(widths) and widths[0] >= 1 and widths[-1] == 8
        assert not math.isnan(made.gain_of(widths) or 0.0)
