"""All speed benchmarks, one after the other: `make bench`. Tables are printed and saved under runs/bench.

Run nothing else on the machine meanwhile. It needs the quickstart's model (`make quickstart`). That model is slower
with several threads, so its sampling and training use one thread.
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
"""Scripts, and what their environment gets."""


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
