import math

import pytest

from arpo_trl.rollout.branching import BranchBudget, BranchDecision, BranchPolicy, BranchRule


def decision(delta: float, *, fires: bool = True, entropy: float = 0.0) -> BranchDecision:
    return BranchDecision(entropy, delta, 0.5, fires)


def test_delta_is_the_difference_of_mean_entropies_over_ln_v():
    # mean(2, 4) − mean(1, 1) = 2; ln e² = 2; ΔH = 1; P = 0.5 + 0.2 · 1
    made = BranchPolicy().decide([2.0, 4.0], [1.0, 1.0], vocab_size=100, coin=0.9)
    assert made.entropy_nats == 3.0
    assert made.delta == pytest.approx(2 / math.log(100))
    assert made.probability == pytest.approx(0.5 + 0.2 * 2 / math.log(100))


@pytest.mark.parametrize(("turn", "fires"), [(1.0001, True), (1.0, False), (0.9, False)])
def test_threshold_with_the_published_settings_says_that_entropy_rose(turn, fires):
    assert BranchPolicy().decide([turn], [1.0], vocab_size=10, coin=0.0).fires is fires


def test_threshold_ignores_the_coin_and_may_exceed_one():
    policy = BranchPolicy(probability=0.9, entropy_weight=1.0, threshold=1.0)
    # ΔH = ln 10 / ln 10 = 1; P = 0.9 + 1 = 1.9 > 1
    assert policy.decide([math.log(10)], [0.0], 10, coin=0.999).probability == pytest.approx(1.9)


@pytest.mark.parametrize(("coin", "fires"), [(0.69, True), (0.71, False)])
def test_probability_is_a_coin_with_p(coin, fires):
    # ΔH = 1, P = 0.5 + 0.2 = 0.7
    policy = BranchPolicy(BranchRule.PROBABILITY)
    assert policy.decide([math.log(10)], [0.0], 10, coin).fires is fires


@pytest.mark.parametrize("entropy", [0.0, 2.0])
def test_random_is_blind_to_entropy(entropy):
    policy = BranchPolicy(BranchRule.RANDOM)
    assert policy.decide([entropy], [1.0], 10, coin=0.49).fires
    assert not policy.decide([entropy], [1.0], 10, coin=0.51).fires


def test_probabilities_of_coins_are_clipped():
    policy = BranchPolicy(BranchRule.PROBABILITY, entropy_weight=100.0)
    assert policy.decide([2.0], [0.0], 10, coin=0.999).probability == 1.0
    assert policy.decide([0.0], [2.0], 10, coin=0.0).probability == 0.0
    assert not policy.decide([0.0], [2.0], 10, coin=0.0).fires


def test_released_sums_entropies_so_that_short_segments_look_confident():
    # sums: 1 · 0.5 − 4 · 0.5 = −1.5, though the means are equal
    made = BranchPolicy(BranchRule.RELEASED).decide([0.5], [0.5] * 4, vocab_size=10, coin=0.0)
    assert made.delta == pytest.approx(-1.5 / math.log(10))


def test_a_ranked_decision_never_fires_by_itself():
    assert not BranchPolicy(BranchRule.RANKED, probability=1.0).decide([9.0], [0.0], 10, coin=0.0).fires


def test_the_budget_goes_to_the_highest_delta_first():
    budget = BranchBudget(2, branches_per_fork=1)
    served = budget.serve([decision(0.1), decision(0.3), decision(0.9, fires=False), decision(0.2)])
    assert [made.granted for made in served] == [0, 1, 0, 1]
    assert budget.remaining == 0


def test_ties_go_to_the_earlier_decision_and_a_fork_takes_what_is_left():
    budget = BranchBudget(3, branches_per_fork=2)
    assert [made.granted for made in budget.serve([decision(0.1), decision(0.1)])] == [2, 1]


def test_ranked_serves_the_highest_entropies_whatever_their_delta():
    budget = BranchBudget(2, branches_per_fork=1)
    ranked = budget.rank([decision(0.9, entropy=0.1), decision(-0.5, entropy=2.0), decision(0.0, entropy=1.0)])
    assert [made.granted for made in ranked] == [0, 1, 1]
    assert [made.fires for made in ranked] == [False, True, True]


def test_nothing_is_topped_up_while_branches_can_still_take_the_budget():
    # one path with 2 results to come: (1 + 1)² − 1 = 3 ≥ 3
    assert BranchBudget(3, 1).top_up([2]) == 0
    assert BranchBudget(3, 1).top_up([1 << 30]) == 0


def test_what_branches_cannot_take_is_topped_up_at_once():
    # two paths, one result each: 2 of 5 can branch, 3 cannot
    budget = BranchBudget(5, 1)
    assert budget.top_up([1, 1]) == 3
    assert budget.remaining == 2
    assert budget.top_up([]) == 2
    assert budget.top_up([]) == 0


def test_every_extra_turn_per_fork_raises_what_branches_can_take():
    # Z = 2, one result to come: 3¹ − 1 = 2 of 5
    assert BranchBudget(5, 2).top_up([1]) == 3
