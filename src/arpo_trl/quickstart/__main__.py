"""`arpo-trl quickstart`: build, cold-start and train a small tool-using model, then report the results.

Stage 1 runs `arpo_trl.scripts.sft` and stage 2 `arpo_trl.scripts.train`, with configurations that users start from.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from arpo_trl.cli import report_errors
from arpo_trl.common.shipped import ACCELERATE_CONFIGS, CONFIGS, file_or_shipped, shipped_file
from arpo_trl.logs.render import render_tree
from arpo_trl.logs.trajectories import LoggedTree, read_trees
from arpo_trl.quickstart.corpus import passages
from arpo_trl.quickstart.demonstrations import PLAIN_QUERIES, VARIED_QUERIES, make_demonstrations
from arpo_trl.quickstart.heldout import HeldOut, answer_heldout
from arpo_trl.quickstart.model import save_cold_start_base
from arpo_trl.quickstart.report import draw, entropy_places, summarise, summary_table
from arpo_trl.quickstart.tasks import make_tasks
from arpo_trl.runs.output_folder import prepare_output
from arpo_trl.tools.builtin import ToolArguments, build_tools
from arpo_trl.tools.search.index import LocalIndex, search_tool
from arpo_trl.tools.toolbox import ToolBox

N_TRAIN, N_HELDOUT, N_WATCHED = 2400, 600, 96
"""Numbers of questions: for training, for the accuracy before and after, and the part of those for evaluation during
training."""
N_DEMONSTRATIONS, SFT_BATCH = 15_360, 16
TOP_K = 2
MAX_COMPLETION_LENGTH = 208
MAX_TOOL_CALLS = 5
SFT_CONFIG, RL_CONFIG = shipped_file(CONFIGS, "quickstart_sft"), shipped_file(CONFIGS, "quickstart")
ACCELERATE_CONFIG = shipped_file(ACCELERATE_CONFIGS, "single")


def prepare(
    folder: Path, seed: int, *, hard: bool = False, n_heldout: int = N_HELDOUT, n_train: int = N_TRAIN
) -> None:
    """Write the input of both stages: the corpus, the questions, the demonstrations and an untrained model.

    `hard` selects the variant of the task in which queries have many forms (`VARIED_QUERIES`).
    """
    folder.mkdir(parents=True, exist_ok=True)
    corpus = passages()
    train, heldout = make_tasks(seed, n_train, n_heldout)
    search = search_tool(LocalIndex(corpus), top_k=TOP_K)
    queries = VARIED_QUERIES if hard else PLAIN_QUERIES
    made = make_demonstrations(train, search, seed, N_DEMONSTRATIONS, queries=queries)
    demonstrations = like_lengths_together(made, seed)
    _write_lines(folder / "corpus.jsonl", corpus)
    _write_lines(folder / "train.jsonl", train)
    _write_lines(folder / "heldout.jsonl", heldout)
    _write_lines(folder / "watched.jsonl", heldout[:N_WATCHED])
    _write_lines(folder / "demonstrations.jsonl", demonstrations)
    save_cold_start_base(folder / "base", seed=0)  # one base for all seeds, as if it were downloaded


def like_lengths_together(rows: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Return the rows, reordered so that each batch of `SFT_BATCH` has similar lengths: a quarter less padding.

    The batches stay in random order. With transformers' `group_by_length` they do not, and this model learns much
    less.
    """
    size, window, rng = SFT_BATCH, 50 * SFT_BATCH, random.Random(seed)
    batches = []
    for start in range(0, len(rows), window):
        near = sorted(rows[start : start + window], key=lambda row: sum(len(m["content"]) for m in row["messages"]))
        batches += [near[i : i + size] for i in range(0, len(near), size)]
    rng.shuffle(batches)
    return [row for batch in batches for row in batch]


def measure(model: Path, data: Path, seed: int, *, temperature: float, device: torch.device | str = "cpu") -> HeldOut:
    """Sample one answer of the model to each held-out question."""
    arguments = ToolArguments(search_index=str(data / "corpus.jsonl"), search_top_k=TOP_K)
    rows = [json.loads(line) for line in (data / "heldout.jsonl").read_text("utf-8").splitlines()]
    with ToolBox(build_tools(arguments), cache=True) as toolbox:
        return answer_heldout(
            AutoModelForCausalLM.from_pretrained(model).to(device),
            AutoTokenizer.from_pretrained(model),
            rows,
            toolbox,
            temperature=temperature,
            max_completion_length=MAX_COMPLETION_LENGTH,
            max_tool_calls=MAX_TOOL_CALLS,
            seed=seed,
        )


def launch(script: str, config: Path, *flags: str) -> float:
    """Run a program of `arpo_trl.scripts` with `accelerate launch`. Return the seconds it took.

    Raises:
        SystemExit: The script failed. It has printed its own error.
    """
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(ACCELERATE_CONFIG)]
    # By default accelerate gives a process one thread. This model does not get faster with more than four.
    environment = {"OMP_NUM_THREADS": str(min(4, os.cpu_count() or 1)), **os.environ}
    start = time.perf_counter()
    command += ["--module", f"arpo_trl.scripts.{script}", "--config", str(config), *flags]
    status = subprocess.run(command, env=environment, check=False).returncode
    if status:
        raise SystemExit(status)
    return time.perf_counter() - start


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        prog="arpo-trl quickstart",
        description="Builds a tiny model, teaches it the format of tool calls on demonstrations, trains it with ARPO "
        "and reports the results. Takes a few minutes on a CPU and downloads nothing.",
    )
    parser.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="default: runs/quickstart")
    parser.add_argument("--hard", action="store_true", help="the harder variant: search queries have many forms")
    parser.add_argument("--config", default="quickstart", help="name or file of stage 2's settings")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="remove an earlier quickstart in --output")
    arguments = parser.parse_args()
    config = file_or_shipped(CONFIGS, arguments.config)
    transformers_logging.disable_progress_bar()
    console = Console()
    output, seed = arguments.output, arguments.seed
    data, sft, rl = output / "data", output / "sft", output / "rl"
    for folder in (sft, rl):
        prepare_output(str(folder), resume=None, overwrite=arguments.overwrite_output_dir)

    console.rule("[bold]Stage 1: cold start on noisy demonstrations")
    prepare(data, seed, hard=arguments.hard)
    seconds_sft = launch(
        "sft",
        SFT_CONFIG,
        *("--model_name_or_path", str(data / "base")),
        *("--dataset", str(data / "demonstrations.jsonl")),
        *("--output_dir", str(sft), "--seed", str(seed)),
    )
    before = measure(sft, data, seed, temperature=1.0)
    greedy_before = measure(sft, data, seed, temperature=0.0)
    places = entropy_places(before.trees)
    console.print(
        f"Held-out accuracy {before.accuracy:.2f}. Entropy of a token, in nats: {places.after_search:.2f} after a "
        f"search, {places.after_python:.2f} after python, {places.elsewhere:.2f} elsewhere."
    )

    console.rule("[bold]Stage 2: reinforcement learning")
    seconds_rl = launch(
        "train",
        config,
        *("--model_name_or_path", str(sft)),
        *("--dataset", str(data / "train.jsonl"), "--eval_dataset", str(data / "watched.jsonl")),
        *("--search_index", str(data / "corpus.jsonl")),
        *("--output_dir", str(rl), "--seed", str(seed)),
    )
    after = measure(rl, data, seed, temperature=1.0)
    greedy_after = measure(rl, data, seed, temperature=0.0)

    history = json.loads((rl / "trainer_state.json").read_text("utf-8"))["log_history"]
    summary = {
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "greedy_before": greedy_before.accuracy,
        "greedy_after": greedy_after.accuracy,
        **summarise(history),
        **places.as_summary(),
        "seconds_sft": seconds_sft,
        "seconds_rl": seconds_rl,
        "seed": seed,
        "hard": arguments.hard,
        "config": config.name,
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    draw(history, summary, places, entropy_places(after.trees), output / "quickstart.png")
    console.rule("[bold]One tree")
    if (tree := _tree_to_show(rl / "trajectories")) is not None:
        console.print(render_tree(tree))
    console.rule("[bold]Result")
    console.print(summary_table(summary))
    console.print(f"Picture: {output / 'quickstart.png'}   Numbers: {output / 'summary.json'}   Model: {rl}")


def _tree_to_show(folder: Path) -> LoggedTree | None:
    """Return the last logged tree that branched and has different rewards, or the best match; None without trees."""
    trees = [tree for file in sorted(folder.glob("step-*.jsonl"), reverse=True) for tree in read_trees(file)]

    def interest(tree: LoggedTree) -> tuple[bool, bool]:
        branched = any(node.decision and node.decision.granted for node in tree.tree.observations())
        return branched, len(set(tree.rewards)) > 1

    return max(trees, key=interest, default=None)


def _write_lines(path: Path, rows: Iterable[str | Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


if __name__ == "__main__":
    main()
