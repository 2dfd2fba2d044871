"""Reads a run's logged metrics and logged trees from its folder, even during the run."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from arpo_trl.common.user_files import expect, read_json
from arpo_trl.errors import DataError
from arpo_trl.logs.trajectories import FOLDER, LogFile, LoggedTree, log_files, read_trees
from arpo_trl.visible import get_logger

logger = get_logger(__name__)

KINDS = {"step": "training", "eval": "evaluation"}
"""Start of a log file's name → the kind of its rollouts."""
_STATE = "trainer_state.json"


def required_log_files(run: Path) -> list[LogFile]:
    """Like `log_files`, but a folder without such files is also an error."""
    files = log_files(run)
    if not files:
        raise DataError(
            f"{run} has no logged trees. Pass the output_dir of a run, or train with trajectory_log_rate above 0."
        )
    return files


def listed(numbers: Sequence[int]) -> str:
    """The numbers as text. Of more than eight numbers, the first eight and the last."""
    shown = ", ".join(map(str, numbers[:8]))
    return shown if len(numbers) <= 8 else f"{shown}, … {numbers[-1]}"


def state_file(run: Path) -> Path | None:
    """The file with the run's log history: that of its newest checkpoint or, if it has ended after that step, of its
    end; None if there is none."""
    run = run.parent if run.name == FOLDER else run
    checkpoints = {
        int(path.parent.name[11:]): path
        for path in run.glob(f"checkpoint-*/{_STATE}")
        if path.parent.name[11:].isdecimal()
    }
    ended, newest = run / _STATE, max(checkpoints, default=0)
    mark = _mark(ended) if ended.is_file() else None
    if mark is None or _step_of(ended, mark) < newest:  # a finished run may have been continued
        return checkpoints.get(newest)
    return ended


@lru_cache(maxsize=16)  # pages of a live run ask every two seconds
def _step_of(state: Path, mark: tuple[int, int]) -> float:
    """The last step in the log history of `state`, which last changed at `mark`; infinity if it cannot be read."""
    try:
        rows = read_json(state)["log_history"]
        return max((row["step"] for row in rows if "step" in row), default=0)
    except (DataError, LookupError, TypeError):
        return math.inf  # so that its reader names the fault


def log_history(run: Path) -> list[dict[str, Any]]:
    """The metrics that the run has logged, one row per log line; empty if it has saved none.

    Raises:
        DataError: The file is not a trainer's state.
    """
    path = state_file(run)
    if path is None:
        return []
    try:
        state = read_json(path)
    except DataError:
        if path.exists():
            raise
        return log_history(run)  # the run has removed an old checkpoint
    expect(state, {"log_history": [dict]}, str(path))
    return [row for row in state["log_history"] if isinstance(row.get("step"), int)]


def trees_of(file: LogFile) -> list[LoggedTree] | None:
    """The trees of a file of a run. None after a warning if it is broken, so that it does not hide the other files."""
    try:
        return list(read_trees(file.path))
    except DataError as error:
        if file.path.exists():  # otherwise the run has removed it in the meantime
            logger.warning(f"{error} This file is left out.")
        return None


class RunReader:
    """Reads the log files of a run, and rereads changed files.

    `revision` grows with every change, also from one reader of a run to the next. `files` contains, for each file, the
    revision at which it was read and its trees. `history` contains the logged metrics.

        reader = RunReader(Path("runs/my"))
        reader.refresh()
    """

    def __init__(self, run: Path):
        self.run = run
        self.revision = time.time_ns() // 1000  # an open page may still ask for the changes since an earlier reader's
        self.files: dict[LogFile, tuple[int, list[LoggedTree]]] = {}
        self.history: list[dict[str, Any]] = []
        self._seen: dict[Path, tuple[int, int]] = {}

    def refresh(self) -> None:
        """Reads new and changed files. Logs that are broken, or removed in the meantime, are left out.

        Raises:
            DataError: There is no such folder, or the run's state is broken.
        """
        state = state_file(self.run)
        files = {file.path: file for file in log_files(self.run)}
        found = {path: mark for path in (*files, state) if path is not None and (mark := _mark(path)) is not None}
        if found == self._seen:
            return
        self.revision += 1
        self.history = log_history(self.run)
        self.files = {file: held for file, held in self.files.items() if file.path in found}
        for path, file in files.items():
            if path in found and found[path] != self._seen.get(path):
                self.files.pop(file, None)
                if (trees := trees_of(file)) is not None:
                    self.files[file] = (self.revision, trees)
        self._seen = found

    def trees(self) -> Mapping[LogFile, Sequence[LoggedTree]]:
        """The trees of each file, in the order of the files."""
        return {file: self.files[file][1] for file in sorted(self.files)}


def _mark(path: Path) -> tuple[int, int] | None:
    """A value that changes with the file; None if the file is missing, for example because a resumed run has removed
    it."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size
