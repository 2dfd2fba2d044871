"""Environments of batches that are sampled during the update (`rollouts_ahead`)."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from ahead_run import ROWS, make_trainer
from arpo_trl import ARPOTrainer
from arpo_trl.errors import ConfigError, Interrupted, RewardError
from arpo_trl.logs.trajectories import read_trees
from arpo_trl.rollout.engines.scripted import ScriptedTurn
from basket import Basket
from support import save_tiny_model, until

OPENED: list[Any] = []
CLOSED: Counter[int] = Counter()
NAMES = ROWS.remove_columns("answer").add_column("name", [f"n{i}" for i in range(len(ROWS))])


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


class Cart(Basket):
    """What was put into it, after the name of its row."""

    copyable = True

    def __init__(self) -> None:
        OPENED.append(self)

    def __deepcopy__(self, memo: Any) -> Cart:
        made = type(self)()
        made.items = list(self.items)
        return made

    def close(self) -> None:
        CLOSED[id(self)] += 1


def buys(request: Any, context: str) -> ScriptedTurn:
    """Each path puts its address twice and answers; entropy rises after the first call."""
    *address, depth = request.key[1:]
    return ScriptedTurn(
        text="so" if depth == 2 else f"<put>{'/'.join(map(str, address))}</put>", entropies=[[0.5, 1.0, 0.1][depth]]
    )


def counts(environments: Any, tool_calls: Any, prompts: Any, name: Any) -> list[float]:
    """Also checks that each completion has the environment of its own calls, which is not closed."""
    assert len({id(each) for each in environments}) == len(environments)
    for environment, calls, prompt, row in zip(environments, tool_calls, prompts, name, strict=True):
        assert environment.items == [row] + [call["arguments"]["item"] for call in calls]
        assert prompt.endswith(f" in {row}") and not CLOSED[id(environment)]
    return [float(len(set(environment.items))) for environment in environments]


def trainer(model_path: str, folder: Path, kind: Any = Cart, **settings: Any) -> ARPOTrainer:
    given = {"train_dataset": NAMES, "reward_funcs": counts, "environment_factory": kind, **settings}
    made = make_trainer(model_path, folder, buys, initial_rollouts=2, max_completion_length=200, **given)
    OPENED.clear()  # without those that were looked at
    CLOSED.clear()
    return made


def all_closed(made: ARPOTrainer) -> bool:
    assert made._environments is not None
    return made._environments.instances.live == 0 and Counter(map(id, OPENED)) == CLOSED


@pytest.mark.slow
def test_environments_of_the_next_batch_are_created_during_the_update(model_path, tmp_path):
    updating = threading.Event()
    sampled: list[Any] = []

    class Slow(Cart):
        def reset(self, name: str, **row: Any) -> str:
            if name in ("n0", "n1"):  # the rows of the first batch
                time.sleep(0.4)
            else:
                assert updating.wait(60.0)
            return super().reset(name)

    def counted(environments: Any, tool_calls: Any, prompts: Any, name: Any) -> list[float]:
        sampled.append(name)
        return counts(environments, tool_calls, prompts, name)

    settings = {"max_steps": 3, "environment_concurrency": 16, "shuffle_dataset": False}
    made = trainer(model_path, tmp_path, Slow, reward_funcs=counted, **settings)
    compute = made.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> Any:
        """Each update but the last takes until the next batch is sampled."""
        updating.set()
        until(lambda: len(sampled) >= min(3, made.state.global_step + 2))
        return compute(*args, **kwargs)

    made.compute_loss = compute_loss
    made.train()
    logged = [log for log in made.state.log_history if "loss" in log]
    assert [log["arpo/ahead/staleness_max"] for log in logged] == [0.0, 1.0, 1.0]
    assert logged[0]["arpo/ahead/update_waited_s"] > 0.4
    # 3 batches of 2 groups: 2 paths each from the prompt, and 2 branches, which are copies
    assert sum(log["arpo/environments/resets"] for log in logged) == 12
    assert sum(log["arpo/environments/forks"] for log in logged) >= 12
    assert max(log["arpo/environments/live_max"] for log in logged) <= 16
    assert all(leaf.address in {(0,), (1,), (0, 1, 0), (1, 1, 0)} for leaf in made._last.rollout.leaves)
    assert all_closed(made)


def test_environments_that_no_reward_reads_stay_within_their_limit(model_path, tmp_path):
    def one(completions):
        return [1.0] * len(completions)

    # 3 batches at the same time, with 2 groups each
    with pytest.raises(ConfigError, match=r"is 5, but 3 rollouts \(rollouts_ahead\) have 6 prompts. .* at least 6"):
        trainer(model_path, tmp_path, reward_funcs=one, rollouts_ahead=2, environment_concurrency=5)
    made = trainer(model_path, tmp_path, reward_funcs=one, rollouts_ahead=2, environment_concurrency=6)
    made.train()
    assert max(log.get("arpo/environments/live_max", 0) for log in made.state.log_history) <= 6
    assert all_closed(made)


def test_too_little_room_for_the_rewards_is_an_error_at_the_start(model_path, tmp_path):
    with pytest.raises(ConfigError, match=r"is 15, but 2 rollouts \(rollouts_ahead\) have 16 completions"):
        trainer(model_path, tmp_path, environment_concurrency=15)


def test_an_evaluation_waits_for_the_environments_of_the_rollouts(model_path, tmp_path):
    seen = []

    class OnEvaluate(TrainerCallback):
        def on_evaluate(self, *_: Any, **__: Any) -> None:
            seen.append(made._environments.instances.live)

    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    made = trainer(model_path, tmp_path, max_steps=2, eval_dataset=NAMES.select([3]), **evaluation)
    made.add_callback(OnEvaluate())
    made.train()
    assert seen == [0, 0] and all_closed(made)


def test_an_evaluation_opens_no_environment_while_a_rollout_runs_ahead(model_path, tmp_path):
    overlaps = []

    class Slow(Cart):
        def reset(self, name: str, **row: Any) -> str:
            if name == "evaluated" and made._ahead is not None:
                overlaps.append(made._ahead._live)
            time.sleep(0.2)  # so that the rollout outlasts the update
            return super().reset(name)

    evaluation = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    rows = NAMES.select([3]).remove_columns("name").add_column("name", ["evaluated"])
    made = trainer(model_path, tmp_path, Slow, max_steps=2, eval_dataset=rows, **evaluation)
    made.train()
    assert overlaps and not any(overlaps)
    assert [row["eval_reward"] for row in made.state.log_history if "eval_reward" in row] == [2.0, 2.0]
    assert all_closed(made)


class Stops(TrainerCallback):
    def __init__(self, error: type[BaseException]):
        self.error = error

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 1:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_stopped_run_closes_all_environments(model_path, tmp_path, error):
    made = trainer(model_path, tmp_path, rollouts_ahead=2)
    made.add_callback(Stops(error))
    with pytest.raises(error):
        made.train()
    assert OPENED and all_closed(made)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("arpo-rollouts-ahead")]


def test_a_failing_reward_or_reset_stops_the_run_and_all_environments_are_closed(model_path, tmp_path):
    class Broken(Cart):
        def reset(self, name: str, **row: Any) -> str:
            if len({each.items[0] for each in OPENED if hasattr(each, "items")}) > 3:
                raise OSError("sold out")
            return super().reset(name)

    def raises(environments):
        raise RuntimeError("broken")

    made = trainer(model_path, tmp_path / "reset", Broken)
    with pytest.raises(ConfigError, match="Broken could not be created for a row in 3 attempts: OSError: sold out"):
        made.train()
    assert all_closed(made)
    made = trainer(model_path, tmp_path / "reward", reward_funcs=raises)
    with pytest.raises(RewardError, match="'raises' raised RuntimeError: broken"):
        made.train()
    assert all_closed(made)


@pytest.mark.slow
def test_a_stopped_run_resumes_with_the_same_rows_and_environments(model_path, tmp_path):
    class StopsOnce(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 2:
                os.kill(os.getpid(), signal.SIGTERM)

    def trained(folder: Path, *, stops: bool = False) -> list[tuple[int, str, list[float | None]]]:
        saved = {"max_steps": 5, "save_strategy": "steps", "save_steps": 1}
        made = trainer(model_path, folder, rollouts_ahead=2, **saved)
        if stops:
            made.add_callback(StopsOnce())
            with pytest.raises(Interrupted):
                made.train()
            assert all_closed(made)
            made = trainer(model_path, folder, rollouts_ahead=2, **saved)
        made.train(resume_from_checkpoint=True)
        assert all_closed(made)
        files = sorted((folder / "trajectories").glob("step-*"))
        return [(tree.step, tree.prompt, tree.rewards) for file in files for tree in read_trees(file)]

    assert trained(tmp_path / "stopped", stops=True) == trained(tmp_path / "plain")
