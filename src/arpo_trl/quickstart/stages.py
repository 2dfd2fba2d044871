"""The stages of `arpo-trl quickstart`: build, cold-start and train a small tool-using model, then report the results.

Stage 1 runs `arpo_trl.scripts.sft` and stage 2 `arpo_trl.scripts.train`, with configurations that users start from.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

import torch
from rich.console import Console
from rich.text import Text
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from arpo_trl.command_line import parse_settings
from arpo_trl.common.run_files import TRAJECTORIES
from arpo_trl.common.shipped import CONFIGS, shipped_file
from arpo_trl.logs.render import render_tree
from arpo_trl.logs.trajectories import LoggedTree, read_trees
from arpo_trl.quickstart.corpus import passages
from arpo_trl.quickstart.demonstrations import PLAIN_QUERIES, VARIED_QUERIES, make_demonstrations
from arpo_trl.quickstart.heldout import answer_heldout
from arpo_trl.quickstart.model import save_cold_start_base
from arpo_trl.quickstart.report import draw, entropy_places, summarise, summary_table
from arpo_trl.quickstart.shop.task import SHOP
from arpo_trl.quickstart.task import (
    N_HELDOUT,
    N_TRAIN,
    Measured,
    Task,
    like_lengths_together,
    read_lines,
    write_inputs,
    write_lines,
)
from arpo_trl.quickstart.tasks import make_tasks
from arpo_trl.runs.interrupts import kill_children, leave
from arpo_trl.scripts.start import start_errors
from arpo_trl.tools.builtin import ToolArguments, build_tools
from arpo_trl.tools.search.index import LocalIndex, search_tool
from arpo_trl.tools.toolbox import ToolBox
from arpo_trl.viewing.run import log_history

N_DEMONSTRATIONS = 15_360
TOP_K = 2
MAX_COMPLETION_LENGTH = 208
MAX_TOOL_CALLS = 5
SFT_CONFIG, RL_CONFIG = shipped_file(CONFIGS, "quickstart_sft"), shipped_file(CONFIGS, "quickstart")


def prepare(
    folder: Path, seed: int, *, hard: bool = False, n_heldout: int = N_HELDOUT, n_train: int = N_TRAIN
) -> None:
    """Write the inputs of both stages: the corpus, the questions, the demonstrations and an untrained model.

    `hard` selects the variant of the task in which queries have many forms (`VARIED_QUERIES`).
    """
    corpus = passages()
    train, heldout = make_tasks(seed, n_train, n_heldout)
    search = search_tool(LocalIndex(corpus), top_k=TOP_K)
    queries = VARIED_QUERIES if hard else PLAIN_QUERIES
    made = make_demonstrations(train, search, seed, N_DEMONSTRATIONS, queries=queries)
    demonstrations = like_lengths_together(made, seed)
    write_inputs(folder, train, heldout, demonstrations)
    write_lines(folder / "corpus.jsonl", corpus)
    save_cold_start_base(folder / "base", seed=0)  # one base for all seeds, like a downloaded model


def measure(model: Path, data: Path, seed: int, *, temperature: float, device: torch.device | str = "cpu") -> Measured:
    """Sample one answer of the model to each held-out question."""
    arguments = ToolArguments(search_index=str(data / "corpus.jsonl"), search_top_k=TOP_K)
    rows = read_lines(data / "heldout.jsonl")
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
    """Run a program as `arpo-trl train` runs its own. Return its duration in seconds.

    Args:
        script: A program of `arpo_trl.scripts`, the full name of another module, or a path that ends with `.py`.

    Raises:
        SystemExit: The script failed. It has printed its own error.
    """
    # By default accelerate gives a process one thread. This model does not get faster with more than four.
    environment = {"OMP_NUM_THREADS": str(min(4, os.cpu_count() or 1)), **os.environ}
    start = time.perf_counter()
    command = [sys.executable, "-m", "arpo_trl.commands.launch", _program(script), "--accelerate", "single"]
    command += ["--config", str(config), *flags]
    status = subprocess.run(command, env=environment, check=False).returncode
    if status:
        raise SystemExit(status)
    return time.perf_counter() - start


def _program(script: str) -> str:
    return script if "." in script else f"arpo_trl.scripts.{script}"


def _check_settings(name: str, config: Path, flags: Sequence[str]) -> None:
    """Reads the settings of stage 2 of the task `name` as its program will, since that begins minutes later.

    Raises:
        ConfigError: The program would refuse them.
    """
    kinds = {each: import_module(_program(task.script)).SETTINGS for each, task in TASKS.items()}
    (other,) = kinds.keys() - {name}
    before = dict(os.environ)  # which the settings change, and stage 1 inherits
    try:
        with start_errors():
            parse_settings(
                kinds[name],
                ["--config", str(config), *flags],
                elsewhere=lambda: (f"quickstart --task {other}", kinds[other]),
            )
    finally:
        os.environ.clear()
        os.environ.update(before)


def train_format(task: Task, data: Path, model: Path, seed: int) -> float:
    """Run stage 1: train the untrained model in `data` on the demonstrations, into the folder `model`.

    Returns:
        The duration in seconds.

    Raises:
        SystemExit: As `launch`.
    """
    return launch(
        "sft",
        SFT_CONFIG,
        *("--model_name_or_path", str(data / "base")),
        *("--dataset", str(data / "demonstrations.jsonl")),
        *("--output_dir", str(model), "--seed", str(seed)),
        *task.cold_start,
    )


SEARCH = Task(
    prepare=prepare,
    measure=measure,
    tools=("search", "python"),
    script="train",
    config=RL_CONFIG,
    accuracy="eval_arpo/accuracy",
    flags=lambda data: ("--search_index", str(data / "corpus.jsonl")),
)
TASKS = {"search": SEARCH, "shop": SHOP}


def run(name: str, output: Path, seed: int, *, hard: bool = False, config: Path | None = None) -> None:
    """Run both stages of the task `name` and print the results. All output goes to `output`.

    Args:
        hard: The variant of the task "search" in which queries have many forms.
        config: The settings of stage 2. None: the task's.

    Raises:
        ConfigError: The program of stage 2 would refuse `config`.
    """
    task = TASKS[name]
    if hard:
        task = replace(task, prepare=partial(prepare, hard=True))
    transformers_logging.disable_progress_bar()
    console = Console()
    data, sft, rl = output / "data", output / "sft", output / "rl"
    flags = (
        *("--model_name_or_path", str(sft)),
        *("--dataset", str(data / "train.jsonl"), "--eval_dataset", str(data / "watched.jsonl")),
        *("--output_dir", str(rl), "--seed", str(seed)),
        *task.flags(data),
    )
    if config is not None:
        _check_settings(name, config, flags)

    def measured(model: Path, temperature: float) -> Measured:
        how = "sampled" if temperature else "greedy"
        with console.status(f"Answering the held-out tasks, {how} …"):
            return task.measure(model, data, seed, temperature=temperature)

    console.rule("[bold]Stage 1: cold start on noisy demonstrations")
    with console.status("Creating demonstrations …"):
        task.prepare(data, seed)
    seconds_sft = train_format(task, data, sft, seed)
    before, greedy_before = measured(sft, 1.0), measured(sft, 0.0)
    places = entropy_places(before.trees, task.tools)
    entropies = ", ".join(f"{entropy:.2f} {place}" for place, entropy in places.items())
    console.print(f"Held-out accuracy {before.accuracy:.2f}. Entropy of a token, in nats: {entropies}.")

    console.rule("[bold]Stage 2: reinforcement learning")
    seconds_rl = launch(task.script, config or task.config, *flags)
    after, greedy_after = measured(rl, 1.0), measured(rl, 0.0)

    history = log_history(rl)
    summary = {
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "greedy_before": greedy_before.accuracy,
        "greedy_after": greedy_after.accuracy,
        **summarise(history),
        **{f"entropy_{place.replace(' ', '_')}": entropy for place, entropy in places.items()},
        "seconds_sft": seconds_sft,
        "seconds_rl": seconds_rl,
        "seed": seed,
        "hard": hard,
        "config": (config or task.config).name,
    }
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n", "utf-8")
    draw(history, summary, places, entropy_places(after.trees, task.tools), output / "quickstart.png", task.accuracy)
    _show(console, output, rl, summary)


@contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """A context in which SIGTERM ends this process and the stage that it runs, which would otherwise go on alone."""

    def end(number: int, _: object) -> NoReturn:
        kill_children()
        leave(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _show(console: Console, output: Path, rl: Path, summary: Mapping[str, Any]) -> None:
    """Print a tree that branched, and the table of the main numbers."""
    console.rule("[bold]One tree")
    if (tree := _tree_to_show(rl / TRAJECTORIES)) is not None:
        console.print(render_tree(tree))
    console.rule("[bold]Result")
    console.print(summary_table(summary))
    console.print(
        "Training rewards sampled answers, so watch the sampled accuracy: the model learns to make fewer mistakes "
        "when it samples. The greedy accuracy starts high and may not change."
    )
    console.print(Text(f"Picture: {output / 'quickstart.png'}   Numbers: {output / 'summary.json'}   Model: {rl}"))


def _tree_to_show(folder: Path) -> LoggedTree | None:
    """Return the last logged tree that forks and has different rewards, or the best match; None without trees.

    A fork is a tool result after which two turns differ.
    """
    trees = [tree for file in sorted(folder.glob("step-*.jsonl"), reverse=True) for tree in read_trees(file)]

    def interest(logged: LoggedTree) -> tuple[bool, bool]:
        nodes = logged.tree.nodes
        forks = any(len({nodes[child].text for child in seen.children}) > 1 for seen in logged.tree.observations())
        return forks, len(set(logged.rewards)) > 1

    return max(trees, key=interest, default=None)
