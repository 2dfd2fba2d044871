"""What can be known to fail, or has to be said, before the first step."""

from __future__ import annotations

import tempfile
from collections.abc import Collection
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset

from arpo_trl.data import validate_rows
from arpo_trl.errors import ConfigError
from arpo_trl.rollout.protocol import ToolProtocol


def check_writable(folder: Path) -> None:
    """Fails now rather than at the first checkpoint."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # a name of its own: other ranks look at the same time
            pass
    except OSError as error:
        raise ConfigError(f"output_dir {folder} cannot be written ({error}). Choose another folder.") from error


def check_quantized_training(peft_config: Any) -> None:
    """Fails where quantized weights could not be trained, or would not be without a word."""
    if peft_config is None:
        raise ConfigError(
            "The model is to be quantized (load_in_4bit, load_in_8bit or quantization_config), which freezes its "
            "weights, and nothing else is there to train. Set use_peft: true, or give a peft_config."
        )
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            "The model is to be quantized, but bitsandbytes is not installed here. Install the extra: pip install "
            "'.[qlora]'."
        )
    from bitsandbytes.functional import has_avx512bf16

    if not torch.accelerator.is_available() and has_avx512bf16():
        # It packs the weights anew for inference, and the packed ones pass no gradient on: adapters would stay zero.
        raise ConfigError(
            "The model is to be quantized, but there is no GPU, and bitsandbytes does not train on this CPU. Use a "
            "machine with a GPU, or leave quantization out."
        )


def check_rows(dataset: Any, reward_funcs: Collection[Any]) -> None:
    """Fails where a row cannot be rolled out, or lacks what a reward needs; a streamed dataset is checked as it comes.

    A reward function that needs something of a row has a method `check_dataset`, which raises `DataError`.
    """
    if not isinstance(dataset, Dataset):
        return
    validate_rows(dataset)
    for function in reward_funcs:
        if (check := getattr(function, "check_dataset", None)) is not None:
            check(dataset)


def check_prompts_fit(dataset: Any, protocol: ToolProtocol, context: int, advice: str) -> None:
    """Fails where a prompt leaves no room in a context of that many tokens; a streamed dataset is checked as it comes.

    Args:
        advice: What to do about it besides changing the row.
    """
    if not isinstance(dataset, Dataset):
        return
    room = context - 1
    template = len(protocol.encode_prompt(dataset[0]["prompt"]))
    for i, prompt in enumerate(dataset["prompt"]):
        parts = [prompt] if isinstance(prompt, str) else [str(message) for message in prompt]
        # A token covers at least one byte, so only texts this long need to be tokenised to know.
        longest = sum(len(part.encode()) + template for part in parts)
        if longest > room and (length := len(protocol.encode_prompt(prompt))) > room:
            raise ConfigError(
                f"Dataset row {i}: its prompt has {length} tokens, but the context is {context}, which leaves no room "
                f"for a completion. Shorten or drop the row{advice}."
            )


def untold_tags(tools: Collection[str], dataset: Any) -> str | None:
    """What the model must know already, where tags call the tools and the first prompt does not name them; else None.

    Of a streamed dataset nothing is known yet, so it is said.
    """
    prompt = str(dataset[0]["prompt"]) if isinstance(dataset, Dataset) else ""
    untold = [name for name in tools if f"<{name}>" not in prompt]
    if not untold:
        return None
    return (
        f"tool_protocol is 'tags', which puts no tool into a prompt, and the first prompt does not name "
        f"{', '.join(f'<{name}>' for name in untold)}. The model must have been taught to call a tool as "
        f"<{untold[0]}>…</{untold[0]}> and to read what it answers in <result>…</result>: by demonstrations (sft.py), "
        "or by a system prompt. arpo_trl.prompts.tags_system_prompt(tools) writes one that describes these tools; "
        "load_arpo_dataset takes it as system_prompt. A model that calls tools in its own way wants tool_protocol "
        "'chat_template' instead."
    )
