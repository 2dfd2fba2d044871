"""Checks the distribution of the model over ranks, and gathers sharded weights for sampling.

Ranks sample different amounts: one path calls no tool, another six. So no forward of a rollout may need another rank.
If each rank has only a part of the weights (ZeRO-3, FSDP2), a collective gathers them once per rollout. After that
each rank runs independently. This needs memory for one full copy of the weights on each rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from arpo_trl.config import ARPOConfig
from arpo_trl.errors import ConfigError
from arpo_trl.trl_seam import unwrap_model_for_generation


def check_launch(accelerator: Accelerator, *, gathers: bool) -> None:
    """Checks that the processes can share the work as configured.

    Args:
        gathers: `ds3_gather_for_generation`.

    Raises:
        ConfigError: The run would hang, or would not share the work as configured.
    """
    ranks, state = accelerator.num_processes, accelerator.state
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > ranks:
        raise ConfigError(
            f"{started} processes were started, but accelerate runs each as a single process: all would train the "
            "same model and overwrite each other's files. On a CPU set use_cpu: true."
        )
    fsdp = getattr(state, "fsdp_plugin", None)
    if fsdp is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ConfigError(
            f"FSDP is configured, but accelerate does not shard on device type {accelerator.device.type}: each "
            "process would silently have the whole model. Use accelerate_configs/ddp.yaml, or zero3.yaml, which does "
            "shard."
        )
    if fsdp is not None and fsdp.fsdp_version == 1:
        raise ConfigError(
            "FSDP version 1 gathers each layer's weights in every forward, which needs all ranks at once. But ranks "
            "sample different amounts and would hang. Set fsdp_version: 2 (accelerate_configs/fsdp2.yaml)."
        )
    plugin = state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3 and ranks > 1 and not gathers:
        raise ConfigError(
            f"ds3_gather_for_generation is false on {ranks} ranks: each forward of a rollout would gather the layers "
            "one by one, which needs all ranks at once. But ranks sample different amounts and would hang. Set it to "
            "true, which needs memory for one copy of the weights on each rank."
        )
    parallel = getattr(accelerator, "parallelism_config", None)
    if parallel is not None and parallel.non_data_parallel_size > 1:
        raise ConfigError(
            f"parallelism_config splits each sample over {parallel.non_data_parallel_size} ranks (tensor, context or "
            "sequence parallel), but each rank samples separate trees. Unset it. vLLM can still use tensor "
            "parallelism (vllm_tensor_parallel_size, or the server's option)."
        )


@contextmanager
def model_for_generation(
    wrapped: torch.nn.Module, accelerator: Accelerator, args: ARPOConfig
) -> Iterator[PreTrainedModel]:
    """A context with the unwrapped model and all its weights, for sampling. Entering is a collective.

    Uses TRL's `unwrap_model_for_generation`, once per rollout. Runs under the autocast of the training forward, so
    that sampling and training compute the same distribution.
    """
    with (
        unwrap_model_for_generation(
            wrapped,
            accelerator,
            gather_deepspeed3_params=args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        ) as model,
        local_forwards(wrapped, plain := getattr(model, "_orig_mod", model)),
        accelerator.autocast(),
    ):
        yield plain  # a compiled model would be compiled again for each new shape


@contextmanager
def local_forwards(wrapped: torch.nn.Module, model: torch.nn.Module) -> Iterator[None]:
    """A context in which no forward of `model` needs another rank. Entering is a collective.

    Args:
        wrapped: The trainer's wrapped model: a DeepSpeed engine, a DDP module, an FSDP2 model, or the plain model.
        model: The model inside `wrapped`. Under ZeRO-3, `unwrap_model_for_generation` has gathered its weights.
    """
    with _untraced(wrapped), _unsharded(model):
        yield


@contextmanager
def _untraced(wrapped: torch.nn.Module) -> Iterator[None]:
    """Removes a ZeRO-3 hook that TRL keeps. The hook compares the order of modules between ranks in some forwards.

    These are the first one or two forwards of a rollout, depending on earlier forwards. In an evaluation a rank may
    have nothing to sample. It would not take part, and the other ranks would wait for it.
    """
    optimizer = getattr(wrapped, "optimizer", None)
    offload = getattr(optimizer, "parameter_offload", optimizer)  # found as in TRL's `remove_hooks`
    handle = getattr(offload, "fwd_pre_hook", None)
    if offload is None or handle is None:
        yield
        return
    hooks = offload.module._forward_pre_hooks
    hook = hooks.pop(handle.id)
    try:
        yield
    finally:
        hooks[handle.id] = hook
        hooks.move_to_end(handle.id, last=False)  # DeepSpeed runs it before all others


@contextmanager
def _unsharded(model: torch.nn.Module) -> Iterator[None]:
    """Gathers an FSDP2 model's weights and keeps them gathered between forwards. Does nothing for other models."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for module in modules for group in _parameter_groups(module)]
    resharding = [group.post_forward_mesh_info for group in groups]
    for module in modules:
        module.unshard()
    # FSDPModule.set_reshard_after_forward sets this attribute, but there is no getter for its old value.
    for group in groups:
        group.post_forward_mesh_info = None
    try:
        yield
    finally:
        for group, before in zip(groups, resharding, strict=True):
            group.post_forward_mesh_info = before
        for module in modules:
            module.reshard()


def _parameter_groups(module: FSDPModule) -> list[Any]:
    """FSDP2's groups of parameters in this module. In torch 2.11 and before, a module has one group or none."""
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    return [] if state._fsdp_param_group is None else [state._fsdp_param_group]
