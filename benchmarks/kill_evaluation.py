"""Kills an evaluation at random times, resumes it, and compares the results with those of an uninterrupted run.

    python benchmarks/kill_evaluation.py --model runs/quickstart/rl --data runs/quickstart/data

Decoding is greedy. If a run finishes before its next kill, it is compared and another run starts, until all kills are
used.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from arpo_trl.evaluation.samples import Records, key_of


def command(arguments: argparse.Namespace, output: Path) -> list[str]:
    """An evaluation of the quickstart's model on its held-out questions."""
    data: Path = arguments.data
    words = ["eval", "--model", arguments.model, "--data", data / "heldout.jsonl", "--limit", arguments.limit]
    words += ["--search-index", data / "corpus.jsonl", "--search-top-k", 2, "--max-completion-length", 208]
    words += ["--temperature", 0, "--concurrency", arguments.concurrency, "--output", output]
    return [sys.executable, "-c", "from arpo_trl.cli import main; main()", *map(str, words)]


def outcome(folder: Path) -> dict[Any, Any]:
    """The results that kills must not change: samples and summary without their times."""
    samples: dict[Any, Any] = {}
    for record in Records(folder / "samples.jsonl").values():
        if key_of(record) in samples:
            raise SystemExit(f"{key_of(record)} is in {folder} twice")
        steps = [
            (s["role"], s["text"], [(c["name"], c["text"]) for c in s.get("calls", ())]) for s in record["trajectory"]
        ]
        samples[key_of(record)] = (record["prediction"], record["scores"], record["tokens"], steps)
    summary = json.loads((folder / "results.json").read_text("utf-8"))["benchmarks"]["heldout"]
    samples["summary"] = {
        name: summary[name] for name in ("score", "interval", "metrics", "by_calls", "tokens", "failed")
    }
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--limit", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        start = time.perf_counter()
        subprocess.run(command(arguments, whole), check=True, capture_output=True)
        seconds = time.perf_counter() - start
        expected = outcome(whole)
        print(f"uninterrupted: {len(expected) - 1} samples, score {expected['summary']['score']:.3f}, {seconds:.0f} s")
        killed, torn, runs, in_run = 0, 0, 0, 0
        while killed < arguments.kills or in_run:
            output = Path(folder) / f"killed-{runs}"
            words = [*command(arguments, output), *(["--resume"] if in_run else [])]
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            try:
                process.wait(draw.uniform(0.0, seconds) if killed < arguments.kills else None)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGKILL)
                process.wait()
                killed, in_run = killed + 1, in_run + 1
                log = output / "samples.jsonl"
                torn += log.exists() and log.read_bytes()[-1:] not in (b"", b"\n")
                continue
            if process.returncode:
                raise SystemExit(f"run {runs} ended with status {process.returncode} after {in_run} kills")
            same = outcome(output) == expected
            print(f"run {runs}: killed {in_run} times, {'identical' if same else 'DIFFERENT'}")
            if not same:
                raise SystemExit(1)
            runs, in_run = runs + 1, 0
        print(f"{killed} kills, {torn} of them in the middle of a line")


if __name__ == "__main__":
    main()
