"""The quickstart's task trained with each engine: transformers, colocated vLLM, and a vLLM server.

    OMP_NUM_THREADS=1 python benchmarks/vllm_parity.py --seeds 0 1 2

Each seed has one cold start (the quickstart's stage 1), from which each engine trains. The script measures accuracy on
the held-out questions, always with the transformers engine. The next column is the maximum over the steps of the mean
|sampling − training logprob|. Results are appended to <output>/results.jsonl. `--table` only prints existing results.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from arpo_trl.quickstart.stages import RL_CONFIG, SEARCH, launch, measure
from arpo_trl.viewing.run import log_history
from serving import running
from study.files import append, rows_in
from study.training import cold_start

VLLM = ("--use_vllm", "true", "--vllm_max_model_length", "1024")
ENGINES = ("transformers", "colocate", "server")


@contextmanager
def flags(engine: str, folder: Path) -> Iterator[tuple[str, ...]]:
    """The flags that select the engine. Runs the server for as long as the context is open."""
    if engine == "transformers":
        yield ()
    elif engine == "colocate":
        yield (*VLLM, "--vllm_mode", "colocate")
    else:
        with running(str(folder / "sft"), folder / "server.log", "--max-num-seqs", "128") as server:
            yield (*VLLM, "--vllm_mode", "server", "--weight_sync", "disk", "--vllm_server_urls", server.url)


def train(folder: Path, seed: int, engine: str, steps: int) -> dict[str, Any]:
    output = folder / engine
    with flags(engine, folder) as chosen:
        seconds = launch(
            "train",
            RL_CONFIG,
            *("--model_name_or_path", str(folder / "sft"), "--dataset", str(folder / "data/train.jsonl")),
            *("--eval_strategy", "no", "--search_index", str(folder / "data/corpus.jsonl")),
            *("--output_dir", str(output), "--seed", str(seed), "--max_steps", str(steps)),
            *("--trajectory_log_rate", "0", *chosen),
        )
    history = log_history(output)
    differences = [row.get("sampling/sampling_logp_difference/mean", 0.0) for row in history if "loss" in row]
    return {
        "engine": engine,
        "seed": seed,
        "before": measure(folder / "sft", folder / "data", seed, temperature=1.0).accuracy,
        "after": measure(output, folder / "data", seed, temperature=1.0).accuracy,
        "largest_difference": max(differences),
        "seconds": seconds,
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = ["| engine | seeds | before | after | largest mean difference | seconds |", "|---|" + "---:|" * 5]
    for engine in ENGINES:
        if found := [row for row in rows if row["engine"] == engine]:
            after = [row["after"] for row in found]
            spread = f" ± {stdev(after):.3f}" if len(after) > 1 else ""
            before, seconds = (mean(row[name] for row in found) for name in ("before", "seconds"))
            difference = max(row["largest_difference"] for row in found)
            cells = (engine, len(found), f"{before:.3f}", f"{mean(after):.3f}{spread}", f"{difference:.4f}")
            lines.append(f"| {' | '.join(map(str, cells))} | {seconds:.0f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=ENGINES)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--output", type=Path, default=Path("runs/parity"))
    parser.add_argument("--table", action="store_true", help="only print the table of the existing results")
    arguments = parser.parse_args()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    arguments.output.mkdir(parents=True, exist_ok=True)
    results = arguments.output / "results.jsonl"
    rows = rows_in(results)
    for seed in arguments.seeds if not arguments.table else ():
        folder = arguments.output.resolve() / f"seed{seed}"
        cold_start(folder, seed, SEARCH)
        for engine in arguments.engines:
            if any((row["engine"], row["seed"]) == (engine, seed) for row in rows):
                continue
            rows.append(train(folder, seed, engine, arguments.steps))
            append(results, rows[-1])
    print(table(rows))


if __name__ == "__main__":
    main()
