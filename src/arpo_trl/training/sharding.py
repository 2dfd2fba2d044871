"""How a run's ranks share the model: what cannot work is refused, and sampling has the weights whole.

Ranks sample different amounts: one path calls no tool, another six. So no forward of a rollout may need another rank.
Where ranks hold parts of the weights (ZeRO-3, FSDP2), they are put together once for each rollout, a collective, and
then every rank goes its own way. What that takes in memory is one copy of the weights for each rank.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from arpo_trl.config import ARPOConfig
from arpo_trl.errors import ConfigError
from arpo_trl.trl_seam import unwrap_model_for_generation


def check_launch(accelerator: Accelerator, *, gathers: bool) -> None:
    """Refuses a way of sharing the work that would do something else than what was asked for, or hang.

    Args:
        gathers: `ds3_gather_for_generation`.

    Raises:
        ConfigError: What cannot work, and the way out.
    """
    ranks, state = accelerator.num_processes, accelerator.state
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started > ranks:
        raise ConfigError(
            f"{started} processes were started, but each takes itself for the only one, and all would train the same "
            "and write over each other's files. On a CPU set use_cpu: true."
        )
    fsdp = getattr(state, "fsdp_plugin", None)
    if fsdp is None and os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        raise ConfigError(
            f"FSDP was asked for, but accelerate does not shard on a {accelerator.device.type}: each process would "
            "hold the whole model without a word. Use accelerate_configs/ddp.yaml, or zero3.yaml, which does shard."
        )
    if fsdp is not None and fsdp.fsdp_version == 1:
        raise ConfigError(
            "FSDP version 1 gathers a layer's weights whenever it is computed, which all ranks must do together, but "
            "ranks sample different amounts and would hang. Set fsdp_version: 2 (accelerate_configs/fsdp2.yaml)."
        )
    plugin = state.deepspeed_plugin
    if plugin is not None and plugin.zero_stage == 3 and ranks > 1 and not gathers:
        raise ConfigError(
            f"ds3_gather_for_generation is false on {ranks} ranks: then each forward of a rollout gathers the layers "
            "one by one, which all ranks must do together, but ranks sample different amounts and would hang. Leave "
            "it true, which takes room for one copy of the weights on each rank."
        )
    parallel = getattr(accelerator, "parallelism_config", None)
    if parallel is not None and parallel.non_data_parallel_size > 1:
        raise ConfigError(
            f"parallelism_config shares each sample among {parallel.non_data_parallel_size} ranks (tensor, context or "
            "sequence parallel), but each rank samples trees of its own. Unset it; vLLM may use tensor parallelism "
            "all the same (vllm_tensor_parallel_size, or a server's)."
        )


@contextmanager
def model_for_generation(
    wrapped: torch.nn.Module, accelerator: Accelerator, args: ARPOConfig
) -> Iterator[PreTrainedModel]:
    """The model in `wrapped` as a rollout samples from it: unwrapped, its weights whole; opening it is a collective.

    TRL's own way in, entered once per rollout. It is under the autocast of the training forward, so that sampling and
    training compute the same distribution.
    """
    with (
        unwrap_model_for_generation(
            wrapped,
            accelerator,
            gather_deepspeed3_params=args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        ) as model,
        local_forwards(wrapped, model),
        accelerator.autocast(),
    ):
        yield model


@contextmanager
def local_forwards(wrapped: torch.nn.Module, model: torch.nn.Module) -> Iterator[None]:
    """While it is open, no forward of `model` needs another rank; opening it is a collective.

    Args:
        wrapped: As the trainer trains it: a DeepSpeed engine, a DDP module, an FSDP2 model, or the model itself.
        model: The model in it, under ZeRO-3 with its weights gathered by TRL's `unwrap_model_for_generation`.
    """
    with _untraced(wrapped), _unsharded(model):
        yield


@contextmanager
def _untraced(wrapped: torch.nn.Module) -> Iterator[None]:
    """Leaves out a hook of ZeRO-3 that TRL leaves in: it compares the modules' order between ranks, in some forwards.

    Which ones depends on what went before: the first of a rollout, or the first two. A rank that has nothing to write,
    in an evaluation, would not take part, and the others would wait for it.
    """
    optimizer = getattr(wrapped, "optimizer", None)
    offload = getattr(optimizer, "parameter_offload", optimizer)  # as TRL's `remove_hooks` finds it
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
        hooks.move_to_end(handle.id, last=False)  # DeepSpeed has it before all others


@contextmanager
def _unsharded(model: torch.nn.Module) -> Iterator[None]:
    """An FSDP2 model's weights whole, which they stay between forwards; nothing for other models."""
    modules = [module for module in model.modules() if isinstance(module, FSDPModule)]
    groups = [group for module in modules for group in module._get_fsdp_state()._fsdp_param_groups]
    resharding = [group.post_forward_mesh_info for group in groups]
    for module in modules:
        module.unshard()
    for group in groups:  # what FSDPModule.set_reshard_after_forward sets, which cannot be asked for what it was
        group.post_forward_mesh_info = None
    try:
        yield
    finally:
        for group, before in zip(groups, resharding, strict=True):
            group.post_forward_mesh_info = before
        for module in modules:
            module.reshard()
