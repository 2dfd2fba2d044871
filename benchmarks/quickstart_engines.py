"""The quickstart's reinforcement learning on this device: accuracy before and after, seconds by phase, peak memory.

    python benchmarks/quickstart_engines.py before          # the cold-started model of `make quickstart`
    python benchmarks/quickstart_engines.py transformers    # trains it, sampling with transformers
    python benchmarks/quickstart_engines.py vllm            # trains it, sampling with vLLM in sleep mode
    python benchmarks/quickstart_engines.py vllm --device cpu --tiny

The script runs `train.py` with configs/quickstart.yaml in this process, in bfloat16 autocast and without evaluations.
As in the quickstart, it measures the accuracy on held-out questions, sampled at temperature 1 with transformers in
float32. With all 600 questions the standard error is 0.02. Phases are sums of the metrics `arpo/time/…`.
"""

from __future__ import annotations

import argparse
import json
import math
import runpy
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from arpo_trl.quickstart.corpus import passages
from arpo_trl.quickstart.model import save_cold_start_base
from arpo_trl.quickstart.stages import RL_CONFIG, measure
from arpo_trl.quickstart.tasks import make_tasks
from arpo_trl.viewing.run import log_history
from card import PeakMemory, device_name, own_stdout, shown, start_vllm_uncompiled

COLUMNS = (
    "engine | accuracy | steps | seconds | decode s | tool wait s | sync s | logprobs s | reward s | update s "
    "| sampling − training logprob | peak GiB"
)
PHASES = ("decode", "tool_wait", "sync", "logprobs", "reward", "update")
VLLM = (
    *("--use_vllm", "true", "--vllm_mode", "colocate", "--vllm_max_model_length", "1024"),
    *("--vllm_gpu_memory_utilization", "0.1"),
)


def train(engine: str, run: Path, output: Path, steps: int, device: torch.device, *more: str) -> list[dict[str, Any]]:
    """Trains; the logged metrics of each step.

    Raises:
        SystemExit: The script failed. It has printed its own error.
    """
    flags = [
        *("--config", str(RL_CONFIG), "--model_name_or_path", str(run / "sft"), "--output_dir", str(output)),
        *("--dataset", str(run / "data/train.jsonl"), "--search_index", str(run / "data/corpus.jsonl")),
        *("--max_steps", str(steps), "--eval_strategy", "no", "--trajectory_log_rate", "0", "--bf16", "true"),
        *("--use_cpu", str(device.type == "cpu").lower(), *more),
    ]
    if engine == "vllm":
        start_vllm_uncompiled(device)
        flags += [
            *VLLM,
            "--vllm_enable_sleep_mode",
            str(device.type == "cuda").lower(),
        ]  # vLLM has no sleep mode on a CPU
    sys.argv = ["train.py", *flags]
    runpy.run_path("train.py", run_name="__main__")
    history = log_history(output)
    return [row for row in history if "loss" in row]


def make_tiny_run(run: Path) -> None:
    """Creates the files of a quickstart run with few questions and a model without cold start."""
    (run / "data").mkdir()
    questions, heldout = make_tasks(0, 8, 8)
    for name, rows in (("corpus", passages()), ("train", questions), ("heldout", heldout)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (run / "data" / f"{name}.jsonl").write_text(lines, "utf-8")
    save_cold_start_base(run / "sft")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", choices=["before", "transformers", "vllm"])
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="default: runs/quickstart")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument(
        "--tiny", action="store_true", help="a quick trial: a model without cold start and few questions"
    )
    parser.add_argument("--header", action="store_true", help="print the head of the table before the row")
    arguments = parser.parse_args()
    out, device, run = own_stdout(), torch.device(arguments.device), arguments.run
    if arguments.header:
        print(f"Quickstart, {arguments.steps} steps, on {device_name(device)}\n", file=out)
        print(f"| {COLUMNS} |\n|{'---:|' * (COLUMNS.count('|') + 1)}", file=out)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.tiny:
            run = Path(folder)
            make_tiny_run(run)
        if not (run / "sft/config.json").exists():
            raise SystemExit(f"{run / 'sft'} is missing. Run `make quickstart`, or copy its runs/quickstart here.")
        model, history, seconds = run / "sft", [], 0.0
        with PeakMemory(device) as peak:
            if arguments.engine != "before":
                start = time.perf_counter()
                model = Path(folder) / "rl"
                more = ("--per_device_train_batch_size", "16") if arguments.tiny else ()
                history = train(arguments.engine, run, model, arguments.steps, device, *more)
                seconds = time.perf_counter() - start
            accuracy = measure(model, run / "data", 0, temperature=1.0, device=device).accuracy
    cells = [arguments.engine, f"{accuracy:.3f}"]
    if history:
        spent = [sum(row.get(f"arpo/time/{phase}_s", 0.0) for row in history) for phase in PHASES]
        off = max(
            row.get("sampling/sampling_logp_difference/mean", math.nan) for row in history
        )  # only logged with vLLM
        cells += [str(len(history)), f"{seconds:.1f}", *(f"{value:.2f}" for value in spent), shown(off, ".4f")]
    else:
        cells += [""] * (len(PHASES) + 3)
    print("| " + " | ".join([*cells, f"{peak.gib:.2f}"]) + " |", file=out)


if __name__ == "__main__":
    main()
