"""Weights of engines: the allowed difference of logprobs."""

from arpo_trl.rollout.engines.weights import mean_difference


def test_mean_difference_is_per_token_and_in_deviations_where_logprobs_vary_by_more_than_a_nat():
    assert mean_difference([-1.0, -2.0], [-1.5, -2.5]) == 0.5
    assert mean_difference([-1.0, -5.0], [-1.5, -5.5]) == 0.25  # they deviate by 2 nats
