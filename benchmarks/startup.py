"""Measures the start-up times of `arpo-trl --help`, `arpo-trl train --help` and the first training step of `train.py`.

python benchmarks/startup.py --quickstart runs/quickstart
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from arpo_trl.viewing.run import log_history


def seconds(command: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def first_step(quickstart: Path) -> tuple[float, float]:
    """The seconds of `train.py` with one step, and of that step with its rollout."""
    data = quickstart / "data"
    with tempfile.TemporaryDirectory() as output:
        command = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--config_file",
            "accelerate_configs/single.yaml",
        ]
        command += ["train.py", "--config", "configs/quickstart.yaml", "--model_name_or_path", str(quickstart / "sft")]
        command += ["--dataset", str(data / "train.jsonl"), "--search_index", str(data / "corpus.jsonl")]
        command += ["--eval_strategy", "no", "--max_steps", "1", "--output_dir", output]
        total = seconds(command)
        history = log_history(Path(output))
    return total, history[0]["step_time"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quickstart", type=Path, default=Path("runs/quickstart"))
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    program = str(Path(sys.executable).with_name("arpo-trl"))
    print("| | seconds |\n|---|---:|")
    for words in (["--help"], ["train", "--help"]):
        taken = median(seconds([program, *words]) for _ in range(arguments.repeats))
        print(f"| `arpo-trl {' '.join(words)}` | {taken:.2f} |")
    runs = [first_step(arguments.quickstart) for _ in range(arguments.repeats)]
    print(f"| `accelerate launch train.py` with one step | {median(total for total, _ in runs):.1f} |")
    print(f"| of these in the step | {median(step for _, step in runs):.1f} |")


if __name__ == "__main__":
    main()
