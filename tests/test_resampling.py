import json
import math
from collections import Counter

import pytest
import torch

from arpo_trl import ARPOConfig
from arpo_trl.errors import ConfigError
from arpo_trl.logs.metrics import Tally
from arpo_trl.logs.trajectories import read_trees
from arpo_trl.rollout.batch import RolloutBatch, RolloutTimes, SampledGroup
from arpo_trl.rollout.engines.base import SamplingParams
from arpo_trl.rollout.engines.scripted import ScriptedEngine, ScriptedTurn
from arpo_trl.rollout.tree import ExecutedCall, RolloutTree, StopReason
from arpo_trl.tools.calls import CallSource
from arpo_trl.training.resampling import equal_groups, tally_discarded, with_new_trees
from ranks import launch
from support import ON_CPU, save_tiny_model, tokenizer
from test_baselines import ROWS, trainer


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def tree(tokens: int) -> RolloutTree:
    made = RolloutTree([9])
    made.end(made.add_turn(0, [1] * tokens, "", [-0.5] * tokens, []).index, (0,), StopReason.EOS)
    return made


def rolled(*tokens: int, seconds: float = 1.0) -> RolloutBatch:
    times = RolloutTimes(total_s=4 * seconds, forward_s=seconds, tool_wait_s=seconds, sync_s=seconds)
    groups = [SampledGroup(tree=tree(n), turns_in_sequence=n, spans={1: (0.0, float(n))}) for n in tokens]
    return RolloutBatch(groups=groups, times=times)


def test_a_group_is_equal_if_all_known_rewards_are():
    nan = math.nan
    rewards = torch.tensor([[1.0, 1.0, 0.0, 1.0, nan, 1.0, nan, nan]])
    assert equal_groups(rewards, 2).tolist() == [True, False, True, False]
    # The sums are equal in the first group, but neither row is. The second function applies to no leaf of the third.
    rewards = torch.tensor([[1.0, 0.0, 1.0, 1.0, 2.0, 2.0], [0.0, 1.0, 0.5, 0.5, nan, nan]])
    assert equal_groups(rewards, 2).tolist() == [False, True, True]


def test_new_trees_take_the_places_of_the_old_and_wait_for_them():
    merged = with_new_trees(rolled(2, 5, 3), rolled(1, 4), [0, 2], waited=7)
    assert [len(tree.nodes[1].ids) for tree in merged.trees] == [1, 5, 4]
    assert merged.spans == [{1: (0.0, 1.0)}, {1: (0.0, 5.0)}, {1: (0.0, 4.0)}]  # also of the new trees
    assert merged.turns_in_sequence == [7 + 1, 5, 7 + 4]  # the longest chain, on another rank, has 7 turns
    assert (merged.times.total_s, merged.times.own_s) == (8.0, 2.0)
    assert with_new_trees(rolled(2), rolled(), [], waited=7).turns_in_sequence == [2]  # a rank without them


def test_what_is_discarded_is_counted():
    tally, called = Tally(), RolloutTree([9])
    turn = called.add_turn(0, [1] * 4, "", [-0.5] * 4, [])
    calls = [
        ExecutedCall(name="search", arguments={}, text="", failure=None, seconds=0.0, source=source)
        for source in (CallSource.EXECUTED, CallSource.CACHED, CallSource.REFUSED)
    ]
    called.add_observation(turn.index, [2], calls, "")
    tally_discarded([*rolled(2, 3).trees, called], tally)
    assert tally.values() == {
        "resampling/groups": 3,
        "resampling/calls_made": 2,
        "resampling/calls_executed": 1,
        "resampling/generated_tokens": 2 + 3 + 4,
    }


def test_rollouts_ahead_have_no_further_rounds(tmp_path):
    served = {"use_vllm": True, "vllm_mode": "server", "rollouts_ahead": 1}
    with pytest.raises(ConfigError, match="rollouts_ahead is 1 and dynamic_sampling_rounds is 2"):
        ARPOConfig(str(tmp_path), dynamic_sampling_rounds=2, **served, **ON_CPU)


class Luck:
    """Answers of a group are all wrong until its prompt has been rolled out `at` times, and mixed from then on."""

    def __init__(self, at: dict[str, int]):
        self.at = at
        self.rolls: dict[str, int] = {}

    def __call__(self, request, context) -> ScriptedTurn:
        asked = context.rpartition("what is ")[2][0]
        if request.key[1] == 0:
            self.rolls[asked] = self.rolls.get(asked, 0) + 1
        right = self.rolls[asked] >= self.at.get(asked, 1) and request.key[1] % 2
        return ScriptedTurn(text=f"<answer>\\boxed{{{asked if right else 99}}}</answer>", entropies=[1.0])


def engine(luck: Luck) -> ScriptedEngine:
    return ScriptedEngine(tokenizer(), SamplingParams(eos_ids=(tokenizer().eos_token_id,)), luck)


def made_batch(made) -> dict:
    made.model.train()
    return made._generate_and_score_completions([ROWS[i // 4] for i in range(8)])


def test_only_groups_of_equal_rewards_are_rolled_out_again(model_path, tmp_path):
    luck = Luck({"0": 3})
    settings = {"initial_rollouts": 4, "dynamic_sampling_rounds": 3}
    made = trainer(model_path, tmp_path, engine(luck), trajectory_log_rate=1.0, **settings)
    batch = made_batch(made)
    assert luck.rolls == {"0": 3, "1": 1}
    assert (batch["advantages"] != 0).all()
    metrics = made._metrics["train"]
    assert metrics["arpo/resampling/groups"] == [2.0]
    assert metrics["arpo/resampling/left"] == [0.0]
    assert metrics["arpo/alarm/zero_variance_groups"] == [0.0]
    # what TRL and the reward log is of the last round alone
    assert len(metrics["completions/mean_length"]) == len(metrics["reward"]) == len(metrics["arpo/accuracy"]) == 1
    assert metrics["reward"] == [pytest.approx(0.5)]
    written = int((batch["completion_mask"] * batch["tool_mask"]).sum())
    prompts = int(batch["prompt_mask"].sum())
    assert made.state.num_input_tokens_seen == written + prompts
    (logged,) = (tmp_path / "trajectories").glob("step-*")
    assert len(list(read_trees(logged))) == 2


def test_the_number_of_rounds_is_limited(model_path, tmp_path):
    luck = Luck({"0": 99})
    made = trainer(model_path, tmp_path, engine(luck), initial_rollouts=4, dynamic_sampling_rounds=2)
    made_batch(made)
    assert luck.rolls == {"0": 3, "1": 1}
    assert made._metrics["train"]["arpo/resampling/left"] == [0.5]


def test_a_further_round_scores_only_the_new_completions(model_path, tmp_path):
    calls = []

    def reward(completions, number, log_extra, log_metric, **_):
        calls.append(number)
        again = len(calls) > 1
        log_extra("call", [len(calls)] * len(number))
        log_metric("mean_number", sum(number) / len(number))
        return [float(i % 2) if again or n else 0.0 for i, n in enumerate(number)]

    async def free(completions, number, **_):
        return [0.0] * len(number)

    made = trainer(model_path, tmp_path, dynamic_sampling_rounds=3, reward_funcs=[reward, free])
    made.model.train()
    made._generate_and_score_completions([{"prompt": f"what is {i // 4}", "number": i // 4} for i in range(8)])
    assert calls == [[0] * 4 + [1] * 4, [0] * 4]
    assert list(made._logs["extra"]["call"]) == [2, 2, 2, 2, 1, 1, 1, 1]
    # of eight completions, half with 1, and of four with 0
    assert made._metrics["train"]["mean_number"] == [pytest.approx(4 / 12)]
    assert made._last_rewards.tolist() == [0.0, 1.0] * 4


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_rolled_out_again_without_the_setting_or_in_evaluation(model_path, tmp_path, training):
    luck = Luck({"0": 3})
    settings = {} if training else {"dynamic_sampling_rounds": 3, "num_generations_eval": 4}
    made = trainer(model_path, tmp_path, engine(luck), initial_rollouts=4, **settings)
    made.model.train(training)
    made._generate_and_score_completions([ROWS[i // 4] for i in range(8)])
    assert luck.rolls == {"0": 1, "1": 1}


def test_another_round_draws_other_random_numbers_and_repeats(model_path, tmp_path):
    def completions(folder) -> list[list[int]]:
        """With a reward that never differs."""
        made = trainer(model_path, tmp_path / folder, dynamic_sampling_rounds=1, max_completion_length=16)
        made.reward_funcs = [lambda completions, **_: [1.0] * len(completions)]
        return made_batch(made)["completion_ids"].tolist()

    once = trainer(model_path, tmp_path / "once", max_completion_length=16)
    assert completions("a") == completions("b") != made_batch(once)["completion_ids"].tolist()


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_with_different_groups_to_roll_out_again_stay_together(model_path, tmp_path):
    launch("ddp", "tests/resampling_ranks.py", model_path, str(tmp_path))
    first, second = (json.loads((tmp_path / f"seen-{rank}.json").read_text("utf-8")) for rank in (0, 1))
    # the two leaves of each group, and again where they were rolled out again
    assert Counter([*first["scored"], *second["scored"]]) == {0: 2, 1: 4, 2: 2, 3: 4}
    # in each rollout the mean reward is .5 in the end
    assert first["baseline"] == second["baseline"] == 0.5
    assert first["log"]["arpo/resampling/left"] == 0.0
    assert first["log"]["arpo/resampling/groups"] in (0.0, 1.0, 2.0)
    assert first["log"]["arpo/tree/groups"] == 2
