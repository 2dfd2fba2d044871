"""Rollouts that run during the update, on a scripted engine. tests/test_vllm_server_engine.py has them on a server."""

import errno
import itertools
import math
import os
import random
import shutil
import signal
import threading
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from transformers import TrainerCallback
from trl import GRPOTrainer
from trl.trainer.utils import RepeatSampler

import ahead_run
import forked
from ahead_run import ROWS, by_length, make_trainer, searching
from arpo_trl import ARPOConfig
from arpo_trl.errors import CheckpointError, ConfigError, EngineError, Interrupted, RewardError
from arpo_trl.evaluation.callback import EvaluationCallback
from arpo_trl.evaluation.runner import Evaluator
from arpo_trl.logs.trajectories import read_trees
from arpo_trl.training.ahead import RolloutsAhead
from arpo_trl.training.rewards_ahead import Scored, score
from arpo_trl.training.rows_ahead import RowsAhead, later_epochs
from arpo_trl.training.samples_ahead import SamplesAhead
from evaluating import questions
from ranks import launch, launched
from support import ON_CPU, save_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def losses(made) -> list[dict]:
    return [row for row in made.state.log_history if "loss" in row]


def prompts_by_step(folder: Path) -> dict[int, list[str]]:
    """The prompts of the groups that each step trained on, from the log of all trees."""
    found: dict[int, list[str]] = {}
    for file in sorted((folder / "trajectories").glob("step-*")):
        for logged in read_trees(file):
            found.setdefault(logged.step, []).append(logged.prompt)
    return found


class OnStep(TrainerCallback):
    def __init__(self, called):
        self.called = called

    def on_step_begin(self, args, state, control, **_):
        self.called(state.global_step)


def all_are_sampled(made) -> None:
    """Waits until all batches that were started are sampled and scored."""
    if (ahead := made._ahead) is not None:
        ahead._wait_until(lambda: all(batch.sampled for batch in list(ahead._batches.values())))


def all_wait_for_rewards(made, batches: int) -> None:
    """Waits until that many batches are sampled, and are scored or wait for it."""
    while sum(len(batch.threads) for batch in list(made._ahead._batches.values())) < batches:
        time.sleep(0.01)


# Order ---------------------------------------------------------------------------------------------------------------


def test_the_next_rollout_runs_while_the_update_does(model_path, tmp_path):
    """Update n waits until all answers of batch n + 1 are sampled, and these wait for the update to begin."""
    made = make_trainer(model_path, tmp_path, max_steps=3)
    engine, compute = made.tree_sampler.engine, made.compute_loss
    poll, updating, answers = engine.poll, [-1], Counter()
    all_sampled = [threading.Event() for _ in range(4)]

    def poll_and_count(timeout_s=0.0):
        events = poll(timeout_s)
        keys = {request.id: request.key for request in engine.requests}
        for batch in [keys[event.id][0] // 2 for event in events if keys[event.id][-1] == 1]:
            answers[batch] += 1
            if answers[batch] == 8:
                all_sampled[batch].set()
        return events

    def compute_loss(*args, **kwargs):
        updating[0] += 1
        assert all_sampled[min(updating[0] + 1, 2)].wait(60.0)
        return compute(*args, **kwargs)

    engine.poll = poll_and_count
    engine.holds = lambda request: request.key[0] // 2 > updating[0] + 1
    made.compute_loss = compute_loss
    made.train()
    assert [row["arpo/ahead/staleness_max"] for row in losses(made)] == [0.0, 1.0, 1.0]
    assert [row["arpo/ahead/staleness_mean"] for row in losses(made)] == [0.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "settings",
    [
        {"rollouts_ahead": 3},
        {"rollouts_ahead": 1, "steps_per_generation": 2, "per_device_train_batch_size": 4},
        {"rollouts_ahead": 2, "num_iterations": 2},
        {"rollouts_ahead": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 1},
        {"rollouts_ahead": 2, "gradient_accumulation_steps": 2, "steps_per_generation": 2},
        {"rollouts_ahead": 3, "train_dataset": ROWS.select(range(7))},
        {"rollouts_ahead": 1, "train_dataset": ROWS.select(range(2)), "max_steps": 4},
        {"rollouts_ahead": 2, "train_dataset": ROWS.select(range(6)), "shuffle_dataset": False},
        {
            "rollouts_ahead": 2,
            "gradient_accumulation_steps": 2,
            "steps_per_generation": 1,
            "train_dataset": ROWS.select(range(6)),
        },
    ],
    ids=[
        "three",
        "two steps a batch",
        "two iterations",
        "two batches a step",
        "accumulated",
        "an epoch of three batches",
        "an epoch of one batch",
        "no shuffling",
        "an epoch that ends with half a step",
    ],
)
def test_rows_are_trained_in_the_order_of_a_run_without_rollouts_ahead(model_path, tmp_path, settings):
    settings = {"max_steps": 14, **settings}  # into the second epoch
    make_trainer(model_path, tmp_path / "ahead", **settings).train()
    make_trainer(model_path, tmp_path / "plain", **{**settings, "rollouts_ahead": 0}).train()
    assert prompts_by_step(tmp_path / "ahead") == prompts_by_step(tmp_path / "plain")


def test_rows_of_later_epochs_lose_the_columns_that_the_data_loader_drops(model_path, tmp_path):
    found = []

    def reward(completions, **columns):
        found.append({"answer", "task"} & columns.keys())
        return by_length(completions)

    rows = {"train_dataset": ROWS.select(range(4)), "remove_unused_columns": True}  # two steps an epoch
    make_trainer(model_path, tmp_path, reward_funcs=reward, max_steps=4, **rows).train()
    assert found == [set()] * 4


def test_staleness_grows_with_the_batches_ahead_and_rollouts_cross_epochs(model_path, tmp_path):
    made = make_trainer(model_path, tmp_path, rollouts_ahead=2, max_steps=14)
    made.add_callback(OnStep(lambda step: all_are_sampled(made)))  # every turn is there before the next update
    made.train()
    stale = [row["arpo/ahead/staleness_max"] for row in losses(made)]
    assert stale[:3] == [0.0, 1.0, 2.0]
    assert stale[2:] == [2.0] * 12  # 12 steps an epoch


def test_no_batch_is_sampled_that_is_not_trained(model_path, tmp_path):
    made = make_trainer(model_path, tmp_path, rollouts_ahead=3, max_steps=3)
    made.train()
    assert {request.key[0] for request in made.tree_sampler.engine.requests} == set(range(6))  # 3 batches of 2 groups
    assert not [thread for thread in threading.enumerate() if thread.name == "arpo-rollouts-ahead"]


def test_the_same_run_draws_the_same_seeds_whatever_the_timing(model_path, tmp_path):
    seeds = []
    for i, pause_s in enumerate((0.0, 0.05)):
        made = make_trainer(model_path, tmp_path / str(i), rollouts_ahead=2)
        made.add_callback(OnStep(lambda step, pause_s=pause_s: time.sleep(pause_s)))
        made.train()
        seeds.append({request.key: request.seed for request in made.tree_sampler.engine.requests})
    assert seeds[0] == seeds[1]


# Rewards -------------------------------------------------------------------------------------------------------------


def test_reward_functions_run_in_the_rollouts_time_and_log_into_their_own_batch(model_path, tmp_path):
    threads = []

    def reward(completions, prompts, turns, tool_calls, answer, trainer_state, log_extra, log_metric, **_):
        threads.append(threading.current_thread().name)
        log_extra("asked", list(answer))
        log_metric("first", float(answer[0][0]))
        assert len(completions) == len(prompts) == len(turns) == len(tool_calls) == 8
        assert all("iron" in completion for completion in completions)
        return by_length(completions)

    async def other(completions, **_):
        return [None, *[1.0] * (len(completions) - 1)]

    made = make_trainer(model_path, tmp_path, reward_funcs=[reward, other], log_completions=True, max_steps=4)
    made.train()
    assert set(threads) == {"arpo-rewards-ahead"}
    first = {step: float(prompts[0].split()[-1]) for step, prompts in prompts_by_step(tmp_path).items()}
    assert [row["first"] for row in losses(made)] == list(first.values())
    assert [row["rewards/other/mean"] for row in losses(made)] == [1.0] * 4
    assert len(made._logs["extra"]["asked"]) == len(made._logs["prompt"])


def test_a_batch_scored_during_the_reading_of_another_gets_its_own_rewards(model_path, tmp_path, monkeypatch):
    """Batch 1 is sampled and scored within TRL's `_calculate_rewards` for batch 0."""
    calculate, taking, scored = GRPOTrainer._calculate_rewards, threading.Event(), []

    def slow(self, *args, **kwargs):
        taking.set()
        all_are_sampled(self)
        return calculate(self, *args, **kwargs)

    def reward(completions, answer, log_metric, **_):
        scored.append(float(answer[0][0]))
        log_metric("first", scored[-1])
        return by_length(completions)

    monkeypatch.setattr(GRPOTrainer, "_calculate_rewards", slow)
    made = make_trainer(model_path, tmp_path, reward_funcs=reward, max_steps=2)
    made.tree_sampler.engine.holds = lambda request: request.key[0] // 2 == 1 and not taking.is_set()
    made.train()
    assert [row.get("first") for row in losses(made)] == scored
    assert len(scored) == 2


def test_rewards_advantages_and_completions_are_those_of_a_run_without_rollouts_ahead(model_path, tmp_path):
    """At a learning rate of zero, and with a script: the weights and seeds do not matter."""
    logs = []
    for k in (0, 2):
        made = make_trainer(model_path, tmp_path / str(k), rollouts_ahead=k, learning_rate=0.0, log_completions=True)
        made.train()
        logs.append([{name: value for name, value in row.items() if known(name)} for row in losses(made)])
        logs.append({name: list(made._logs[name]) for name in ("prompt", "completion", "advantages")})
    assert logs[0] == logs[2]
    assert logs[1] == logs[3]


def known(name: str) -> bool:
    return not any(part in name for part in ("time", "_s", "ahead", "share", "seconds", "entropy", "runtime"))


def test_messages_and_models_reach_rewards_as_in_trl(model_path, tmp_path):
    rows = Dataset.from_list([{"prompt": [{"role": "user", "content": f"what is {i}"}]} for i in range(8)])
    seen = []

    def reward(completions, **_):
        seen.append((threading.current_thread().name, completions))
        return by_length(completions)

    for k in (0, 1):
        made = make_trainer(
            model_path, tmp_path / str(k), rollouts_ahead=k, reward_funcs=reward, train_dataset=rows, max_steps=1
        )
        made.train()
    (_, plain), (_, ahead) = seen
    assert ahead == plain
    assert [message["role"] for message in ahead[0]] == ["assistant", "tool", "assistant"]
    model = torch.nn.Linear(1, 1)
    given = score([model], [{"prompt": "a"}], ["b"], [[1]], {}, state=None, loop=None)
    assert given.rewards == [None]
    assert given.replaying([model]) == [model]
    assert Scored(count=1, rewards=[[1.0]]).replaying([model])[0](log_extra=None, log_metric=None, prompts=[]) == [1.0]


def test_a_column_that_only_a_later_round_logs_has_a_value_for_each_completion():
    first = Scored(count=4, rewards=[[0.0] * 4])
    again = Scored(count=2, rewards=[[1.0, 0.0]], columns=[("note", ["a", "b"])])
    assert first.with_new(again, [0, 1]).columns == [("note", ["a", "b", None, None])]
    earlier = Scored(count=4, rewards=[[0.0] * 4], columns=[("note", list("wxyz"))])
    assert earlier.with_new(Scored(count=2, rewards=[[1.0, 0.0]]), [0, 1]).columns == [
        ("note", [None, None, "y", "z"])
    ]


# Staleness -----------------------------------------------------------------------------------------------------------


def test_a_rollout_waits_where_it_would_be_staler_than_allowed_and_is_counted(model_path, tmp_path):
    made = make_trainer(model_path, tmp_path, rollouts_ahead=3, max_staleness=1, max_steps=6)
    made.train()
    assert max(row["arpo/ahead/staleness_max"] for row in losses(made)) == 1.0
    # Of three batches ahead two wait. Before the last three of six steps two, one and no batches are left to come.
    assert [row["arpo/ahead/delayed"] for row in losses(made)] == [2.0, 2.0, 2.0, 1.0, 0.0, 0.0]


def test_stale_tokens_are_dropped_from_the_loss_and_counted(model_path, tmp_path):
    made = make_trainer(
        model_path, tmp_path, rollouts_ahead=2, max_staleness=1, stale_tokens="drop", max_steps=4, log_completions=True
    )
    made.add_callback(OnStep(lambda step: all_are_sampled(made)))
    masks = []
    compute = made.compute_loss

    def compute_loss(model, inputs, *args, **kwargs):
        masks.append((inputs["tool_mask"] * inputs["completion_mask"], inputs["num_items_in_batch"]))
        return compute(model, inputs, *args, **kwargs)

    made.compute_loss = compute_loss
    made.train()
    # Steps 0, 1, 2, 3 train tokens that are 0, 1, 2, 2 steps old. With nothing to train on, the loss is zero.
    assert [row["arpo/ahead/dropped"] for row in losses(made)] == [0.0, 0.0, 1.0, 1.0]
    assert [bool(mask.sum()) for mask, _ in masks] == [True, True, False, False]
    assert all(int(mask.sum()) == int(count) for mask, count in masks)
    assert [row["loss"] for row in losses(made)][2:] == [0.0, 0.0]


def test_a_batch_without_a_token_in_the_loss_has_no_dropped_tokens(model_path, tmp_path):
    drops = {"max_staleness": 1, "stale_tokens": "drop"}
    made = make_trainer(
        model_path, tmp_path, max_completion_length=3, mask_truncated_completions=True, max_steps=2, **drops
    )
    made.train()
    assert [row["arpo/ahead/dropped"] for row in losses(made)] == [0.0, 0.0]


def test_waits_and_transfers_are_logged_in_seconds(model_path, tmp_path, monkeypatch):
    made = make_trainer(model_path, tmp_path, max_steps=4)
    engine, compute, wait, waits_since = made.tree_sampler.engine, made.compute_loss, RolloutsAhead.wait, {}
    sync = engine.sync

    def waiting(self, number):
        waits_since[number] = time.monotonic()
        return wait(self, number)

    def holds(request):
        return request.key[0] // 2 == 0 and time.monotonic() < waits_since.get(0, math.inf) + 0.3

    def compute_loss(*args, **kwargs):
        if made.state.global_step == 1:
            all_are_sampled(made)
            time.sleep(0.3)
        return compute(*args, **kwargs)

    def slow_sync():
        time.sleep(0.2 * (made.state.global_step == 3))
        sync()

    monkeypatch.setattr(RolloutsAhead, "wait", waiting)
    engine.holds, engine.sync, made.compute_loss = holds, slow_sync, compute_loss
    made.train()
    waited, waited_for, moved = (
        [row[f"arpo/ahead/{name}"] for row in losses(made)]
        for name in ("update_waited_s", "rollout_waited_s", "sync_s")
    )
    assert waited[0] >= 0.3  # the first batch is held
    assert waited_for[0] == 0.0 and waited_for[2] >= 0.3  # the third one is ready before the second update ends
    assert moved[3] >= 0.2


@pytest.mark.parametrize(
    ("ratios", "limits", "share"),
    [
        ([[0.5, 3.0, 0.0, 3.0]], (None, 3.0), 2 / 3),  # of tokens: the last one is not in the mask
        ([[0.5, 3.0, 0.9, 3.0]], (0.5, 3.0), 2 / 3),
        ([[0.5, 2.9, 0.9, 3.0]], (None, 3.0), 0.0),
        ([[3.0]], (None, 3.0), 1.0),  # of sequences
        ([[3.0]], (None, None), 0.0),
    ],
)
def test_the_share_of_ratios_at_a_limit(ratios, limits, share):
    least, most = limits
    settings = SimpleNamespace(vllm_importance_sampling_clip_min=least, vllm_importance_sampling_clip_max=most)
    found = SamplesAhead._share_clipped(settings, torch.tensor(ratios), torch.tensor([[1, 1, 1, 0]]))
    assert found == pytest.approx(share)


# Evaluation ----------------------------------------------------------------------------------------------------------


def test_benchmarks_are_sampled_while_nothing_runs_ahead(model_path, tmp_path, monkeypatch):
    made = make_trainer(model_path, tmp_path, rollouts_ahead=2, max_steps=5)
    run, seen = Evaluator.run, []

    def running(self, *args):
        assert not made._ahead._open and not made.tree_sampler.engine._running
        seen.append(made.state.global_step)
        return run(self, *args)

    monkeypatch.setattr(Evaluator, "run", running)
    made.add_callback(EvaluationCallback(made, [questions("0")], every_steps=2))
    made.train()
    assert seen == [2, 4]
    assert list(prompts_by_step(tmp_path)) == [0, 1, 2, 3, 4]


def test_an_evaluation_samples_with_current_weights_while_nothing_runs_ahead(model_path, tmp_path):
    made = make_trainer(
        model_path,
        tmp_path,
        rollouts_ahead=2,
        max_steps=5,
        eval_dataset=ROWS.select(range(2)),
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=8,
    )
    engine, evaluated = made.tree_sampler.engine, []
    sample = made.tree_sampler.sample

    def sampling(*args, **kwargs):
        assert not made._ahead._open and not engine._running
        engine.sync()  # as the session of an engine with weights does
        evaluated.append(engine.version)
        return sample(*args, **kwargs)

    made.tree_sampler.sample = sampling
    made.train()
    assert evaluated == [2, 4, 5]
    assert len(losses(made)) == 5
    assert list(prompts_by_step(tmp_path)) == [0, 1, 2, 3, 4]


# Ends ----------------------------------------------------------------------------------------------------------------


def test_a_rollout_that_fails_ends_the_run_with_its_error(model_path, tmp_path):
    def script(request, context):
        if request.key[0] // 2 == 2:
            raise EngineError("the server is gone")
        return searching(request, context)

    made = make_trainer(model_path, tmp_path, script, rollouts_ahead=1, max_steps=8)
    with pytest.raises(EngineError, match="the server is gone"):
        made.train()
    assert 1 <= made.state.global_step <= 2
    assert not [thread for thread in threading.enumerate() if thread.name == "arpo-rollouts-ahead"]


def test_a_reward_that_fails_ends_the_run_with_its_error(model_path, tmp_path):
    def reward(completions, answer, **_):
        return by_length(completions) if seen.add(answer[0][0]) or len(seen) < 3 else [float("nan")] * 8

    seen = set()
    made = make_trainer(model_path, tmp_path, reward_funcs=reward, max_steps=8)
    with pytest.raises(RewardError, match="returned nan for completion 0"):
        made.train()


def test_no_reward_is_called_after_one_failed(model_path, tmp_path):
    calls = []

    def reward(completions, **_):
        calls.append(len(completions))
        all_wait_for_rewards(made, 3)
        raise ValueError("broken")

    made = make_trainer(model_path, tmp_path, reward_funcs=reward, rollouts_ahead=2)
    with pytest.raises(RewardError, match="'reward' raised ValueError: broken"):
        made.train()
    assert len(calls) == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("arpo-rewards-ahead")]


@pytest.mark.parametrize("where", ["engine", "tool", "reward", "evaluation", "update"])
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_run_within_seconds_with_a_checkpoint_to_resume_from(
    model_path, tmp_path, monkeypatch, where, signum
):
    """Wherever the run is: it waits for the engine, for a tool or a reward that hangs, or for these to evaluate."""
    monkeypatch.setattr("arpo_trl.training.ahead.CLOSE_S", 0.5)  # seconds for a thread that hangs
    hang, there = threading.Event(), threading.Event()

    def reward(completions, answer, **_):
        if where == "reward":  # the other batches wait for their rewards
            all_wait_for_rewards(made, 3)
            there.set()
            hang.wait(120.0)
        return by_length(completions)

    def search(query: str) -> str:
        """Search.

        Args:
            query: What for.
        """
        if where in ("tool", "evaluation") and next(searched) > 12:  # 8 leaves a batch
            there.set()
            hang.wait(120.0)
        return "iron"

    searched = itertools.count()
    settings = {}
    if where == "evaluation":  # after step 1, while the rollout of step 2 hangs
        settings = {"eval_strategy": "steps", "eval_steps": 1, "eval_dataset": ROWS.select(range(2))}
    made = make_trainer(
        model_path, tmp_path, reward_funcs=reward, tools=[search], rollouts_ahead=2, max_steps=8, **settings
    )
    if where == "engine":

        def holds(request):
            if request.key[0] // 2 == 2:
                there.set()
            return request.key[0] // 2 == 2

        made.tree_sampler.engine.holds = holds
    elif where == "update":
        made.add_callback(OnStep(lambda step: there.set() if step == 2 else None))

    def signalled():
        there.wait(60.0)
        sent.append(time.monotonic())
        os.kill(os.getpid(), signum)

    sent = []
    threading.Thread(target=signalled, daemon=True).start()
    with pytest.raises(Interrupted, match=r"is saved|No step was finished"):
        made.train()
    assert time.monotonic() - sent[0] < 60.0
    hang.set()


def test_a_full_disk_at_a_checkpoint_ends_the_run_and_its_rollouts(model_path, tmp_path, monkeypatch):
    made = make_trainer(model_path, tmp_path, rollouts_ahead=2, max_steps=14, save_strategy="steps", save_steps=2)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(made, "save_model", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        made.train()
    assert made.state.global_step == 2
    assert not [thread for thread in threading.enumerate() if thread.name == "arpo-rollouts-ahead"]


@pytest.mark.parametrize(("before", "after"), [(0, 1), (1, 0)])
def test_a_checkpoint_is_resumed_with_the_same_rollouts_ahead(model_path, tmp_path, before, after):
    settings = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    make_trainer(model_path, tmp_path, rollouts_ahead=before, **settings).train()
    with pytest.raises(ConfigError, match=rf"rollouts_ahead.*{before}.*{after}"):
        make_trainer(model_path, tmp_path, rollouts_ahead=after, **settings).train(resume_from_checkpoint=True)


class StopsAfter(TrainerCallback):
    """Sends SIGTERM some time after the beginning of a step of this process, at the latest two steps later."""

    def __init__(self, made, steps: int, seconds: float):
        self.made, self.steps, self.seconds = made, steps, seconds

    def on_step_begin(self, args, state, control, **_):
        self.steps -= 1
        if self.steps == 0:
            threading.Timer(self.seconds, self.stop).start()
        elif self.steps == -2:
            self.stop()

    def stop(self):
        self.made._interrupts.told = int(signal.SIGTERM)


def test_no_row_is_lost_or_trained_twice_over_many_stops(model_path, tmp_path):
    """24 rows, 2 a step, 2 epochs: 24 steps. Each stop is at another moment, after at most 7 steps."""
    settings = {"max_steps": 24, "save_strategy": "steps", "save_steps": 1, "save_total_limit": 1}
    make_trainer(model_path, tmp_path / "plain", **settings, rollouts_ahead=0).train()
    draw, stops, finished = random.Random(0), 0, False
    while not finished:
        made = make_trainer(model_path, tmp_path / "ahead", **settings, rollouts_ahead=2)
        made.add_callback(StopsAfter(made, draw.choice([3, 5]), draw.random() * 0.2))
        try:
            made.train(resume_from_checkpoint=True)
            finished = True
        except Interrupted:
            stops += 1
    assert stops > 2
    assert prompts_by_step(tmp_path / "ahead") == prompts_by_step(tmp_path / "plain")
    trained = Counter(prompt for prompts in prompts_by_step(tmp_path / "ahead").values() for prompt in prompts)
    assert len(trained) == 24 and set(trained.values()) == {2}  # each row once an epoch


def test_no_row_is_lost_or_trained_twice_over_twenty_kills(model_path, tmp_path):
    """Each kill is at another moment. They take as many runs as they need."""
    make_trainer(model_path, tmp_path / "plain", max_steps=ahead_run.STEPS, rollouts_ahead=0).train()
    draw, kills, log, folder = random.Random(0), 0, tmp_path / "log", tmp_path / "ahead-0"
    while kills < 20:
        command = [ahead_run.__file__, model_path, str(folder)]
        log.write_text("")
        process = forked.Fork(command, cwd=tmp_path, env=os.environ, log=log)
        steps, delay_s = draw.choice([1, 2]), draw.random() * 0.4
        while log.read_text().count("step ") < steps and process.poll() is None:
            time.sleep(0.02)
        time.sleep(delay_s)
        if process.poll() is None:
            process.kill()
            kills += 1
        process.wait()
        if "done\n" in log.read_text():
            assert prompts_by_step(folder) == prompts_by_step(tmp_path / "plain")
            folder = tmp_path / f"ahead-{kills}"
    assert "done\n" in forked.run([ahead_run.__file__, model_path, str(folder)], cwd=tmp_path, env=os.environ)
    assert prompts_by_step(folder) == prompts_by_step(tmp_path / "plain")


@pytest.mark.distributed
def test_ranks_sample_ahead_independently_and_stop_and_resume_together(model_path, tmp_path):
    """The second of two ranks is slow. 24 rows, 4 a step, 2 epochs."""
    command = ("ddp", ahead_run.__file__, model_path, str(tmp_path))
    launcher = ("--mixed_precision", "no")
    with launched(*command, launcher=launcher) as running:
        while "step 2\n" not in running.output():
            time.sleep(0.05)
        for one in running.ranks():
            one.kill()
    with launched(*command, launcher=launcher) as running:
        while "step 5\n" not in running.output():
            time.sleep(0.05)
        running.ranks()[1].send_signal(signal.SIGTERM)
        stopped = running.wait()
        assert "is saved in" in stopped.output
        assert "forcefully exiting" not in stopped.output  # which the launcher says of a rank that does not end
    launch(*command, launcher=launcher)
    trained = [prompt for _, prompts in sorted(prompts_by_step(tmp_path).items()) for prompt in prompts]
    assert len(trained) == 48
    assert len(set(trained[:24])) == len(set(trained[24:])) == 24


# Rows ----------------------------------------------------------------------------------------------------------------


def test_rows_can_be_looked_at_before_they_are_handed_out_once_each_in_order():
    read = []

    def source():
        for i in range(5):
            read.append(i)
            yield [{"prompt": i}]

    rows = RowsAhead(source(), iter([[{"prompt": 7}]]))
    assert rows.at(2) == [{"prompt": 2}]
    assert read == [0, 1, 2]  # only as far as asked
    assert [next(rows)[0]["prompt"] for _ in range(2)] == [0, 1]
    rows.trained = 1
    rows.forget_trained()
    assert rows.at(1) == [{"prompt": 1}]  # handed out, and still there
    assert rows.at(5) == [{"prompt": 7}]  # 5 micro-batches, 0 to 4, then those of the next epoch
    assert rows.at(6) is None
    assert [batch[0]["prompt"] for batch in rows] == [2, 3, 4]
    assert list(rows) == []


def test_steps_to_a_later_row_count_the_short_last_step_of_an_epoch():
    """A resumed epoch of 5 micro-batches, 2 of them trained: steps of [0 1] [2 3] [4], then [0 1] [2 3] [4]."""
    epoch = [[{"prompt": i}] for i in range(5)]
    rows = RowsAhead(iter(epoch[2:]), iter(epoch * 2), skipped=2)
    assert rows.at(7) is not None  # the last of the next epoch
    assert [rows.steps_to(position, 2) for position in range(8)] == [0, 0, 1, 2, 2, 3, 3, 4]
    rows.trained = 2
    assert rows.steps_to(3, 2) == 1


def test_later_epochs_are_those_that_the_data_loader_will_deal_out():
    sampler = RepeatSampler(ROWS, mini_repeat_count=2, batch_size=4, repeat_count=1, seed=3)
    epochs = [list(sampler) for _ in range(3)]
    again = RepeatSampler(ROWS, mini_repeat_count=2, batch_size=4, repeat_count=1, seed=3)
    rows = later_epochs(ROWS, again, 4, 1, 2)  # 4 rows for each of two ranks
    assert list(again) == epochs[0]  # the current epoch begins
    expected = [epochs[1][i + 4 : i + 8] for i in range(0, 48, 8)] + [epochs[2][4:8]]
    assert [next(rows) for _ in range(7)] == [[ROWS[number] for number in batch] for batch in expected]
    assert list(again) == epochs[1]  # its generator was not used


# Bad input -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rollouts_ahead": -1}, "rollouts_ahead is -1; expected an integer of at least 0"),
        ({"use_vllm": False}, "rollouts_ahead is 1, but the updated model itself samples"),
        ({"vllm_mode": "colocate"}, "rollouts_ahead is 1, but vLLM shares the device with the update"),
        ({"rollout_schedule": "rounds"}, "rollout_schedule is 'rounds', whose rollouts are reproducible bit for bit"),
        (
            {"steps_per_generation": 3, "gradient_accumulation_steps": 2},
            "steps_per_generation 3 × num_iterations 1 is neither a multiple nor a divisor of "
            "gradient_accumulation_steps 2",
        ),
        (
            {"steps_per_generation": 2, "num_iterations": 2, "max_staleness": 3},
            "max_staleness is 3, but the next rollout is first trained 4 steps later",
        ),
        ({"rollouts_ahead": 0, "max_staleness": 2}, "max_staleness is set, but rollouts_ahead is 0"),
        ({"stale_tokens": "drop"}, "stale_tokens is 'drop', but max_staleness is not set"),
        ({"max_staleness": 0}, "max_staleness is 0; expected"),
        ({"stale_tokens": "keep"}, "stale_tokens is 'keep'; expected"),
    ],
)
def test_settings_that_contradict_rollouts_ahead_are_refused_with_the_reason(tmp_path, settings, message):
    given = {"use_vllm": True, "vllm_mode": "server", "rollouts_ahead": 1, "num_generations": 4, **ON_CPU, **settings}
    with pytest.raises(ConfigError, match=message):
        ARPOConfig(str(tmp_path), **given)


def test_a_dataset_shorter_than_the_rows_ahead_is_refused(model_path, tmp_path):
    with pytest.raises(ConfigError, match=r"an epoch has only 3 generation batches \(6 rows, 2 prompts per batch\)"):
        make_trainer(model_path, tmp_path, train_dataset=ROWS.select(range(6)), rollouts_ahead=4)
    make_trainer(model_path, tmp_path, train_dataset=ROWS.select(range(6)), rollouts_ahead=3)


def test_sampling_ahead_without_the_correction_is_logged(model_path, tmp_path, caplog):
    make_trainer(model_path, tmp_path, vllm_importance_sampling_correction=False)
    assert "rollouts_ahead is set without vllm_importance_sampling_correction" in caplog.text


def test_an_engine_that_cannot_change_its_weights_during_sampling_is_refused(model_path, tmp_path, monkeypatch):
    monkeypatch.delattr(ahead_run.EngineWithVersions, "sync")
    with pytest.raises(ConfigError, match="EngineWithVersions cannot update its weights during sampling"):
        make_trainer(model_path, tmp_path)


def test_an_engine_that_fails_after_a_signal_costs_no_step(model_path, tmp_path):
    """Ctrl-C also ends a server of the same terminal."""

    def failing(request, context):
        if made.state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            while made._interrupts.told is None:
                time.sleep(0.01)
            raise EngineError("The server has ended.")
        return searching(request, context)

    made = make_trainer(model_path, tmp_path, failing, max_steps=6)
    with pytest.raises(Interrupted, match=r"Step \d is saved"):
        made.train()


class EndEpoch(TrainerCallback):
    """Ends each epoch after `steps` steps."""

    def __init__(self, steps: int):
        self.steps = steps

    def on_epoch_begin(self, args, state, control, **_):
        self.began = state.global_step

    def on_step_end(self, args, state, control, **_):
        control.should_epoch_stop = state.global_step - self.began >= self.steps


@pytest.mark.parametrize("settings", [{}, {"gradient_accumulation_steps": 1, "steps_per_generation": 2}])
def test_an_epoch_that_a_callback_ends_is_trained_as_without_rollouts_ahead(model_path, tmp_path, settings):
    """The second case also ends in the middle of a generation batch."""
    rows: dict[int, list] = {}
    for ahead in (0, 2):
        made = make_trainer(
            model_path, tmp_path / str(ahead), rollouts_ahead=ahead, num_train_epochs=3, max_steps=-1, **settings
        )
        made.add_callback(EndEpoch(3))
        generate, seen = made._generate_and_score_completions, rows.setdefault(ahead, [])

        def noted(given, generate=generate, seen=seen, made=made):
            seen.append((made.state.global_step, [row["prompt"] for row in given]))
            return generate(given)

        made._generate_and_score_completions = noted
        made.train()
        assert made.state.global_step == 9
        assert made._ahead is None
    assert rows[0] == rows[2]


class EndEpochAt(TrainerCallback):
    def on_step_end(self, args, state, control, **_):
        control.should_epoch_stop |= state.global_step == 3


def test_a_run_resumes_with_the_rows_of_the_epoch_after_one_that_a_callback_has_ended(model_path, tmp_path):
    def trained(resume):
        made = make_trainer(model_path, tmp_path, rollouts_ahead=2, max_steps=14, save_strategy="steps", save_steps=5)
        made.add_callback(EndEpochAt())
        generate, rows = made._generate_and_score_completions, {}

        def noted(given):
            rows[made.state.global_step] = [row["prompt"] for row in given]
            return generate(given)

        made._generate_and_score_completions = noted
        made.train(resume_from_checkpoint=resume)
        made.toolbox.close()
        return rows

    whole = trained(False)
    for step in (10, 14):
        shutil.rmtree(tmp_path / f"checkpoint-{step}")
    assert trained(True) == {step: rows for step, rows in whole.items() if step >= 5}
