"""Rollouts ahead of the update, on the quickstart's model and one vLLM server on this machine's CPU.

    OMP_NUM_THREADS=1 python benchmarks/ahead.py steps               # seconds a step with k = 0, 1, 2, and the bound
    OMP_NUM_THREADS=1 python benchmarks/ahead.py accuracy --seeds 3  # at equal steps
    OMP_NUM_THREADS=1 python benchmarks/ahead.py kills --steps 200   # two ranks, one slow; two restarts of the server

`steps`: each search takes 0.5 s on average, drawn from an exponential distribution, so that a rollout has a long tail.
The update also sleeps, as if it ran on another device, for as long as a rollout takes with k = 0 (`--update_s`). The
bound is max(rollout, update). `accuracy` is measured on held-out questions, as in the quickstart. Each result is
written to `--folder` at once, so that `accuracy` can be stopped and started again. `kills` prints the steps and rows
that were trained. All three need the quickstart's model (`make quickstart`).
"""

from __future__ import annotations

import argparse
import hashlib
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.data.loading import load_arpo_dataset
from arpo_trl.logs.trajectories import read_trees
from arpo_trl.quickstart.stages import RL_CONFIG, measure
from arpo_trl.rewards import HierarchicalReward
from arpo_trl.tools import LocalIndex, python_tool, search_tool
from arpo_trl.viewing.run import log_history
from serving import Server, running
from study.files import paired, read, write

SEARCH_S = 0.5
"""Mean seconds of a search."""
LEFT_OUT = 2
"""First steps that are not counted: the server is slow at first."""
KS = (0, 1, 2)
"""Values of `rollouts_ahead`. The first is the one to compare with."""
QUESTIONS, LEAVES = 4, 8
"""Of a step."""


def slow_search(run: Path, mean_s: float) -> Callable[[str], str]:
    """The quickstart's search. The same query always takes as long."""
    found = search_tool(LocalIndex.open(run / "data/corpus.jsonl"), top_k=2)

    def search(query: str) -> str:
        """Search for facts.

        Args:
            query: What to look for.
        """
        draw = int.from_bytes(hashlib.blake2b(query.encode(), digest_size=4).digest(), "big") / 2**32
        time.sleep(-mean_s * math.log(1 - draw))
        return found(query)

    return search


class StepTimes(TrainerCallback):
    """When each step begins, and when the last one ends."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.at.append(time.perf_counter())

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.at.append(time.perf_counter())

    @property
    def seconds(self) -> float:
        """The mean of the steps that count."""
        counted = self.at[LEFT_OUT:]
        return (counted[-1] - counted[0]) / (len(counted) - 1)


def make_trainer(run: Path, output: Path, url: str, rows: Dataset, search_s: float, **settings: Any) -> ARPOTrainer:
    return ARPOTrainer(
        model=str(run / "sft"),
        reward_funcs=HierarchicalReward(),
        args=ARPOConfig(
            **{
                "output_dir": str(output),
                "use_vllm": True,
                "vllm_mode": "server",
                "vllm_server_urls": [url],
                "weight_sync": "disk",
                "num_generations": LEAVES,
                "initial_rollouts": LEAVES // 2,
                "entropy_probe_tokens": 8,
                "per_device_train_batch_size": QUESTIONS * LEAVES,
                "max_completion_length": 208,
                "max_tool_calling_iterations": 5,
                "learning_rate": 5e-4,
                "save_strategy": "no",
                "report_to": "none",
                "disable_tqdm": True,
                "logging_steps": 1,
                "use_cpu": True,
                "bf16": False,
                "gradient_checkpointing": False,
                **settings,
            }
        ),
        train_dataset=rows,
        tools=[slow_search(run, search_s), python_tool()],
    )


def steps(run: Path, folder: Path, *, count: int, update_s: float | None) -> None:
    """Prints the table of `steps`."""
    rows = load_arpo_dataset(str(run / "data/train.jsonl"))
    print("| k | s a step | rollout s | update s | bound s | bound / step | staleness | update waited s |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    rollout_s = 0.0
    with running(str(run / "sft"), folder / "server.log") as server:
        for k in KS:
            trainer = make_trainer(
                run, folder / f"k{k}", server.url, rows, SEARCH_S, rollouts_ahead=k, max_steps=LEFT_OUT + count
            )
            times = StepTimes()
            trainer.add_callback(times)
            compute_loss = trainer.compute_loss

            def updating(*args: Any, compute: Any = compute_loss, seconds: float = update_s or 0.0, **kw: Any) -> Any:
                time.sleep(seconds)
                return compute(*args, **kw)

            trainer.compute_loss = updating
            trainer.train()
            log = [row for row in trainer.state.log_history if "loss" in row][LEFT_OUT:]

            def of(name: str, log: list[dict[str, Any]] = log) -> float:
                return mean(row.get(name, 0.0) for row in log)

            update = of("arpo/time/update_s") + of("arpo/time/logprobs_s")
            if k == 0:
                rollout_s = of("arpo/time/rollout_s")
                if update_s is None:
                    update_s = max(0.0, rollout_s - update)
                    update += update_s
                    seconds = times.seconds + update_s
                else:
                    seconds = times.seconds
            else:
                seconds = times.seconds
            bound = max(rollout_s, update)
            cells = [seconds, of("arpo/time/rollout_s"), update, bound, bound / seconds]
            cells += [of("arpo/ahead/staleness_mean"), of("arpo/ahead/update_waited_s")]
            print(f"| {k} | " + " | ".join(f"{cell:.2f}" for cell in cells) + " |", flush=True)


def accuracy(run: Path, folder: Path, *, seeds: int, count: int) -> None:
    """Trains with each k and seed that has no result yet, seed by seed, and prints the table of all results."""
    files = {(k, seed): folder / f"{count}-steps-k{k}-{seed}.json" for seed in range(seeds) for k in KS}
    if missing := [key for key, file in files.items() if not file.exists()]:
        folder.mkdir(parents=True, exist_ok=True)
        with running(str(run / "sft"), folder / "server.log") as server:
            for key in missing:
                write(files[key], train(run, folder / files[key].stem, server.url, *key, count))
    results = {key: result for key, file in files.items() if (result := read(file)) is not None}
    print("| k | seed | accuracy | staleness | ratio clipped | s |\n|---:|---:|---:|---:|---:|---:|")
    for (k, seed), result in results.items():
        cells = [f"{result[name]:.3f}" for name in ("accuracy", "staleness_mean", "ratio_clipped")]
        print(f"| {k} | {seed} | " + " | ".join(cells) + f" | {result['seconds']:.0f} |")
    of_k = {k: {str(seed): results[k, seed]["accuracy"] for seed in range(seeds)} for k in KS}
    for k in KS[1:]:
        print(f"k = {k} against 0, paired by seed: {paired(of_k[k], of_k[0])}")


def train(run: Path, output: Path, url: str, k: int, seed: int, count: int) -> dict[str, float]:
    """Trains with the quickstart's settings and returns the held-out accuracy and means over the steps."""
    start = time.perf_counter()
    command = [
        *(sys.executable, "train.py", "--config", str(RL_CONFIG), "--output_dir", str(output)),
        *("--model_name_or_path", str(run / "sft"), "--dataset", str(run / "data/train.jsonl")),
        *("--search_index", str(run / "data/corpus.jsonl"), "--eval_strategy", "no"),
        *("--use_vllm", "true", "--vllm_mode", "server", "--vllm_server_urls", url),
        *("--weight_sync", "disk", "--rollout_schedule", "overlap", "--rollouts_ahead", str(k)),
        *("--max_steps", str(count), "--seed", str(seed), "--overwrite_output_dir", "true"),
    ]
    with output.with_suffix(".log").open("w") as log:
        subprocess.run(command, check=True, stdout=log, stderr=log)
    history = log_history(output)
    steps = [row for row in history if "loss" in row]
    means = {
        name: mean(row.get(f"arpo/ahead/{name}", 0.0) for row in steps) for name in ("staleness_mean", "ratio_clipped")
    }
    seconds = time.perf_counter() - start
    scored = measure(output, run / "data", seed, temperature=1.0).accuracy
    return {"accuracy": scored, **means, "steps": count, "seconds": seconds}


class Restarts(TrainerCallback):
    """Writes the step into a file, for the process that restarts the server."""

    def __init__(self, file: Path):
        self.file = file

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            self.file.write_text(str(state.global_step))


def rank(run: Path, folder: Path, *, url: str, count: int) -> None:
    """One of two ranks of `kills`. The second one's searches take ten times as long."""
    rows = load_arpo_dataset(str(run / "data/train.jsonl")).select(range(2 * count))
    trainer = make_trainer(
        run,
        folder / "run",
        url,
        rows,
        0.2 if os.environ["RANK"] == "1" else 0.02,
        rollouts_ahead=1,
        max_steps=count,
        per_device_train_batch_size=LEAVES,
        trajectory_log_rate=1.0,
        vllm_server_timeout=600.0,
    )
    trainer.add_callback(Restarts(folder / "step"))
    trainer.train()


def kills(run: Path, folder: Path, *, count: int) -> None:
    """Prints how a run of two ranks whose server is killed and restarted twice went."""
    server = Server(str(run / "sft"), folder / "server.log").start().wait()
    launch = [
        *(sys.executable, "-m", "accelerate.commands.launch", "--config_file", "accelerate_configs/ddp.yaml"),
        *("--num_processes", "2", "--mixed_precision", "no", "--main_process_port", "0", __file__),
    ]
    start = time.perf_counter()
    words = ["rank", "--run", str(run), "--folder", str(folder), "--url", server.url, "--steps", str(count)]
    trained = subprocess.Popen([*launch, *words], stdout=subprocess.DEVNULL)
    try:
        for at in (count // 3, 2 * count // 3):
            while trained.poll() is None and int(_text(folder / "step") or 0) < at:
                time.sleep(0.05)
            server.kill()
            server.start()
        status = trained.wait()
    finally:
        trained.kill()
        server.kill()
    seen: Counter[str] = Counter()
    for file in (folder / "run/trajectories").glob("step-*"):
        seen.update(tree.prompt for tree in read_trees(file))
    print(
        f"exit status {status}, {_text(folder / 'step')} + 1 steps begun, {sum(seen.values())} of {2 * count} groups "
        f"trained, {len(seen)} different rows, {time.perf_counter() - start:.0f} s"
    )


def _text(file: Path) -> str:
    return file.read_text() if file.exists() else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["steps", "accuracy", "kills", "rank"], help="'rank' is used by 'kills'")
    parser.add_argument("--run", type=Path, default=Path("runs/quickstart"), help="default: runs/quickstart")
    parser.add_argument("--steps", type=int, help="default: 10 that count, 40, and 200")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--update_s", type=float, help="default: a rollout's seconds with k = 0, less the update's")
    parser.add_argument("--folder", type=Path, help="for the outputs; default: a temporary one")
    parser.add_argument("--url", help="the server, for 'rank'")
    arguments = parser.parse_args()
    if not (arguments.run / "sft/config.json").exists():
        raise SystemExit(f"{arguments.run / 'sft'} is missing. Run `make quickstart`.")
    with tempfile.TemporaryDirectory() as temporary:
        run, folder = arguments.run, arguments.folder or Path(temporary)
        match arguments.what:
            case "steps":
                steps(run, folder, count=arguments.steps or 10, update_s=arguments.update_s)
            case "accuracy":
                accuracy(run, folder, seeds=arguments.seeds, count=arguments.steps or 40)
            case "kills":
                kills(run, folder, count=arguments.steps or 200)
            case "rank":
                rank(run, folder, url=arguments.url, count=arguments.steps)


if __name__ == "__main__":
    main()
