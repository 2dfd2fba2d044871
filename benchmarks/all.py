"""Every benchmark of speed, one after the other: `make bench`. Tables are printed and saved under runs/bench.

Give it the machine for itself. It needs the quickstart's model (`make quickstart`), which loses more to threads than
it gains: what trains it runs on one.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

OUTPUT = Path("runs/bench")
ONE_THREAD = {"against_trl", "time_to_accuracy", "sampler_share"}
BENCHMARKS = {
    "startup": ["startup.py"],
    "against_trl": ["against_trl.py"],
    "time_to_accuracy": ["time_to_accuracy.py"],
    "sampler_share": ["sampler_share.py"],
    "update": ["update.py"],
    "growth": ["growth.py"],
}


def main() -> None:
    if not Path("runs/quickstart/sft/config.json").exists():
        raise SystemExit("runs/quickstart/sft is missing. Run `make quickstart` first.")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for name, (script, *flags) in BENCHMARKS.items():
        start = time.perf_counter()
        extra = {"OMP_NUM_THREADS": "1"} if name in ONE_THREAD else {}
        shown = [*(f"{key}={value}" for key, value in extra.items()), "python", f"benchmarks/{script}", *flags]
        print(f"\n{name}: {' '.join(shown)}\n", flush=True)
        command = [sys.executable, f"benchmarks/{script}", *flags]
        with (OUTPUT / f"{name}.md").open("w", encoding="utf-8") as file:
            process = subprocess.Popen(
                command, env=os.environ | extra, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
        if process.wait():
            raise SystemExit(f"{name} failed; run its command alone to see why.")
        print(f"\n{time.perf_counter() - start:.0f} s, saved to {OUTPUT / name}.md", flush=True)


if __name__ == "__main__":
    main()
