import asyncio
import math
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from arpo_trl.errors import RewardError
from arpo_trl.rewards.hierarchical import HierarchicalReward
from arpo_trl.training.reward_guard import checked_reward, named_apart, total_rewards


def test_the_total_weights_applicable_rewards_and_is_nan_without_any():
    # 1 · 0.5 + 2 · 3 = 6.5; a NaN counts nothing, 2 · 3 = 6
    rewards = torch.tensor([[0.5, 3.0], [math.nan, 3.0], [math.nan, math.nan]])
    totals = total_rewards(rewards, torch.tensor([1.0, 2.0])).tolist()
    assert totals[:2] == [6.5, 6.0]
    assert math.isnan(totals[2])


def test_a_wrapped_function_has_the_file_and_the_name_by_which_a_checkpoint_knows_it():
    interrupts = SimpleNamespace(told=None)
    assert checked_reward(total_rewards, interrupts).origin == "reward_guard.py:total_rewards"
    assert checked_reward(HierarchicalReward(), interrupts).origin == "hierarchical.py:hierarchical"
    assert checked_reward(eval("lambda completions: 0"), interrupts).origin == "<lambda>"


def test_names_of_rewards_are_distinct_and_the_first_keeps_its_own():
    functions = [checked_reward(lambda completions: [], SimpleNamespace(told=None)) for _ in range(4)]
    names = ["reward", "reward", "reward_2", "reward"]
    assert named_apart(functions, names) == ["reward", "reward_3", "reward_2", "reward_4"]
    assert [function.__name__ for function in functions] == ["reward", "reward_3", "reward_2", "reward_4"]
    model = torch.nn.Identity()
    assert named_apart([model, model], ["judge", "judge"]) == ["judge", "judge_2"]


def test_a_function_that_reads_environments_is_not_called_without_one():
    def best(completions, environments):
        return [environment.score / max(each.score for each in environments) for environment in environments]

    async def best_async(completions, environments):
        return best(completions, environments)

    interrupts = SimpleNamespace(told=None, raising=nullcontext)
    given = {"completions": ["x", "y"], "environments": [None, None]}
    assert checked_reward(best, interrupts)(**given) == [None, None]
    assert asyncio.run(checked_reward(best_async, interrupts)(**given)) == [None, None]


def test_an_error_before_an_async_function_awaits_names_the_function():
    async def scores(completions, *, gold):
        return [0.0]

    interrupts = SimpleNamespace(told=None, raising=nullcontext)
    with pytest.raises(RewardError, match="scores"):
        asyncio.run(checked_reward(scores, interrupts)(completions=["x"]))


@pytest.mark.parametrize("first", [None, ["b"]])
def test_a_function_that_changes_a_list_of_a_row_changes_its_own_copy(first):
    def spoils(completions, gold):
        gold[1].append("spoiled")
        return [0.0] * len(completions)

    gold = [first, ["a"]]
    interrupts = SimpleNamespace(told=None, raising=nullcontext)
    assert checked_reward(spoils, interrupts)(completions=["x", "y"], gold=gold) == [0.0, 0.0]
    assert gold == [first, ["a"]]
