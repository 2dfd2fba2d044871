import math
from types import SimpleNamespace

import torch

from arpo_trl.runs.resumable import _origin
from arpo_trl.training.reward_guard import checked_reward, total_rewards


def test_the_total_weights_applicable_rewards_and_is_nan_without_any():
    # 1 · 0.5 + 2 · 3 = 6.5; a NaN counts nothing, 2 · 3 = 6
    rewards = torch.tensor([[0.5, 3.0], [math.nan, 3.0], [math.nan, math.nan]])
    totals = total_rewards(rewards, torch.tensor([1.0, 2.0])).tolist()
    assert totals[:2] == [6.5, 6.0]
    assert math.isnan(totals[2])


def test_a_wrapped_function_keeps_the_module_by_which_a_checkpoint_knows_it():
    wrapped = checked_reward(total_rewards, SimpleNamespace(told=None))
    assert _origin(wrapped) == "arpo_trl.training.reward_guard.total_rewards"
    assert _origin(torch.nn.Linear(1, 1)) == "Linear"
