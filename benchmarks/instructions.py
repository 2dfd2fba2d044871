"""CPU instructions of the pure parts, counted by callgrind. The counts do not depend on the machine's load.

    python benchmarks/instructions.py            # needs valgrind; a minute for each part, more for the one with torch

Each part runs in two new interpreters, zero times and `TIMES` times. The difference is the cost of the part.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys

TIMES = 20
LEAVES = 16


def grow_tree() -> None:
    """Builds and reads a tree of 16 leaves, half of them branches, with 3 turns of 100 and 2 results of 200 tokens."""
    from arpo_trl.rollout.tree import ExecutedCall, RolloutTree, StopReason
    from arpo_trl.tools.calls import CallSource

    call = ExecutedCall(
        name="search", arguments={"query": "iron"}, text="text", failure=None, seconds=0.1, source=CallSource.EXECUTED
    )
    ids, logprobs, seen = [1] * 100, [-0.5] * 100, [2] * 200
    tree = RolloutTree([0] * 300)
    for start in range(LEAVES // 2):
        first = tree.add_turn(0, ids, "text", logprobs, [0.1] * 20)
        fork = tree.add_observation(first.index, seen, [call], "text")
        for address in ((start,), (start, 1, 0)):
            second = tree.add_turn(fork.index, ids, "text", logprobs, [0.1] * 20)
            last = tree.add_observation(second.index, seen, [call], "text")
            tree.end(tree.add_turn(last.index, ids, "text", logprobs, [0.1] * 20).index, address, StopReason.EOS)
    tree.check(LEAVES)
    for leaf in tree.leaves():
        assert len(leaf.ids) == len(leaf.mask) == len(leaf.logprobs) == len(leaf.token_nodes) == 700


def decide() -> None:
    """Makes and applies 100 branch decisions."""
    from arpo_trl.rollout.rules import BranchContext, Candidate, LivePath
    from arpo_trl.rollout.rules.threshold import Threshold
    from arpo_trl.rollout.tree import RolloutTree

    rule = Threshold()
    context = BranchContext(tree=RolloutTree([]), vocab_size=150_000, remaining=50, seed_of=lambda place: 0)
    candidates = [
        Candidate(node=i, address=(i,), depth=1, turn=[i / 100] * 20, before=[], root=[0.5] * 20) for i in range(100)
    ]
    assert sum(decision.granted for decision in rule.decide(candidates, context)) == 49
    assert rule.supply([LivePath(address=(0,), node=0, results=1)] * 16, context) == 16


def attribute() -> None:
    """Computes the credits "hard" and "once" for 16 rows of 700 tokens, each with 5 nodes."""
    import torch

    from arpo_trl.rollout.credit.base import mean_over_leaves
    from arpo_trl.rollout.credit.once import first_copies

    nodes = torch.tensor([[row // 2] * 300 + [100 + row] * 400 for row in range(LEAVES)])
    mean_over_leaves(torch.linspace(-1, 1, LEAVES), nodes)
    first_copies(nodes)


PARTS = {"tree": grow_tree, "branching": decide, "attribution": attribute}


def instructions(part: str, times: int) -> int:
    command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", sys.executable]
    environment = {**os.environ, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, __file__, "--run", part, str(times)], env=environment, capture_output=True, text=True, check=True
    )
    [count] = re.findall(r"Collected : (\d+)", done.stderr)
    return int(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), help=f"of {list(PARTS)}")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        part, times = arguments.run
        PARTS[part]()  # excludes the work of the first use
        for _ in range(int(times)):
            PARTS[part]()
        return
    print("| part | instructions, millions |\n|---|---:|")
    for part in arguments.parts:
        own = (instructions(part, TIMES) - instructions(part, 0)) / TIMES
        print(f"| {part} | {own / 1e6:.2f} |", flush=True)


if __name__ == "__main__":
    main()
