"""Every benchmark of speed, one after the other: `make bench`. Tables are printed and saved under runs/bench.

Give it the machine for itself. It needs the quickstart's model (`make quickstart`).
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

OUTPUT = Path("runs/bench")
BENCHMARKS = {
    "update": ["update.py"],
    "growth": ["growth.py"],
    "against_trl": ["against_trl.py"],
    "time_to_accuracy": ["time_to_accuracy.py"],
    "sampler_share": ["sampler_share.py"],
    "startup": ["startup.py"],
}


def main() -> None:
    if not Path("runs/quickstart/sft/config.json").exists():
        raise SystemExit("runs/quickstart/sft is missing. Run `make quickstart` first.")
    OUTPUT.mkdir(parents=True, exist_ok=True)
    for name, (script, *flags) in BENCHMARKS.items():
        start = time.perf_counter()
        print(f"\n{name}: python benchmarks/{' '.join([script, *flags])}\n", flush=True)
        command = [sys.executable, f"benchmarks/{script}", *flags]
        with (OUTPUT / f"{name}.md").open("w", encoding="utf-8") as file:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            assert process.stdout is not None
            for line in process.stdout:
                print(line, end="", flush=True)
                file.write(line)
        if process.wait():
            raise SystemExit(f"{name} failed; run its command alone to see why.")
        print(f"\n{time.perf_counter() - start:.0f} s, saved to {OUTPUT / name}.md", flush=True)


if __name__ == "__main__":
    main()
