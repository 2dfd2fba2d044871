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


def estimates(
    score: list[float], calls: list[float], variance: dict[int, float], ends: list[float] | None = None
) -> DepthEstimates:
    """Without `ends` all paths end at the last depth."""
    made = DepthEstimates()
    ends = ends or [0.0] * (len(score) - 1) + [1.0]
    made.load_state_dict(
        {"score": score, "calls": calls, "ends": ends, "variance": variance, "leaves": 8, "made": None}
    )
    return made


def test_sums_are_per_planned_path_and_a_path_that_ended_earlier_adds_nothing():
    sums = depth_sums([tree_of_three()], [1.0, 0.0, 0.0])
    assert (sums["trees"], sums["leaves"]) == (1, 3)
    # two planned paths at the root: D weighs ½, B and C, which share the other one, ¼ each
    # depth 0: ½ · 2 · (1 − .5)² + ½ · (1 − .9)²; depth 1: ¼ (1 − .8)² + ¼ (1 − .2)²
    assert sums["score"] == pytest.approx([0.255, 0.17])
    # the valid call is on half of the paths; the refused one costs nothing
    assert (sums["calls"], sums["ends"], sums["made"]) == ([0.5, 0.0], [0.5, 0.5], 1)
    # B and C part below the result: ½ (1 − 0)²; D parts from them at the root: ½ (1 − 0)² + ½ (0 − 0)²
    assert sums["pairs"] == {0: (0.5, 2), 1: (0.5, 1)}


def test_a_path_that_was_added_at_the_root_forms_pairs_only():
    tree = tree_of_three()
    tree.topups = 1
    sums = depth_sums([tree], [1.0, 0.0, 0.0])
    # only B and C were planned
    assert (sums["calls"], sums["ends"], sums["made"]) == ([1.0, 0.0], [0.0, 1.0], 1)
    assert sums["score"] == pytest.approx([0.5, 0.34])
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
    assert made.calls_share is None
    made.update([depth_sums([tree_of_three()], [1.0, 0.0, 0.0])], memory=0.75)
    assert made.score == pytest.approx([0.255, 0.17])
    assert (made.calls, made.ends, made.variance) == ([0.5, 0.0], [0.5, 0.5], {0: 0.25, 1: 0.5})
    # one call; three independent paths make 3 · ½
    assert made.calls_share == pytest.approx(1 / 1.5)
    # v_0: ½ (1 + 1) / 2 = .5, so .75 · .25 + .25 · .5; v_1: 0, so .75 · .5
    tree = tree_of_three()
    tree.topups = 1
    made.update([depth_sums([tree], [1.0, 1.0, 0.0])], memory=0.75)
    assert made.variance == pytest.approx({0: 0.3125, 1: 0.375})
    # c_0: .75 · .5 + .25 · 1; e_0: .75 · .5 + .25 · 0; one call again
    assert (made.calls, made.ends) == ([0.625, 0.0], [0.375, 0.625])
    assert made.calls_share == pytest.approx(1 / 1.875)


def test_ranks_together_are_one_batch():
    apart, together = DepthEstimates(), DepthEstimates()
    apart.update([depth_sums([tree_of_three()], [1.0, 0.0, 0.0]), depth_sums([tree_of_three()], [0.0] * 3)], 0.8)
    together.update([depth_sums([tree_of_three(), tree_of_three()], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0])], 0.8)
    assert apart.score == pytest.approx(together.score)
    assert (apart.calls, apart.variance, apart.leaves) == (together.calls, together.variance, 3)


def test_variance_shares_widths_and_gains_are_those_worked_out_by_hand():
    made = estimates([1.0, 2.0], [1.0, 0.5], {0: 0.2, 1: 0.15})
    # δ² = .05, .15 (v_2 = 0); b² = 0, .05; a = 1·0 + .05·1 = .05 and 2·.05 + .15·(1 + 2) = .55
    assert made.variance_shares() == pytest.approx([0.05, 0.55])
    # n = (8x, 8): (.05 / x + .55)(x + .5) is least at x = √(.025 / .55) = .2132: .325 + 2 · √(.025 · .55) = .559521
    assert made.gain() == pytest.approx(0.9 / 0.559521, rel=1e-3)
    # budget .5 · 8 · 1.5 = 6 = 1 · n_0 + .5 · 8 with n_1 at its limit of 8: n_0 = 2
    assert made.widths(8, 0.5) == pytest.approx([2.0, 8.0])
    # variance .05 / 2 + .55 / 8 = .09375 for 6 calls; 6 calls are 6 / 1.5 = 4 independent paths: .6 / 4 = .15
    assert made.gain_of([2.0, 8.0]) == pytest.approx(0.15 / 0.09375)


def test_calls_include_the_paths_that_replace_unsplit_shares():
    # e = .25, .25, .5 and calls .75, .5, 0: C = 1.25
    made = estimates([1.0, 1.0, 1.0], [0.75, 0.5, 0.0], {0: 0.4, 1: 0.3, 2: 0.1}, [0.25, 0.25, 0.5])
    # widths 2, 4, 8: .75 · 2 + .5 · 4 = 3.5 calls; .25 · (8 − 2) + .25 · (8 − 4) = 2.5 leaves start at the root
    assert made.restarts([2.0, 4.0, 8.0], 8.0) == 2.5
    assert made.calls_of([2.0, 4.0, 8.0], 8.0) == 3.5 + 2.5 * 1.25
    # one path until all have ended, and seven others: the calls of independent paths, and their variance
    assert made.calls_of([8.0, 8.0, 8.0], 8.0) == 10.0
    # g = .75 − .3125, .5 − .3125, −.625. 10 − .4375 · 6 − .1875 · 4 is the same
    assert made.costs() == pytest.approx([0.4375, 0.1875, -0.625])
    assert made.calls_of([2.0, 4.0, 8.0], 8.0) == pytest.approx(10 - 0.4375 * 6 - 0.1875 * 4)
    # a = .1, .5, .6; ρ = 2.5 / 8: .6875 · (.1 / 2 + .5 / 4 + .6 / 8) + .3125 · 1.2 / 8 = .171875 + .046875
    assert made.gain_of([2.0, 4.0, 8.0]) == pytest.approx(1.2 * 1.25 / (0.21875 * 6.625))
    assert made.gain_of([8.0]) == pytest.approx(1.0)
    # ratios √(.1 / .4375) = .4781 and √(.5 / .1875) = 1.6330. T = 7: 2 = (.4375 · .4781 + .1875 · 1.6330) · 3.8808
    assert made.widths(8, 0.7) == pytest.approx([0.4781 * 3.8808, 1.6330 * 3.8808, 8.0], rel=1e-4)
    # the fewest calls, 10 − 7 · .625 = 5.625, have one path until depth 2: half the calls are not possible
    assert made.widths(8, 0.5) == pytest.approx([1.0, 1.0, 8.0])


def test_widths_may_be_deeper_than_all_paths_so_far():
    # All paths end after one result, when M = 6 leaves have 3 paths: e_1 · (6 − 3) = 3 leaves start at the root.
    made = estimates([1.0, 1.0], [1.0, 0.0], {0: 0.25, 1: 0.2}, [0.0, 1.0])
    # a = .05, .05 + .4: ρ = ½, V = ½ · (.05 / 1 + .45 / 3) + ½ · .5 / 6, T = 1 + 3
    variance = (0.05 + 0.15) / 2 + 0.5 / 12
    assert made.gain_of([1.0, 3.0, 6.0]) == pytest.approx(0.5 / (variance * 4))


def test_all_is_split_before_the_depth_at_which_paths_end():
    # at depth 1 one more segment saves more restarts, .9 · 1.1 calls, than it costs; all is split there
    made = estimates([1.0, 1.0, 1.0], [1.0, 0.1, 0.0], {0: 0.4, 1: 0.3, 2: 0.1}, [0.0, 0.9, 0.1])
    assert made.costs() == pytest.approx([1.0, -0.89, -0.11])
    # 4.4 = 8.8 − (8 − n_0)
    assert made.widths(8, 0.5) == pytest.approx([3.6, 8.0, 8.0])


def test_where_most_paths_end_at_once_independent_paths_are_best():
    # nine of ten paths answer without a call: a path has C = .1, all at depth 0, and g_0 = .1 − .1 · .9 = .01
    made = estimates([1.0, 1.0], [0.1, 0.0], {0: 0.2, 1: 0.02}, [0.9, 0.1])
    assert made.calls_of([1.0, 8.0], 8.0) == pytest.approx(0.8 - 7 * 0.01)
    assert made.gain() == pytest.approx(1.0)


def test_widths_are_in_the_ratio_of_the_roots_while_no_limit_binds():
    # v = .4, .3, .1 and 0: δ² = .1, .2, .1; b² = 0, .1, .3; S = 1: a = .1, .1 + .2·2 = .5, .3 + .1·3 = .6
    made = estimates([1.0, 1.0, 1.0], [0.4, 0.5, 0.0], {0: 0.4, 1: 0.3, 2: 0.1})
    assert made.variance_shares() == pytest.approx([0.1, 0.5, 0.6])
    assert made.costs() == pytest.approx([0.4, 0.5, -0.9])  # the last: 0 − .9 · 1
    # ratios √(a/g): .5, 1, ∞. budget ⅓ · 8 · .9 = 2.4 = .4 · .5s + .5 · s = .7 s
    assert made.widths(8, 1 / 3) == pytest.approx([0.5 * 2.4 / 0.7, 2.4 / 0.7, 8.0])


def test_a_depth_without_forks_lies_between_its_neighbours():
    made = estimates([1.0, 1.0, 1.0], [1.0, 1.0, 0.0], {0: 0.3, 2: 0.1})
    # v_1 = .2: δ² = .1 each; b² = 0, .1, .2; a = .1, .1 + .1·2, .2 + .1·3
    assert made.variance_shares() == pytest.approx([0.1, 0.3, 0.5])


def test_where_width_would_fall_depths_are_pooled_and_branching_gains_nothing():
    assert pooled([4.0, 1.0], [1.0, 4.0]) == [1.0, 1.0]
    assert pooled([1.0, 3.0, 1.0], [1.0, 1.0, 1.0]) == [1.0, 2.0, 2.0]
    assert pooled([1.0, 3.0, 1.0], [1.0, -2.0, 1.0]) == [1.0, math.inf, math.inf]
    assert pooled([1.0, 1.0, 1.0], [0.1, 0.2, -0.3]) == [pytest.approx(2 / 0.3)] * 2 + [math.inf]
    made = estimates([1.0, 0.01], [0.0, 1.0], {0: 0.2, 1: 0.0})
    # δ² = .2, 0; b² = 0, .2: a = .2, .01·.2 = .002. Late calls, early variance: one block, η = 1
    assert made.variance_shares() == pytest.approx([0.2, 0.002])
    assert made.gain() == pytest.approx(1.0)
    # no widths save calls: all leaves make the last one
    assert made.widths(8, 0.5) == pytest.approx([8.0, 8.0])


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
        # depth 0 has neither, and all leaves make the calls of depth 1
        ([0.0, 3.0], [0.0, 1.0], {0: 0.2, 1: 0.2}, [8.0, 8.0]),
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
