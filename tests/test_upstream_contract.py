"""One test for each fact of TRL or transformers that the trainer and the engines rely on.

If an upgrade breaks one of them, the name of the test shows where to start.
"""

import ast
import contextlib
import importlib.metadata
import importlib.util
import inspect
import math
import re
import subprocess
import sys
import tomllib
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field, make_dataclass
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.data_loader import BatchSamplerShard, prepare_data_loader
from datasets import Dataset
from huggingface_hub import HfApi, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._http import default_client_factory
from packaging.requirements import Requirement
from peft import LoraConfig, get_peft_model
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import BatchSampler, DataLoader
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    MambaForCausalLM,
    MinPLogitsWarper,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    Trainer,
    TrainingArguments,
)
from transformers.cache_utils import Cache, DynamicLayer
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import (
    create_causal_mask,
    create_sliding_window_causal_mask,
    sliding_window_causal_mask_function,
)
from transformers.modeling_flash_attention_utils import FLASH_ATTN_KERNEL_FALLBACK
from transformers.utils.chat_template_utils import _get_template_variables
from transformers.utils.hub import PushInProgress
from trl import GRPOConfig, GRPOTrainer, TrlParser
from trl.generation.vllm_client import VLLMClient
from trl.generation.vllm_generation import VLLMGeneration
from trl.models import unwrap_model_for_generation
from trl.models.utils import add_hooks, remove_hooks
from trl.trainer.utils import (
    RepeatSampler,
    get_callable_name,
    is_async_callable,
    pad,
    print_prompt_completions_sample,
    shuffle_sequence_dict,
    split_tensor_dict,
)

from arpo_trl import trl_seam
from arpo_trl.publishing.push import http
from arpo_trl.rollout.engines.generation_rules import ELSEWHERE, HONOURED, REFUSED
from arpo_trl.rollout.engines.transformers import CACHE_ARGUMENT
from arpo_trl.training.prefix_sharing import EXTENDS
from support import save_tiny_model, small_model, tokenizer

M = 2
PROMPTS = ["the melting point", "of iron is", "what is", "the answer"]
ROWS = Dataset.from_list([{"prompt": prompt, "answer": [str(i)]} for i, prompt in enumerate(PROMPTS)])


def parameters(function) -> list[str]:
    return list(inspect.signature(function).parameters)


def rollout(prompts, trainer):
    """Two tokens and EOS per row, the middle one from outside; the first token tells the row."""
    eos = tokenizer().eos_token_id
    return {
        "prompt_ids": [tokenizer()(prompt)["input_ids"] for prompt in prompts],
        "completion_ids": [[20 + i, 30, eos] for i in range(len(prompts))],
        "logprobs": [[-0.5, 0.0, -0.25] for _ in prompts],
        "env_mask": [[1, 0, 1] for _ in prompts],
        "marks": [f"mark {i}" for i in range(len(prompts))],
    }


class Recorder:
    """A reward function that keeps what it was called with; rewards 0, 1, 0, 1, …"""

    __name__ = "recorder"

    def __init__(self):
        self.calls = []

    def __call__(self, completions, **columns):
        self.calls.append({"completions": completions, **columns})
        return [float(i % 2) for i in range(len(completions))]


@pytest.fixture(scope="module")
def model_path(tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def reward() -> Recorder:
    return Recorder()


@pytest.fixture
def trainer(model_path, tmp_path, reward) -> GRPOTrainer:
    """4 rows per forward, generated for 2 steps at once: 8 rows, 4 prompts."""
    made = GRPOTrainer(
        model=model_path,
        reward_funcs=reward,
        args=GRPOConfig(
            str(tmp_path),
            num_generations=M,
            per_device_train_batch_size=4,
            per_device_eval_batch_size=4,
            gradient_accumulation_steps=2,
            loss_type="grpo",
            beta=0.0,
            report_to="none",
            use_cpu=True,
        ),
        train_dataset=ROWS,
        eval_dataset=ROWS,
    )
    made.rollout_func = rollout  # after __init__, as our trainer does
    made.current_gradient_accumulation_steps = 2  # which train() sets
    made.model.train()
    return made


def batch(trainer: GRPOTrainer) -> dict:
    return trainer._generate_and_score_completions([dict(ROWS[i // M]) for i in range(8)])


# One module has all that we import from inside TRL -------------------------------------------------------------------


def test_no_module_but_the_seam_imports_from_inside_trl():
    package = Path(trl_seam.__file__).parent
    found = set()
    for path in package.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            if any(name.startswith("trl.") for name in names):
                found.add(path.name)
    assert found == {"trl_seam.py"}


@pytest.mark.slow
def test_the_seam_has_all_its_names_and_only_one_imports_vllm():
    lines = "\n".join(f"trl_seam.{name}" for name in trl_seam.__all__ if name != "VLLMGeneration")
    program = f"import sys\nfrom arpo_trl import trl_seam\n{lines}\nassert 'trl.generation' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
    assert trl_seam.VLLMGeneration is VLLMGeneration
    with pytest.raises(AttributeError, match="no attribute 'LLM'"):
        _ = trl_seam.LLM


# transformers and TRL: checkpoints -----------------------------------------------------------------------------------


class Watched(GRPOTrainer):
    """Records the order in which a run calls the methods that `Resumable` overrides."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen = []

    def _run_epoch(self, **loop):
        self.seen.append(("epoch", loop["epoch"], loop["epochs_trained"], loop["steps_trained_in_current_epoch"]))
        super()._run_epoch(**loop)

    def _load_rng_state(self, checkpoint):
        self.seen.append("generators")
        super()._load_rng_state(checkpoint)

    def training_step(self, *args, **kwargs):
        self.seen.append("step")
        return super().training_step(*args, **kwargs)

    def _save_rng_state(self, output_dir):
        self.seen.append("saved")
        super()._save_rng_state(output_dir)

    def _finalize_training(self, *args):
        self.seen.append("end")
        return super()._finalize_training(*args)


@pytest.mark.slow
def test_a_resumed_run_loads_its_generators_once_right_before_its_first_step_if_there_is_one(model_path, tmp_path):
    """Two prompts make one step, and four prompts an epoch of two: step 1 is within it, step 2 ends it."""

    def train(steps: int, resume: str | None) -> list:
        settings = GRPOConfig(
            str(tmp_path / "resumed"), num_generations=M, per_device_train_batch_size=2 * M, max_completion_length=4,
            max_steps=steps, save_steps=1, report_to="none", use_cpu=True, disable_tqdm=True,
        )  # fmt: skip
        made = Watched(model=model_path, reward_funcs=lambda completions, **_: [0.0] * len(completions),
                       args=settings, train_dataset=ROWS)  # fmt: skip
        made.train(resume_from_checkpoint=resume)
        return made.seen

    folder = tmp_path / "resumed"
    assert train(2, None) == [("epoch", 0, 0, 0), "step", "saved", "step", "saved", "end"]
    within, between = str(folder / "checkpoint-1"), str(folder / "checkpoint-2")
    assert train(2, within) == [("epoch", 0, 0, 1), "generators", "step", "saved", "end"]
    assert train(2, between) == ["end"]
    assert train(3, between) == [("epoch", 1, 1, 0), "generators", "step", "saved", "end"]


def test_a_sampler_draws_each_epochs_order_from_a_generator_of_its_own():
    sampler, generator = RepeatSampler(range(8), 1, seed=3), torch.Generator().manual_seed(3)
    for _ in range(2):
        assert list(sampler) == torch.randperm(sampler.num_samples, generator=generator).tolist()


def test_a_copied_generator_draws_the_same_and_leaves_the_first_as_it_is():
    generator = torch.Generator().manual_seed(3)
    copied = generator.clone_state()
    assert torch.randperm(8, generator=copied).tolist() == torch.randperm(8, generator=generator).tolist()


def test_accelerate_deals_the_batches_of_a_sampler_out_to_the_ranks_in_turns():
    for rank in range(2):
        dealt = BatchSamplerShard(BatchSampler(range(12), 3, drop_last=False), 2, rank, split_batches=False)
        assert list(dealt) == [list(range(start, start + 3)) for start in (3 * rank, 6 + 3 * rank)]


def test_accelerate_splits_a_stream_by_shards_where_each_rank_can_have_one():
    """Then a rank's batches repeat other rows than those of the rollout, so the trainer passes a `WholeStream`."""
    rows = Dataset.from_list([{"number": number} for number in range(8)])
    for shards, expected in ((1, [0, 1, 4, 5]), (2, [0, 1, 2, 3])):
        loader = DataLoader(rows.to_iterable_dataset(num_shards=shards), batch_size=2)
        dealt = prepare_data_loader(loader, num_processes=2, process_index=0, put_on_device=False)
        assert [int(number) for batch in dealt for number in batch["number"]] == expected


# TRL: what we override -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("_generate", ["self", "prompts"]),
        ("_generate_and_score_completions", ["self", "inputs"]),
        ("_calculate_rewards", ["self", "inputs", "prompts", "completions", "completion_ids_list"]),
        ("_compute_loss", ["self", "model", "inputs"]),
        ("training_step", ["self", "model", "inputs", "num_items_in_batch"]),
        ("get_batch_samples", ["self", "epoch_iterator", "num_batches", "device"]),
        ("train", ["self", "resume_from_checkpoint", "trial", "ignore_keys_for_eval"]),
        ("_evaluate", ["self", "trial", "ignore_keys_for_eval", "skip_scheduler"]),
        (
            "_maybe_log_save_evaluate",
            [
                *("self", "tr_loss", "grad_norm", "model", "trial", "epoch", "ignore_keys_for_eval", "start_time"),
                "learning_rate",
            ],
        ),
        ("_get_train_sampler", ["self", "dataset"]),
        ("create_accelerator_and_postprocess", ["self"]),
        ("save_model", ["self", "output_dir", "_internal_call"]),
        ("_get_output_dir", ["self", "trial"]),
        ("_save_checkpoint", ["self", "model", "trial"]),
        ("_push_from_checkpoint", ["self", "checkpoint_folder"]),
        ("_save_rng_state", ["self", "output_dir"]),
        ("_load_rng_state", ["self", "checkpoint"]),
        ("_finalize_training", ["self", "trial", "num_train_samples", "start_time"]),
        ("_load_from_checkpoint", ["self", "resume_from_checkpoint", "model"]),
        ("_issue_warnings_after_load", ["self", "load_result"]),
        ("_load_callback_state", ["self"]),
        (
            "_get_dataloader",
            ["self", "dataset", "description", "batch_size", "sampler_fn", "is_training", "dataloader_key"],
        ),
    ],
)
def test_overridden_methods_accept_our_arguments(method, expected):
    assert parameters(getattr(GRPOTrainer, method)) == expected


def test_two_settings_of_the_launch_determine_whether_the_trainer_saves_a_sharded_model():
    """When this fails, `WholeModels` may be superfluous, or without effect."""
    saved = inspect.getsource(Trainer.save_model)
    assert '"FULL_STATE_DICT" in str(self.accelerator.state.fsdp_plugin.state_dict_type)' in saved
    assert "stage3_gather_16bit_weights_on_model_save" in saved


def test_the_trainer_has_the_arguments_that_ours_passes_on_or_refuses():
    assert parameters(GRPOTrainer.__init__) == [
        *("self", "model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class"),
        *("reward_processing_classes", "callbacks", "optimizers", "quantization_config", "peft_config", "tools"),
        *("rollout_func", "environment_factory"),
    ]


def test_the_trainer_has_the_attributes_that_ours_reads(trainer):
    assert trainer.num_generations == trainer.num_generations_eval == M
    assert trainer.eos_token_ids == [tokenizer().eos_token_id]
    assert trainer._tokenizer.eos_token_id == tokenizer().eos_token_id
    assert trainer._is_vlm is False
    assert trainer.chat_template_kwargs == {}
    assert trainer.pad_to_multiple_of is None
    assert (trainer.temperature, trainer.top_p, trainer.top_k) == (1.0, 1.0, 0)
    assert trainer.min_p is None and trainer.repetition_penalty == 1.0
    assert trainer.max_completion_length == trainer.args.max_completion_length
    assert isinstance(trainer.reward_weights, torch.Tensor)
    assert trainer.model_wrapped is trainer.model
    assert trainer.num_iterations == 1
    assert trainer._current_train_step_time >= 0.0  # of the current step
    assert (trainer.vllm_importance_sampling_clip_min, trainer.vllm_importance_sampling_clip_max) == (None, 3.0)


def test_micro_batches_are_read_from_the_epochs_iterator_with_next_and_only_on_demand(trainer):
    rows = iter([[{"prompt": i}] for i in range(5)])
    batches, count = trainer.get_batch_samples(rows, 3, trainer.args.device)
    assert batches == [[{"prompt": i}] for i in range(3)] and count is None
    assert next(rows) == [{"prompt": 3}]


def test_reward_functions_are_read_at_each_call_and_get_the_columns_and_the_two_logs(trainer):
    """So that results which were computed before can take their place."""
    seen = []

    def reward(*, prompts, completions, completion_ids, log_extra, log_metric, trainer_state, **columns):
        log_extra("seen", list(completions))
        log_metric("count", float(len(completions)))
        seen.append((prompts, completions, completion_ids, trainer_state, columns))
        return [0.5, None]

    trainer.reward_funcs = [reward]
    rows = [{"prompt": "a", "answer": i, "marks": i, "completion": "no"} for i in range(2)]
    rewards = trainer._calculate_rewards(rows, ["a", "a"], ["b", "c"], [[1], [2]])
    assert rewards[0].item() == 0.5 and rewards[1].isnan()
    assert seen == [(["a", "a"], ["b", "c"], [[1], [2]], trainer.state, {"answer": [0, 1], "marks": [0, 1]})]
    assert trainer._pending_extra_logs == {"seen": ["b", "c"]} and trainer._pending_metrics == {"count": [2.0]}


def test_async_reward_functions_run_on_a_loop_of_the_trainer(model_path, tmp_path):
    async def reward(completions, **_):
        return [0.0] * len(completions)

    settings = GRPOConfig(str(tmp_path), num_generations=M, per_device_train_batch_size=M, use_cpu=True)
    made = GRPOTrainer(model=model_path, reward_funcs=reward, args=settings, train_dataset=ROWS)
    assert made.async_loop.is_running()


# TRL: rollouts -------------------------------------------------------------------------------------------------------


def test_generate_returns_an_8_tuple_around_the_rollout_function(trainer):
    prompts = ["what is", "what is"]
    ids, completion_ids, mask, completions, logprobs, extra, images, tool_images = trainer._generate(prompts)
    given = rollout(prompts, trainer)
    assert ids == given["prompt_ids"]
    assert completion_ids == given["completion_ids"]
    assert mask == given["env_mask"]
    assert logprobs == given["logprobs"]
    assert extra == {"marks": given["marks"]}  # env_mask is taken out
    assert len(completions) == 2
    assert images is None and tool_images == []


def test_where_there_are_tools_the_loops_masks_completions_and_counts_are_taken(trainer):
    assert parameters(GRPOTrainer._tool_call_loop) == [
        *("self", "prompts", "prompt_ids", "completion_ids", "completions", "logprobs", "images", "multimodal_fields"),
    ]
    trainer.tools = [print]  # after __init__, as ours does
    trainer._tool_call_loop = lambda prompts, ids, completion_ids, completions, logprobs, *_: (
        [[1, 0, 1]] * 2,
        ["ours"] * 2,
        *(completion_ids, logprobs, 3, 1, [[], []]),
    )
    trainer.rollout_func = lambda prompts, of: {**rollout(prompts, of), "logprobs": None}
    _, _, mask, completions, logprobs, *_ = trainer._generate(["what is", "what is"])
    assert (mask, completions, logprobs) == ([[1, 0, 1]] * 2, ["ours"] * 2, None)
    metrics = trainer._metrics["train"]
    assert metrics["tools/call_frequency"] == [1.5]
    assert metrics["tools/failure_frequency"] == pytest.approx([1 / 3])


def test_log_prints_completions_and_none_if_their_number_is_zero(trainer, capsys):
    """`ARPOTrainer.log` prints them itself."""
    assert parameters(print_prompt_completions_sample) == [
        *("prompts", "completions", "rewards", "advantages", "step", "num_samples", "extra"),
    ]
    trainer.log_completions = True
    (Path(trainer.args.output_dir) / "completions").mkdir()
    for name in ("prompt", "completion", "advantages"):
        trainer._logs[name].append(1.0)
    for number in (None, 0):
        trainer.num_completions_to_print = number
        trainer.log({})
        assert ("Completion" in capsys.readouterr().out) == (number is None)


def test_messages_reach_the_rollout_function_untemplated(trainer):
    seen = []

    def listens(prompts, trainer):
        seen.extend(prompts)
        return rollout(["what is"] * len(prompts), trainer)

    trainer.rollout_func = listens
    message = [{"role": "user", "content": "hello"}]
    trainer._generate([message, message])
    assert seen == [message, message]


def test_length_metrics_count_the_models_tokens_only(trainer):
    trainer._generate(["what is", "what is"])
    assert trainer._metrics["train"]["completions/mean_length"] == [2.0]  # of three tokens, one is masked


def test_extra_fields_reach_the_reward_functions_next_to_the_columns(trainer, reward):
    batch(trainer)
    call = reward.calls[0]
    assert call["marks"] == [f"mark {i}" for i in range(8)]
    assert call["answer"] == [[str(i // M)] for i in range(8)]
    assert len(call["completions"]) == len(call["prompts"]) == 8
    assert {"log_metric", "log_extra", "trainer_state", "completion_ids"} <= set(call)


def test_environments_that_are_set_while_completions_are_generated_reach_the_reward_functions(trainer, reward):
    assert trainer.environments is None and trainer.environment_factories is None

    def sets(prompts, of):
        of.environments = list(range(8))
        return rollout(prompts, of)

    trainer.rollout_func = sets
    batch(trainer)
    assert reward.calls[0]["environments"] == list(range(8))


def test_extra_fields_are_written_into_the_rows_that_were_passed(trainer):
    # which is why ours passes copies
    rows = [dict(ROWS[0]), dict(ROWS[0])]
    trainer._generate_and_score_completions(rows)
    assert rows[1]["marks"] == "mark 1"


def test_the_completions_that_generate_returns_are_the_ones_rewarded(trainer, reward, monkeypatch):
    def replaced(self, prompts):
        result = list(GRPOTrainer._generate(self, prompts))
        result[3] = [f"ours {i}" for i in range(len(prompts))]
        return tuple(result)

    monkeypatch.setattr(trainer, "_generate", replaced.__get__(trainer))
    batch(trainer)
    assert reward.calls[0]["completions"] == [f"ours {i}" for i in range(8)]


def test_the_batch_holds_group_advantages_and_masks(trainer):
    made = batch(trainer)
    # each group is rewarded 0 and 1: mean 0.5, std √(2·0.25/1) = 0.70711
    expected = 0.5 / (math.sqrt(0.5) + 1e-4)
    assert made["advantages"].tolist() == pytest.approx([-expected, expected] * 4, rel=1e-4)
    assert made["completion_ids"].shape == made["completion_mask"].shape == made["tool_mask"].shape == (8, 3)
    assert made["tool_mask"].tolist() == [[1, 0, 1]] * 8
    # what token-level losses divide by: the trained tokens of the whole batch
    assert made["num_items_in_batch"].ndim == 0
    assert int(made["num_items_in_batch"]) == 16


def test_completions_are_padded_on_the_right_in_the_order_given(trainer):
    made = batch(trainer)
    assert made["completion_ids"][:, 0].tolist() == [20 + i for i in range(8)]


def test_the_models_mode_determines_training_or_evaluation(trainer):
    trainer.model.eval()
    trainer._generate(["what is", "what is"])
    assert "completions/mean_length" in trainer._metrics["eval"]
    assert "completions/mean_length" not in trainer._metrics["train"]


def test_a_nan_reward_is_taken_as_not_applicable_without_a_word(trainer, reward):
    trainer.reward_funcs = [lambda completions, **_: [math.nan, 1.0] * (len(completions) // 2)]
    assert batch(trainer)["advantages"].tolist() == [0.0] * 8


def test_logged_metrics_are_means_and_evaluations_get_a_prefix(trainer):
    trainer._metrics["train"]["arpo/x"] = [1.0, 3.0]
    trainer.log({})
    assert trainer.state.log_history[-1]["arpo/x"] == 2.0
    trainer.model.eval()
    trainer._metrics["eval"]["arpo/x"] = [4.0]
    trainer.log({})
    assert trainer.state.log_history[-1]["eval_arpo/x"] == 4.0


# TRL: the way of the rows --------------------------------------------------------------------------------------------


def test_the_order_of_the_rows_depends_neither_on_train_sampling_strategy_nor_on_data_seed(trainer):
    """As docs/settings.md says of both."""
    before = list(trainer._get_train_sampler())
    trainer.args.train_sampling_strategy, trainer.args.data_seed = "sequential", 3
    assert list(trainer._get_train_sampler()) == before != sorted(before)


def test_rows_come_prompt_major():
    sampler = RepeatSampler(range(4), mini_repeat_count=3, batch_size=2, repeat_count=1, shuffle=False)
    assert list(sampler) == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]


def test_a_generation_batch_is_the_ranks_rows_of_all_its_steps_in_whole_groups(trainer):
    rows = next(iter(trainer.get_train_dataloader()))
    prompts = [row["prompt"] for row in rows]
    assert len(prompts) == 8  # 4 per forward × 2 steps
    assert all(prompts[i] == prompts[i + 1] for i in range(0, 8, M))
    assert sorted(set(prompts)) == sorted(PROMPTS)


def test_an_evaluation_batch_contains_whole_groups(trainer):
    rows = next(iter(trainer.get_eval_dataloader()))
    prompts = [row["prompt"] for row in rows]
    assert len(prompts) == 4
    assert all(prompts[i] == prompts[i + 1] for i in range(0, 4, M))


def test_shuffling_and_splitting_carry_per_token_advantages_along():
    ids = torch.arange(6).unsqueeze(1).repeat(1, 3)
    made = {"completion_ids": ids, "advantages": ids * 10.0, "num_items_in_batch": torch.tensor(18)}
    chunks = split_tensor_dict(shuffle_sequence_dict(made), 2)
    assert [chunk["advantages"].shape for chunk in chunks] == [(3, 3), (3, 3)]
    for chunk in chunks:
        assert torch.equal(chunk["advantages"], chunk["completion_ids"] * 10.0)
        assert int(chunk["num_items_in_batch"]) == 18
    order = torch.cat([chunk["completion_ids"][:, 0] for chunk in chunks]).tolist()
    assert sorted(order) == [0, 1, 2, 3, 4, 5]


def test_pad_lays_tensors_side_by_side():
    rows = [torch.tensor([1, 2]), torch.tensor([3])]
    assert pad(rows, padding_value=-1, padding_side="right").tolist() == [[1, 2], [3, -1]]
    assert pad(rows, padding_value=-1, padding_side="right", pad_to_multiple_of=3).shape == (2, 3)


# TRL: the loss -------------------------------------------------------------------------------------------------------


def test_the_loss_accepts_advantages_per_sequence_and_per_token(trainer):
    made = batch(trainer)
    per_token = made["advantages"].unsqueeze(1).expand(8, 3).clone()
    whole = trainer._compute_loss(trainer.model, made)
    assert torch.equal(trainer._compute_loss(trainer.model, made | {"advantages": per_token}), whole)


def test_the_loss_weighs_each_token_by_its_own_advantage(trainer):
    made = batch(trainer)
    # At the sampling weights the ratio is 1, so "grpo" is minus the mean over rows of the mean over unmasked tokens,
    # halved by the two accumulation steps: columns 0 and 2 count, column 1 is masked.
    advantages = torch.tensor([[1.0, 100.0, 2.0]] * 8)
    loss = trainer._compute_loss(trainer.model, made | {"advantages": advantages})
    assert loss.item() == pytest.approx(-(1.0 + 2.0) / 2 / 2)


def test_the_tool_mask_excludes_tokens_from_the_loss(trainer):
    made = batch(trainer)
    advantages = torch.tensor([[1.0, 100.0, 2.0]] * 8)
    mask = torch.tensor([[0, 0, 1]] * 8)
    loss = trainer._compute_loss(trainer.model, made | {"advantages": advantages, "tool_mask": mask})
    assert loss.item() == pytest.approx(-2.0 / 2)


def test_the_loss_reads_advantages_and_old_logprobs_after_it_has_computed_logprobs(trainer, monkeypatch):
    made = batch(trainer)
    compute = trainer._get_per_token_logps_and_entropies

    def changing(*args, **kwargs):
        logprobs, *others = compute(*args, **kwargs)
        made["old_per_token_logps"] = logprobs.detach() - math.log(1.1)
        made["advantages"] = torch.full((8,), 3.0)
        return logprobs, *others

    monkeypatch.setattr(trainer, "_get_per_token_logps_and_entropies", changing)
    loss = trainer._compute_loss(trainer.model, made)
    assert loss.item() == pytest.approx(-3.0 * 1.1 / 2)  # halved by the two accumulation steps
    assert trainer.importance_sampling_level == "token"
    assert trainer.epsilon_high == 0.2


def test_advantages_are_logged_for_all_ranks_after_those_of_earlier_rollouts(trainer):
    assert trainer.scale_rewards == "group"
    made = batch(trainer)
    logged = trainer._logs["advantages"]
    assert isinstance(logged, deque) and list(logged)[-8:] == made["advantages"].tolist()


def test_what_reward_functions_log_waits_for_the_end_of_scoring_and_can_be_dropped_before(trainer):
    trainer.reward_funcs = [
        lambda completions, log_metric, log_extra, **_: (
            log_metric("mark", 1.0) or log_extra("note", ["x"] * len(completions)) or [0.0] * len(completions)
        )
    ]
    given = ([dict(ROWS[0])] * 2, ["what is"] * 2, ["a"] * 2, [[20]] * 2)
    assert trainer._calculate_rewards(*given).shape == (2, 1)
    assert dict(trainer._pending_metrics) == {"mark": [1.0]}
    assert dict(trainer._pending_extra_logs) == {"note": ["x", "x"]}
    trainer._pending_metrics.clear()
    trainer._pending_extra_logs.clear()
    assert "mark" not in trainer._metrics["train"]


def test_generating_appends_to_the_metrics_and_counts_tokens_in_the_state(trainer):
    trainer._generate(["what is", "what is"])
    lengths = trainer._metrics["train"]["completions/mean_length"]
    seen = trainer.state.num_input_tokens_seen
    trainer._generate(["what is", "what is"])
    assert trainer._metrics["train"]["completions/mean_length"] is lengths and len(lengths) == 2
    assert trainer.state.num_input_tokens_seen == 2 * seen > 0


def test_logps_come_as_a_triple_of_the_completions_width(trainer):
    ids = torch.tensor([[20, 21, 22, 23, 24]])
    logps, entropies, aux_loss = trainer._get_per_token_logps_and_entropies(
        trainer.model, ids, torch.ones_like(ids), 3, compute_entropy=True
    )
    # As TRL computes them, up to bfloat16's rounding, which a CPU's kernels may do otherwise for other shapes
    with trainer.accelerator.autocast():
        logits = trainer.model(ids).logits.float().log_softmax(-1)
    expected = logits[0, 1:4].gather(1, ids[0, 2:].unsqueeze(1)).squeeze(1)
    assert torch.allclose(logps[0], expected, atol=1e-2)
    assert torch.allclose(entropies[0], -(logits.exp() * logits).sum(-1)[0, 1:4], atol=1e-2)
    assert (expected.diff().abs() > 0.1).all()  # each place has another
    assert aux_loss is None


# TRL: the model for generation ---------------------------------------------------------------------------------------


def test_unwrapping_takes_what_we_pass_and_yields_a_plain_model(trainer):
    assert {"gather_deepspeed3_params", "gradient_checkpointing_kwargs"} <= set(
        parameters(unwrap_model_for_generation)
    )
    with unwrap_model_for_generation(
        trainer.model_wrapped,
        trainer.accelerator,
        gather_deepspeed3_params=trainer.args.ds3_gather_for_generation,
        gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs,
    ) as model:
        assert isinstance(model, PreTrainedModel)


def test_full_parameters_are_summoned_through_dist(trainer):
    summoned = trainer._dist.summon_full_params(trainer.model_wrapped, recurse=False)
    assert isinstance(summoned, contextlib.AbstractContextManager)
    with summoned:
        pass


def test_the_accelerators_autocast_is_the_training_forwards(trainer):
    assert isinstance(trainer.accelerator, Accelerator)
    with trainer.accelerator.autocast():
        pass


# TRL: vLLM -----------------------------------------------------------------------------------------------------------


def test_vllm_generation_connects_in_one_method_and_names_parameters_as_vllm_does(model_path):
    """The basis of weight_sync: disk: TRL's iteration over the parameters, without TRL's connection."""

    class Unconnected(VLLMGeneration):
        def _init_vllm(self):
            self.connected = False

    model = Qwen3ForCausalLM.from_pretrained(model_path)
    names = {name for name, _ in model.named_parameters()}
    made = Unconnected(model, Accelerator(cpu=True), tokenizer(), mode="server")
    assert made.connected is False
    assert {name for name, _ in made._iter_named_params()} == names
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    merged = Unconnected(adapted, Accelerator(cpu=True), tokenizer(), mode="server")
    assert {name for name, _ in merged._iter_named_params()} == names


def test_vllm_generation_takes_what_we_give_it_and_holds_what_we_read():
    assert {"mode", "server_base_url", "server_timeout", "group_port"} <= set(parameters(VLLMGeneration.__init__))
    source = inspect.getsource(VLLMGeneration)
    for name in (
        "self.llm ",
        "self.enable_sleep_mode ",
        "self.tensor_parallel_size ",
        "self.accelerator ",
        "self.model ",
        "self._dist ",
        "sleep(level=2)",
        'wake_up(tags=["kv_cache"])',
    ):
        assert name in source
    # What `ColocatedWeights.sync` relies on, and repeats
    assert "empty_cache()" in inspect.getsource(VLLMGeneration.sync_weights)
    assert "if is_peft_model(self.model) and self.tensor_parallel_size > 1" in inspect.getsource(
        VLLMGeneration.generate
    )


def test_the_client_of_trls_nccl_transfer_sends_no_key():
    """So `ARPOConfig` refuses weight_sync: nccl with a key."""
    assert not re.search("authorization|api_?key", inspect.getsource(VLLMClient), re.IGNORECASE)


def test_a_rollout_function_is_preceded_by_a_sync_unless_the_step_is_marked_as_loaded(trainer):
    synced = []
    trainer.use_vllm = True
    trainer.vllm_generation = type("Generation", (), {"sync_weights": lambda self: synced.append(1)})()
    trainer._last_loaded_step = trainer.state.global_step
    trainer._generate(["what is", "what is"])
    assert synced == []
    trainer._last_loaded_step = -1
    trainer._generate(["what is", "what is"])
    assert synced == [1]


def test_use_vllm_alone_turns_on_the_correction_from_sampling_logprobs(trainer):
    trainer.use_vllm = True
    trainer._last_loaded_step = trainer.state.global_step
    trainer.vllm_importance_sampling_mode = "token_truncate"
    made = batch(trainer)
    assert made["importance_sampling_ratio"].shape == made["completion_ids"].shape
    expected = (made["old_per_token_logps"] - made["sampling_per_token_logps"]).exp().clamp(max=3.0)
    trained = (made["completion_mask"] * made["tool_mask"]).bool()
    assert torch.allclose(made["importance_sampling_ratio"][trained], expected[trained])
    assert trainer._metrics["train"]["sampling/sampling_logp_difference/mean"][0] > 0


# vLLM's server: what ends requests early. tests/test_vllm_server_engine.py relies on what it answers -----------------


@pytest.mark.vllm
def test_a_server_can_end_all_requests_and_takes_a_salt_for_its_prefix_cache():
    routes = (vllm_folder() / "entrypoints/serve/dev/rlhf/api_router.py").read_text("utf-8")
    assert '@router.post("/abort_requests")' in routes
    assert "cache_salt" in (vllm_folder() / "entrypoints/openai/completion/protocol.py").read_text("utf-8")


# vLLM on a CPU: where it packs weights, and how it asks for the kernel -----------------------------------------------


def vllm_folder() -> Path:
    spec = importlib.util.find_spec("vllm")
    assert spec is not None and spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


@pytest.mark.vllm
def test_vllm_packs_weights_for_a_cpu_nowhere_else():
    """A new file here packs weights that `cpu_weights` does not support."""
    packs = re.compile(
        r"convert_weight_packed|create_onednn_\w*mm\(|prepack_for_linear|prepack_moe|conv1d_weight_pack"
    )
    folder = vllm_folder()
    assert {
        str(path.relative_to(folder)) for path in folder.rglob("*.py") if packs.search(path.read_text("utf-8"))
    } == {
        "_custom_ops.py",  # defines them
        "model_executor/layers/utils.py",  # dispatch_cpu_unquantized_gemm
        "model_executor/layers/fused_moe/experts/cpu_moe.py",
        "v1/attention/backends/mla/amx_mla.py",
        "platforms/zen_cpu.py",  # speaks of it
        # quantized layers
        "model_executor/kernels/linear/mixed_precision/cpu.py",
        "model_executor/kernels/linear/scaled_mm/cpu.py",
        "models/deepseek_v4/cpu/cpu_sparse.py",
    }


@pytest.mark.vllm
def test_what_vllm_asks_of_transformers_is_in_its_extra_and_nowhere_else():
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text("utf-8"))["project"]
    (distribution,) = importlib.metadata.packages_distributions()["vllm"]
    (asked,) = [line for line in importlib.metadata.requires(distribution) if line.startswith("transformers")]
    assert Requirement(asked).specifier.contains("5.17.0") and not Requirement(asked).specifier.contains("5.18.0")
    assert "transformers<5.18" in project["optional-dependencies"]["vllm"]
    (ours,) = [line for line in project["dependencies"] if line.startswith("transformers")]
    assert all(Requirement(ours).specifier.contains(version) for version in ("5.17.0", "5.24.0"))


@pytest.mark.vllm
def test_vllms_layers_look_the_cpus_dispatch_up_when_they_are_loaded():
    for name in ("linear.py", "vocab_parallel_embedding.py"):
        source = (vllm_folder() / "model_executor/layers" / name).read_text("utf-8")
        assert " " * 12 + "from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm\n" in source
        assert "dispatch_cpu_unquantized_gemm(layer, remove_weight=" in source
    source = (vllm_folder() / "model_executor/layers/utils.py").read_text("utf-8")
    assert "return layer.cpu_linear(x, weight, bias)" in source


@pytest.mark.vllm
def test_vllms_cpu_kernels_that_take_packed_weights_are_called_as_ours_are():
    layers = vllm_folder() / "model_executor/layers"
    convolutions = (layers / "mamba/ops/cpu/gdn_attention.py").read_text("utf-8")
    for name in ("fwd", "update"):
        assert f"ops.causal_conv1d_{name}_cpu(\n            x=x," in convolutions
    assert convolutions.count("weight=weight,") == convolutions.count("is_vnni=is_vnni,") == 4
    experts = (layers / "fused_moe/experts/cpu_moe.py").read_text("utf-8")
    for name in ("_use_zentorch = is_zentorch_moe_supported(layer)", "def _padded_intermediate_size(cls, moe_config:"):
        assert name in experts
    kernel = (layers / "fused_moe/modular_kernel.py").read_text("utf-8")
    assert "self.fused_experts.apply(\n            output=fused_out,\n            hidden_states=a1q," in kernel
    latent = (layers / "attention/mla_attention.py").read_text("utf-8")
    assert 'getattr(self.impl, "uses_amx_bmm", False)' in latent
    assert "self.impl.process_weights_after_loading(act_dtype)" in latent


# TRL: helpers --------------------------------------------------------------------------------------------------------


def test_callables_are_named_and_classified_as_in_trl():
    async def later(**_):
        return []

    assert get_callable_name(Recorder()) == "recorder"
    assert get_callable_name(later) == "later"
    assert is_async_callable(later) and not is_async_callable(Recorder())


@dataclass
class Setting:
    alpha: float = 0.5


def test_the_parser_raises_on_unknown_keys(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("alpah: 0.7\n")
    with pytest.raises(ValueError, match="Unknown arguments from config file"):
        TrlParser(Setting).parse_args_and_config(["--config", str(tmp_path / "run.yaml")])


def test_the_parser_hands_a_copy_of_a_fields_metadata_to_argparse():
    class Metadata(dict):
        def copy(self):
            return {"help": self["help"]}

    setting = make_dataclass("Made", [("size", int, field(default=1, metadata=Metadata(help="How big.", range="1")))])
    parser = TrlParser(setting)  # argparse raises TypeError on a keyword that it does not know, such as range
    assert "How big. (default: 1)" in " ".join(parser.format_help().split())


def test_the_parser_tells_which_flags_are_left(tmp_path: Path):
    (tmp_path / "run.yaml").write_text("alpha: 0.7\n")
    parsed = TrlParser(Setting).parse_args_and_config(
        ["--config", str(tmp_path / "run.yaml"), "--beta", "1"], return_remaining_strings=True
    )
    assert parsed == (Setting(0.7), ["--beta", "1"])


# The Hub: why pushing is ours, and what it rests on ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("init_hf_repo", ["self", "token", "private"]),
        ("push_to_hub", ["self", "commit_message", "blocking", "token", "revision", "private", "kwargs"]),
        ("_push_from_checkpoint", ["self", "checkpoint_folder"]),
        ("_finish_current_push", ["self"]),
        ("create_model_card", ["self", "model_name", "dataset_name", "tags"]),
        ("_save", ["self", "output_dir", "state_dict"]),
    ],
)
def test_overridden_methods_of_pushing_accept_our_arguments(method, expected):
    without_private = [name for name in expected if name != "private"]  # which transformers 5.17 did not have yet
    assert parameters(getattr(GRPOTrainer, method)) in (expected, without_private)


def test_the_trainer_calls_the_methods_of_pushing_where_ours_expect_it():
    assert "self.init_hf_repo()" in inspect.getsource(Trainer.__init__)
    assert "self._push_from_checkpoint(output_dir)" in inspect.getsource(Trainer._save_checkpoint)
    assert "self._finish_current_push()" in inspect.getsource(Trainer._finalize_training)
    assert "self.create_model_card(" in inspect.getsource(GRPOTrainer._save_checkpoint)
    saved = inspect.getsource(Trainer.save_model)
    assert "if self.args.push_to_hub and not _internal_call" in saved  # so train.py saves or pushes, not both
    assert "self._save(output_dir" in saved  # for a checkpoint too
    assert "self.save_model(output_dir, _internal_call=True)" in inspect.getsource(Trainer._save_checkpoint)


def test_the_trainers_own_background_push_dies_without_a_word():
    """Ours warns. When this fails, upstream reports failures itself, and BackgroundPush may be superfluous."""
    failed: Future = Future()
    failed.set_exception(RuntimeError("the Hub is away"))
    progress = PushInProgress([failed])
    progress.wait_until_done()
    assert progress.is_done()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator, which may have bf16")
def test_trls_default_precision_is_rejected_without_an_accelerator_unless_use_cpu_is_set(tmp_path):
    """Ours asks for it there. When this fails, `take_the_cpu_if_alone` is superfluous."""
    with pytest.raises(ValueError, match="doesn't support bf16/gpu"):
        GRPOConfig(str(tmp_path))
    args = GRPOConfig(str(tmp_path), use_cpu=True)
    assert args.bf16 and args.gradient_checkpointing  # the settings that users get


def test_the_trainer_pickles_a_token_that_its_settings_hold(tmp_path):
    """Which is why hub_token is refused."""
    args = TrainingArguments(str(tmp_path), hub_token="hf_planted", use_cpu=True)
    torch.save(args, tmp_path / "training_args.bin")
    assert b"hf_planted" in (tmp_path / "training_args.bin").read_bytes()
    assert args.to_dict()["hub_token"] == "<HUB_TOKEN>"  # what trackers get


def test_the_hubs_client_has_no_timeout_and_accepts_another_factory():
    with default_client_factory() as client:
        assert isinstance(client, http.Client)  # httpx2 from huggingface_hub 2.0 on, httpx before
        assert client.timeout == http.Timeout(None)
    assert issubclass(HfHubHTTPError, http.HTTPError)
    assert parameters(set_client_factory) == ["client_factory"]


def test_creating_a_repository_of_somebody_else_passes_and_asking_for_the_right_to_write_does_not(hub):
    hub.repos["models", "them/policy"] = {}
    api = HfApi()
    assert api.create_repo("them/policy", exist_ok=True).repo_id == "them/policy"
    with pytest.raises(HfHubHTTPError) as refused:
        api.auth_check("them/policy", write=True)
    assert refused.value.response.status_code == 403


def test_an_upload_accepts_our_arguments_and_adds_to_existing_files(hub, tmp_path):
    assert {"repo_id", "repo_type", "folder_path", "commit_message", "revision"} <= set(
        parameters(HfApi.upload_folder)
    )
    api = HfApi()
    api.create_repo("me/policy")
    for name in ("a.md", "b.md"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text(name)
        api.upload_folder(repo_id="me/policy", folder_path=tmp_path / name)
    assert sorted(hub.repos["models", "me/policy"]) == ["a.md", "b.md"]


# transformers: what the engine rests on ------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}


def qwen2() -> PreTrainedModel:
    return Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()


def qwen3() -> PreTrainedModel:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=4)).eval()


def llama() -> PreTrainedModel:
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


MODELS = [qwen2, qwen3, llama]


class RecordingLayer(DynamicLayer):
    """Grows like transformers' own, and keeps the shapes it was given."""

    def __init__(self):
        super().__init__()
        self.shapes: list[tuple[torch.Size, torch.Size]] = []

    def update(self, key_states, value_states, *args, **kwargs):
        self.shapes.append((key_states.shape, value_states.shape))
        return super().update(key_states, value_states, *args, **kwargs)


@pytest.mark.parametrize("make", MODELS)
def test_attention_updates_each_layer_of_the_cache_once_per_forward(make):
    cache = Cache(layers=[RecordingLayer(), RecordingLayer()])
    with torch.no_grad():
        make()(input_ids=torch.ones(3, 5, dtype=torch.long), use_cache=True, **{CACHE_ARGUMENT: cache})
    # (rows, key/value heads, queries, head dimension), after the rotary embedding
    assert [layer.shapes for layer in cache.layers] == [[((3, 2, 5, 4), (3, 2, 5, 4))]] * 2


@pytest.mark.parametrize("make", MODELS)
def test_attention_runs_over_the_caches_return_value(make):
    class Emptied(RecordingLayer):
        def update(self, key_states, value_states, *args, **kwargs):
            super().update(key_states, value_states)
            return torch.zeros_like(key_states), torch.zeros_like(value_states)

    model, ids = make(), torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        plain = model(input_ids=ids, **{CACHE_ARGUMENT: Cache(layers=[RecordingLayer(), RecordingLayer()])}).logits
        emptied = model(input_ids=ids, **{CACHE_ARGUMENT: Cache(layers=[Emptied(), Emptied()])}).logits
    assert not torch.allclose(plain, emptied)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_4d_mask_is_returned_as_it_is(dtype):
    mask = torch.zeros(2, 1, 3, 7, dtype=dtype)
    config = Qwen3Config(**SIZES, head_dim=4)
    config._attn_implementation = "sdpa"
    made = create_causal_mask(config, torch.zeros(2, 3, 16), mask, **{CACHE_ARGUMENT: None})
    assert made is mask


@pytest.mark.parametrize("make", MODELS)
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_4d_mask_determines_the_visible_keys_of_a_query(make, attention):
    model = make()
    model.set_attn_implementation(attention)
    assert model.config._attn_implementation == attention
    # The last query does not see the middle key, so another token there changes nothing for it.
    visible = torch.ones(3, 3, dtype=torch.bool).tril()
    visible[2, 1] = False
    mask = visible.expand(1, 1, 3, 3)
    if attention == "eager":  # which adds the mask to the scores
        mask = torch.zeros(1, 1, 3, 3).masked_fill(~mask, torch.finfo(torch.float32).min)
    positions = torch.arange(3).unsqueeze(0)
    with torch.no_grad():
        one, other = (
            model(input_ids=torch.tensor([[3, token, 5]]), attention_mask=mask, position_ids=positions).logits
            for token in (4, 9)
        )
    assert torch.allclose(one[0, 2], other[0, 2], atol=1e-6)
    assert not torch.allclose(one[0, 1], other[0, 1])


def test_flash_attention_finds_its_kernel_by_the_models_setting():
    """So packs extend its function under the same name. Without the package flash_attn the name is a kernel's."""
    assert "attn_implementation=module.config._attn_implementation" in inspect.getsource(flash_attention_forward)
    if torch.version.hip is None:
        assert {FLASH_ATTN_KERNEL_FALLBACK[f"flash_attention_{i}"] for i in (2, 3)} < set(EXTENDS)


@pytest.mark.parametrize("make", MODELS)
def test_positions_are_used_as_given(make):
    model, ids = make(), torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        here, there, apart = (
            model(input_ids=ids, position_ids=torch.tensor([positions])).logits
            for positions in ([0, 1, 2], [7, 8, 9], [0, 1, 9])
        )
    # Rotary embeddings see distances only, so a shift changes nothing and a gap does.
    assert torch.allclose(here, there, atol=1e-5)
    assert not torch.allclose(here, apart, atol=1e-5)


@pytest.mark.parametrize("make", MODELS)
def test_logits_can_be_kept_for_the_last_position_only(make):
    with torch.no_grad():
        logits = make()(input_ids=torch.ones(2, 5, dtype=torch.long), logits_to_keep=1).logits
    assert logits.shape == (2, 1, 32)


@pytest.mark.parametrize("make", MODELS)
def test_a_models_config_lists_the_attention_of_its_layers(make):
    config = make().config.get_text_config()
    assert set(getattr(config, "layer_types", None) or ["full_attention"]) == {"full_attention"}
    assert (config.num_hidden_layers, config.vocab_size, config.max_position_embeddings) == (2, 32, 64)


def test_warpers_need_no_ids_and_leave_impossible_tokens_at_minus_infinity():
    warpers = LogitsProcessorList(
        [TemperatureLogitsWarper(0.5), TopKLogitsWarper(3), TopPLogitsWarper(0.9), MinPLogitsWarper(0.01)]
    )
    warped = warpers(None, torch.tensor([[4.0, 3.0, 2.0, 1.0]]))
    # of 8, 6, 4 the shares are 0.87, 0.12 and 0.02: the first two reach 0.9
    assert warped.tolist() == [[8.0, 6.0, -math.inf, -math.inf]]


def test_fsdp2_stores_its_action_after_a_forward_in_its_parameter_groups():
    """`arpo_trl.training.sharding` keeps and restores it; PyTorch only lets it be set."""
    source = inspect.getsource(FSDPModule.set_reshard_after_forward)
    assert "self_module.modules()" in source
    assert "_get_fsdp_state()" in source and "post_forward_mesh_info" in source
    assert re.search(r"\._fsdp_param_groups?\b", source)  # one group per module, in 2.11


def test_trl_leaves_in_the_zero3_hook_that_compares_ranks():
    """`arpo_trl.training.sharding` leaves it out while sampling. Were TRL to remove it, ours would find none."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload  # slow to import

    source = inspect.getsource(DeepSpeedZeRoOffload.setup_zero_stage3_hooks)
    assert "self.fwd_pre_hook = self.module.register_forward_pre_hook(_start_of_forward_hook)" in source
    assert source.index("self.fwd_pre_hook =") < source.index("self._register_deepspeed_module(self.module)")
    assert "fwd_pre_hook" not in inspect.getsource(remove_hooks) + inspect.getsource(add_hooks)
    assert "optimizer.parameter_offload" in inspect.getsource(remove_hooks)


# torch: the private kernels of packs, seen so in 2.11 (CUDA 13) and 2.13 ---------------------------------------------


def test_the_kernels_of_packs_have_our_arguments_and_return_values():
    lengths = "Tensor? cum_seq_q, Tensor? cum_seq_k, SymInt max_q, SymInt max_k, float dropout_p, bool is_causal"
    assert f"Tensor value, {lengths}, bool return_debug_mask, *, float? scale=None" in schema(
        "_flash_attention_forward"
    )
    assert "-> (Tensor output, Tensor softmax_logsumexp, Tensor rng_state, Tensor unused, Tensor debug_attn_mask)" in (
        schema("_flash_attention_forward")
    )
    assert (
        "Tensor value, Tensor out, Tensor logsumexp, Tensor cum_seq_q, Tensor cum_seq_k, SymInt max_q, SymInt max_k, "
        "float dropout_p, bool is_causal, Tensor rng_state, Tensor unused, *, float? scale=None"
    ) in schema("_flash_attention_backward")
    assert (
        "Tensor value, Tensor? bias, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt? max_seqlen_q, "
        "SymInt? max_seqlen_k, float dropout_p, int custom_mask_type, bool compute_log_sumexp=False, *, float? scale="
    ) in schema("_efficient_attention_forward")
    assert (
        "Tensor out, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, "
        "Tensor logsumexp, float dropout_p, Tensor philox_seed, Tensor philox_offset, int custom_mask_type, "
        "bool bias_requires_grad, *, float? scale=None"
    ) in schema("_efficient_attention_backward")


def schema(name: str) -> str:
    return str(getattr(torch.ops.aten, name).default._schema)


def test_a_sliding_window_counts_the_query_itself_and_a_four_dimensional_mask_is_taken_as_it_is():
    seen = sliding_window_causal_mask_function(3)
    keys = torch.arange(6)
    assert [bool(seen(0, 0, torch.tensor(4), key)) for key in keys] == [False, False, True, True, True, False]
    mask = torch.ones(2, 1, 3, 5, dtype=torch.bool)
    config = MistralConfig(sliding_window=3, attn_implementation="sdpa")
    made = create_sliding_window_causal_mask(config, torch.zeros(2, 3, 16), mask, **{CACHE_ARGUMENT: None})
    assert made is mask


def test_a_model_whose_layers_differ_takes_a_mask_for_each_kind_by_name():
    model = small_model(Qwen2Config, Qwen2ForCausalLM, use_sliding_window=True, sliding_window=2, max_window_layers=1)
    assert model.config.layer_types == ["full_attention", "sliding_attention"]
    ids = torch.arange(5)[None]
    causal = torch.ones(5, 5, dtype=torch.bool).tril()
    masks = {"full_attention": causal[None, None], "sliding_attention": causal.triu(-1)[None, None]}
    with torch.no_grad():
        torch.testing.assert_close(model(ids, attention_mask=masks).logits, model(ids).logits)


def test_models_have_private_names_for_their_state_and_attention():
    assert MambaForCausalLM._is_stateful and not Qwen3ForCausalLM._is_stateful
    assert Qwen3ForCausalLM._supports_sdpa and not MambaForCausalLM._supports_sdpa


def test_transformers_tells_which_variables_a_chat_template_reads():
    messages = "{% for m in messages %}{{ m.content }}{% generation %}{{ x }}{% endgeneration %}{% endfor %}"
    template = "{% set x = 1 %}" + messages + "{% if thinking is defined %}{{ bos_token }}{% endif %}"
    assert _get_template_variables(template) == {"messages", "thinking", "bos_token"}


def test_every_setting_of_generate_is_applied_refused_or_irrelevant_to_the_distribution():
    neutral = {
        *("do_sample", "early_stopping", "length_penalty"),  # of beams, or set by TRL
        *("renormalize_logits", "low_memory", "prefill_chunk_size", "use_cache", "use_mtp"),
        *("cache_config", "cache_implementation", "max_cache_len", "compile_config", "disable_compile"),
        *("continuous_batching_config", "speculation_type", "is_assistant", "num_assistant_tokens"),
        *("num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_early_exit"),
        *("assistant_ensemble_weight", "assistant_lookbehind", "target_lookbehind", "prompt_lookup_num_tokens"),
        *("max_matching_ngram_size", "output_attentions", "output_hidden_states", "output_logits", "output_scores"),
        *("return_dict_in_generate", "bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
        *("_from_model_config", "transformers_version"),
    }
    assert set(GenerationConfig().to_dict()) == neutral | set(HONOURED) | set(REFUSED) | set(ELSEWHERE)


def test_generate_uses_the_models_settings_for_unset_ones():
    model = small_model(Qwen3Config, Qwen3ForCausalLM)
    model.generation_config.suppress_tokens, model.generation_config.min_p = [3], 0.1
    model.generation_config.top_k = 7
    run = GenerationConfig(top_k=0, min_p=None)  # as TRL makes its own
    merged, _ = model._prepare_generation_config(run)
    assert (merged.suppress_tokens, merged.min_p, merged.top_k) == ([3], 0.1, 0)


def test_response_templates_are_read_by_the_tokenizer_with_prefix_and_tools():
    assert parameters(PreTrainedTokenizerBase.parse_response)[1:] == ["response", "schema", "prefix", "tools"]
    call = '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call><|im_end|>'
    message = tokenizer().parse_response(call, trl_seam.qwen3_template, prefix="", tools=[])
    assert message["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    thought = tokenizer().parse_response(f"<think>{call}", trl_seam.qwen3_template, prefix="", tools=[])
    assert thought == {"role": "assistant", "reasoning_content": call}  # an open thought holds all that follows


@pytest.mark.vllm
def test_vllms_tool_parsers_are_listed_made_and_called_as_ours_are():
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.tool_parsers import ToolParserManager

    assert {"mistral", "deepseek_v3", "deepseek_v31", "muse_glimmer"} <= set(ToolParserManager.list_registered())
    request = ChatCompletionRequest(messages=[], tools=None)
    parser = ToolParserManager.get_tool_parser("hermes")(tokenizer(), request.tools)
    found = parser.extract_tool_calls('<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call>', request)
    assert [(call.function.name, call.function.arguments) for call in found.tool_calls] == [("f", '{"x": 1}')]
    assert found.content is None


def test_memory_that_runs_out_is_a_runtime_error_of_its_own():
    assert issubclass(torch.OutOfMemoryError, RuntimeError)
    with pytest.raises(RuntimeError, match="can't allocate memory"):
        torch.empty(1 << 58, dtype=torch.uint8)


def test_the_gpt_oss_template_finds_a_call_by_its_header():
    header = trl_seam.gptoss_template["fields"]["tool_calls"]["open_pattern"]
    assert re.fullmatch(header, "to=functions.search<|channel|>commentary json<|message|>")["name"] == "search"


def test_trainers_load_models_by_a_function_of_their_module_that_passes_the_loading_info_on(tmp_path):
    from trl.trainer import grpo_trainer, sft_trainer

    model = small_model(Qwen3Config, Qwen3ForCausalLM)
    model.save_pretrained(tmp_path)
    for module in (grpo_trainer, sft_trainer):
        assert module.create_model_from_path is trl_seam.create_model_from_path
        assert "create_model_from_path(" in inspect.getsource(module)
    loaded, report = trl_seam.create_model_from_path(str(tmp_path), output_loading_info=True)
    assert type(loaded) is Qwen3ForCausalLM and not report["missing_keys"]
