"""Rollouts that run during the update, on a scripted engine; tests/test_vllm_ahead.py does the same on a server."""

import threading

import pytest

from ahead_run import make_trainer
from support import save_tiny_model


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def losses(made) -> list[dict]:
    return [row for row in made.state.log_history if "loss" in row]


def test_the_next_rollout_runs_while_the_update_does(model_path, tmp_path):
    updating, sampled = threading.Event(), threading.Event()
    made = make_trainer(model_path, tmp_path, max_steps=3)

    def holds(request):
        """The answers of batch 1 come during the first update."""
        if request.key[0] // 2 == 1 and request.key[-1] == 1 and updating.is_set():
            sampled.set()
        return request.key[0] // 2 == 1 and not updating.is_set()

    made.tree_sampler.engine.holds = holds
    compute = made.compute_loss

    def compute_loss(*args, **kwargs):
        updating.set()
        assert sampled.wait(20.0)
        return compute(*args, **kwargs)

    made.compute_loss = compute_loss
    made.train()
    assert [row["arpo/ahead/staleness_max"] for row in losses(made)] == [0.0, 1.0, 1.0]
    assert [row["arpo/ahead/staleness_mean"] for row in losses(made)] == [0.0, 1.0, 1.0]
