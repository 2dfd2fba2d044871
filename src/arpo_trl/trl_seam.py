"""All that we import from inside TRL: names that its public package does not export, and that may move.

No other module imports from `trl.` modules, so a new version of TRL is this file's work, together with the overridden
methods of `GRPOTrainer`. tests/test_upstream_contract.py tests each fact that we rely on.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

# `parse_response`: a turn as the message that rewards are given. The `…_template`s: how families of models write tool
# calls, in transformers' language of response templates.
from trl.chat_template_utils import (
    gemma4_template,
    glm4moe_template,
    gptoss_template,
    lfm2_2_5_template,
    llama3_template,
    nemotron_3_template,
    parse_response,
    qwen3_5_template,
    qwen3_template,
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
    "gemma4_template",
    "get_callable_name",
    "get_config_model_id",
    "glm4moe_template",
    "gptoss_template",
    "is_async_callable",
    "lfm2_2_5_template",
    "llama3_template",
    "nemotron_3_template",
    "pad",
    "parse_response",
    "print_prompt_completions_sample",
    "qwen3_5_template",
    "qwen3_template",
    "unwrap_model_for_generation",
]


def __getattr__(name: str) -> Any:
    """`VLLMGeneration`, which starts vLLM and moves weights to it, on first use: its module imports vLLM."""
    if name != "VLLMGeneration":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trl.generation.vllm_generation import VLLMGeneration

    return VLLMGeneration
