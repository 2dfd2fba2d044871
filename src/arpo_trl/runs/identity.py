"""The identity of a run: the settings that affect the results of a step, the model's shape and frozen weights, the
dataset's content, the tools and rewards. A run can resume only from a checkpoint with the same identity.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

import pyarrow as pa
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import TrainingArguments

from arpo_trl.config import ARPOConfig

_HASHED_ROWS = 1000
_HASHED_VALUES = 64
_DECIDING_TRAINING_ARGUMENTS = frozenset(
    """learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1
    adam_beta2 adam_epsilon optim_target_modules max_grad_norm bf16 fp16 neftune_noise_alpha seed data_seed
    per_device_train_batch_size gradient_accumulation_steps""".split()
)
"""The settings of transformers that affect the results of a step. The others control logging, saving or placement."""
_FREE_SETTINGS = frozenset(
    """num_generations_eval ds3_gather_for_generation cache_implementation use_vllm vllm_mode vllm_model_impl
    vllm_enable_sleep_mode vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port
    vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size model_init_kwargs trust_remote_code
    log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo
    use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged
    tool_timeout_s tool_concurrency tool_concurrency_per_tool environment_concurrency tool_cache vllm_server_urls
    vllm_request_timeout_s weight_sync weight_sync_dir weight_sync_tolerance shared_prefix_forward
    trajectory_log_rate hub_trajectories_id""".split()
)
"""The settings of TRL and of this package that may change: they affect only placement, speed or rounding."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIdentity:
    """The properties that must be equal in a run and a checkpoint for the run to resume from it.

    RunIdentity(settings=deciding_settings(args), model=model_identity(model), dataset=dataset_identity(rows),
                tools=["search"], tools_parameters={"search": {…}}, rewards=["accuracy"], processes=2, sharding=None)
    """

    settings: dict[str, Any]
    model: dict[str, Any]
    dataset: dict[str, Any] | None
    tools: list[str]
    tools_parameters: dict[str, Any]
    """`Resumable.tools_parameters`."""
    rewards: list[str]
    processes: int
    sharding: str | None
    """The library that shards the optimizer over the processes, such as DeepSpeed; None if there is none.

    Only the same number of processes can load the files of a sharded optimizer.
    """
    frozen_weights: str | None = None
    """The digest `frozen_weights`. Compared only if both sides have one."""
    reward_settings: dict[str, Any] = field(default_factory=dict)
    """Name of a reward → the settings that affect its values, for rewards that have such settings."""

    def as_dict(self) -> dict[str, Any]:
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self)}


def deciding_settings(args: ARPOConfig) -> dict[str, Any]:
    """The settings that affect the results of a step, as JSON values."""
    of_transformers = {each.name for each in fields(TrainingArguments)}
    all_values = args.to_dict()
    return _plain(
        {
            each.name: all_values.get(each.name)
            for each in fields(args)
            if each.name in _DECIDING_TRAINING_ARGUMENTS
            or (each.name not in of_transformers and each.name not in _FREE_SETTINGS)
        }
    )


def dataset_identity(dataset: Any) -> dict[str, Any] | None:
    """The number of rows and a digest of their content in order; None for a streamed dataset."""
    if not isinstance(dataset, Dataset):
        return None
    digest = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(_HASHED_ROWS):
        table = batch.combine_chunks().replace_schema_metadata(None)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        digest.update(sink.getvalue())
    return {"rows": len(dataset), "content": digest.hexdigest()[:16]}


def model_identity(model: Any) -> dict[str, Any]:
    """The model's class, its number of parameters, and a digest of their names, shapes, dtypes and `requires_grad`."""
    digest, count = hashlib.sha256(), 0
    for name, parameter in model.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO-3 `shape` is empty
        count += math.prod(shape)
        digest.update(f"{name} {shape} {parameter.dtype} {parameter.requires_grad}\n".encode())
    return {"type": type(model).__name__, "parameters": count, "shapes": digest.hexdigest()[:16]}


def frozen_weights(model: Any) -> str | None:
    """A digest of a reference model, or of the model under an adapter: a run uses these weights, and no checkpoint
    contains them. Reads the first values of each weight, packed or not, except of sharded ones.

    None if it read none, or if the adapter changes the weights under it when it is created, as PiSSA does.
    """
    adapters = model.peft_config.values() if is_peft_model(model) else ()
    if any(isinstance(getattr(adapter, "init_lora_weights", None), str) for adapter in adapters):
        return None
    digest, is_empty = hashlib.sha256(), True
    for name, weight in model.named_parameters():
        is_packed = type(weight).__module__.startswith("bitsandbytes.")
        is_plain = type(weight) is torch.nn.Parameter and weight.is_floating_point()
        is_whole = (is_plain or is_packed) and not hasattr(weight, "ds_shape")
        # Not what is trained, TRL's copy of the adapter, and what a trained copy of a module replaces.
        of_adapter = adapters and (weight.requires_grad or ".ref." in name or ".original_module." in name)
        if is_whole and not of_adapter:
            scales = getattr(getattr(weight, "quant_state", None), "absmax", None)
            for values in (weight.detach(), scales):
                if values is not None:
                    digest.update(values.flatten()[:_HASHED_VALUES].float().cpu().numpy().tobytes())
            is_empty = False
    return None if is_empty else digest.hexdigest()[:16]


def differences_between(there: Any, here: Any, name: str = "") -> Iterator[str]:
    """Yields "name.of.key is … there and … here" for each value that differs, sorted by key."""
    if isinstance(there, dict) and isinstance(here, dict):
        for key in sorted({*there, *here}):
            yield from differences_between(there.get(key), here.get(key), f"{name}.{key}" if name else key)
    elif there != here:
        yield f"{name} is {_short(there)} there and {_short(here)} here"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "…"


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
