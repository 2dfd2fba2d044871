"""A training step against TRL's own GRPOTrainer and tool loop: same model, tools, prompts and leaves, one process.

    python benchmarks/against_trl.py --model runs/quickstart/sft --data runs/quickstart/data

Both trainers take turns, order alternated, on the same generation batches. TRL's tool loop parses JSON calls; so that
it speaks the quickstart's tags, its parser and its tool-result encoder are replaced here by the protocol's, and the
closing tags, single tokens here, end its turns as EOS does. All else is TRL's: generation, tool execution, update.

Latencies are long-tailed (Pareto, exponent 2.5, at most ten times the mean) and belong to a call's arguments, so that
both loops pay the same for the same call.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.rollout.protocol import TagProtocol
from arpo_trl.tools.box import ToolCall, tool_spec
from arpo_trl.tools.build import ToolArguments, build_tools

LEAVES, PROMPTS, LENGTH, CALLS = 8, 16, 240, 5


class TagGRPOTrainer(GRPOTrainer):
    """TRL's trainer on the quickstart's tags."""

    protocol: TagProtocol

    def _get_tool_suffix_ids(self, tool_messages: list[dict[str, Any]]) -> list[int]:
        return self.protocol.encode_observation([(message["name"], message["content"]) for message in tool_messages])


def parse_with(protocol: TagProtocol) -> Callable[..., dict[str, Any]]:
    def parse_response(tokenizer: Any, ids: list[int], **_: Any) -> dict[str, Any]:
        text = protocol.decode_turn(ids, (tokenizer.eos_token_id,))
        message: dict[str, Any] = {"role": "assistant", "content": text}
        calls = [call for call in protocol.parse_turn(text) if isinstance(call, ToolCall)]
        if calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls
            ]
        return message

    return parse_response


def length_reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Something that differs between the leaves of a group and costs nothing."""
    return [float(len(ids) % 7) for ids in completion_ids]


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
        "num_generations": LEAVES,
        "per_device_train_batch_size": LEAVES * PROMPTS,
        "max_completion_length": LENGTH,
        "max_tool_calling_iterations": CALLS,
        "learning_rate": 0.0,
        "max_steps": 1000,
        "report_to": "none",
        "use_cpu": not torch.cuda.is_available(),
        "bf16": False,
        "gradient_checkpointing": False,
        "loss_type": "grpo",
        **more,
    }


def slowed(tool: Callable[[str], str], mean_s: float) -> Callable[[str], str]:
    """The tool with a latency that its arguments determine."""
    if not mean_s:
        return tool
    shape = 2.5

    @functools.wraps(tool)  # which keeps its name, docstring and signature
    def delayed(*args: Any, **kwargs: Any) -> str:
        drawn = random.Random(repr((args, sorted(kwargs.items())))).paretovariate(shape) * (shape - 1) / shape
        time.sleep(mean_s * min(drawn, 10.0))
        return tool(*args, **kwargs)

    return delayed


def step(trainer: GRPOTrainer, rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of the rollout with scoring and of the update, and what they produced."""
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    start = time.perf_counter()
    batch = trainer._generate_and_score_completions(rows)
    rollout = time.perf_counter()
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, batch).backward()
    end = time.perf_counter()
    trained = int((batch["completion_mask"] * batch["tool_mask"]).sum())
    return {
        "rollout_s": rollout - start,
        "update_s": end - rollout,
        "step_s": end - start,
        "trained_tokens": trained,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart/sft"))
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart/data"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--latency", type=float, nargs="+", default=[0.0, 0.1, 0.5], help="mean seconds added to each tool call"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/against_trl"))
    arguments = parser.parse_args()
    dataset = Dataset.from_list(
        [json.loads(line) for line in (arguments.data / "train.jsonl").read_text("utf-8").splitlines()]
    )
    tools = build_tools(ToolArguments(search_index=str(arguments.data / "corpus.jsonl"), search_top_k=2))
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    protocol = TagProtocol(tokenizer, {tool.__name__: tool_spec(tool) for tool in tools})
    grpo_trainer.parse_response = parse_with(protocol)
    grpo_trainer.supports_tool_calling = lambda processing_class: True
    grpo_trainer.is_chat_template_prefix_preserving = lambda processing_class: True
    grpo_trainer.add_response_schema = lambda processing_class: processing_class
    lines = [
        "| tool latency | | rollout s | TRL / ours | update s | TRL / ours | step s | TRL / ours | trained tokens |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for latency in arguments.latency:
        offered = [slowed(tool, latency) for tool in tools]

        def ours(n: int, offered: list[Callable[..., Any]] = offered) -> ARPOTrainer:
            args = ARPOConfig(**settings(arguments.output, initial_rollouts=n, trajectory_log_rate=0.0))
            return ARPOTrainer(str(arguments.model), length_reward, args, dataset, tools=offered)

        theirs_model = AutoModelForCausalLM.from_pretrained(arguments.model)
        theirs_model.generation_config.eos_token_id = [
            tokenizer.eos_token_id,
            *(tokenizer.convert_tokens_to_ids(f"</{tool.__name__}>") for tool in tools),
        ]
        theirs = TagGRPOTrainer(
            theirs_model, length_reward, GRPOConfig(**settings(arguments.output)), dataset, tools=offered
        )
        theirs.protocol = protocol
        # A truthy response template makes TRL parse completions; which one does not matter, ours is used.
        theirs._tokenizer.response_template = {"tags": True}
        trainers: dict[str, GRPOTrainer] = {
            "TRL GRPOTrainer": theirs,
            "ours, N = M": ours(LEAVES),
            "ours, N = M/2": ours(LEAVES // 2),
            "ours, N = M/4": ours(LEAVES // 4),
        }
        measured: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in trainers}
        for repeat in range(-1, arguments.repeats):  # the first round warms up and is not counted
            rows = [dataset[(repeat + 1) * PROMPTS + i // LEAVES] for i in range(PROMPTS * LEAVES)]
            order = list(trainers) if repeat % 2 else list(reversed(trainers))
            for name in order:
                torch.manual_seed(repeat)
                for key, value in step(trainers[name], [dict(row) for row in rows]).items():
                    if repeat >= 0:
                        measured[name][key].append(value)
        base = measured["TRL GRPOTrainer"]
        for name, values in measured.items():
            cells = [f"{latency:g} s", name]
            for key in ("rollout_s", "update_s", "step_s"):
                ratios = [b / v for b, v in zip(base[key], values[key], strict=True)]
                cells += [f"{median(values[key]):.2f}", f"{median(ratios):.2f}"]
            lines.append("| " + " | ".join([*cells, f"{median(values['trained_tokens']):,.0f}"]) + " |")
        for trainer in trainers.values():
            if isinstance(trainer, ARPOTrainer):
                trainer.toolbox.close()
    print("\n".join(lines))


if __name__ == "__main__":
    main()
