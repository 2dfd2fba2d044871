"""GRPO compared with ARPO's branch rules at equal leaves and steps, on the quickstart's task.

    OMP_NUM_THREADS=1 python benchmarks/compare_rules.py --seeds 0 1 2 --jobs 2

Each seed has one cold start (the quickstart's stage 1). From there `train.py` trains each variant, and the script
evaluates it on the held-out questions. Each result is appended to <output>/results.jsonl at once, so a run can be
stopped and resumed. `--table` only prints the existing results.
"""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from arpo_trl.quickstart.report import summarise
from arpo_trl.quickstart.stages import RL_CONFIG, SEARCH, launch, measure
from arpo_trl.viewing.run import log_history
from study.files import append, rows_in, slug
from study.processes import run_all
from study.training import cold_start

RESULTS = "results.jsonl"
LEAVES = 8
VARIANTS = {
    "GRPO (N = M)": ("--initial_rollouts", str(LEAVES)),
    "ARPO N = M/4": ("--initial_rollouts", str(LEAVES // 4)),
    "ranked N = M/4": ("--initial_rollouts", str(LEAVES // 4), "--branch_rule", "ranked"),
    "random N = M/4": ("--initial_rollouts", str(LEAVES // 4), "--branch_rule", "random"),
    "ARPO N = M/2": ("--initial_rollouts", str(LEAVES // 2)),
}
COLUMNS = {
    "accuracy_before": "before",
    "accuracy_after": "accuracy",
    "tool_calls_made": "calls made",
    "tool_calls_distinct": "distinct",
    "generated_tokens": "tokens",
    "turns_in_sequence": "turns in sequence",
    "sharing_ratio": "sharing",
    "topups": "top-ups",
    "seconds": "seconds",
}


def start(folder: Path, seed: int) -> None:
    cold_start(folder, seed, SEARCH)


def train(folder: Path, seed: int, variant: str, steps: int) -> dict[str, Any]:
    output = folder / slug(variant)
    seconds = launch(
        "train",
        RL_CONFIG,
        *("--model_name_or_path", str(folder / "sft"), "--dataset", str(folder / "data/train.jsonl")),
        *("--eval_strategy", "no", "--search_index", str(folder / "data/corpus.jsonl")),
        *("--output_dir", str(output), "--seed", str(seed), "--max_steps", str(steps), "--trajectory_log_rate", "0"),
        *VARIANTS[variant],
    )
    history = log_history(output)
    return {
        "variant": variant,
        "seed": seed,
        "accuracy_before": measure(folder / "sft", folder / "data", seed, temperature=1.0).accuracy,
        "accuracy_after": measure(output, folder / "data", seed, temperature=1.0).accuracy,
        **summarise(history),
        "seconds": seconds,
    }


def append_result(output: Path, seed: int, variant: str, steps: int) -> None:
    append(output / RESULTS, train(output / f"seed{seed}", seed, variant, steps))


def as_table(rows: list[dict[str, Any]], variants: Iterable[str], columns: Mapping[str, str]) -> str:
    """Markdown: mean ± standard deviation over seeds."""
    by_variant: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_variant[row["variant"]].append(row)
    lines = ["| | seeds | " + " | ".join(columns.values()) + " |", "|---|" + "---:|" * (len(columns) + 1)]
    for variant in variants:
        if found := by_variant.get(variant):
            cells = [_cell([row[name] for row in found]) for name in columns]
            lines.append(f"| {variant} | {len(found)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(values: list[float]) -> str:
    digits = 3 if max(values) < 2 else 2 if max(values) < 20 else 0
    spread = f" ± {stdev(values):,.{digits}f}" if len(values) > 1 else ""
    return f"{mean(values):,.{digits}f}{spread}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, default=Path("runs/compare"))
    parser.add_argument(
        "--jobs", type=int, default=1, help="concurrent runs; compare seconds only at equal numbers of jobs"
    )
    parser.add_argument("--steps", type=int, default=16, help="training steps of each run (default: 16)")
    parser.add_argument("--table", action="store_true", help="only print the table of the existing results")
    arguments = parser.parse_args()
    output: Path = arguments.output
    results, errors = output / RESULTS, list[str]()
    if not arguments.table:
        seeds = {seed: output / f"seed{seed}" for seed in arguments.seeds}
        cold = {f"cold {seed}": partial(start, folder, seed) for seed, folder in seeds.items()}
        run_all(cold, arguments.jobs, output / "logs", errors)
        finished = {(row["variant"], row["seed"]) for row in rows_in(results)}
        jobs = {
            f"{variant}, seed {seed}": partial(append_result, output, seed, variant, arguments.steps)
            for variant in VARIANTS
            for seed, folder in seeds.items()
            if (folder / "sft").exists() and (variant, seed) not in finished
        }
        run_all(jobs, arguments.jobs, output / "logs", errors)
    print(as_table(rows_in(results), VARIANTS, COLUMNS))
    for error in errors:
        print(f"error: {error}", file=sys.stderr)
    return 1 if errors else 0


if __name__ == "__main__":
    sys.exit(main())
