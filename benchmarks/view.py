"""Measures how long the page of a large run takes to open in a headless Chromium, and to search.

    python benchmarks/view.py

Writes the logs of a run with groups of 8 leaves: 4 paths from the root, each with a branch under its first result, and
two tool calls and an answer on each path. A turn has 600 characters, a result 1,500. The page is then opened several
times. Opening ends with the first frame after the page's script is done, which shows the curves, the first 50 groups
and the newest tree.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

from arpo_trl.logs.trajectories import LoggedTree, TrajectoryLog
from arpo_trl.rollout.tree import Address, BranchDecision, ExecutedCall, RolloutTree, StopReason
from arpo_trl.tools.calls import CallSource
from arpo_trl.viewing.page import page
from arpo_trl.viewing.run import RunReader
from browser import Tab, browsing, find_browser

LEAVES, AT_ROOT, GROUPS = 8, 4, 16
"""Leaves of a group, its paths from the root, and groups of a step."""
TURN, RESULT, PROBED = 600, 1500, 20
"""Characters of a turn and of a result, and tokens whose entropies are logged."""
WORDS = "the melting point of iron in degrees is higher than that of tin because its atoms hold together".split()
NEXT_FRAME = "new Promise((done) => requestAnimationFrame(() => setTimeout(done)))"


def text(draws: random.Random, chars: int) -> str:
    return " ".join(draws.choices(WORDS, k=chars // 5))[:chars]


def tree(step: int, group: int, draws: random.Random) -> LoggedTree:
    """A group of `LEAVES` leaves."""
    made = RolloutTree([1] * 100)

    def turn(parent: int) -> int:
        tokens = TURN // 4
        entropies = [draws.random() for _ in range(PROBED)]
        return made.add_turn(parent, [2] * tokens, text(draws, TURN), [-0.5] * tokens, entropies).index

    def result(parent: int) -> int:
        found = text(draws, RESULT)
        call = ExecutedCall(
            name="search",
            arguments={"query": text(draws, 40)},
            text=found,
            failure=None,
            seconds=0.5,
            source=CallSource.EXECUTED,
        )
        return made.add_observation(parent, [3] * (RESULT // 4), [call], found).index

    def finish(parent: int, address: Address) -> None:
        made.end(turn(result(turn(parent))), address, StopReason.EOS)

    for path in range(AT_ROOT):
        fork = result(turn(0))
        made.nodes[fork].decision = BranchDecision(
            entropy_nats=0.5, delta=0.01, probability=0.502, fires=True, granted=1
        )
        finish(fork, (path,))
        finish(fork, (path, 1, 0))
    return LoggedTree(
        step=step,
        group=group,
        prompt=text(draws, 300),
        tree=made,
        rewards=[float(draws.random() < 0.5) for _ in range(LEAVES)],
        advantages=[0.0] * LEAVES,
        rule={"name": "threshold", "branch_threshold": 0.5},
    )


def write_run(run: Path, leaves: int) -> None:
    """Logs the trees of a run with `leaves` leaves."""
    draws = random.Random(0)
    log = TrajectoryLog(run / "trajectories", rate=1.0, seed=0, rank=0)
    groups = leaves // LEAVES
    for step in range(-(-groups // GROUPS)):
        count = min(GROUPS, groups - step * GROUPS)
        log.write(f"step-{step:06d}", [tree(step, group, draws) for group in range(count)])


def seconds(act: Callable[[], Any]) -> float:
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def measure(tab: Tab, file: Path, repeats: int) -> list[float]:
    """The median and the longest time to open the page; then of its second tree, a first search and a second one."""

    def open_page() -> None:
        tab.open(file.as_uri())
        tab.run(NEXT_FRAME)

    def run(code: str) -> float:
        return seconds(lambda: tab.run(f"{code}; {NEXT_FRAME}"))

    opened = [seconds(open_page) for _ in range(repeats)]
    another = run("document.querySelectorAll('.group')[1].click()")
    searches = [
        run(f"document.getElementById('search').value = '{word}'; filter()") for word in ("atoms tin", "tin hi")
    ]
    return [median(opened), max(opened), another, *searches]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--leaves", type=int, nargs="+", default=[10_000, 20_000])
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    browser = find_browser()
    if browser is None:
        raise SystemExit("There is no Chromium or Chrome.")
    print("| leaves | groups | page MB | written in s | opens in s: median, most | next tree s | search s | again s |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    for leaves in arguments.leaves:
        with tempfile.TemporaryDirectory() as folder, browsing(browser, Path(folder, "profile")) as tab:
            run, file = Path(folder, "run"), Path(folder, "view.html")
            write_run(run, leaves)

            def write_page(run: Path = run, file: Path = file) -> None:
                reader = RunReader(run)
                reader.refresh()
                file.write_text(page(reader), "utf-8")

            written = seconds(write_page)
            middle, most, another, first, again = measure(tab, file, arguments.repeats)
            print(
                f"| {leaves:,} | {leaves // LEAVES:,} | {file.stat().st_size / 1e6:.0f} | {written:.1f} | "
                f"{middle:.2f}, {most:.2f} | {another:.2f} | {first:.2f} | {again:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
