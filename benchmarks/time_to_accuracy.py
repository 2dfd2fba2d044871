"""Training time until the quickstart's model has a given held-out accuracy, with GRPOTrainer and with ARPOTrainer.

    OMP_NUM_THREADS=1 python benchmarks/time_to_accuracy.py --run runs/quickstart

Both train from the same cold start on the same questions with the settings of configs/quickstart.yaml. The reward is 1
for a correct answer. Every few steps the clock stops, and the policy answers held-out questions at temperature 1. All
runs take place in one process, in alternating order. The table has medians over the seeds; a run that ended below the
accuracy counts as inf.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import yaml
from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from against_trl import CALLS, THEIRS, trl_trainer
from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.quickstart.heldout import answer_heldout
from arpo_trl.quickstart.task import read_lines
from arpo_trl.rewards.answers import extract_answer, task_accuracy
from arpo_trl.tools.builtin import ToolArguments, build_tools
from arpo_trl.tools.toolbox import ToolBox

CONFIG = Path("configs/quickstart.yaml")
SHARED = (
    "max_steps num_generations per_device_train_batch_size max_completion_length max_tool_calling_iterations "
    "learning_rate lr_scheduler_type max_grad_norm adam_beta2 bf16 gradient_checkpointing"
).split()
"""Keys of the configuration that both trainers have. Both use `loss_type: grpo`, the default of ARPOConfig."""
OURS = {"ours, N = M": 8, "ours, N = M/2": 4}


def right(completions: list[list[dict[str, str]]], answer: list[list[str]], task: list[str], **_: Any) -> list[float]:
    """1 if the last message contains the correct answer, else 0."""
    found = [extract_answer(completion[-1]["content"] if completion else "") for completion in completions]
    return [
        0.0 if given is None else task_accuracy(given, golds, kind)
        for given, golds, kind in zip(found, answer, task, strict=True)
    ]


class Watch(TrainerCallback):
    """Measures the accuracy every `every` steps with a stopped clock. Ends the training at `target`."""

    def __init__(self, measure: Callable[[Any], float], every: int, target: float):
        self.measure, self.every, self.target = measure, every, target
        self.seconds, self.started = 0.0, 0.0
        self.seen: list[tuple[int, float, float]] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.started = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step % self.every:
            return
        self.seconds += time.perf_counter() - self.started
        self.seen.append((state.global_step, self.seconds, self.measure(model)))
        control.should_training_stop = control.should_training_stop or self.seen[-1][2] >= self.target
        self.started = time.perf_counter()


def train(name: str, folder: Path, seed: int, every: int, target: float) -> list[tuple[int, float, float]]:
    """Runs one training. Returns (step, seconds of training, held-out accuracy) of each measurement."""
    model, data = folder / "sft", folder / "data"
    rows, heldout = (read_lines(data / f"{part}.jsonl") for part in ("train", "heldout"))
    tools = build_tools(ToolArguments(search_index=str(data / "corpus.jsonl"), search_top_k=2))
    config = yaml.safe_load(CONFIG.read_text("utf-8"))
    common = {
        "output_dir": "runs/time_to_accuracy", "seed": seed, "loss_type": "grpo", "save_strategy": "no",
        "use_cpu": not torch.cuda.is_available(), "report_to": "none", "disable_tqdm": True, "logging_strategy": "no",
        **{key: config[key] for key in SHARED},
    }  # fmt: skip
    trainer: GRPOTrainer
    if name == THEIRS:
        trainer = trl_trainer(model, right, GRPOConfig(**common), Dataset.from_list(rows), tools)
    else:
        own = {key: config[key] for key in ("entropy_probe_tokens", "tool_cache", "rollout_schedule")}
        args = ARPOConfig(**common, **own, initial_rollouts=OURS[name], trajectory_log_rate=0.0)
        trainer = ARPOTrainer(str(model), right, args, Dataset.from_list(rows), tools=tools)
    with ToolBox(tools, cache=True) as toolbox:

        def measure(policy: Any) -> float:
            lengths = {"max_completion_length": config["max_completion_length"], "max_tool_calls": CALLS}
            tokenizer = trainer.processing_class
            return answer_heldout(policy, tokenizer, heldout, toolbox, temperature=1.0, **lengths).accuracy

        watch = Watch(measure, every, target)
        trainer.add_callback(watch)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    if isinstance(trainer, ARPOTrainer):
        trainer.toolbox.close()
    return watch.seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="the output folder of a quickstart")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4], help="seeds of the training")
    parser.add_argument("--target", type=float, default=0.6)
    parser.add_argument("--every", type=int, default=4, help="steps between measurements (default: 4)")
    arguments = parser.parse_args()
    target = arguments.target
    names = (THEIRS, *OURS)
    runs: dict[str, list[tuple[int, float, float]]] = {name: [] for name in names}  # steps, seconds, a step's seconds
    for turn, seed in enumerate(arguments.seeds):
        for name in names[:: -1 if turn % 2 else 1]:
            step, seconds, accuracy = train(name, arguments.run, seed, arguments.every, target)[-1]
            runs[name].append((step, seconds if accuracy >= target else math.inf, seconds / step))
            print(f"{name}, seed {seed}: {step} steps, {seconds:.0f} s, accuracy {accuracy:.3f}", flush=True)
    print(f"\n| | steps | seconds to {target:g} | from | to | s a step | TRL / ours |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name in names:
        steps, needed, each = zip(*runs[name], strict=True)
        ratio = median(theirs[1] / ours[1] for theirs, ours in zip(runs[THEIRS], runs[name], strict=True))
        cells = [f"{median(steps):g}", *(f"{s:.0f}" for s in (median(needed), min(needed), max(needed)))]
        print(f"| {name} | {' | '.join(cells)} | {median(each):.2f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
