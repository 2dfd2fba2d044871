"""GRPO and ARPO in the quickstart's shop with slow resets: how many resets and calls branching saves.

    OMP_NUM_THREADS=1 python benchmarks/shop.py --seeds 0 1 2

The script makes one cold start by the quickstart's stage 1 (`--cold_start` names a folder with `data` and `sft` to use
instead). GRPO (N = M) and ARPO (N = M/2) train from it with each seed. A reset takes `--reset_seconds`. The script
appends each result to <output>/results.jsonl at once, so a run can be stopped and resumed. `--table` only prints the
table.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from transformers.utils import logging as transformers_logging

from arpo_trl.quickstart.report import summarise
from arpo_trl.quickstart.shop.task import SHOP, measure
from arpo_trl.quickstart.stages import launch
from arpo_trl.viewing.run import log_history
from compare_rules import as_table
from study.files import append, rows_in
from study.training import cold_start

LEAVES, GROUPS = 8, 8
VARIANTS = {"GRPO (N = M)": LEAVES, "ARPO N = M/2": LEAVES // 2}
COLUMNS = {
    "accuracy_before": "before",
    "accuracy_after": "accuracy",
    "tool_calls_made": "calls",
    "resets": "resets",
    "forks": "forks",
    "topups": "top-ups",
    "generated_tokens": "tokens",
    "seconds_in_resets": "seconds in resets",
    "seconds_per_step": "seconds per step",
}


def train(cold: Path, output: Path, seed: int, variant: str, steps: int, reset_seconds: float) -> dict[str, Any]:
    launch(
        SHOP.script,
        SHOP.config,
        *("--model_name_or_path", str(cold / "sft"), "--dataset", str(cold / "data/train.jsonl")),
        *("--output_dir", str(output), "--seed", str(seed), "--max_steps", str(steps)),
        *("--initial_rollouts", str(VARIANTS[variant]), "--per_device_train_batch_size", str(GROUPS * LEAVES)),
        *("--reset_seconds", str(reset_seconds), "--eval_strategy", "no", "--trajectory_log_rate", "0"),
    )
    history = log_history(output)
    logged = [row for row in history if "reward" in row]
    counts = {name: sum(row[f"arpo/environments/{name}"] for row in logged) for name in ("resets", "forks")}
    in_resets = sum(row["arpo/environments/resets"] * row["arpo/environments/reset_s"] for row in logged)
    runtime = next(row["train_runtime"] for row in history if "train_runtime" in row)
    return {
        "variant": variant,
        "seed": seed,
        "accuracy_after": measure(output, cold / "data", seed, temperature=1.0).accuracy,
        **summarise(history),
        **counts,
        "seconds_in_resets": in_resets,
        "seconds_per_step": runtime / len(logged),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/shop"))
    parser.add_argument("--cold_start", type=Path, help="default: <output>")
    parser.add_argument("--steps", type=int, default=16, help="training steps of each run (default: 16)")
    parser.add_argument("--reset_seconds", type=float, default=0.5, help="default: 0.5")
    parser.add_argument("--table", action="store_true", help="only print the table of the existing results")
    arguments = parser.parse_args()
    transformers_logging.disable_progress_bar()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    cold: Path = arguments.cold_start or output
    results = output / "results.jsonl"
    done = rows_in(results)
    if not arguments.table:
        cold_start(cold, 0, SHOP)
        finished = {(row["variant"], row["seed"]) for row in done}
        for seed in arguments.seeds:
            before = None
            for variant in VARIANTS:
                if (variant, seed) in finished:
                    continue
                if before is None:
                    before = measure(cold / "sft", cold / "data", seed, temperature=1.0).accuracy
                folder = output / f"{variant.split()[0].lower()}-{seed}"
                row = train(cold, folder, seed, variant, arguments.steps, arguments.reset_seconds)
                done.append({"accuracy_before": before, **row})
                append(results, done[-1])
    print(as_table(done, list(VARIANTS), COLUMNS))


if __name__ == "__main__":
    main()
