"""A training step compared with TRL's GRPOTrainer and its tool loop: same model, tools, prompts, leaves and process.

    python benchmarks/against_trl.py --model runs/quickstart/sft --data runs/quickstart/data

Both trainers run in alternating order on the same generation batches. TRL's tool loop parses JSON calls. To use the
quickstart's tags, this script replaces TRL's parser and tool-result encoder by those of the protocol, and adds the
closing tags (single tokens here) to the EOS ids. Generation, tool execution and update are TRL's.

"Calls made" counts each call in the trees once. "Executed" counts the calls that reached a tool's function; it is
lower, because identical concurrent searches share one execution. "At least" is the lower bound of the calls made: a
branch saves at most all calls of its leaf, so N = M/2 makes at least half as many calls as N = M.

Latencies have a long tail (Pareto, exponent 2.5, at most ten times the mean). They depend on the arguments of a call,
so that the same call takes the same time in both loops.
"""

from __future__ import annotations

import argparse
import functools
import random
import threading
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
from arpo_trl.quickstart.task import read_lines
from arpo_trl.rollout.protocols import TagProtocol
from arpo_trl.tools.builtin import ToolArguments, build_tools
from arpo_trl.tools.calls import CallSource, ToolCall
from arpo_trl.tools.spec import tool_spec

LENGTH, CALLS = 240, 5
THEIRS = "TRL GRPOTrainer"
OURS = {"ours, N = M": 1, "ours, N = M/2": 2, "ours, N = M/4": 4}
"""Our variants by name, each with its ratio M ÷ N."""


class TagGRPOTrainer(GRPOTrainer):
    """TRL's trainer on the quickstart's tags."""

    protocol: TagProtocol

    def _get_tool_suffix_ids(self, tool_messages: list[dict[str, Any]]) -> list[int]:
        return self.protocol.encode_observation([(message["name"], message["content"]) for message in tool_messages])


def parse_with(protocol: TagProtocol) -> Callable[..., dict[str, Any]]:
    def parse_response(tokenizer: Any, ids: list[int], **_: Any) -> dict[str, Any]:
        text = protocol.decode_turn(ids)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        calls = [call for call in protocol.parse_turn(text) if isinstance(call, ToolCall)]
        if calls:
            message["tool_calls"] = [
                {"type": "function", "function": {"name": call.name, "arguments": call.arguments}} for call in calls
            ]
        return message

    return parse_response


def trl_trainer(
    model: Path,
    reward: Callable[..., list[float]],
    config: GRPOConfig,
    dataset: Dataset,
    tools: list[Any],
    kind: type[TagGRPOTrainer] = TagGRPOTrainer,
) -> TagGRPOTrainer:
    """TRL's trainer with the quickstart's model, which writes tags. Patches TRL's module in this process."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    protocol = TagProtocol(tokenizer, {tool.__name__: tool_spec(tool) for tool in tools})
    grpo_trainer.parse_response = parse_with(protocol)
    grpo_trainer.supports_tool_calling = lambda processing_class: True
    grpo_trainer.is_chat_template_prefix_preserving = lambda processing_class: True
    grpo_trainer.add_response_schema = lambda processing_class: processing_class
    loaded = AutoModelForCausalLM.from_pretrained(model)
    loaded.generation_config.eos_token_id = [
        tokenizer.eos_token_id,
        *(tokenizer.vocab[tag] for tool in tools if (tag := f"</{tool.__name__}>") in tokenizer.vocab),
    ]
    trainer = kind(loaded, reward, config, dataset, tools=tools)
    trainer.protocol = protocol
    # TRL parses completions if the response template is truthy. Its content is not used.
    trainer._tokenizer.response_template = {"tags": True}
    return trainer


def length_reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A cheap reward that differs between the leaves of a group."""
    return [float(len(ids) % 7) for ids in completion_ids]


def settings(folder: Path, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": str(folder),
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
    """The tool with a random latency, seeded by the arguments of the call."""
    if not mean_s:
        return tool
    shape = 2.5

    @functools.wraps(tool)  # keeps the name, docstring and signature
    def delayed(*args: Any, **kwargs: Any) -> str:
        drawn = random.Random(repr((args, sorted(kwargs.items())))).paretovariate(shape) * (shape - 1) / shape
        time.sleep(mean_s * min(drawn, 10.0))
        return tool(*args, **kwargs)

    return delayed


class Counter:
    """Counts the executions of tools."""

    def __init__(self) -> None:
        self.calls = 0
        self._lock = threading.Lock()

    def __call__(self, tool: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(tool)
        def counted(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.calls += 1
            return tool(*args, **kwargs)

        return counted


def step(trainer: GRPOTrainer, rows: list[dict[str, Any]], counter: Counter) -> dict[str, float]:
    """Runs one step. Returns the seconds of the rollout (with scoring) and of the update, and counts per leaf."""
    before = counter.calls
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    start = time.perf_counter()
    batch = trainer._generate_and_score_completions(rows)
    rollout = time.perf_counter()
    trainer.model.zero_grad()
    trainer._compute_loss(trainer.model, batch).backward()
    end = time.perf_counter()
    made = executed = counter.calls - before
    if isinstance(trainer, ARPOTrainer):
        assert trainer._last is not None
        nodes = [node for tree in trainer._last.rollout.trees for node in tree.nodes]
        made = sum(call.source is not CallSource.REFUSED for node in nodes for call in node.calls)
    trained = int((batch["completion_mask"] * batch["tool_mask"]).sum())
    return {
        "rollout_s": rollout - start,
        "update_s": end - rollout,
        "step_s": end - start,
        "trained_tokens": trained,
        "made": made / len(rows),
        "executed": executed / len(rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart/sft"))
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart/data"))
    parser.add_argument("--leaves", type=int, default=16, help="M, a multiple of 4 (default: 16)")
    parser.add_argument("--prompts", type=int, default=4, help="groups a step (default: 4)")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--latency", type=float, nargs="+", default=[0.0, 0.1, 0.5], help="mean seconds added to each tool call"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/against_trl"))
    arguments = parser.parse_args()
    dataset = Dataset.from_list(read_lines(arguments.data / "train.jsonl"))
    tools = build_tools(ToolArguments(search_index=str(arguments.data / "corpus.jsonl"), search_top_k=2))
    lines = [
        "| tool latency | | rollout s | TRL / ours | update s | TRL / ours | step s | TRL / ours | trained tokens | "
        "calls made / leaf | at least | executed |",
        "|---|---|" + "---:|" * 10,
    ]
    leaves = arguments.leaves
    batch = {"num_generations": leaves, "per_device_train_batch_size": leaves * arguments.prompts}
    for latency in arguments.latency:
        counters: dict[str, Counter] = defaultdict(Counter)
        offered = [slowed(tool, latency) for tool in tools]

        def ours(name: str, n: int, offered: list[Any] = offered, counters: Any = counters) -> ARPOTrainer:
            args = ARPOConfig(**settings(arguments.output, initial_rollouts=n, trajectory_log_rate=0.0, **batch))
            counted = [counters[name](tool) for tool in offered]
            return ARPOTrainer(str(arguments.model), length_reward, args, dataset, tools=counted)

        theirs = trl_trainer(
            arguments.model,
            length_reward,
            GRPOConfig(**settings(arguments.output, **batch)),
            dataset,
            [counters[THEIRS](tool) for tool in offered],
        )
        trainers: dict[str, GRPOTrainer] = {THEIRS: theirs}
        for name, divisor in OURS.items():
            trainers[name] = ours(name, leaves // divisor)
        measured: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in trainers}
        for repeat in range(-1, arguments.repeats):  # the first round warms up and is not counted
            first = (repeat + 1) * arguments.prompts
            rows = [dataset[first + i // leaves] for i in range(arguments.prompts * leaves)]
            order = list(trainers) if repeat % 2 else list(reversed(trainers))
            for name in order:
                torch.manual_seed(repeat)
                for key, value in step(trainers[name], [dict(row) for row in rows], counters[name]).items():
                    if repeat >= 0:
                        measured[name][key].append(value)
        base = measured[THEIRS]
        whole = median(measured["ours, N = M"]["made"])
        for name, values in measured.items():
            cells = [f"{latency:g} s", name]
            for key in ("rollout_s", "update_s", "step_s"):
                ratios = [b / v for b, v in zip(base[key], values[key], strict=True)]
                cells += [f"{median(values[key]):.2f}", f"{median(ratios):.2f}"]
            bound = f"{whole / OURS[name]:.2f}" if name in OURS else ""
            cells += [f"{median(values['trained_tokens']):,.0f}", f"{median(values['made']):.2f}", bound]
            cells.append(f"{median(values['executed']):.2f}")
            lines.append("| " + " | ".join(cells) + " |")
        for trainer in trainers.values():
            if isinstance(trainer, ARPOTrainer):
                trainer.toolbox.close()
    print("\n".join(lines))


if __name__ == "__main__":
    main()
