"""Weights of engines: the allowed difference of logprobs, and the folder for servers."""

from accelerate import Accelerator

from arpo_trl.rollout.engines.vllm.weights import DiskTransfer
from arpo_trl.rollout.engines.weights import mean_difference
from support import A_SERVER, tiny_model, tokenizer


def test_mean_difference_is_per_token_and_in_deviations_where_logprobs_vary_by_more_than_a_nat():
    assert mean_difference([-1.0, -2.0], [-1.5, -2.5]) == 0.5
    assert mean_difference([-1.0, -5.0], [-1.5, -5.5]) == 0.25  # they deviate by 2 nats


def test_weights_for_servers_replace_older_ones_and_those_that_killed_runs_began(tmp_path):
    for name in ("arpo-ab12-3", "arpo-ab12-4.partial-0f", "arpo-notes", "mine.partial"):
        (tmp_path / name).mkdir()
    DiskTransfer(tiny_model(), Accelerator(cpu=True), tokenizer(), tmp_path, [A_SERVER]).prepare("arpo-cd34-0")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arpo-cd34-0", "arpo-notes", "mine.partial"]
