import math

import torch

from arpo_trl.training.reward_guard import total_rewards


def test_the_total_weights_applicable_rewards_and_is_nan_without_any():
    # 1 · 0.5 + 2 · 3 = 6.5; a NaN counts nothing, 2 · 3 = 6
    rewards = torch.tensor([[0.5, 3.0], [math.nan, 3.0], [math.nan, math.nan]])
    totals = total_rewards(rewards, torch.tensor([1.0, 2.0])).tolist()
    assert totals[:2] == [6.5, 6.0]
    assert math.isnan(totals[2])
