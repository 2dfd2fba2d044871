"""Runs all speed benchmarks in sequence: `make bench`. Prints their tables and saves them under runs/bench.

Run nothing else on the machine at the same time. The benchmarks need the quickstart's model (`make quickstart`). They
sample and train it with one thread, because several threads make so small a model slower.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

OUTPUT = Path("runs/bench")
ONE_THREAD = {"OMP_NUM_THREADS": "1"}
BENCHMARKS: dict[str, dict[str, str]] = {
    "startup": {},
    "against_trl": ONE_THREAD,
    "time_to_accuracy": ONE_THREAD,
    "sampler_share": ONE_THREAD,
    "update": {},
    "growth": {},
}
"""Scripts, and the environment variables that they need."""


def main() -> None:
    if not Path("runs/quickstart/sft/config.json").exists():
        raise SystemExit("runs/quickstart/sft is missing. Run `make quickstart` first.")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for name, extra in BENCHMARKS.items():
        start = time.perf_counter()
        script = f"benchmarks/{name}.py"
        shown = [*(f"{key}={value}" for key, value in extra.items()), "python", script]
        print(f"\n{name}: {' '.join(shown)}\n", flush=True)
        command = [sys.executable, script]
        with (OUTPUT / f"{name}.md").open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                command, env=os.environ | extra, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
        if process.wait():
            raise SystemExit(f"{name} failed. Run its command alone to see the error.")
        print(f"\n{time.perf_counter() - start:.0f} s, saved to {OUTPUT / name}.md", flush=True)


if __name__ == "__main__":
    main()
