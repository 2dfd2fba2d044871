"""Runs the shipped configurations with tiny models of the families that they name, built locally.

`python shipped.py CONFIG --flag value … -- CONFIG --flag value …` runs `train.py` on one configuration after the
other in one process. It is a separate process because vLLM in the trainer's process sets up torch.distributed, which
no other test should inherit.
"""

from __future__ import annotations

import gc
import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from arpo_trl.data.demonstrations import encode_trajectory
from arpo_trl.rollout.protocols import TagProtocol
from support import script, small_model, with_template

CONFIGS = Path(__file__).parents[1] / "configs"
PROMPTS = 128
"""What the largest generation batch takes."""
SCHOOL_STEPS = 70
LLAMA_ROPE = {
    **{"rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0},
    **{"high_freq_factor": 4.0, "original_max_position_embeddings": 8192},
}
SHAPE: dict[str, Any] = {"hidden_size": 64, "head_dim": 32}  # vLLM's attention on a CPU takes multiples of 32
FAMILIES: dict[str, tuple[Any, Any, str, str | None, dict[str, Any]]] = {
    "Qwen2.5-3B": (
        *(Qwen2Config, Qwen2ForCausalLM, "qwen2_5", None),
        {"hidden_size": 64, "max_position_embeddings": 32_768, "rope_theta": 1e6, "tie_word_embeddings": True},
    ),
    "Qwen2.5-7B": (
        *(Qwen2Config, Qwen2ForCausalLM, "qwen2_5", None),
        {"hidden_size": 64, "max_position_embeddings": 32_768, "rope_theta": 1e6},
    ),
    "Qwen3": (
        *(Qwen3Config, Qwen3ForCausalLM, "qwen3", None),
        {**SHAPE, "max_position_embeddings": 40_960, "rope_theta": 1e6},
    ),
    "Llama-3.1": (
        *(LlamaConfig, LlamaForCausalLM, "llama3_1", "<|eot_id|>"),
        {**SHAPE, "max_position_embeddings": 131_072, "rope_parameters": LLAMA_ROPE},
    ),
}
"""By a part of the model's name: configuration, class, chat template, end of a turn, what the family's files say."""


def settings(config: str) -> dict[str, Any]:
    """The content of a file of configs/."""
    written: dict[str, Any] = yaml.safe_load((CONFIGS / config).read_text("utf-8"))
    return written


def family(config: str) -> str:
    """The family of the model that a configuration names."""
    (found,) = [name for name in FAMILIES if name in settings(config)["model_name_or_path"]]
    return found


COLOCATED = sorted(file.name for file in CONFIGS.glob("vllm_*.yaml") if "_lora" not in file.name)
SERVED = sorted(file.name for file in CONFIGS.glob("vllm_*_lora.yaml"))
ALONE = [name for name in COLOCATED if settings(name)["vllm_tensor_parallel_size"] == 1]
IN_PAIRS = [name for name in COLOCATED if settings(name)["vllm_tensor_parallel_size"] == 2]
NO_SLEEP = ("--vllm_enable_sleep_mode", "false")


def question(i: int) -> list[dict[str, str]]:
    return [{"role": "system", "content": "Use \x08oxed{}."}, {"role": "user", "content": f"what is {i}"}]


def save_data(folder: Path) -> None:
    """Questions as the published rows have them, and recorded results to search in."""
    rows = [
        {
            "prompt": question(i),
            "ability": "math" if i % 2 else "qa",
            "reward_model": {"ground_truth": str(i % 10), "style": "rule"},
            "extra_info": {"question": f"what is {i}", "index": i},
        }
        for i in range(PROMPTS)
    ]
    Dataset.from_list(rows).to_parquet(folder / "rows.parquet")
    (folder / "recorded.json").write_text(json.dumps({"iron": "Page 1: a metal"}), "utf-8")


def save_family(name: str, folder: Path) -> str:
    """A model of that layout after a short training: most of its paths search at most once and answer."""
    config_class, model_class, template, eos, shape = FAMILIES[name]
    tokenizer = with_template(template, eos)
    if eos is not None:
        tokenizer.add_special_tokens({"bos_token": "<|begin_of_text|>"})
    own = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id, "initializer_range": 0.05}
    model = small_model(config_class, model_class, **shape, **own)
    teach(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def teach(model: Any, tokenizer: PreTrainedTokenizerFast) -> None:
    protocol = TagProtocol(tokenizer, {})
    encoded = []
    for i in range(10):
        answer = {"role": "assistant", "content": f"<answer>\\boxed{{{i % 10}}}</answer>"}
        call = [{"role": "assistant", "content": "<search>iron</search>"}, {"role": "tool", "content": "a metal"}]
        encoded.append(encode_trajectory({"messages": [*question(i), *(call if i % 4 else []), answer]}, protocol))
    longest = max(len(row["input_ids"]) for row in encoded)
    ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in encoded])
    labels = torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in encoded])
    optimizer = torch.optim.Adam(model.parameters(), lr=4e-3)
    for _ in range(SCHOOL_STEPS):
        model(ids, labels=labels).loss.backward()  # causal: padding on the right changes nothing
        optimizer.step()
        optimizer.zero_grad()


def replacements(model: str, data: Path, output: Path) -> list[str]:
    """The flags that replace missing files of a published run; everything else is as shipped."""
    return [
        *("--model_name_or_path", model, "--dataset", str(data / "rows.parquet"), "--output_dir", str(output)),
        *("--search_recorded", str(data / "recorded.json"), "--max_completion_length", "48", "--max_steps", "1"),
        *("--use_cpu", "true"),
    ]


def the_step(output: Path) -> dict[str, Any]:
    """The logged values of a run of one step. Also checks that a model was saved."""
    (logged,) = [
        row for row in json.loads((output / "trainer_state.json").read_text("utf-8"))["log_history"] if "loss" in row
    ]
    assert list(output.glob("*.safetensors"))
    assert math.isfinite(logged["loss"]) and math.isfinite(logged["grad_norm"])
    return logged


def check(config: str, output: Path, ranks: int = 1) -> None:
    """One step was made of the batch that the file has, from trees that branched where it says so."""
    wanted, logged = settings(config), the_step(output)
    batch = wanted["per_device_train_batch_size"] * wanted.get("steps_per_generation", 1) * ranks
    assert logged["arpo/tree/leaves"] == batch
    assert (logged["arpo/tree/branches"] > 0) == (wanted["initial_rollouts"] < wanted["num_generations"])
    assert logged["grad_norm"] > 0
    if wanted.get("use_vllm"):
        assert logged["sampling/sampling_logp_difference/mean"] < 0.02


def replaced(config: str, models: dict[str, str], data: Path, output: Path) -> list[str]:
    return replacements(models[family(config)], data, output)


def run(config: str, *flags: str, name: str = "train") -> None:
    """`train.py --config configs/CONFIG …` in this process."""
    before = sys.argv
    sys.argv = [f"{name}.py", "--config", str(CONFIGS / config), *flags]
    try:
        script(name).main()
    finally:
        sys.argv = before
        gc.collect()


def main(words: list[str]) -> None:
    while words:
        end = words.index("--") if "--" in words else len(words)
        run(*words[:end])
        words = words[end + 1 :]


if __name__ == "__main__":
    main(sys.argv[1:])
