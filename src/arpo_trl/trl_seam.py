"""All imports from TRL's submodules: names that the package `trl` does not export, and that may move.

No other module imports from `trl.` submodules. So a new version of TRL affects only this file and the overridden
methods of `GRPOTrainer`. tests/test_upstream_contract.py tests each upstream fact that this package relies on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# For `ChatTemplateProtocol`: render a chat template so that the loss can mask it, and parse a model's tool calls.
from trl.chat_template_utils import (
    add_response_schema,
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    parse_response,
)

# Turns the trained model into one that generates: unwrapped, ZeRO-3 weights gathered, hooks removed.
from trl.models import unwrap_model_for_generation

# `get_config_model_id`: the base model's name, for output folders and cards.
# `get_callable_name`, `is_async_callable`: TRL's name of a reward function in metrics, and whether TRL awaits it.
# `pad`: pads a batch on a side, to a multiple of a length.
# `print_prompt_completions_sample`: prints the table of `log_completions`.
from trl.trainer.utils import (
    get_callable_name,
    get_config_model_id,
    is_async_callable,
    pad,
    print_prompt_completions_sample,
)

if TYPE_CHECKING:
    from trl.generation.vllm_generation import VLLMGeneration

__all__ = [
    "VLLMGeneration",
    "add_response_schema",
    "get_callable_name",
    "get_config_model_id",
    "get_training_chat_template",
    "is_async_callable",
    "is_chat_template_prefix_preserving",
    "pad",
    "parse_response",
    "print_prompt_completions_sample",
    "unwrap_model_for_generation",
]


def __getattr__(name: str) -> Any:
    """Loads `VLLMGeneration`, which starts vLLM and moves weights to it, at first use: its module imports vLLM."""
    if name != "VLLMGeneration":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trl.generation.vllm_generation import VLLMGeneration

    return VLLMGeneration
