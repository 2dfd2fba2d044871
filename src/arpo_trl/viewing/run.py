"""Reads a run's logged metrics and logged trees from its folder, even during the run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from arpo_trl.common.run_files import TRAINER_STATE, TRAJECTORIES
from arpo_trl.common.user_files import expect, read_json
from arpo_trl.errors import DataError
from arpo_trl.logs.metrics import Tally
from arpo_trl.logs.trajectories import LogFile, LoggedTree, log_files, read_trees
from arpo_trl.runs.output_folder import checkpoints_of
from arpo_trl.viewing.history import last_step, tally_logged
from arpo_trl.viewing.page_tree import PageTree
from arpo_trl.visible import get_logger

logger = get_logger(__name__)

KINDS = {"step": "training", "eval": "evaluation"}
"""Start of a log file's name → the kind of its rollouts."""
MAX_LEAVES = 20_000
"""The default maximum number of leaves on a page. The newest steps come first."""
_T = TypeVar("_T")


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
    run = run.parent if run.name == TRAJECTORIES else run
    checkpoints = {
        step: path for step, folder in checkpoints_of(run).items() if (path := folder / TRAINER_STATE).exists()
    }
    ended, newest = run / TRAINER_STATE, max(checkpoints, default=0)
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
    return _made_of(file, lambda _, tree: tree)


def _made_of(file: LogFile, make: Callable[[int, LoggedTree], _T]) -> list[_T] | None:
    """What `make` returns for each tree and its number, without holding the trees. None as in `trees_of`."""
    try:
        return [make(number, tree) for number, tree in enumerate(read_trees(file.path))]
    except DataError as error:
        if file.path.exists():  # otherwise the run has removed it in the meantime
            logger.warning(f"{error} This file is left out.")
        return None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadFile:
    """A file of the log as it was read: the number of its trees, and what the page shows of them."""

    revision: int
    """The reader's revision at which the file was read."""
    count: int
    trees: list[PageTree] | None
    """None if newer files have enough leaves for the page."""
    tally: Tally | None
    """The counts of a training step that the logged metrics lack. None for other files."""

    def lacks(self, fits: bool, counts: bool) -> bool:
        """Whether the file must be read again: the page has room for its trees (`fits`), or needs its counts."""
        return (fits and self.trees is None) or (counts and self.tally is None)


class RunReader:
    """Reads the log files of a run, and rereads changed files.

    It holds no tokens, and the texts of the newest trees only: the log of a long run is larger than the memory.

    `revision` grows with every change, also from one reader of a run to the next. `files` contains the read files in
    their order, `history` the logged metrics.

        reader = RunReader(Path("runs/my"))
        reader.refresh()
    """

    def __init__(self, run: Path, max_leaves: int = MAX_LEAVES):
        self.run, self.max_leaves = run, max_leaves
        self.revision = time.time_ns() // 1000  # an open page may still ask for the changes since an earlier reader's
        self.files: dict[LogFile, ReadFile] = {}
        self.history: list[dict[str, Any]] = []
        self._seen: dict[Path, tuple[int, int]] = {}

    def refresh(self) -> None:
        """Reads new and changed files. Logs that are broken, or removed in the meantime, are left out.

        Raises:
            DataError: There is no such folder, or the run's state is broken.
        """
        state = state_file(self.run)
        files = log_files(self.run)
        paths = (*(file.path for file in files), state)
        found = {path: mark for path in paths if path is not None and (mark := _mark(path)) is not None}
        if found == self._seen:
            return
        self.revision += 1
        self.history = log_history(self.run)
        logged, leaves, held = last_step(self.history), 0, {}
        for file in reversed(files):
            if (mark := found.get(file.path)) is None:
                continue
            fits, counts = leaves < self.max_leaves, file.kind == "step" and file.step >= logged
            read = self.files.get(file)
            if mark != self._seen.get(file.path) or (read is not None and read.lacks(fits, counts)):
                read = self._read(file, fits, counts)
            if read is not None:
                held[file] = read if fits else replace(read, trees=None)
                leaves += sum(tree.leaves for tree in held[file].trees or ())
        self.files, self._seen = dict(reversed(held.items())), found

    def _read(self, file: LogFile, fits: bool, counts: bool) -> ReadFile | None:
        """The file with its trees if the page has room for them (`fits`), and their tally if it `counts`."""
        tally = Tally() if counts else None

        def make(number: int, logged: LoggedTree) -> PageTree | None:
            if tally is not None:
                tally_logged(logged, tally)
            return PageTree.of(file, number, logged) if fits else None

        if not (fits or counts):
            count = _lines(file.path)
            return None if count is None else ReadFile(revision=self.revision, count=count, trees=None, tally=None)
        if (made := _made_of(file, make)) is None:
            return None
        trees = [tree for tree in made if tree is not None] if fits else None
        return ReadFile(revision=self.revision, count=len(made), trees=trees, tally=tally)


def _lines(path: Path) -> int | None:
    """The number of lines of a log file; None if the run has removed it."""
    try:
        with path.open("rb") as file:
            return sum(1 for _ in file)
    except FileNotFoundError:
        return None


def _mark(path: Path) -> tuple[int, int] | None:
    """A value that changes with the file; None if the file is missing, for example because a resumed run has removed
    it."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_mtime_ns, status.st_size
