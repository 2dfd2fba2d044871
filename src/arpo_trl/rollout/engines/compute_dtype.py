"""The precision that training computes in, held against what the device has and against what vLLM samples in.

Where they differ a run works, but slowly, or with sampling and training logprobs further apart than they need be: that
is said once, with the setting to change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger

logger = get_logger(__name__)

_AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}
_SETTINGS = {"bfloat16": "bf16: true", "float16": "fp16: true", "float32": "bf16: false"}
"""What makes training compute in each, with weights in float32."""


def training_dtype(model: Any, accelerator: Accelerator) -> str:
    """What `model`'s matrices are multiplied in: the autocast's type, or without one the weights' own."""
    return _AUTOCAST.get(accelerator.mixed_precision) or str(model.dtype).removeprefix("torch.")


def computed_in(model: torch.nn.Module, device: torch.device) -> set[torch.dtype]:
    """The types whose rounding is in what `model` computes now: its weights', and autocast's where that is on."""
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    return dtypes


def warn_of_emulation(model: Any, accelerator: Accelerator) -> None:
    """Says so where training computes in bfloat16 on a GPU that has no arithmetic for it."""
    if training_dtype(model, accelerator) != "bfloat16" or accelerator.device.type != "cuda":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        logger.warning(
            f"Training computes in bfloat16 (bf16: true is the default), but {torch.cuda.get_device_name()} has no "
            "arithmetic for it and emulates it, which is slow. Set fp16: true, or bf16: false for float32."
        )


def warn_of_other_dtype(model: Any, accelerator: Accelerator, sampled_in: Mapping[str, str], way_out: str) -> None:
    """Says so where vLLM samples in another precision than training computes in.

    Args:
        sampled_in: vLLM's dtype, by the name of each engine.
        way_out: What changes vLLM's dtype; `{dtype}` stands for the trainer's.
    """
    ours = training_dtype(model, accelerator)
    for theirs in sorted(set(sampled_in.values()) - {ours}):
        names = ", ".join(name for name, dtype in sampled_in.items() if dtype == theirs)
        logger.warning(
            f"Training computes in {ours}, but {names} in {theirs}: sampling and training logprobs differ by more "
            "than within one precision, which the importance sampling correction then counts. Set "
            f"{_SETTINGS[theirs]} for the trainer, or {way_out.format(dtype=ours)}."
        )
