"""All imports from TRL's submodules: names that the package `trl` does not export, and that may move.

No other module imports from `trl.` submodules. So a new version of TRL affects only this file and the overridden
methods of `GRPOTrainer`. tests/test_upstream_contract.py tests each upstream fact that this package relies on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

# `parse_response` turns a turn into the message that rewards receive. The `…_template`s are transformers response
# templates: they describe how families of models write tool calls.
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

# Prepares the trained model for generation: unwrapped, ZeRO-3 weights gathered, hooks removed.
from trl.models import unwrap_model_for_generation

# `create_model_from_path`: loads a trainer's model and the reference model.
# `get_config_model_id`: the base model's name, for output folders and cards.
# `get_callable_name`, `is_async_callable`: TRL's name of a reward function in metrics, and whether TRL awaits it.
# `nanstd`: the standard deviation of rewards, NaN skipped.
# `pad`: pads a batch on a side, to a multiple of a length.
# `print_prompt_completions_sample`: prints the table of `log_completions`.
from trl.trainer.utils import (
    create_model_from_path,
    get_callable_name,
    get_config_model_id,
    is_async_callable,
    nanstd,
    pad,
    print_prompt_completions_sample,
)

if TYPE_CHECKING:
    from trl.generation.vllm_generation import VLLMGeneration

__all__ = [
    "VLLMGeneration",
    "checked_loading",
    "gemma4_template",
    "get_callable_name",
    "get_config_model_id",
    "glm4moe_template",
    "gptoss_template",
    "is_async_callable",
    "lfm2_2_5_template",
    "llama3_template",
    "nanstd",
    "nemotron_3_template",
    "pad",
    "parse_response",
    "print_prompt_completions_sample",
    "qwen3_5_template",
    "qwen3_template",
    "unwrap_model_for_generation",
]


@contextmanager
def checked_loading(check: Callable[[str, Any, set[str]], None]) -> Iterator[None]:
    """A context in which GRPOTrainer and SFTTrainer call `check(name, model, missing)` on each model that they load by
    its name. `missing` are the keys that transformers did not find in its files."""
    from trl.trainer import grpo_trainer, sft_trainer

    def load(name: str, *args: Any, **arguments: Any) -> Any:
        model, report = create_model_from_path(name, *args, **arguments, output_loading_info=True)
        check(name, model, report["missing_keys"])
        return model

    trainers: tuple[Any, ...] = (grpo_trainer, sft_trainer)
    for module in trainers:
        module.create_model_from_path = load
    try:
        yield
    finally:
        for module in trainers:
            module.create_model_from_path = create_model_from_path


def __getattr__(name: str) -> Any:
    """Loads `VLLMGeneration`, which starts vLLM and moves weights to it, at first use: its module imports vLLM."""
    if name != "VLLMGeneration":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from trl.generation.vllm_generation import VLLMGeneration

    return VLLMGeneration
