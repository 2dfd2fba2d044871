"""Kills a training run at random times, resumes it, and compares the results with those of an uninterrupted run.

    python benchmarks/kill_training.py --model runs/quickstart/sft --data runs/quickstart/data
    python benchmarks/kill_training.py … --config zero3 --processes 2
    python benchmarks/kill_training.py … --signal SIGTERM      # stops it gracefully and measures how long that takes

A run is twelve steps of the quickstart with a checkpoint after each. Every second kill waits until a checkpoint is
being written. If a run finishes before its next kill, it is compared and another run starts, until all kills are used.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from arpo_trl.runs.checkpoints import Checkpoints
from arpo_trl.runs.identity import differences_between

ROOT = Path(__file__).parent.parent
STEPS = 12
STOP_S = 60.0
"""Seconds after a signal. A process that still runs then counts as left behind."""
WRITING_S = 0.05
"""Most seconds between the first file of a checkpoint and a kill that waits for a checkpoint."""
# cache_hits depend on the timing: an identical call joins a running one or finds its result.
TIMES = ("time", "per_second", "seconds_p", "cache_hits")


def command(arguments: argparse.Namespace, output: Path) -> list[str]:
    launcher = ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{arguments.config}.yaml"]
    launcher += ["--num_processes", str(arguments.processes), "--mixed_precision", "no", "--main_process_port", "0"]
    settings = {
        "config": "configs/quickstart.yaml",
        "model_name_or_path": arguments.model,
        "dataset": arguments.data / "train.jsonl",
        "search_index": arguments.data / "corpus.jsonl",
        "output_dir": output,
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": 1,
        "eval_strategy": "no",
        "per_device_train_batch_size": 32 // arguments.processes,
        "trajectory_log_rate": 1,
        "use_cpu": True,
        "resume_from_checkpoint": True,
    }
    words = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    return [sys.executable, *(launcher if arguments.processes > 1 else []), "train.py", *words]


def outcome(folder: Path) -> dict[str, Any]:
    """The results that kills must not change: logs, weights and trees, all without their times."""
    state = json.loads((folder / f"checkpoint-{STEPS}" / "trainer_state.json").read_text("utf-8"))
    trees = {}
    for file in sorted((folder / "trajectories").iterdir()):
        with file.open(encoding="utf-8") as lines:  # str.splitlines would also break within a string
            rows = [json.loads(line) for line in lines]
        nodes = [node for row in rows for node in row["nodes"]]
        for call in [call for node in nodes for call in (*node.get("calls", ()), *node.get("unread", ()))]:
            call["source"] = "executed" if call["source"] == "executed" else "saved"
            del call["seconds"]
        trees[file.name] = {str(row["group"]): row for row in rows}
    weights = (folder / f"checkpoint-{STEPS}" / "model.safetensors").read_bytes()
    return {
        "metrics": {
            str(i): {k: v for k, v in row.items() if not any(t in k for t in TIMES)}
            for i, row in enumerate(state["log_history"])
        },
        "weights": hashlib.sha256(weights).hexdigest(),
        "trees": trees,
    }


def kill(process: subprocess.Popen[bytes], number: signal.Signals) -> float:
    """Seconds until a process and its children have ended after a signal. SIGKILL is sent to each of them."""
    family = psutil.Process(process.pid).children(recursive=True)
    start = time.perf_counter()
    process.send_signal(number)
    if number == signal.SIGKILL:
        for child in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
    process.wait(STOP_S)
    _, left = psutil.wait_procs(family, timeout=STOP_S)
    if left:
        raise SystemExit(f"{number.name} left {len(left)} processes behind: {left}")
    return time.perf_counter() - start


def run_for(
    words: list[str], output: Path, seconds: float | None, writing_s: float | None, number: signal.Signals
) -> tuple[int | None, float]:
    """Runs the command. Returns its exit status and 0; if it was killed (after `seconds`, or `writing_s` seconds into
    its next checkpoint), None and the seconds until it had ended."""
    # DeepSpeed holds a lock file while it loads an extension. A killed process leaves it, and later ones would wait.
    built = output.parent / "built"
    for lock in built.rglob("lock"):
        lock.unlink()
    environment = {**os.environ, "TORCH_EXTENSIONS_DIR": str(built)}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(words, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        start = time.perf_counter()
        while (status := process.poll()) is None:
            if writing_s is not None and (output / ".unfinished").exists():
                time.sleep(writing_s)
                return None, kill(process, number)
            if seconds is not None and time.perf_counter() - start > seconds:
                return None, kill(process, number)
            time.sleep(0.001)
        if status:
            log.seek(0)
            print(log.read()[-3000:].decode(errors="replace"))
        return status, 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--config", default="single")
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--signal", default="SIGKILL", choices=["SIGKILL", "SIGTERM", "SIGINT"])
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.model, arguments.data = str(Path(arguments.model).resolve()), arguments.data.resolve()
    number = signal.Signals[arguments.signal]
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if arguments.processes > 1:  # builds extensions, so that the first run is not slower
            run_for([*command(arguments, folder / "first"), "--max_steps", "1"], folder / "first", None, None, number)
        start = time.time()
        if run_for(command(arguments, folder / "whole"), folder / "whole", None, None, number)[0]:
            raise SystemExit("the uninterrupted run failed")
        seconds = time.time() - start
        starting = (folder / "whole" / "checkpoint-1").stat().st_mtime - start
        expected = outcome(folder / "whole")
        print(
            f"uninterrupted: {STEPS} steps, {len(expected['trees'])} files of trees, {seconds:.0f} s, of which "
            f"{starting:.0f} to the first checkpoint",
            flush=True,
        )
        half_written, runs, in_run = 0, 0, 0
        ends: list[float] = []
        while len(ends) < arguments.kills or in_run:
            output = folder / f"killed-{runs}"
            kills, waits = len(ends) < arguments.kills, len(ends) % 2 == 1
            saved, _ = Checkpoints(output).last()
            left = (seconds - starting) * (STEPS - (saved.step if saved else 0)) / STEPS
            limit = draw.uniform(starting / 2, starting + left) if kills and not waits else None
            writing = draw.uniform(0, WRITING_S) if kills and waits else None
            status, end_s = run_for(command(arguments, output), output, limit, writing, number)
            if status is None:
                ends.append(end_s)
                in_run += 1
                half_written += any((output / ".unfinished").glob("checkpoint-*"))
                continue
            if status:
                raise SystemExit(f"run {runs} ended with status {status} after {in_run} kills")
            differing = list(differences_between(expected, outcome(output)))
            print(f"run {runs}: killed {in_run} times, {'DIFFERENT' if differing else 'identical'}", flush=True)
            if differing:
                print("\n".join(differing[:20]))
                raise SystemExit(1)
            runs, in_run = runs + 1, 0
        print(
            f"{len(ends)} x {number.name} in {runs} runs, {half_written} of them left a half-written checkpoint; "
            f"all processes were gone after {max(ends):.1f} s at most, {median(ends):.1f} s in the median"
        )


if __name__ == "__main__":
    main()
