"""The python tool compared with a new subprocess per call, both isolated, in one run.

    OMP_NUM_THREADS=1 python benchmarks/python_tool.py

Prints a Markdown table. Each round makes one call of each kind in each way. The order is reversed in every second
round, so that other load on the machine affects all alike. "Calls per second" is measured afterwards: one caller makes
calls in sequence without a pause, so that the worker cannot prepare the next fork between calls.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable

import numpy as np

from arpo_trl.tools.python.local import ISOLATIONS, PythonTool
from arpo_trl.tools.python.sandbox import Limits

CALLS = {
    "plain": "total = sum(i * i for i in range(1000))\nprint(total)",
    "numpy": "import numpy as np\nprint(np.linalg.det(np.array([[2.0, 1.0], [1.0, 3.0]])))",
    "sympy": "from sympy import symbols, solve\nx = symbols('x')\nprint(solve(x**2 - 7*x + 12, x))",
}


def fresh_subprocess(code: str) -> str:
    """Runs the code in a new interpreter without any isolation."""
    ran = subprocess.run([sys.executable, "-I", "-c", code], capture_output=True, text=True, check=True)
    return ran.stdout.rstrip("\n")


def seconds_of(call: Callable[[str], str], code: str) -> tuple[float, str]:
    began = time.perf_counter()
    shown = call(code)
    return time.perf_counter() - began, shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40, help="(default: 40)")
    parser.add_argument("--isolation", choices=ISOLATIONS, default="auto")
    arguments = parser.parse_args()
    tool = PythonTool(Limits(), max_workers=1, allow_unsafe=False, isolation=arguments.isolation)
    ways: dict[str, Callable[[str], str]] = {"tool": tool, "fresh subprocess": fresh_subprocess}
    seconds: dict[tuple[str, str], list[float]] = {(kind, way): [] for kind in CALLS for way in ways}
    for code in CALLS.values():  # starts the workers
        tool(code)
    for number in range(arguments.rounds):
        for kind, code in CALLS.items():
            shown = set()
            for way in list(ways)[:: 1 if number % 2 else -1]:
                took, text = seconds_of(ways[way], code)
                seconds[kind, way].append(took)
                shown.add(text)
            assert len(shown) == 1, shown
    rates: dict[tuple[str, str], float] = {}
    for kind, code in CALLS.items():
        for way, call in ways.items():
            calls = arguments.rounds if way == "tool" else 3
            began = time.perf_counter()
            for _ in range(calls):
                call(code)
            rates[kind, way] = calls / (time.perf_counter() - began)
    print(tool)
    print("\n| call | | p50 ms | p95 ms | calls per second | p50: subprocess ÷ tool |\n|---|---|---:|---:|---:|---:|")
    for kind in CALLS:
        times = np.median(seconds[kind, "fresh subprocess"]) / np.median(seconds[kind, "tool"])
        for way in ways:
            taken = seconds[kind, way]
            p50, p95 = np.percentile(taken, [50, 95]) * 1000
            faster = f"{times:.0f}" if way == "tool" else ""
            print(f"| {kind} | {way} | {p50:.1f} | {p95:.1f} | {rates[kind, way]:.0f} | {faster} |")
    tool.close()


if __name__ == "__main__":
    main()
