"""`ARPOTrainer` with an `environment_factory`: prompts, branches, rewards, metrics, logs, resuming.

tests/test_from_grpo.py compares it with TRL's own use of environments.
"""

from __future__ import annotations

import itertools
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.errors import ConfigError, DataError, RewardError, ToolSpecError
from arpo_trl.logs.trajectories import read_trees
from arpo_trl.rollout.engines.base import SamplingParams
from arpo_trl.rollout.engines.scripted import ScriptedEngine, ScriptedTurn
from basket import Basket
from support import ANSWER, ON_CPU, save_tiny_model, search, tokenizer

ROWS = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": "what is the answer"}], "name": name} for name in "abcd"]
)
OPENED: list[Any] = []
CLOSED: Counter[int] = Counter()


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def counted() -> None:
    OPENED.clear()
    CLOSED.clear()


class Shop(Basket):
    """A cart whose reward is the number of different items."""

    def __init__(self) -> None:
        OPENED.append(self)
        self.items: list[str] = []

    def describe(self) -> str:
        return "\n".join(self.items)

    def get_reward(self) -> float:
        assert not CLOSED[id(self)]
        return float(len(set(self.items)))

    def close(self) -> None:
        CLOSED[id(self)] += 1


def buys(request: Any, context: str) -> ScriptedTurn:
    """Each path puts its address, then its depth, and answers; entropy rises after the first call."""
    *address, depth = request.key[1:]
    text = [f"<put>{'/'.join(map(str, address))}</put>", f"<put>{len(address)}</put>", ANSWER][depth]
    return ScriptedTurn(text=text, entropies=[[0.5, 1.0, 0.1][depth]])


def trainer(model_path: str, folder: Path, *, kind: Any = Shop, rewards: Any = None, **given: Any) -> ARPOTrainer:
    settings = {
        "num_generations": 4,
        "per_device_train_batch_size": 8,
        "max_completion_length": 120,
        "max_steps": 1,
        "save_strategy": "no",
        "rollout_schedule": "rounds",
        "trajectory_log_rate": 1.0,
        **ON_CPU,
        **given.pop("settings", {}),
    }
    eos = tokenizer().eos_token_id
    engine = ScriptedEngine(tokenizer(), SamplingParams(eos_ids=(eos,), stop_strings=("</put>",)), buys)
    return ARPOTrainer(
        model_path,
        rewards,
        ARPOConfig(str(folder), **settings),
        ROWS,
        environment_factory=kind,
        engine=engine,
        tools=[search],
        **given,
    )


def test_branches_train_with_environments_of_their_own(model_path, tmp_path):
    seen: dict[str, Any] = {}

    def distinct(environments, completions, prompts, name):
        seen.update(environments=list(environments), prompts=prompts, name=name, closed=CLOSED.total())
        return [float(len(environment.items)) for environment in environments]

    made = trainer(model_path, tmp_path, rewards=distinct)
    OPENED.clear()
    CLOSED.clear()
    made.train()
    assert len({id(each) for each in seen["environments"]}) == 8
    leaves = made._last.rollout.leaves
    for environment, leaf, name in zip(seen["environments"], leaves, seen["name"], strict=True):
        assert environment.items == [name] + [call.arguments["item"] for call in leaf.calls]
    # N = 2 of M = 4, and each path branches once: (0,), (0, 1, 0), (1,), (1, 1, 0), which puts its parent's address
    assert [leaf.address for leaf in leaves[:4]] == [(0,), (0, 1, 0), (1,), (1, 1, 0)]
    assert [environment.items[1:] for environment in seen["environments"][:4]] == [
        ["0", "1"], ["0", "3"], ["1", "1"], ["1", "3"]
    ]  # fmt: skip
    assert [prompt[-1]["content"] for prompt in seen["prompts"]] == [
        f"what is the answer in {name}" for name in seen["name"]
    ]
    assert seen["closed"] == 0 and Counter(map(id, OPENED)) == CLOSED
    assert made.environments is None and made._environments.instances.live == 0

    log = made.state.log_history[0]
    # Two groups of two paths and two branches, each replayed on an instance of its own
    assert log["arpo/environments/resets"] == 8 and log["arpo/environments/replays"] == 4
    assert log["arpo/environments/forks"] == log["arpo/environments/refused_forks"] == 0
    assert log["arpo/environments/failed"] == 0 and log["arpo/environments/live_max"] == 8
    assert log["arpo/environments/replay_s"] >= 0 and log["arpo/environments/reset_s"] >= 0
    # Items of the four leaves: a 0 1, a 0 3, a 1 1, a 1 3
    assert log["rewards/Shop/mean"] == pytest.approx((3 + 3 + 2 + 3) / 4)
    assert log["reward"] == pytest.approx(3 + (3 + 3 + 2 + 3) / 4)
    (path,) = (tmp_path / "trajectories").iterdir()
    calls = [call for tree in read_trees(path) for leaf in tree.tree.leaves() for call in leaf.calls]
    assert calls[0].changed == "+ 0"


def test_a_reward_that_raises_leaves_no_environment_open(model_path, tmp_path):
    def breaks(environments):
        raise RuntimeError("broken")

    made = trainer(model_path, tmp_path, rewards=breaks)
    with pytest.raises(RewardError, match="'breaks' raised RuntimeError: broken"):
        made.train()
    assert Counter(map(id, OPENED)) == CLOSED and made._environments.instances.live == 0


def test_environments_that_no_reward_reads_are_closed_with_their_paths(model_path, tmp_path):
    class Plain(Shop):
        get_reward = None  # type: ignore[assignment]

    made = trainer(
        model_path,
        tmp_path,
        kind=Plain,
        rewards=lambda completions: [1.0] * len(completions),
        settings={"environment_concurrency": 3},
    )
    made.train()
    assert made.state.log_history[0]["arpo/environments/live_max"] <= 3
    assert Counter(map(id, OPENED)) == CLOSED


def test_too_little_room_is_an_error_at_the_start(model_path, tmp_path):
    with pytest.raises(
        ConfigError, match=r"environment_concurrency is 7, but a rollout has 8 completions. .* least 8"
    ):
        trainer(model_path, tmp_path, settings={"environment_concurrency": 7})


def test_a_class_that_cannot_fork_trains_without_branches_with_a_warning(model_path, tmp_path, caplog):
    class Final(Shop):
        replayable = False

    with caplog.at_level(logging.WARNING):
        made = trainer(model_path, tmp_path, kind=Final)
    assert "The environment Final has no fork(), is not copyable and not replayable" in caplog.text
    made.train()
    assert made.args.initial_rollouts == 4
    assert [leaf.address for leaf in made._last.rollout.leaves] == [(0,), (1,), (2,), (3,)] * 2


def test_a_class_that_cannot_fork_leaves_the_settings_for_the_next_trainer(model_path, tmp_path):
    class Final(Shop):
        replayable = False

    args = trainer(model_path, tmp_path).args
    for kind, paths_from_root in ((Final, 4), (Shop, 2)):
        eos = tokenizer().eos_token_id
        engine = ScriptedEngine(tokenizer(), SamplingParams(eos_ids=(eos,), stop_strings=("</put>",)), buys)
        made = ARPOTrainer(model_path, None, args, ROWS, environment_factory=kind, engine=engine, tools=[search])
        assert made.tree_sampler.settings.initial_rollouts == made.args.initial_rollouts == paths_from_root


def test_a_completion_without_an_environment_has_no_reward_of_it(model_path, tmp_path):
    resets = itertools.count()

    class Rare(Shop):
        def reset(self, name: str, **row: Any) -> str:
            if next(resets) == 3:  # the second path of a group: the first two resets are for the prompts
                raise OSError("sold out")
            return super().reset(name)

    seen = []

    def counts(environments, name):
        seen.append((len(environments), None in environments, len(name)))
        return [1.0] * len(environments)

    made = trainer(model_path, tmp_path, kind=Rare, rewards=counts)
    OPENED.clear()
    made.train()
    assert made.state.log_history[0]["arpo/environments/failed"] == 1
    assert seen == [(7, False, 7)]


def test_an_async_get_reward_is_awaited_and_weights_count_it(model_path, tmp_path):
    class Late(Shop):
        async def get_reward(self) -> float:  # type: ignore[override]
            return Shop.get_reward(self)

    made = trainer(
        model_path,
        tmp_path,
        kind=Late,
        rewards=lambda completions: [1.0] * len(completions),
        settings={"reward_weights": [10.0]},
    )
    assert made.args.reward_weights == [10.0] and made.reward_func_names[-1] == "Late"
    made.train()
    assert made.state.log_history[0]["reward"] == pytest.approx(10 + (3 + 3 + 2 + 3) / 4)


def test_an_error_of_get_reward_names_its_line(model_path, tmp_path):
    class Broken(Shop):
        def get_reward(self) -> float:
            raise KeyError("basket")

    with pytest.raises(
        RewardError, match=r"'Broken' raised KeyError: 'basket' \(.*test_environment_training\.py, line"
    ):
        trainer(model_path, tmp_path, kind=Broken).train()


def test_an_evaluation_has_environments_too(model_path, tmp_path):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    made = trainer(model_path, tmp_path, eval_dataset=ROWS.select([2]), settings=settings)
    made.train()
    evaluated = next(log for log in made.state.log_history if "eval_rewards/Shop/mean" in log)
    assert evaluated["eval_arpo/environments/replays"] == 0 and evaluated["eval_arpo/environments/resets"] == 4
    assert Counter(map(id, OPENED)) == CLOSED


@pytest.mark.slow
def test_a_resumed_run_is_the_run_that_was_not_stopped(model_path, tmp_path):
    whole = trainer(model_path, tmp_path / "whole", settings={"max_steps": 3})
    whole.train()
    saving = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    trainer(model_path, tmp_path / "parts", settings=saving).train()
    shutil.rmtree(tmp_path / "parts" / "checkpoint-3")
    again = trainer(model_path, tmp_path / "parts", settings=saving)
    again.train(resume_from_checkpoint=True)
    for key in ("loss", "grad_norm", "reward", "arpo/environments/replays"):
        assert [log[key] for log in again.state.log_history[:3]] == [log[key] for log in whole.state.log_history[:3]]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"kind": lambda: None}, ConfigError, "environment_factory returned None"),
        ({"kind": object}, ToolSpecError, "has no method reset"),
        (
            {"settings": {"share_calls": "history"}},
            ConfigError,
            "share_calls is 'history', but there is an ",
        ),
        ({"kind": {"a": Shop}}, DataError, r"has only the columns \['prompt'.*Add a column 'environment'"),
        (
            {"kind": {"a": Shop}, "settings": {"remove_unused_columns": True}},
            ConfigError,
            "remove_unused_columns is true, .* reads the column 'environment'",
        ),
        ({"settings": {"dynamic_sampling_rounds": 1}}, ConfigError, "dynamic_sampling_rounds is 1, but there is an "),
    ],
)
def test_a_factory_that_cannot_work_is_an_error_at_the_start(model_path, tmp_path, given, error, message):
    with pytest.raises(error, match=message):
        trainer(model_path, tmp_path, **given)


def test_without_a_dataset_max_steps_is_required(model_path, tmp_path):
    args = ARPOConfig(str(tmp_path), **ON_CPU)
    with pytest.raises(ConfigError, match=r"There is no train_dataset, and max_steps is -1\. Set max_steps"):
        ARPOTrainer(model_path, None, args, environment_factory=Shop)
