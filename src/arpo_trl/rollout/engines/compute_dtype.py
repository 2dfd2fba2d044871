"""Compares the training precision with the device's, with vLLM's sampling precision and with the optimizer's steps.

If they do not fit, a run works, but it is slow, sampling and training logprobs differ more than necessary, or the
weights do not change. One warning then names the setting to change.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import is_peft_model
from transformers import TrainingArguments

from arpo_trl.visible import get_rank_logger

logger = get_rank_logger(__name__)

_AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}
_SETTINGS = {"bfloat16": "bf16: true", "float16": "fp16: true", "float32": "bf16: false"}
"""For each dtype: the setting with which training computes in it, with weights in float32."""

LOGIT_ROUNDING = {torch.float64: 1e-3, torch.float32: 1e-3, torch.float16: 0.03}
"""The largest difference of logits or logprobs that is accepted as rounding, by dtype; `COARSE_ROUNDING` for other
dtypes. In standard deviations. Logits are compared in float32."""
COARSE_ROUNDING = 0.1


def training_dtype(model: Any, accelerator: Accelerator) -> str:
    """The dtype of `model`'s matrix products: autocast's, or without autocast that of the weights."""
    return _AUTOCAST.get(accelerator.mixed_precision) or str(model.dtype).removeprefix("torch.")


def computed_in(model: torch.nn.Module, device: torch.device) -> set[torch.dtype]:
    """The dtypes that round `model`'s results: those of its weights and, if autocast is enabled, autocast's.

    TF32 counts as float16.
    """
    dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
    if torch.is_autocast_enabled(device.type):
        dtypes.add(torch.get_autocast_dtype(device.type))
    return dtypes | {rounded_as(dtype, device) for dtype in dtypes}


def largest_rounding(model: torch.nn.Module, device: torch.device) -> float:
    """The largest of the `LOGIT_ROUNDING` of the dtypes in which `model` computes."""
    return max(LOGIT_ROUNDING.get(dtype, COARSE_ROUNDING) for dtype in computed_in(model, device))


def rounded_as(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """The dtype whose digits matrix products of `dtype` have on the device: float16 for float32 if TF32 is on."""
    if dtype != torch.float32 or device.type != "cuda":
        return dtype
    # torch >= 2.9 raises from the older function if the newer setting was used, as transformers does for `tf32: true`.
    precision = getattr(torch.backends.cuda.matmul, "fp32_precision", None)
    tf32 = torch.get_float32_matmul_precision() != "highest" if precision is None else precision == "tf32"
    return torch.float16 if tf32 else dtype


def warn_of_emulation(model: Any, accelerator: Accelerator) -> None:
    """Warn if training computes in bfloat16 on a GPU that only emulates it."""
    if training_dtype(model, accelerator) != "bfloat16" or accelerator.device.type != "cuda":
        return
    if not torch.cuda.is_bf16_supported(including_emulation=False):
        logger.warning(
            f"Training computes in bfloat16 (bf16: true is the default), but {torch.cuda.get_device_name()} does not "
            "support bfloat16 and emulates it, which is slow. Set fp16: true, or bf16: false for float32."
        )


def warn_of_lost_steps(model: Any, accelerator: Accelerator, args: TrainingArguments) -> None:
    """Warn if most of the trained weights are too coarse for the optimizer's steps, so that they would not change.

    A step of Adam, Lion or Adafactor changes a weight by about the learning rate. The sum is rounded to the weight
    itself if that is less than half the distance to the next number, which is at least a quarter of `eps` times the
    weight. DeepSpeed, and FSDP with mixed precision, add the steps to float32 copies. A new adapter is not checked:
    its second matrices start at 0, where no step is lost.
    """
    kind = accelerator.distributed_type
    has_copies = kind == DistributedType.DEEPSPEED or (
        kind == DistributedType.FSDP and accelerator.mixed_precision != "no"
    )
    trained = [parameter.detach() for parameter in model.parameters() if parameter.requires_grad]
    is_adapter = is_peft_model(model)
    if has_copies or "sgd" in args.optim or (is_adapter and not all(weights.any() for weights in trained)):
        return
    coarse = [weights for weights in trained if weights.dtype in (torch.bfloat16, torch.float16)]
    lost = sum(
        int((weights.abs() > 4 * args.learning_rate / torch.finfo(weights.dtype).eps).sum()) for weights in coarse
    )
    share = lost / max(1, sum(weights.numel() for weights in trained))
    if share > 0.5:
        dtype = str(coarse[0].dtype).removeprefix("torch.")
        remedy = (
            "Raise learning_rate."
            if is_adapter
            else "Load the model in float32 (dtype='float32'; bf16: true still computes in bfloat16), train an "
            "adapter (peft_config), or use DeepSpeed, or FSDP with mixed precision, which keep float32 copies."
        )
        logger.warning(
            f"The trained weights are {dtype}, and steps of learning_rate {args.learning_rate:g} leave at least "
            f"{share:.0%} of them unchanged: a step is less than half the distance to the next {dtype} number. "
            f"{remedy}"
        )


def warn_of_other_dtype(model: Any, accelerator: Accelerator, sampled_in: Mapping[str, str], way_out: str) -> None:
    """Warn if vLLM's sampling precision differs from the training precision.

    Args:
        sampled_in: vLLM's dtype by engine name.
        way_out: How to change vLLM's dtype; `{dtype}` stands for the trainer's.
    """
    ours = training_dtype(model, accelerator)
    for theirs in sorted(set(sampled_in.values()) - {ours}):
        names = ", ".join(name for name, dtype in sampled_in.items() if dtype == theirs)
        logger.warning(
            f"Training computes in {ours}, but {names} in {theirs}. This increases the difference between sampling "
            f"and training logprobs, and so the importance sampling correction. Set {_SETTINGS[theirs]} for the "
            f"trainer, or {way_out.format(dtype=ours)}."
        )
