import math

import pytest
import torch
from datasets import Dataset

from arpo_trl import ARPOConfig, ARPOTrainer, HierarchicalReward
from arpo_trl.errors import ConfigError
from arpo_trl.logs.alarms import Alarms
from arpo_trl.logs.metrics import Tally
from arpo_trl.rollout.engines.base import SamplingParams
from arpo_trl.rollout.engines.scripted import ScriptedEngine
from arpo_trl.rollout.rules.threshold import Threshold
from arpo_trl.rollout.tree import Leaf, RolloutTree, StopReason
from arpo_trl.training.baselines import (
    BatchMean,
    Running,
    ScoredLeaves,
    ScoreNorm,
    advantages_of,
    squared_score,
    tally_baseline,
    weighted_means,
)
from support import EXACT, ON_CPU, branching_script, python, save_tiny_model, search, tokenizer

NAN = math.nan


def leaf(*probabilities: float) -> Leaf:
    """A path of two turns around a result of two tokens; the first token is the first turn."""
    tree = RolloutTree([9])
    first = tree.add_turn(0, [1], "", [math.log(probabilities[0])], [])
    seen = tree.add_observation(first.index, [2, 2], [], "")
    rest = [math.log(p) if p == p else NAN for p in probabilities[1:]]
    last = tree.add_turn(seen.index, [3] * len(rest), "", rest, [])
    tree.end(last.index, (0,), StopReason.EOS)
    return tree.leaves()[0]


def scored(rewards: list[float], leaves: list[Leaf] | None = None, size: int | None = None) -> ScoredLeaves:
    values = torch.tensor(rewards)
    return ScoredLeaves(
        leaves=leaves or [leaf(0.5, 0.5)] * len(rewards),
        rewards=values,
        of_all_ranks=values,
        trained=torch.ones(len(rewards), dtype=torch.bool),
        size=size or len(rewards),
    )


# Weights -------------------------------------------------------------------------------------------------------------


def test_the_weight_of_a_leaf_sums_over_its_sampled_tokens():
    # (1 − .5)² + (1 − .9)² + (1 − .2)² = .25 + .01 + .64; the result's two tokens do not count
    assert squared_score(leaf(0.5, 0.9, 0.2), per_sequence=False) == pytest.approx(0.9)
    # three sampled tokens: .9 / 3²
    assert squared_score(leaf(0.5, 0.9, 0.2), per_sequence=True) == pytest.approx(0.1)


def test_a_token_without_logprob_adds_nothing():
    assert squared_score(leaf(0.5, NAN, 0.2), per_sequence=False) == pytest.approx(0.89)


def test_a_weighted_mean_skips_rewards_that_do_not_apply():
    rewards = torch.tensor([[1.0, 0.0, NAN], [2.0, 2.0, 2.0], [NAN, NAN, NAN], [0.0, 1.0, 2.0]])
    weights = torch.tensor([[1.0, 3.0, 9.0], [0.1, 0.2, 0.3], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    means = weighted_means(rewards, weights)
    assert means[0] == 0.25  # 1 · 1 / (1 + 3)
    assert means[1] == 2.0  # exactly
    assert means[2].isnan()
    assert means[3] == 1.0  # no weights: the plain mean


def test_the_score_norm_baseline_is_closer_to_uncertain_leaves():
    certain, uncertain = leaf(1.0, 0.9), leaf(0.9, 0.8)  # weights .01 and .01 + .04 = .05
    given = scored([1.0, 0.0], [certain, uncertain])
    baselines = ScoreNorm(per_sequence=False, cap=None)(given)
    assert baselines.tolist() == pytest.approx([1 / 6, 1 / 6])  # .01 / .06
    # advantages without scaling: 5/6 and −1/6
    assert advantages_of(given, baselines, "none").tolist() == pytest.approx([5 / 6, -1 / 6])
    # with the standard deviation √.5 of (1, 0)
    spread = math.sqrt(0.5) + 1e-4
    assert advantages_of(given, baselines, "group").tolist() == pytest.approx([5 / 6 / spread, -1 / 6 / spread])


def test_the_cap_limits_weights_to_a_multiple_of_the_median():
    leaves = [leaf(1.0, 0.9), leaf(1.0, 0.9), leaf(1.0, 0.0 + 1e-30)]  # weights .01, .01 and 1
    given = scored([1.0, 1.0, 0.0], leaves)
    free = ScoreNorm(per_sequence=False, cap=None)(given)[0]
    capped = ScoreNorm(per_sequence=False, cap=3.0)(given)[0]
    assert float(free) == pytest.approx(0.02 / 1.02)
    assert float(capped) == pytest.approx(0.02 / 0.05)  # the third weight is 3 · .01


def test_leaves_that_do_not_count_are_not_in_the_median_of_the_cap():
    leaves = [leaf(1.0, 0.9), leaf(1.0, 0.9), leaf(1.0, 0.8), leaf(1.0, 0.0 + 1e-30)]  # weights .01, .01, .04 and 1
    given = scored([-1.0, NAN, 1.0, 0.0], leaves)
    given.trained[0] = False
    free = ScoreNorm(per_sequence=False, cap=None)(given)[0]
    capped = ScoreNorm(per_sequence=False, cap=3.0)(given)[0]
    assert float(free) == pytest.approx(0.04 / 1.04)
    assert float(capped) == pytest.approx(0.04 / 0.16)  # the last weight is 3 · .04, the lower one of two
    given.trained[:] = False
    assert ScoreNorm(per_sequence=False, cap=3.0)(given).tolist() == [0.0] * 4  # the plain mean


def test_a_leaf_that_is_not_trained_has_no_weight():
    given = scored([1.0, 0.0, 0.0])
    given.trained[1] = False
    assert ScoreNorm(per_sequence=False, cap=None)(given).tolist() == [0.5, 0.5, 0.5]


# Other baselines and the scale ---------------------------------------------------------------------------------------


def test_the_batch_baseline_and_scale_give_z_scores_over_the_batch():
    given = scored([1.0, 0.0, 0.0, 0.0], size=2)
    advantages = advantages_of(given, BatchMean()(given), "batch")
    # mean .25; sample deviation √((.75² + 3 · .25²) / 3) = .5
    assert advantages.tolist() == pytest.approx([0.75 / 0.5001, *[-0.25 / 0.5001] * 3])


def test_the_running_baseline_is_the_average_of_earlier_rollouts():
    baseline = Running(0.5)
    assert baseline(scored([1.0, 0.0])).tolist() == [0.5, 0.5]  # its own mean, as there is none before it
    assert baseline(scored([1.0, 1.0])).tolist() == [0.5, 0.5]
    assert baseline(scored([0.0, NAN])).tolist() == [0.75, 0.75]  # .5 · .5 + .5 · 1
    assert baseline(scored([NAN, NAN])).tolist() == [0.0, 0.0]
    resumed = Running(0.5)
    resumed.state = baseline.state
    assert resumed(scored([9.0, 9.0])).tolist() == [0.375, 0.375]


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_a_leaf_without_reward_has_no_advantage(scale):
    given = scored([1.0, NAN, 0.0], size=3)
    assert advantages_of(given, BatchMean()(given), scale)[1] == 0.0


def test_a_group_of_equal_rewards_has_no_advantage_under_the_groups_deviation():
    given = scored([1.0, 1.0, 0.0, 1.0], size=2)
    assert advantages_of(given, BatchMean()(given), "group")[:2].tolist() == [0.0, 0.0]
    # without division the group is compared with the batch
    assert advantages_of(given, BatchMean()(given), "none")[:2].tolist() == [0.25, 0.25]


@pytest.mark.parametrize("reward", [0.1, 0.7, 0.9, 1.1, 2 / 3, -0.3, 1234.567])
@pytest.mark.parametrize("size", [2, 6, 8, 12, 16])
def test_rewards_that_are_equal_up_to_rounding_have_no_advantage(reward, size):
    """The computed deviation of equal numbers is not 0: of 0.9, it is 6e-8 for M = 6. A baseline far from them would
    give advantages of thousands."""
    rewards = torch.full((size,), reward)
    given = scored([*rewards[1:].tolist(), float(rewards[0].nextafter(torch.tensor(9999.0)))])
    for scale in ("group", "batch"):
        assert advantages_of(scored(rewards.tolist()), torch.full((size,), 0.3), scale).tolist() == [0.0] * size
        assert advantages_of(given, torch.full((size,), 0.3), scale).tolist() == [0.0] * size


# Metrics -------------------------------------------------------------------------------------------------------------


def test_metrics_count_baselines_and_leaves_below_the_mean_that_are_reinforced():
    # Leaves below the mean: two of group 0, with b = −.1 and so an advantage of .1; one of group 1, with b = 0 and so
    # none; one of group 2, with −.4. Two of four are reinforced.
    given = scored([1.0, 0.0, 0.0, 1.0, 0.5, 0.0, 1.0, 1.0, 0.0], size=3)
    baselines = torch.tensor([-0.1] * 3 + [0.0] * 3 + [0.4] * 3)
    tally = Tally()
    tally_baseline(given, baselines, given.rewards - baselines, tally)
    assert tally.values() == pytest.approx(
        {"baseline/value": 0.1, "baseline/negative": 1 / 3, "baseline/reinforced_below_mean": 0.5}
    )


def test_an_alarm_reports_reinforced_wrong_answers():
    alarms, tally = Alarms(Threshold()), Tally()
    tally.add("baseline/reinforced_below_mean", 30, 100)
    (message,) = alarms.check(tally)
    assert "30% of the leaves with less reward" in message and "score_norm_cap" in message


# In the trainer ------------------------------------------------------------------------------------------------------

ROWS = Dataset.from_list(
    [{"prompt": [{"role": "user", "content": f"what is {i}"}], "answer": [str(i)], "task": "math"} for i in range(8)]
)


def scripted() -> ScriptedEngine:
    stops = ("</search>", "</python>")
    return ScriptedEngine(
        tokenizer(), SamplingParams(eos_ids=(tokenizer().eos_token_id,), stop_strings=stops), branching_script
    )


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def trainer(model_path, folder, engine=None, reward_funcs=None, **settings) -> ARPOTrainer:
    args = ARPOConfig(
        str(folder),
        **{
            "num_generations": 4,
            "per_device_train_batch_size": 8,
            "max_completion_length": 120,
            "rollout_schedule": "rounds",
            "save_strategy": "no",
            "max_steps": 2,
            **ON_CPU,
            **settings,
        },
    )
    rewards = HierarchicalReward() if reward_funcs is None else reward_funcs
    return ARPOTrainer(model_path, rewards, args, ROWS, tools=[search, python], engine=engine)


def test_score_norm_of_a_rollout_equals_the_values_from_its_trees(model_path, tmp_path):
    made = trainer(model_path, tmp_path, scripted(), advantage_baseline="score_norm", **EXACT)
    made.model.train()
    batch = made._generate_and_score_completions([ROWS[i // 4] for i in range(8)])
    # every token has logprob −.5, so a leaf of T tokens has w = T · (1 − e^−.5)² / T² ∝ 1 / T
    lengths = (batch["completion_mask"] * batch["tool_mask"]).sum(dim=1).double().view(2, 4)
    rewards = made._last_rewards.double().view(2, 4)
    b = (rewards / lengths).sum(dim=1) / (1 / lengths).sum(dim=1)
    expected = (rewards - b[:, None]) / (rewards.std(dim=1, keepdim=True) + 1e-4)
    assert rewards.std(dim=1).min() > 0
    torch.testing.assert_close(batch["advantages"].double(), expected.flatten(), rtol=1e-4, atol=1e-4)
    assert list(made._logs["advantages"]) == batch["advantages"].tolist()
    assert made._metrics["train"]["arpo/baseline/value"] == [pytest.approx(float(b.mean()), abs=1e-5)]


@pytest.mark.parametrize("baseline", ["score_norm", "batch", "running"])
def test_evaluation_keeps_the_advantages_of_trl(model_path, tmp_path, baseline):
    made = trainer(model_path, tmp_path, scripted(), advantage_baseline=baseline, num_generations_eval=4)
    made.model.eval()
    batch = made._generate_and_score_completions([ROWS[i // 4] for i in range(8)])
    rewards = made._last_rewards.view(2, 4)
    expected = (rewards - rewards.mean(dim=1, keepdim=True)) / (rewards.std(dim=1, keepdim=True) + 1e-4)
    torch.testing.assert_close(batch["advantages"], expected.flatten())
    assert made._baseline.state is None
    assert "arpo/baseline/value" not in made._metrics["eval"]


def test_score_norm_needs_an_engine_with_logprobs(model_path, tmp_path):
    blind = scripted()
    blind.has_logprobs = False
    with pytest.raises(ConfigError, match=r"advantage_baseline 'score_norm' .* ScriptedEngine returns none"):
        trainer(model_path, tmp_path, blind, advantage_baseline="score_norm")
    trainer(model_path, tmp_path, blind)  # others take any engine


@pytest.mark.parametrize(
    ("settings", "reader"),
    [
        ({"branch_rule": "surprisal", "branch_rule_kwargs": {"rounds": 1}}, "branch_rule 'surprisal'"),
        ({"branch_rule": "schedule"}, "branch_rule 'schedule'"),
        ({"branch_rule": "schedule", "branch_rule_kwargs": {"widths": [2, 2]}}, None),
        (
            {"advantage_attribution": "tree", "advantage_attribution_kwargs": {"average": "softmax"}},
            "advantage_attribution 'tree'",
        ),
        ({"advantage_attribution": "tree"}, None),
    ],
)
def test_rules_and_credits_that_read_logprobs_need_an_engine_with_them(model_path, tmp_path, settings, reader):
    blind = scripted()
    blind.has_logprobs = False
    settings = {"initial_rollouts": 2} | settings
    if reader is None:
        trainer(model_path, tmp_path, blind, **settings)
        return
    with pytest.raises(ConfigError, match=f"{reader} reads the sampling logprobs .* ScriptedEngine returns none"):
        trainer(model_path, tmp_path, blind, **settings)


@pytest.mark.slow
@pytest.mark.parametrize("baseline", ["score_norm", "batch", "running"])
def test_every_baseline_trains_with_the_real_engine(model_path, tmp_path, baseline):
    made = trainer(model_path, tmp_path, advantage_baseline=baseline, scale_rewards="batch", max_completion_length=24)
    made.train()
    assert made.state.global_step == 2
    made._baseline.state = 0.25
    other = trainer(model_path, tmp_path / "other", advantage_baseline=baseline, max_completion_length=24)
    other.load_state_dict(made.state_dict())
    assert other._baseline.state == 0.25


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"advantage_baseline": "median"}, r"advantage_baseline is 'median'; expected one of .*'score_norm'"),
        ({"score_norm_cap": 3.0}, "score_norm_cap is 3.0, but advantage_baseline is 'mean'"),
        ({"advantage_baseline": "score_norm", "score_norm_cap": 0.5}, "score_norm_cap is 0.5; expected"),
        ({"running_baseline_decay": 1.0}, "running_baseline_decay is 1.0; expected"),
        ({"running_baseline_decay": 0.5}, "running_baseline_decay is 0.5, but advantage_baseline is 'mean'"),
        (
            {"advantage_baseline": "running", "multi_objective_aggregation": "normalize_then_sum"},
            "advantage_baseline is 'running', but multi_objective_aggregation is 'normalize_then_sum'",
        ),
    ],
)
def test_settings_that_cannot_work_are_errors(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message):
        ARPOConfig(str(tmp_path), **ON_CPU, **settings)
