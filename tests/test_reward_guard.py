import asyncio
import functools
import math
import os
import signal
import subprocess
import threading
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
import torch

from arpo_trl.errors import Interrupted, RewardError
from arpo_trl.rewards.hierarchical import HierarchicalReward
from arpo_trl.runs.interrupts import Interrupts
from arpo_trl.training.reward_guard import REWARD_POLL_S, checked_reward, named_apart, total_rewards
from support import until


def test_the_total_weights_applicable_rewards_and_is_nan_without_any():
    # 1 · 0.5 + 2 · 3 = 6.5; a NaN counts nothing, 2 · 3 = 6
    rewards = torch.tensor([[0.5, 3.0], [math.nan, 3.0], [math.nan, math.nan]])
    totals = total_rewards(rewards, torch.tensor([1.0, 2.0])).tolist()
    assert totals[:2] == [6.5, 6.0]
    assert math.isnan(totals[2])


def test_a_wrapped_function_has_the_file_and_the_name_by_which_a_checkpoint_knows_it():
    interrupts = Interrupts()
    assert checked_reward(total_rewards, interrupts).origin == "reward_guard.py:total_rewards"
    hierarchical = checked_reward(HierarchicalReward("paper_f1", bonus_tools=["lookup"]), interrupts)
    assert hierarchical.origin == "hierarchical.py:hierarchical"
    settings = {"accuracy": "paper_f1", "multi_tool_bonus": 0.1, "bonus_tools": ["lookup"], "judge_model": None}
    assert hierarchical.reward_settings == settings
    assert checked_reward(eval("lambda completions: 0"), interrupts).origin == "<lambda>"


def test_names_of_rewards_are_distinct_and_the_first_keeps_its_own():
    functions = [checked_reward(lambda completions: [], Interrupts()) for _ in range(4)]
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

    interrupts = Interrupts()
    given = {"completions": ["x", "y"], "environments": [None, None]}
    assert checked_reward(best, interrupts)(**given) == [None, None]
    assert asyncio.run(checked_reward(best_async, interrupts)(**given)) == [None, None]


def test_an_awaitable_that_a_sync_function_returns_is_awaited():
    def decorated(function):
        return functools.wraps(function)(lambda **columns: function(**columns))

    @decorated
    async def scores(completions):
        await asyncio.sleep(0)
        return [len(text) for text in completions]

    @decorated
    async def fails(completions):
        raise ValueError("no such gold")

    interrupts = Interrupts()
    assert checked_reward(scores, interrupts)(completions=["x", "yy"]) == [1, 2]
    with pytest.raises(RewardError, match="'fails' raised ValueError: no such gold"):
        checked_reward(fails, interrupts)(completions=["x"])


def test_the_place_of_an_error_is_the_innermost_line_of_the_users_code(tmp_path, monkeypatch):
    (tmp_path / "own_scores.py").write_text("import json\n\ndef read(text):\n    return json.loads(text)\n")
    monkeypatch.syspath_prepend(tmp_path)
    from own_scores import read

    def scores(completions):
        return [read(text) for text in completions]

    with pytest.raises(RewardError, match=r"'scores' raised JSONDecodeError: .* \(.*own_scores.py, line 4\)"):
        checked_reward(scores, Interrupts())(completions=["{"])


def test_an_error_before_an_async_function_awaits_names_the_function():
    async def scores(completions, *, gold):
        return [0.0]

    with pytest.raises(RewardError, match="scores"):
        asyncio.run(checked_reward(scores, Interrupts())(completions=["x"]))


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("result", [subprocess.CalledProcessError(-signal.SIGINT, "tests"), math.nan])
def test_a_function_that_fails_because_ctrl_c_ended_its_program_gives_placeholders(is_async, result):
    """Outside the main thread, as with rollouts_ahead: nothing interrupts the function itself."""

    def scores(completions):
        os.kill(os.getpid(), signal.SIGINT)
        until(lambda: interrupts.told is not None)
        if isinstance(result, Exception):
            raise result
        return [result]

    async def scores_async(completions):
        return scores(completions)

    def call() -> None:
        got.append(asyncio.run(checked(completions=["x"])) if is_async else checked(completions=["x"]))

    interrupts, got = Interrupts(), []
    checked = checked_reward(scores_async if is_async else scores, interrupts)
    with interrupts.listening():
        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
    assert got == [[0.0]]


def test_after_an_interrupted_training_an_async_function_is_waited_for():
    async def scores(completions):
        await asyncio.sleep(2 * REWARD_POLL_S)
        return [1.0]

    interrupts = Interrupts()
    with pytest.raises(Interrupted), interrupts.listening():
        os.kill(os.getpid(), signal.SIGTERM)
        until(lambda: interrupts.told is not None)
        interrupts.check()
    assert asyncio.run(checked_reward(scores, interrupts)(completions=["x"])) == [1.0]


@pytest.mark.parametrize(
    ("values", "logged"),
    [
        ([np.float32(0.5), torch.tensor(2)], [0.5, 2]),
        ([np.str_("a"), None], ["a", None]),
        ([datetime(2026, 1, 2), Path("x")], ["2026-01-02 00:00:00", "x"]),
        ([1, "b"], ["1", "b"]),
        ([["a"], ["b"]], [["a"], ["b"]]),
        (np.array([1, 2]), [1, 2]),
    ],
)
def test_columns_of_log_extra_become_plain_data_that_a_checkpoint_and_a_table_can_hold(values, logged):
    def reward(completions, log_extra):
        log_extra("seen", values)
        return [0.0, 0.0]

    found = {}
    interrupts = Interrupts()
    checked_reward(reward, interrupts)(completions=["x", "y"], log_extra=found.__setitem__)
    assert found == {"seen": logged} and [type(value) for value in found["seen"]] == [type(each) for each in logged]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda log_metric, log_extra: log_metric("m", "text"),
            "'reward' logged 'text' as the metric 'm'; expected a nu",
        ),
        (
            lambda log_metric, log_extra: log_extra("c", [1]),
            "'reward' passed 1 values to log_extra for the column 'c' a",
        ),
        (lambda log_metric, log_extra: log_extra("c", "ab"), "'reward' passed 'ab' to log_extra"),
    ],
)
def test_a_wrong_log_names_the_reward_function(call, message):
    def reward(completions, log_metric, log_extra):
        call(log_metric, log_extra)
        return [0.0, 0.0]

    interrupts = Interrupts()
    functions = {"log_metric": {}.__setitem__, "log_extra": {}.__setitem__}
    with pytest.raises(RewardError, match=message):
        checked_reward(reward, interrupts)(completions=["x", "y"], **functions)


@pytest.mark.parametrize("first", [None, ["b"]])
def test_a_function_that_changes_a_list_of_a_row_changes_its_own_copy(first):
    def spoils(completions, gold):
        gold[1].append("spoiled")
        return [0.0] * len(completions)

    gold = [first, ["a"]]
    interrupts = Interrupts()
    assert checked_reward(spoils, interrupts)(completions=["x", "y"], gold=gold) == [0.0, 0.0]
    assert gold == [first, ["a"]]
