"""`arpo-trl tree`: the rollouts of a run as a table, and trees as text."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from arpo_trl.errors import DataError
from arpo_trl.logs.metrics import branches
from arpo_trl.logs.render import LEGEND, render_tree
from arpo_trl.logs.trajectories import LoggedTree, read_trees
from arpo_trl.viewing.run import KINDS, LogFile, listed, required_log_files, trees_of
from arpo_trl.visible import say


def show_trees(path: Path, *, step: int | None, group: int | None, full: bool) -> None:
    """Prints the trees of a log file, or of a step of the run at `path`. Without `step`, prints a table of the run's
    steps.

    Raises:
        DataError: There is no such file, folder, step or group.
    """
    console = Console()
    if path.is_dir():
        files = required_log_files(path)
        if step is None:
            if group is not None:
                raise DataError(f"--group {group} needs a --step: each step has its own groups.")
            return _print_steps(console, path, files)
        chosen = [file for file in files if file.step == step]
        if not chosen:
            steps = sorted({file.step for file in files})
            raise DataError(f"{path} has no logged trees of step {step}; it has trees of the steps {listed(steps)}.")
        trees = [(KINDS[file.kind], tree) for file in chosen for tree in trees_of(file) or []]
        if not trees:
            raise DataError(f"{path} has no readable trees of step {step}.")
    else:
        if not path.exists():
            raise DataError(f"{path} does not exist. Pass the output_dir of a run, or a file of its trajectories.")
        logged = list(read_trees(path))
        if not logged:
            raise DataError(
                f"{path} has no logged trees. Pass the output_dir of a run, or a file of its trajectories."
            )
        trees = [("", tree) for tree in logged if step in (None, tree.step)]
        if not trees:
            steps = sorted({tree.step for tree in logged})
            raise DataError(f"{path} has no logged trees of step {step}; it has trees of the steps {listed(steps)}.")
    shown = [(kind, tree) for kind, tree in trees if group in (None, tree.group)]
    if not shown:
        groups = sorted({tree.group for _, tree in trees})
        raise DataError(f"There is no logged tree of group {group}; expected one of {listed(groups)}.")
    for kind, tree in shown:
        of = ", evaluation" if kind == KINDS["eval"] else ""
        console.print(render_tree(tree, full=full, title=f"step {tree.step}, group {tree.group}{of}"))
    console.print(Text(LEGEND, style="dim"))


def _print_steps(console: Console, run: Path, files: Iterable[LogFile]) -> None:
    table = Table(box=None, header_style="bold", pad_edge=False)
    table.add_column("step", justify="right")
    table.add_column("rollout")
    for heading in ("trees", "leaves", "reward", "wrong", "branches", "calls", "failed"):
        table.add_column(heading, justify="right")
    step = 0
    for file in files:
        if (trees := trees_of(file)) is not None:
            step = file.step
            table.add_row(str(step), KINDS[file.kind], *_counts(trees))
    if not table.row_count:
        raise DataError(f"{run} has no readable trees.")
    # On a narrow terminal lines go on in the next one: rich would cut numbers off.
    table.width = console.measure(table, options=console.options.update(max_width=sys.maxsize)).maximum
    console.print(table, crop=False)
    console.print(Text("wrong: leaves with a reward of 0 or less. failed: tool calls that failed.", style="dim"))
    say(f"One step's trees: arpo-trl tree {shlex.quote(str(run))} --step {step}")


def _counts(trees: list[LoggedTree]) -> list[str]:
    rewards = [reward for tree in trees for reward in tree.rewards]
    known = [reward for reward in rewards if reward is not None]
    calls = [call for tree in trees for call in tree.tree.calls()]
    counts = (
        len(trees),
        len(rewards),
        f"{sum(known) / len(known):.2f}" if known else "–",
        sum(reward <= 0 for reward in known),
        sum(branches(tree.tree) for tree in trees),
        len(calls),
        sum(not call.ok for call in calls),
    )
    return list(map(str, counts))
