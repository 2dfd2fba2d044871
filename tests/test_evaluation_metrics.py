import math
import random

import pytest

from arpo_trl.evaluation.metrics import bootstrap, majority, mcnemar, paired_bootstrap, pass_at_k


@pytest.mark.parametrize(
    ("scores", "k", "expected"),
    [
        ([1, 0, 0, 0], 1, 1 / 4),
        ([1, 0, 0, 0], 2, 1 / 2),  # 1 − C(3,2)/C(4,2) = 1 − 3/6
        ([1, 0, 0, 1], 2, 5 / 6),  # 1 − C(2,2)/C(4,2) = 1 − 1/6
        ([0, 1, 1, 1], 2, 1.0),  # any two hold a right one
        ([0, 0], 2, 0.0),
        ([1.0], 1, 1.0),
        ([0.2, 0.8, 0.5], 1, 0.5),  # the mean
        ([0.2, 0.8, 0.5], 2, 0.7),  # best of the three pairs: 0.8, 0.5, 0.8
        ([0.2, 0.8, 0.5], 3, 0.8),  # the maximum
    ],
)
def test_pass_at_k_is_the_expected_best_of_k(scores, k, expected):
    assert pass_at_k(scores, k) == pytest.approx(expected)


def test_pass_at_k_is_the_published_formula_for_zeros_and_ones():
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                published = 1 - math.comb(n - c, k) / math.comb(n, k)
                assert pass_at_k([1.0] * c + [0.0] * (n - c), k) == pytest.approx(published)


@pytest.mark.parametrize("k", [0, 3])
def test_pass_at_k_needs_k_samples(k):
    with pytest.raises(ValueError, match=f"k is {k} with 2 samples"):
        pass_at_k([1, 0], k)


@pytest.mark.parametrize(
    ("predictions", "winner"),
    [
        (["a", "b", "B"], 1),
        (["a", "b", "b", "a"], 0),  # as many: the earliest
        ([None, None, "c"], 2),  # who says nothing does not vote
        ([None, ""], None),
        ([], None),
    ],
)
def test_the_majority_is_the_answer_that_most_samples_gave(predictions, winner):
    assert majority(predictions, lambda x, y: x.lower() == y.lower()) == winner


def test_the_majority_compares_only_different_texts():
    compared = []

    def same(x, y):
        compared.append((x, y))
        return x.lower() == y.lower()

    assert majority(["a", "b", "B"] * 50, same) == 1
    assert compared == [("a", "b"), ("a", "B"), ("b", "B")]


def test_the_bootstrap_interval_is_that_of_the_binomial_for_many_questions():
    estimate = bootstrap([1.0] * 400 + [0.0] * 600, seed=0)
    half = 1.96 * math.sqrt(0.4 * 0.6 / 1000)  # 0.030
    assert estimate.mean == 0.4
    assert estimate.low == pytest.approx(0.4 - half, abs=0.003)
    assert estimate.high == pytest.approx(0.4 + half, abs=0.003)


def test_the_bootstrap_repeats_with_its_seed_and_is_a_point_where_nothing_varies():
    draw = random.Random(0)
    scores = [draw.random() for _ in range(50)]
    assert bootstrap(scores, 1) == bootstrap(scores, 1) != bootstrap(scores, 2)
    for flat in ([1.0], [0.5] * 30):
        estimate = bootstrap(flat, 0)
        assert estimate.mean == estimate.low == estimate.high == flat[0]


def test_a_paired_difference_is_surer_than_the_scores_it_is_between():
    # B is right wherever A is and on 20 of 100 more: the pairs vary by 0.04, the scores by 0.05 each.
    a, b = [1.0] * 40 + [0.0] * 60, [1.0] * 60 + [0.0] * 40
    difference = paired_bootstrap(a, b, seed=0)
    assert difference.mean == pytest.approx(0.2)
    half = 1.96 * math.sqrt(0.2 * 0.8 / 100)
    assert difference.low == pytest.approx(0.2 - half, abs=0.02)
    assert difference.high == pytest.approx(0.2 + half, abs=0.02)
    assert difference.p < 0.001


def test_runs_that_do_not_differ_have_p_one():
    difference = paired_bootstrap([1, 0, 1], [1, 0, 1], seed=0)
    assert (difference.mean, difference.low, difference.high, difference.p) == (0, 0, 0, 1)


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (0, 0, 1.0),
        (0, 5, 2 / 32),  # both ends of five coins
        (1, 5, 2 * 7 / 64),  # C(6,0) + C(6,1) = 7
        (3, 3, 1.0),
    ],
)
def test_mcnemar_is_the_exact_binomial_test_on_disagreements(only_a, only_b, p):
    a = [True] * only_a + [False] * only_b + [True, False]
    b = [False] * only_a + [True] * only_b + [True, False]
    result = mcnemar(a, b)
    assert (result.only_a, result.only_b) == (only_a, only_b)
    assert result.p == pytest.approx(p)
