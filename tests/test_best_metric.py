"""A `metric_for_best_model` that no evaluation has is an error, as early as this is certain."""

from functools import partial

import pytest
from datasets import Dataset
from transformers import EarlyStoppingCallback

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.errors import ConfigError
from arpo_trl.rollout.engines.base import SamplingParams
from arpo_trl.rollout.engines.scripted import ScriptedEngine
from support import ANSWER, ON_CPU, save_tiny_model, tokenizer

ROWS = Dataset.from_list([{"prompt": "what is the answer"}] * 4)
SEVERAL = {"easy": ROWS, "hard": ROWS}


def reward(completions):
    return [float(i % 2) for i in range(len(completions))]


def logs(completions, log_metric):
    log_metric("rewards/part/mean", 0.5)
    log_metric("half", 0.5)
    return reward(completions)


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make(model_path, tmp_path):
    def made(metric, *, reward_funcs=reward, eval_dataset=ROWS, callbacks=None, **settings) -> ARPOTrainer:
        args = ARPOConfig(
            str(tmp_path / "run"),
            num_generations=4,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            max_completion_length=60,
            max_steps=1,
            metric_for_best_model=metric,
            **{**ON_CPU, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "no", **settings},
        )
        params = SamplingParams(eos_ids=(tokenizer().eos_token_id,))
        engine = ScriptedEngine(tokenizer(), params, lambda request, context: ANSWER)
        return ARPOTrainer(model_path, reward_funcs, args, ROWS, eval_dataset, callbacks=callbacks, engine=engine)

    return made


@pytest.mark.parametrize(
    ("metric", "given", "available"),
    [
        ("eval_runtime", {"eval_dataset": SEVERAL}, "'eval_easy_runtime', 'eval_hard_runtime'"),
        ("rewards/rewrad/mean", {}, "'eval_rewards/reward/mean'"),
        (
            "eval_rewards/reward_3/std",
            {"reward_funcs": [reward, partial(reward)]},
            "'eval_rewards/reward/std', 'eval_rewards/reward_2/std'",
        ),
    ],
)
def test_a_metric_that_cannot_exist_is_an_error_before_the_first_step(make, metric, given, available):
    with pytest.raises(ConfigError) as raised:
        make(metric, **given)
    assert str(raised.value) == (
        f"metric_for_best_model is '{metric}', but evaluation has no number of that name; expected one of "
        f"[{available}], with or without 'eval_'."
    )


BEST = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1}


@pytest.mark.parametrize(
    ("metric", "given", "named"),
    [
        (None, BEST, "'loss'"),
        (None, BEST | {"eval_dataset": SEVERAL}, "'loss'"),
        (None, {"lr_scheduler_type": "reduce_lr_on_plateau"}, "'loss'"),
        (None, {"save_strategy": "best"}, "None"),
        ("eval_loss", {"save_strategy": "best"}, "'eval_loss'"),
        ("loss", {"callbacks": [EarlyStoppingCallback()]}, "'loss'"),
        ("hard_loss", {"eval_dataset": SEVERAL}, "'hard_loss'"),
    ],
)
def test_a_loss_does_not_tell_which_model_is_better(make, metric, given, named):
    with pytest.raises(
        ConfigError, match=f"metric_for_best_model is {named} .*Set metric_for_best_model: eval_reward"
    ):
        make(metric, **given)


@pytest.mark.parametrize("given", [{}, {"eval_dataset": SEVERAL}])
def test_another_metric_that_evaluation_does_not_have_is_an_error_that_lists_those_it_has(make, given):
    trainer = make("accuracy", **given)
    loss = "eval_easy_loss" if given else "eval_loss"
    with pytest.raises(
        ConfigError, match=rf"'accuracy', but evaluation has .*'{loss}'.*'eval_reward', .*rewards/reward"
    ):
        trainer.train()


def test_a_metric_without_a_number_is_an_error(make):
    def none(completions):
        return [None] * len(completions)

    with pytest.raises(ConfigError, match="'rewards/none/mean', but evaluation has no number of that name"):
        make("rewards/none/mean", reward_funcs=[reward, none]).train()


@pytest.mark.parametrize(
    ("metric", "given"),
    [
        ("reward", {}),
        ("eval_rewards/reward/mean", {}),
        ("rewards/reward_2/std", {"reward_funcs": [reward, partial(reward)]}),
        ("completions/mean_length", {}),
        ("arpo/tree/leaves", {}),
        ("hard_runtime", {"eval_dataset": SEVERAL}),
        ("eval_reward", {"eval_dataset": SEVERAL}),
        ("half", {"reward_funcs": logs}),
        ("rewards/part/mean", {"reward_funcs": logs}),
    ],
)
def test_every_metric_that_evaluation_has_can_choose_the_best_model(make, metric, given):
    trainer = make(metric, **given)
    trainer.train()
    assert trainer.state.best_metric is not None


def test_a_metric_that_a_subclass_adds_to_an_evaluation_can_choose_the_best_model(make, monkeypatch):
    class Own(ARPOTrainer):
        def evaluate(self, *args, **kwargs):
            return {**super().evaluate(*args, **kwargs), "eval_own": 0.5}

    monkeypatch.setitem(globals(), "ARPOTrainer", Own)
    trainer = make("own")
    trainer.train()
    assert trainer.state.best_metric == 0.5


def test_other_evaluations_may_have_other_metrics(make):
    trainer = make("hard_runtime", eval_dataset=SEVERAL)
    trainer.is_in_train = True
    assert "eval_loss" in trainer.evaluate(ROWS)
    assert "test_hard_runtime" in trainer.evaluate(metric_key_prefix="test")


def test_a_metric_that_nothing_reads_is_not_checked(make):
    make("accuracy", eval_strategy="no").train()
