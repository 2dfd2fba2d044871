"""The history of a run: its logged metrics and, for later steps, the metrics of its logged trees."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from arpo_trl.logs.metrics import Tally, tally_trees
from arpo_trl.logs.trajectories import LoggedTree


def whole_history(
    logged: Sequence[Mapping[str, Any]], tallies: Mapping[int, Sequence[Tally]]
) -> tuple[list[Mapping[str, Any]], int | None]:
    """The log history, continued by the tallies of logged trees for later steps, and the first of these later steps.

    A running run has saved its log history only up to its newest checkpoint. The step is None if nothing is added.
    """
    last = last_step(logged)
    # A rollout at step s, counted from 0, appears in the history at step s + 1.
    later = {step + 1: of_step for step, of_step in tallies.items() if step >= last}
    return [*logged, *history_of_tallies(later)], min(later, default=None)


def last_step(history: Iterable[Mapping[str, Any]]) -> int:
    """The last training step in the log history; 0 if there is none."""
    return max((row["step"] for row in history if "reward" in row), default=0)


def tally_logged(logged: LoggedTree, tally: Tally) -> None:
    """Counts a logged tree and its rewards into `tally`."""
    tally_trees([logged.tree], tally)
    for reward in logged.rewards:
        if reward is not None:
            tally.add("reward", reward)


def history_of_tallies(tallies: Mapping[int, Sequence[Tally]]) -> list[dict[str, Any]]:
    """The metrics from the tallies of each training step, one row per step.

    The rows have the names of the log history. They cover a sample of the trees, and no times, accuracies or top-ups.
    """
    rows = []
    for step, of_step in sorted(tallies.items()):
        values = Tally.merged(tally.plain() for tally in of_step).values()
        rows.append({"step": step} | {name if name == "reward" else f"arpo/{name}": values[name] for name in values})
    return rows
