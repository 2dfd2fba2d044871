"""Every user mistake with the trainer raises an error that explains it, before the first step if possible.

Settings alone are in test_config.py, datasets alone in test_data.py, tools alone in test_box.py, and mistakes of the
model in test_sampler.py.
"""

import asyncio
import json
import math
import os
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset, DatasetDict, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration, TrainerCallback
from trl import GRPOConfig

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.common.pretrained import causal_config
from arpo_trl.errors import ArpoError, CheckpointError, ConfigError, DataError, RewardError, ToolSpecError
from arpo_trl.rewards import HierarchicalReward, LLMJudge
from arpo_trl.rollout.engines.base import SamplingParams, TurnRequest
from arpo_trl.rollout.engines.scripted import ScriptedEngine, ScriptedTurn
from arpo_trl.training.streams import checked_stream
from support import (
    ANSWER,
    ON_CPU,
    python,
    save_tiny_model,
    search,
    tiny_model,
    tokenizer,
    with_template,
    without_a_layer,
)

ROW = {"prompt": [{"role": "user", "content": "what is the answer"}], "answer": ["1"]}
GOOD = ROW | {"task": "math"}
CONTEXT = 1024
"""Of support's tiny model."""


@pytest.fixture(scope="session")
def model_path(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def make(model_path, tmp_path):
    """`make(…)` is a trainer like any other but for what is given; nothing in it samples from the model."""

    def made(*, args=None, settings=(), rows=(ROW,), **given) -> ARPOTrainer:
        if args is None:
            args = ARPOConfig(
                **{
                    "output_dir": str(tmp_path / "run"),
                    "num_generations": 4,
                    "per_device_train_batch_size": 4,
                    "max_completion_length": 60,
                    "max_steps": 1,
                    "save_strategy": "no",
                    **ON_CPU,
                    **dict(settings),
                }
            )
        eos = tokenizer().eos_token_id
        given.setdefault("model", model_path)
        given.setdefault("reward_funcs", lambda completions, **_: [0.0] * len(completions))
        given.setdefault("tools", [search, python])
        given.setdefault("train_dataset", Dataset.from_list(list(rows)))
        engine = ScriptedEngine(tokenizer(), SamplingParams(eos_ids=(eos,)), lambda request, context: ANSWER)
        return ARPOTrainer(args=args, **{"engine": engine, **given})

    return made


@pytest.mark.parametrize("rows", [[ROW], [ROW, ROW]])
def test_a_streamed_dataset_trains(make, rows):
    stream = Dataset.from_list(rows).to_iterable_dataset()
    trainer = make(train_dataset=stream, eval_dataset={"some": stream})
    trainer.train()
    assert trainer.state.global_step == 1
    assert "eval_some_loss" in trainer.evaluate()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([{"role": "user", "content": " "}], "Dataset row 1: 'prompt' is .*; expected some text in it"),
        ([], r"Dataset row 1: 'prompt' is \[\]; expected text or a list of messages"),
        ([{"role": "usr", "content": "hi"}], "Dataset row 1: message 0 of 'prompt' has the role 'usr'"),
    ],
)
def test_a_bad_row_of_a_streamed_dataset_is_the_error_of_one_that_is_not(make, bad, message):
    rows = Dataset.from_list([ROW, {**ROW, "prompt": bad}])
    with pytest.raises(DataError, match=message):
        make(train_dataset=rows)
    with pytest.raises(DataError, match=message):
        make(train_dataset=rows.to_iterable_dataset(), settings={"max_steps": 2}).train()
    with pytest.raises(DataError, match=message):
        make(eval_dataset={"some": rows.to_iterable_dataset()}).evaluate()


def test_all_splits_in_place_of_the_training_dataset_are_named(make):
    splits = DatasetDict({"train": Dataset.from_list([ROW]), "test": Dataset.from_list([ROW])})
    with pytest.raises(
        ConfigError, match=r"train_dataset with the splits \['train', 'test'\] is a DatasetDict; expected"
    ):
        make(train_dataset=splits)


def test_parts_of_a_content_that_the_template_cannot_take_are_named(make, model_path):
    row = {"prompt": [{"role": "user", "content": [{"type": "text", "text": "what is"}]}]}
    with pytest.raises(DataError, match=r"row 0: the content of a message is a list of parts, and .* Images are not"):
        make(rows=[row], processing_class=with_template("qwen2_5"))


@pytest.mark.parametrize(
    ("settings", "tools", "said"),
    [({}, [search], 1), ({}, None, 0), ({"tool_protocol": "chat_template"}, [search], 0)],
)
def test_only_a_run_that_needs_tags_is_warned_of_paths_without_them(make, caplog, settings, tools, said):
    plain = ScriptedEngine(tokenizer(), SamplingParams(eos_ids=(tokenizer().eos_token_id,)), lambda r, c: "four")
    make(settings=settings, tools=tools, engine=plain, processing_class=with_template("qwen2_5")).train()
    assert caplog.text.count("neither a valid tool call nor an answer") == said


def test_a_tool_that_changes_the_working_folder_does_not_move_the_run(make, tmp_path, monkeypatch, caplog):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def leaves(completions):
        os.chdir(tmp_path / "elsewhere")
        return [0.0] * len(completions)

    make(settings={"output_dir": "run", "trajectory_log_rate": 1.0}, reward_funcs=leaves).train()
    assert (tmp_path / "run/trajectories").is_dir() and not list((tmp_path / "elsewhere").iterdir())
    assert "changed the working folder of the run" in caplog.text


def test_a_tool_or_reward_that_changes_modes_of_torch_does_not_end_the_run(make):
    def sets_dtype(query: str) -> str:
        """Searches.

        Args:
            query: What to look for.
        """
        torch.set_default_dtype(torch.float64)
        return "found"

    def sets_modes(completions):
        torch.set_default_dtype(torch.float64)
        torch.set_grad_enabled(False)
        return [0.0] * len(completions)

    sets_dtype.__name__ = "search"

    def searches(request: TurnRequest, context: str) -> str:
        return ANSWER if request.key[-1] else "<search>iron</search>"

    engine = ScriptedEngine(tokenizer(), SamplingParams(eos_ids=(tokenizer().eos_token_id,)), searches)
    trainer = make(settings={"max_steps": 2}, tools=[sets_dtype], reward_funcs=sets_modes, engine=engine)
    trainer.train()
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert trainer.state.global_step == 2


@pytest.mark.parametrize("resume", [None, "false", "none"])
def test_a_run_over_the_trees_of_an_earlier_one_is_warned_of(make, caplog, resume):
    make(settings={"trajectory_log_rate": 1.0}).train()
    assert "trees of an earlier run" not in caplog.text
    make(settings={"trajectory_log_rate": 1.0}).train(resume)
    assert "trajectories contains trees of an earlier run" in caplog.text


def test_an_evaluation_before_training_is_no_earlier_run(make, caplog):
    settings = {"trajectory_log_rate": 1.0, "per_device_eval_batch_size": 4}
    trainer = make(settings=settings, eval_dataset=Dataset.from_list([ROW]))
    trainer.evaluate()
    trainer.train()
    files = {path.name for path in Path(trainer.args.output_dir, "trajectories").iterdir()}
    assert files == {"eval-000000-rank0.jsonl", "step-000000-rank0.jsonl"}
    assert "trees of an earlier run" not in caplog.text


def test_a_column_that_a_setting_removes_is_told_from_one_that_is_missing(make):
    def reward(completions, answer):
        return [0.0] * len(completions)

    with pytest.raises(RewardError, match=r"requires \['answer'\], but remove_unused_columns is true, .*Set it"):
        make(reward_funcs=reward, settings={"remove_unused_columns": True}).train()
    with pytest.raises(RewardError, match=r"requires \['environments'\], but there is no environment_factory"):
        make(reward_funcs=lambda completions, environments: [0.0]).train()
    with pytest.raises(RewardError, match=r"requires \['answer'\], but the dataset has no such column"):
        make(reward_funcs=reward, rows=[{"prompt": ROW["prompt"]}]).train()


def test_a_row_of_a_streamed_dataset_without_a_prompt_is_an_error(make):
    with pytest.raises(DataError, match=r"no column 'prompt'; it has \['question'\]. Rename a column"):
        make(train_dataset=Dataset.from_list([{"question": "?"}]).to_iterable_dataset()).train()


def test_rows_of_a_streamed_dataset_for_environments_need_no_prompt_but_no_bad_one():
    rows = Dataset.from_list([{"floor": 1}]).to_iterable_dataset()
    assert list(checked_stream(rows, needs_prompt=False)) == [{"floor": 1}]
    with pytest.raises(DataError, match=r"Dataset row 0: 'prompt' is ' '; expected some text in it"):
        list(checked_stream(Dataset.from_list([{"prompt": " "}]).to_iterable_dataset(), needs_prompt=False))


def test_a_streamed_dataset_without_rows_is_an_error_at_once(make):
    nothing = IterableDataset.from_generator(lambda: iter(()))
    for given in ({"train_dataset": nothing}, {"eval_dataset": nothing}, {"eval_dataset": {"some": nothing}}):
        with pytest.raises(DataError, match="The dataset is empty; expected at least one row"):
            make(**given)


def test_a_streamed_dataset_with_too_few_rows_for_a_step_is_an_error(make):
    trainer = make(
        train_dataset=Dataset.from_list([ROW]).to_iterable_dataset(), settings={"per_device_train_batch_size": 8}
    )
    with pytest.raises(DataError, match=r"training dataset has 1 rows, but a generation batch has 2 prompts: 8 comp"):
        trainer.train()


def test_what_the_bad_ones_are_made_from_trains(make):
    trainer = make()
    trainer.train()
    assert trainer.state.global_step == 1


# Arguments of the trainer --------------------------------------------------------------------------------------------


def test_a_bonus_tool_that_the_run_does_not_have_is_an_error_unless_it_is_the_default(make):
    row = {**ROW, "answer": ["1"], "task": "math"}
    with pytest.raises(
        ConfigError, match=r"bonus_tools .* has \['pythom'\], but the run has the tools \['search', 'py"
    ):
        make(rows=[row], reward_funcs=HierarchicalReward(bonus_tools=["search", "pythom"]))
    make(rows=[row], reward_funcs=HierarchicalReward(bonus_tools=["search"]))
    make(rows=[row], reward_funcs=HierarchicalReward(), tools=[search])


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (None, r"The script returned None for turn \(0, 0, 0\); expected text or a ScriptedTurn"),
        (ScriptedTurn(text=ANSWER, entropies=[]), r"The script returned no entropies for turn \(0, 0, 0\)"),
    ],
)
def test_a_script_that_returns_no_turn_is_an_error_that_names_the_turn(make, made, message):
    settings = SamplingParams(eos_ids=(tokenizer().eos_token_id,))
    with pytest.raises(ConfigError, match=message):
        make(engine=ScriptedEngine(tokenizer(), settings, lambda request, context: made)).train()


@pytest.mark.parametrize(
    ("reward_funcs", "message"),
    [
        (5, "reward_funcs has 5; expected functions, models of transformers or their names"),
        ((5,), "reward_funcs has 5; expected functions"),
        (torch.nn.Linear(2, 2), r"reward_funcs has Linear\(.*\); expected functions"),
        (LLMJudge, r"reward_funcs has the class LLMJudge; expected a function or an instance, such as LLMJudge\(\)"),
    ],
)
def test_what_is_no_reward_function_is_an_error(make, reward_funcs, message):
    with pytest.raises(ConfigError, match=message):
        make(reward_funcs=reward_funcs)


def test_reward_functions_may_be_a_tuple_and_cannot_change_each_others_arguments(make):
    seen = []

    def clears(completions, tool_calls, **_):
        for calls in (completions, tool_calls):
            calls.clear()
        return [0.0] * 4

    def reads(completions, tool_calls, **_):
        seen.append((len(completions), len(tool_calls)))
        return [0.0] * 4

    make(reward_funcs=(clears, reads)).train()
    assert seen == [(4, 4)]


def test_rewards_of_the_same_name_have_their_own_metrics_and_columns(make, capsys):
    def constant(value, completions):
        return [value] * len(completions)

    given = [partial(constant, 1.0), partial(constant, 2.0), lambda completions: [3.0] * len(completions)]
    trainer = make(reward_funcs=given, settings={"log_completions": True})
    trainer.train()
    log = trainer.state.log_history[0]
    means = {name: value for name, value in log.items() if name.startswith("rewards/") and name.endswith("mean")}
    assert means == {"rewards/constant/mean": 1, "rewards/constant_2/mean": 2, "rewards/<lambda>/mean": 3}
    assert {name: len(column) for name, column in trainer._logs["rewards"].items()} == {
        "constant": 4,
        "constant_2": 4,
        "<lambda>": 4,
    }


def test_an_error_tells_rewards_of_the_same_name_apart(make):
    def reward_of(value):
        def reward(completions):
            return [value] * len(completions)

        return reward

    with pytest.raises(RewardError, match="The reward function 'reward_2' returned nan"):
        make(reward_funcs=[reward_of(1.0), reward_of(math.nan)]).train()


def test_too_few_rows_for_a_step_are_an_error(make):
    trainer = make(settings={"per_device_train_batch_size": 8})
    with pytest.raises(DataError, match=r"has 1 rows, but a generation batch has 2 prompts: 8 completions ÷ num_gen"):
        trainer.train()


@pytest.mark.parametrize("name", ["rollout_func"])
def test_other_ways_to_roll_out_are_refused(make, name):
    with pytest.raises(ConfigError, match=f"{name} is set, but ARPOTrainer samples trees itself. Pass `tools`"):
        make(**{name: lambda *_: None})


def look(text: str) -> str:
    """Look something up.

    Args:
        text: What to look up.
    """
    return text


class Watcher(TrainerCallback):
    """Does nothing."""


REWARD_MODEL = {"reward_funcs": "reward-model"}
"""By its name. It is not loaded, since its tokenizer is checked before."""


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"model": None}, "model is None; expected a folder or a Hub id, as text, or a causal language model"),
        ({"model": Path("model")}, r"model is \w+Path\('model'\); expected a folder"),
        ({"model": AutoModelForCausalLM}, "model is the class AutoModelForCausalLM; expected"),
        ({"model": torch.nn.Linear(2, 2)}, "model is a Linear; expected"),
        (
            {"model": T5ForConditionalGeneration(T5Config(d_model=8, d_kv=4, d_ff=8, num_layers=1, vocab_size=8))},
            "model is a T5ForConditionalGeneration; expected .* a causal language model",
        ),
        ({"model": tiny_model().model}, "model is a Qwen3Model; expected .* a causal language model"),
        ({"args": {"output_dir": "run"}}, "args is a dict; expected an ARPOConfig, which adds"),
        ({"args": GRPOConfig("run", use_cpu=True)}, "args is a GRPOConfig; expected an ARPOConfig"),
        ({"processing_class": "model"}, "processing_class is 'model'; expected a tokenizer, such as AutoTokenizer"),
        ({"processing_class": {}}, "processing_class is a dict; expected a tokenizer"),
        ({"processing_class": AutoTokenizer}, "processing_class is the class AutoTokenizer; expected a tokenizer"),
        ({"tools": look}, r"tools is the function look; expected a list of functions, such as \[search\]"),
        ({"tools": "look"}, "tools is 'look'; expected a list of functions"),
        ({"tools": {"look": look}}, "tools is a dict; expected a list of functions"),
        (
            {"callbacks": Watcher()},
            r"callbacks is a Watcher; expected a list of callbacks, such as \[MyCallback\(\)\]",
        ),
        ({"callbacks": Watcher}, "callbacks is the class Watcher; expected a list"),
        ({"callbacks": [Watcher(), "wandb"]}, r"callbacks\[1\] is 'wandb'; expected a TrainerCallback, or a class"),
        (
            {"optimizers": None},
            r"optimizers is None; expected a pair \(optimizer, scheduler\), in which each may be None",
        ),
        ({"optimizers": (None,)}, "optimizers is a tuple; expected a pair"),
        (
            {"optimizers": (torch.optim.AdamW, None)},
            r"optimizers\[0\] is the class AdamW; expected an optimizer that has",
        ),
        ({"optimizers": (None, "linear")}, r"optimizers\[1\] is 'linear'; expected a scheduler that has been created"),
        (
            REWARD_MODEL | {"reward_processing_classes": "reward-model"},
            r"reward_processing_classes\[0\] is 'reward-model'; expected the reward model's tokenizer, or None",
        ),
        ({"eval_dataset": "rows.jsonl"}, r"eval_dataset is 'rows.jsonl'; expected a dataset, such as load_dataset"),
        ({"eval_dataset": 3}, "eval_dataset is 3; expected a dataset"),
        ({"eval_dataset": [Dataset.from_list([ROW])]}, "eval_dataset is a list; expected .* a dict of datasets"),
        ({"eval_dataset": {"hard": "rows.jsonl"}}, r"eval_dataset\['hard'\] is 'rows.jsonl'; expected a dataset"),
        ({"eval_dataset": {"hard": None}}, r"eval_dataset\['hard'\] is None; expected a dataset"),
        ({"eval_dataset": {1: [ROW]}}, "A key of eval_dataset is 1; expected a text, which metrics then contain"),
        ({"eval_dataset": {None: [ROW]}}, "A key of eval_dataset is None; expected a text"),
        ({"engine": "vllm"}, r"engine is 'vllm'; expected an engine, such as ScriptedEngine\(…\)"),
        ({"engine": ScriptedEngine}, "engine is the class ScriptedEngine; expected an engine"),
    ],
)
def test_an_argument_of_a_wrong_kind_is_an_error_before_anything_is_loaded(make, tmp_path, given, message):
    with pytest.raises(ConfigError, match=message):
        make(**given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "given",
    [
        {"callbacks": [Watcher, Watcher()]},
        {"optimizers": [None, None]},
        {"reward_processing_classes": ["TRL ignores it for a function"]},
        {"eval_dataset": [ROW] * 4},
        {"eval_dataset": {"easy": [ROW] * 4, "hard": Dataset.from_list([ROW] * 4)}},
        {"tools": {}},
        {"quantization_config": "ignored for a loaded model", "model": tiny_model(), "processing_class": tokenizer()},
    ],
)
def test_arguments_that_grpo_accepts_train(make, given):
    evaluates = {"eval_strategy": "steps", "eval_steps": 1} if "eval_dataset" in given else {}
    trainer = make(settings={"per_device_eval_batch_size": 4, **evaluates}, **given)
    trainer.train()
    assert trainer.state.global_step == 1
    assert any("eval_reward" in log for log in trainer.state.log_history) == bool(evaluates)


@pytest.mark.parametrize("name", ["math/hard", "hard questions\n", " ", ""])
def test_an_evaluation_dataset_may_have_any_text_as_its_name_as_in_trl(make, name):
    settings = {"eval_strategy": "steps", "eval_steps": 1, "metric_for_best_model": f"eval_{name}_runtime"}
    trainer = make(settings={"per_device_eval_batch_size": 4, **settings}, eval_dataset={name: [ROW] * 4})
    trainer.train()
    assert trainer.state.best_metric is not None
    assert any(f"eval_{name}_loss" in log for log in trainer.state.log_history)


def test_no_dataset_to_evaluate_on_is_an_error_if_evaluation_is_set(make):
    with pytest.raises(ConfigError, match="eval_dataset is a dict; expected one with at least one dataset"):
        make(settings={"eval_strategy": "steps", "eval_steps": 1}, eval_dataset={})
    make(eval_dataset={})


@pytest.mark.parametrize("resume", [3, ["checkpoint-1"]])
def test_a_checkpoint_of_a_wrong_kind_is_an_error(make, resume):
    with pytest.raises(
        ConfigError, match=r"resume_from_checkpoint is .*; expected true, false or a checkpoint's folder"
    ):
        make().train(resume)


def test_a_folder_without_a_checkpoint_is_an_error_that_names_it(make, model_path):
    for folder in (model_path, Path(model_path)):
        with pytest.raises(CheckpointError, match=r"has no arpo_state.json: it is not a checkpoint of ARPOTrainer"):
            make().train(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"cache_implementation": "static"}, "cache_implementation is set, .* Unset it"),
        ({"generation_kwargs": {"num_beams": 2}}, "generation_kwargs sets num_beams, .* Remove it"),
    ],
)
def test_settings_that_the_sampler_would_ignore_are_refused(make, settings, message):
    with pytest.raises(ConfigError, match=message):
        make(settings=settings)


def test_an_output_folder_that_cannot_be_written_is_found_before_the_model_is_loaded(make, tmp_path):
    (tmp_path / "file").write_text("")  # no user, root included, can make a folder below a file
    folder = tmp_path / "file" / "run"
    with pytest.raises(ConfigError, match=r"output_dir .*run cannot be written .* Choose another folder"):
        make(settings={"output_dir": str(folder)}, model="no such model")


@pytest.mark.parametrize("name", ["trajectories", ".unfinished", "checkpoint-1"])
def test_a_file_in_the_place_of_a_runs_folder_is_found_before_the_model_is_loaded(make, tmp_path, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).write_text("notes")
    with pytest.raises(ConfigError, match=rf"run/{name} is a file, but a run creates a folder of this name\. Move it"):
        make(model=str(tmp_path / "missing"))


def test_looking_whether_a_folder_can_be_written_leaves_nothing_in_it(make, tmp_path):
    make()
    assert list((tmp_path / "run").iterdir()) == []


# Tokenizer and model -------------------------------------------------------------------------------------------------


def changed_tokenizer(model_path: str, **attributes):
    made = AutoTokenizer.from_pretrained(model_path, padding_side="left")
    for name, value in attributes.items():
        setattr(made, name, value)
    return made


def test_messages_without_a_chat_template_are_an_error(make, model_path):
    bare = changed_tokenizer(model_path, chat_template=None)
    with pytest.raises(ConfigError, match=r"the tokenizer has no chat template. Set .* and save the tokenizer"):
        make(processing_class=bare)


def test_text_prompts_need_no_chat_template(make, model_path):
    bare = changed_tokenizer(model_path, chat_template=None)
    make(processing_class=bare, rows=[{"prompt": "what is the answer", "answer": "1"}])


def test_a_tokenizer_without_eos_is_an_error(make, model_path):
    with pytest.raises(ConfigError, match=r"has no EOS token, so no turn could end. Set `tokenizer.eos_token`"):
        make(processing_class=changed_tokenizer(model_path, eos_token=None))


GEMMA_LIKE = """{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}
{{- message.role + ': ' + message.content }}{% endfor %}"""


def test_roles_that_the_template_refuses_are_found_before_the_model_is_loaded(make, model_path, tmp_path):
    gemma = changed_tokenizer(model_path, chat_template=GEMMA_LIKE)
    user, system = {"role": "user", "content": "hi"}, {"role": "system", "content": "be brief"}
    rows = [{"prompt": [user]}, {"prompt": [user]}, {"prompt": [system, user]}]
    with pytest.raises(
        DataError, match=r"row 2: .* rejects its messages, whose roles are \['system', 'user'\]: .*alter"
    ):
        make(processing_class=gemma, rows=rows, model=str(without_weights(model_path, tmp_path)))


def without_weights(model_path: str, folder: Path) -> Path:
    """A copy of the model that cannot be loaded."""
    copy = folder / "without_weights"
    shutil.copytree(model_path, copy, ignore=shutil.ignore_patterns("*.safetensors"))
    return copy


def test_a_model_whose_files_lack_weights_is_an_error(make, model_path, tmp_path):
    broken = without_a_layer(model_path, tmp_path / "broken")
    with pytest.raises(ConfigError, match=r"\d+ weights of Qwen3ForCausalLM are missing .*layers\.1\..*They would be"):
        make(model=broken)


def test_the_reference_has_to_be_whole_too(make, model_path, tmp_path):
    policy = AutoModelForCausalLM.from_pretrained(model_path)
    policy.config._name_or_path = without_a_layer(model_path, tmp_path / "broken")
    with pytest.raises(ConfigError, match=r"weights of Qwen3ForCausalLM are missing from the files of '.*broken'"):
        make(model=policy, processing_class=tokenizer(), settings={"beta": 0.1})


@pytest.mark.parametrize("kind", ["Qwen3ForSequenceClassification", "Qwen3Model", "BertForMaskedLM"])
def test_a_model_that_generates_no_text_is_found_before_it_is_loaded(make, model_path, tmp_path, kind):
    bare = without_weights(model_path, tmp_path)
    config = json.loads((bare / "config.json").read_text())
    (bare / "config.json").write_text(json.dumps(config | {"architectures": [kind]}))
    with pytest.raises(ConfigError, match=f"'.*without_weights' is a {kind} .*; expected a causal language model"):
        make(model=str(bare))
    for legitimate in (["MyForCausalLM"], [], None):
        (bare / "config.json").write_text(json.dumps(config | {"architectures": legitimate}))
        assert causal_config(str(bare)).vocab_size == config["vocab_size"]


def test_a_model_with_an_encoder_is_found_before_it_is_loaded(make, model_path, tmp_path):
    bare, config = without_weights(model_path, tmp_path), T5Config(architectures=["T5ForConditionalGeneration"])
    config.save_pretrained(bare)
    with pytest.raises(ConfigError, match=r"is a T5ForConditionalGeneration .*; expected a causal language model"):
        make(model=str(bare))


def test_a_token_without_an_embedding_is_found_before_the_model_is_loaded(make, model_path, tmp_path):
    more = changed_tokenizer(model_path)
    more.add_special_tokens({"additional_special_tokens": ["<|new|>"]})
    rows = [{"prompt": "what"}, {"prompt": "what <|new|>"}]
    bare = str(without_weights(model_path, tmp_path))
    with pytest.raises(DataError, match=r"row 1: its prompt contains the token '<\|new\|>', .*resize_token_emb"):
        make(processing_class=more, rows=rows, model=bare)
    make(processing_class=more, rows=rows[:1])  # nothing uses it


# Tools ---------------------------------------------------------------------------------------------------------------


def untyped(query):
    """Search.

    Args:
        query: What.
    """


def undocumented(query: str) -> str:
    return query


def described_in_part(query: str, limit: int = 3) -> str:
    """Search.

    Args:
        query: What.
    """
    return query


def answer(text: str) -> str:
    """Answer.

    Args:
        text: What.
    """
    return text


def named(name: str):
    def tool(query: str) -> str:
        """Search.

        Args:
            query: What.
        """
        return query

    tool.__name__ = name
    return tool


def two_texts(query: str, language: str) -> str:
    """Search.

    Args:
        query: What.
        language: In which.
    """
    return query + language


def a_number(count: int) -> str:
    """Count.

    Args:
        count: How far.
    """
    return str(count)


@pytest.mark.parametrize(
    ("tools", "message"),
    [
        ([untyped], "tool 'untyped': no schema can be built for it.* a type for each"),
        ([undocumented], "tool 'undocumented': no schema can be built for it.* needs a docstring"),
        ([described_in_part], "tool 'described_in_part': no schema can be built for it.* describes each parameter"),
        ([named("not-a-tag")], "tool 'not-a-tag': the name is used as a tag, .* Rename"),
        ([lambda query: query], "tool '<lambda>': the name is used as a tag"),
        ([answer], "tool 'answer': <answer> is a reserved tag"),
        (["search"], "A tool must be a named function, got 'search'"),
        ([search, search], "Two tools are named 'search'.* Rename one"),
        ([named("search"), search], "Two tools are named 'search'"),
    ],
)
def test_a_tool_that_cannot_be_offered_is_found_before_the_model_is_loaded(make, tools, message):
    with pytest.raises(ToolSpecError, match=message):
        make(tools=tools, model="no such model")


@pytest.mark.parametrize("tool", [two_texts, a_number])
def test_a_tool_needs_exactly_one_text_argument(make, tool):
    with pytest.raises(
        ToolSpecError, match=rf"'{tool.__name__}' has the parameters .* exactly one required `str` argument"
    ):
        make(tools=[tool])


# Datasets ------------------------------------------------------------------------------------------------------------

BAD_ROWS = [
    ([{"question": "?", "answer": "1"}], "no column 'prompt'; it has .*Rename a column"),
    ([{"prompt": "?", "answer": "1"}, {"prompt": None, "answer": "1"}], "row 1: 'prompt' is None"),
    ([{"prompt": "?", "answer": "1"}, {"prompt": " ", "answer": "1"}], "row 1: 'prompt' is ' '; expected some text"),
    ([{"prompt": "?", "turns": 3}], r"has the column\(s\) \['turns'\], .* Rename the column"),
    ([{"prompt": [{"role": "user", "content": None}], "answer": "1"}], "row 0: message 0 of 'prompt'"),
    ([{"prompt": [{"role": "usr", "content": "?"}]}], "row 0: message 0 of 'prompt' has the role 'usr'; .*'user'"),
    ([{"prompt": [{"role": "human", "content": "?"}]}], "'prompt' has the role 'human'; did you mean 'user'"),
    ([{"prompt": [{"role": "", "content": "?"}]}], "message 0 of 'prompt' is .*; expected role and content"),
]


BAD_GOLDS = [
    ([{"prompt": "?", "label": "1"}], r"needs the column 'answer', but the dataset has \['prompt', 'label'\]"),
    ([{"prompt": "?", "answer": "1"}], "needs the column 'task', but the dataset has"),
    ([{"prompt": "?", "answer": None, "task": "qa"}], "row 0, for the hierarchical reward: answer is None"),
    ([{"prompt": "?", "answer": ["1", " "], "task": "qa"}], r"row 0, .*: answer is \['1', ' '\]; expected"),
    (
        [{"prompt": "?", "answer": "1", "task": "qa"}, {"prompt": "?", "answer": "1", "task": "sums"}],
        "row 1, for the hierarchical reward: task is 'sums'; expected one of",
    ),
]


@pytest.mark.parametrize(
    ("rows", "message", "given"),
    [(*bad, {}) for bad in BAD_ROWS] + [(*bad, {"reward_funcs": [HierarchicalReward()]}) for bad in BAD_GOLDS],
)
@pytest.mark.parametrize("where", ["train", "eval", "one of several eval"])
def test_a_bad_dataset_is_found_before_the_model_is_loaded(make, rows, message, given, where):
    good, bad = Dataset.from_list([GOOD]), Dataset.from_list(rows)
    given = (
        given
        | {
            "train": {"train_dataset": bad},
            "eval": {"train_dataset": good, "eval_dataset": bad},
            "one of several eval": {"train_dataset": good, "eval_dataset": {"good": good, "bad": bad}},
        }[where]
    )
    with pytest.raises(DataError, match=message):
        make(model="no such model", **given)


def test_a_limit_for_a_tool_that_is_not_offered_is_found_before_the_model_is_loaded(make):
    with pytest.raises(ConfigError, match="name 'serach', which is not a tool; the tools are: search, python"):
        make(model="no/such-model", settings={"tool_concurrency_per_tool": {"serach": 8}})


def test_an_empty_dataset_is_an_error(make):
    with pytest.raises(DataError, match="The dataset is empty"):
        make(train_dataset=Dataset.from_dict({"prompt": [], "answer": []}))


def prompt_of(tokens: int) -> str:
    """A text prompt of exactly that many tokens."""
    text = "1" * tokens  # digits are tokens of their own
    assert len(tokenizer()(text)["input_ids"]) == tokens
    return text


@pytest.mark.parametrize("tokens", [CONTEXT, CONTEXT + 500])
def test_a_prompt_that_leaves_no_room_is_named_before_the_first_step(make, tokens):
    rows = [{"prompt": "?", "answer": "1"}, {"prompt": prompt_of(tokens), "answer": "1"}]
    with pytest.raises(ConfigError, match=rf"row 1: its prompt has {tokens} tokens, .* {CONTEXT}, .* Shorten or drop"):
        make(rows=rows)


def test_a_prompt_that_leaves_room_for_one_token_is_allowed(make):
    make(rows=[{"prompt": prompt_of(CONTEXT - 1), "answer": "1"}])


def test_an_evaluation_prompt_that_leaves_no_room_is_named_too(make):
    with pytest.raises(ConfigError, match=f"its prompt has {CONTEXT} tokens"):
        make(
            rows=[{"prompt": "?", "answer": "1"}],
            eval_dataset=Dataset.from_list([{"prompt": prompt_of(CONTEXT), "answer": "1"}]),
        )


def test_a_prompt_of_many_short_messages_is_measured_with_its_template(make):
    # 300 messages of one character: few bytes of text, but four tokens of template and more around each
    many = [{"role": "user", "content": "1"}] * 300
    with pytest.raises(ConfigError, match=r"row 1: its prompt has .* tokens"):
        make(rows=[ROW, {"prompt": many, "answer": ["1"]}])


# Reward functions ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ([1.0] * 3, "returned 3 rewards for 4 completions; expected a list with one number, or None, per completion"),
        ([1.0] * 5, "returned 5 rewards for 4 completions"),
        ([], "returned 0 rewards for 4 completions"),
        (None, "returned None for 4 completions"),
        (1.0, r"returned 1\.0 for 4 completions"),
        ([0.0, math.nan, 0.0, 0.0], "returned nan for completion 1; expected a finite number"),
        ([0.0, 0.0, math.inf, 0.0], "returned inf for completion 2"),
        (["good"] * 4, "returned 'good' for completion 0"),
        (torch.tensor([0.0, 0.0, 0.0, math.nan]), r"returned tensor\(nan\) for completion 3"),
        ([0.0, 1e300, 0.0, 0.0], "returned 1e\\+300 for completion 1; expected a finite number of at most 1e\\+18"),
        ([10**400] * 4, "returned 1000.* for completion 0; expected a finite number"),
        ({0.0, 1.0, 2.0, 3.0}, r"returned \{.*\} for 4 completions; expected a list"),
    ],
)
def test_an_invalid_reward_is_an_error_that_names_its_function(make, returned, message):
    def scored(completions, **columns):
        return returned

    with pytest.raises(RewardError, match=f"The reward function 'scored' {message}"):
        make(reward_funcs=scored).train()


class Untold(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "message"),
    [(SystemExit(0), "raised SystemExit: 0 "), (Untold(), r"raised Untold: \(its text cannot be made\) ")],
)
def test_a_reward_that_ends_the_program_is_an_error(make, error, message):
    def leaving(completions, **_):
        raise error

    with pytest.raises(RewardError, match=f"The reward function 'leaving' {message}"):
        make(reward_funcs=leaving).train()


def test_an_async_reward_that_ends_the_program_is_an_error(make):
    async def leaving(completions, **_):
        raise SystemExit(0)

    async def in_tasks(completions, **_):
        return await asyncio.gather(*(leaving([completion]) for completion in completions))

    for reward, name in ((leaving, "leaving"), (in_tasks, "in_tasks")):
        with pytest.raises(RewardError, match=f"The reward function '{name}' raised SystemExit: 0 "):
            make(reward_funcs=reward).train()


def test_an_async_reward_is_checked_like_any_other(make):
    async def scored(completions, **columns):
        return [1.0] * 3

    with pytest.raises(RewardError, match="The reward function 'scored' returned 3 rewards for 4 completions"):
        make(reward_funcs=[lambda completions, **_: [1.0] * 4, scored]).train()


@pytest.mark.parametrize(
    "returned",
    [
        *(
            [0, 1, 0, 1],
            [None, 1.0, 0.5, None],
            (0.0, 1.0, 0.0, 1.0),
            np.array([0.0, 1.0, 0.0, 1.0]),
            torch.arange(4.0),
        ),
        *(np.ones((4, 1)), torch.ones(4, 1), [np.array(1.0)] * 4),
    ],
    ids=["integers", "some None", "a tuple", "an array", "a tensor", "a column", "a column tensor", "arrays"],
)
def test_whatever_is_one_number_each_is_a_reward(make, returned):
    trainer = make(reward_funcs=lambda completions, **_: returned)
    trainer.train()
    assert trainer.state.global_step == 1


# Whatever it is ------------------------------------------------------------------------------------------------------


def test_an_error_before_the_first_step_leaves_the_model_as_it_was(make, model_path):
    model = AutoModelForCausalLM.from_pretrained(model_path)
    before = {name: weights.clone() for name, weights in model.state_dict().items()}
    with pytest.raises(ArpoError):
        make(model=model, tools=[a_number])
    assert all(torch.equal(weights, before[name]) for name, weights in model.state_dict().items())


def test_a_failing_step_keeps_the_logged_values(make, tmp_path: Path):
    def fails_later(completions, trainer_state, **_):
        return [math.nan if trainer_state.global_step == 1 else float(i % 2) for i in range(len(completions))]

    trainer = make(
        reward_funcs=fails_later,
        settings={"max_steps": 3, "save_strategy": "steps", "save_steps": 1, "trajectory_log_rate": 1.0},
    )
    with pytest.raises(RewardError, match="returned nan"):
        trainer.train()
    assert (tmp_path / "run" / "checkpoint-1").is_dir()
    assert [path.name for path in (tmp_path / "run" / "trajectories").iterdir()] == ["step-000000-rank0.jsonl"]
