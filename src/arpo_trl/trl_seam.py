"""All that we import from inside TRL: names that its public package does not export, and that may move.

No other module imports from `trl.` modules, so a new version of TRL is this file's work, together with the overridden
methods of `GRPOTrainer`. tests/test_upstream_contract.py tests each fact that we rely on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# Render a chat template so that the loss can mask it, and read a model's tool calls back: `ChatTemplateProtocol`.
from trl.chat_template_utils import (
    add_response_schema,
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    parse_response,
)

# The way from the trained model to one that generates: unwrapped, ZeRO-3 weights gathered, hooks removed.
from trl.models import unwrap_model_for_generation

# `get_config_model_id`: the base model's name, for output folders and cards.
# `get_callable_name`, `is_async_callable`: how TRL names a reward function in metrics, and whether it awaits it.
# `pad`: the layout of a batch (side, multiple).
# `print_prompt_completions_sample`: the table of completions that `log_completions` prints.
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
    """`VLLMGeneration`, which starts vLLM and moves weights to it, on first use: its module imports vLLM."""
    if name != "VLLMGeneration":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trl.generation.vllm_generation import VLLMGeneration

    return VLLMGeneration
