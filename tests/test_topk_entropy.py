import math

import pytest
import torch

from arpo_trl.rollout.engines.topk_entropy import entropy_from_top_k


def logs(*probabilities: float) -> list[float]:
    return [math.log(p) for p in probabilities]


def test_with_every_outcome_known_the_entropy_is_exact():
    # −(0.5 ln 0.5 + 2 · 0.25 ln 0.25) = 1.5 ln 2
    estimate = entropy_from_top_k(logs(0.25, 0.5, 0.25), 3)
    assert estimate.nats == pytest.approx(1.5 * math.log(2))
    assert estimate.error == 0.0


def test_a_tail_without_mass_adds_nothing():
    estimate = entropy_from_top_k(logs(0.5, 0.5), 1000)
    assert (estimate.nats, estimate.error) == (pytest.approx(math.log(2)), 0.0)


def test_the_tail_estimate_is_the_middle_of_the_possible_range():
    # Seen: 0.4 and 0.2. Tail: 0.4 over 4 outcomes of at most 0.2 each.
    # Most: 0.4 ln(4 / 0.4) = 0.4 ln 10. Least: two of 0.2, −0.4 ln 0.2 = 0.4 ln 5. Middle: 0.2 (ln 10 + ln 5).
    estimate = entropy_from_top_k(logs(0.4, 0.2), 6)
    head = -0.4 * math.log(0.4) - 0.2 * math.log(0.2)
    assert estimate.nats == pytest.approx(head + 0.2 * (math.log(10) + math.log(5)))
    assert estimate.error == pytest.approx(0.2 * (math.log(10) - math.log(5)))


def test_what_does_not_fill_an_outcome_up_to_the_last_seen_goes_to_one_more():
    # Seen: 0.5 and 0.2. Tail: 0.3 = one of 0.2 and one of 0.1 at the least, spread over 3 at the most.
    estimate = entropy_from_top_k(logs(0.5, 0.2), 5)
    head = -0.5 * math.log(0.5) - 0.2 * math.log(0.2)
    lowest = -0.2 * math.log(0.2) - 0.1 * math.log(0.1)
    highest = 0.3 * math.log(3 / 0.3)
    assert estimate.nats == pytest.approx(head + (lowest + highest) / 2)
    assert estimate.error == pytest.approx((highest - lowest) / 2)


def test_a_uniform_distribution_is_read_exactly_from_any_part_of_it():
    # the tail can be nothing else than uniform: least and most are one
    estimate = entropy_from_top_k(logs(*[0.01] * 7), 100)
    assert estimate.nats == pytest.approx(math.log(100))
    assert estimate.error == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize("impossible", [-math.inf, -9999.0])
def test_outcomes_that_sampling_has_ruled_out_leave_no_tail(impossible):
    estimate = entropy_from_top_k([*logs(0.5, 0.4999999), impossible], 1000)
    assert estimate.nats == pytest.approx(math.log(2))
    assert estimate.error == 0.0


def test_logprobs_that_sum_to_more_than_one_by_rounding_leave_no_tail():
    assert entropy_from_top_k([math.log(1.0000001)], 1000).error == 0.0


@pytest.mark.parametrize("k", [1, 5, 20, 200])
@pytest.mark.parametrize("sharpness", [0.0, 1.0, 3.0, 10.0])
def test_the_exact_entropy_of_a_softmax_lies_within_the_bound(k, sharpness):
    logits = sharpness * torch.randn(50, 1000, dtype=torch.float64)
    logprobs = logits.log_softmax(-1)
    exact = -(logprobs.exp() * logprobs).sum(-1)
    errors = []
    for row, expected in zip(logprobs, exact.tolist(), strict=True):
        estimate = entropy_from_top_k(row.topk(k).values.tolist(), 1000)
        assert abs(estimate.nats - expected) <= estimate.error + 1e-9
        errors.append(estimate.error)
    assert max(errors) <= math.log(1000) / 2


def test_more_logprobs_never_widen_the_bound():
    logprobs = (3 * torch.randn(1000, dtype=torch.float64)).log_softmax(-1)
    errors = [entropy_from_top_k(logprobs.topk(k).values.tolist(), 1000).error for k in (1, 2, 5, 10, 50, 200, 999)]
    assert errors == sorted(errors, reverse=True)
