"""The checkpoints of an output folder: each is complete or absent, and only the run that wrote it can resume from it.

A checkpoint is written to `<output_dir>/.unfinished`. When all ranks have finished, rank 0 lists the files and their
sizes in `arpo_state.json`, flushes everything to disk and renames the folder to its final name. So a folder named
`checkpoint-…` was complete when it got that name. If a file is lost or truncated later, the sizes reveal it.

`arpo_state.json` also contains the run's identity (`RunIdentity`). A run with another one cannot resume from the
checkpoint.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from typing import Any

from arpo_trl.common.run_files import ADAPTER_CONFIG, PICKLED_ARGUMENTS, UNFINISHED
from arpo_trl.common.user_files import expect, read_json
from arpo_trl.errors import CheckpointError, ConfigError, DataError
from arpo_trl.runs.identity import RunIdentity, differences_between
from arpo_trl.runs.output_folder import checkpoints_of, partial_weights, wants_to_resume
from arpo_trl.visible import get_rank_logger

logger = get_rank_logger(__name__)

STATE_FILE = "arpo_state.json"
VERSIONS = ("arpo-trl", "trl", "transformers", "torch")

_BATCH_SETTINGS = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation"})
"""The settings that must change with the number of processes to keep the global batches the same."""
_ROWS_PER_STEP = "per_device_train_batch_size × gradient_accumulation_steps × processes"
_STATE = {
    "step": int, "written": float, "between_generations": bool, "owes_evaluation": bool, "identity": dict,
    "versions": dict, "files": dict, "passes": int, "steps_in_pass": int,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """The content of a checkpoint's `arpo_state.json`.

    state = SavedState.of(Path("output/checkpoint-20"))
    state.step, state.files["model.safetensors"]        # 20, 988097824
    """

    folder: Path
    step: int
    written: float
    """Seconds since the epoch."""
    between_generations: bool
    """Whether all rows of the generation batch have been trained."""
    owes_evaluation: bool
    """Whether it was written during an evaluation at its step. Then the evaluation must be repeated."""
    identity: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, int]
    """Path in the folder → size in bytes."""
    passes: int
    """The number of passes over the training rows that have ended."""
    steps_in_pass: int
    """The steps in the current pass."""

    @classmethod
    def of(cls, folder: Path) -> SavedState:
        """Reads `arpo_state.json` in `folder`.

        Raises:
            CheckpointError: The file is missing, or this module did not write it.
        """
        file = folder / STATE_FILE
        try:
            if not file.exists():
                raise CheckpointError(
                    f"{folder} has no {STATE_FILE}: it is not a checkpoint of ARPOTrainer, or it is incomplete."
                )
            values = read_json(file)
            expect(values, _STATE, str(file))
        except DataError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        return cls(folder=folder, **{name: values[name] for name in _STATE})

    def check_files(self) -> None:
        """Raises CheckpointError if a file is missing that resuming reads, or its size is not the recorded one."""
        for name, size in self.files.items():
            if Path(name).name == PICKLED_ARGUMENTS:  # resuming does not read it, and pushes omit it
                continue
            try:
                found = (self.folder / name).stat().st_size
            except OSError as error:
                raise CheckpointError(f"{self.folder / name} is missing ({error.strerror}).") from error
            if found != size:
                raise CheckpointError(f"{self.folder / name} has {found:,} bytes; it was written with {size:,}.")

    def check_same_run(self, now: RunIdentity) -> None:
        """Raises ConfigError if another run wrote the checkpoint; names the differences."""
        then, here = dict(self.identity), now.as_dict()
        if None in (then.get("frozen_weights"), here.get("frozen_weights")):
            for identity in (then, here):
                identity.pop("frozen_weights", None)
        if then["processes"] != here["processes"]:
            self._check_can_spread(then, here)
            for identity in (then, here):
                settings, processes = identity["settings"], identity.pop("processes")
                rows = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"] * processes
                identity["settings"] = {k: v for k, v in settings.items() if k not in _BATCH_SETTINGS}
                identity["settings"][_ROWS_PER_STEP] = rows
        differences = [difference.removeprefix("settings.") for difference in differences_between(then, here)]
        if differences:
            more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
            raise ConfigError(
                f"{self.folder} was written by another run: {'; '.join(differences[:3])}{more}. To resume, restore "
                f"the old value. {self.new_run} Choose another output_dir."
            )

    @property
    def new_run(self) -> str:
        """How to start a new run from the weights, as a sentence for users."""
        model, first = str(self.folder), ""
        if (self.folder / ADAPTER_CONFIG).exists():
            model, first = "FOLDER", f"merge the adapter (arpo-trl merge {shlex.quote(model)} --output FOLDER) and "
        return f"To start a new run from the weights, {first}set model_name_or_path to {model}."

    def _check_can_spread(self, then: dict[str, Any], here: dict[str, Any]) -> None:
        told = f"{self.folder} was written by {then['processes']} processes, but this run has {here['processes']}"
        way_out = f"Start {then['processes']} processes"
        if then["sharding"] is not None or here["sharding"] is not None:
            raise ConfigError(
                f"{told}; {then['sharding'] or here['sharding']} saves one part of the optimizer per process. "
                f"{way_out}."
            )
        if not self.between_generations:
            raise ConfigError(
                f"{told}; it contains the untrained rest of a generation batch, one part per process. {way_out}, or "
                "resume from a checkpoint at a multiple of the steps per generation batch."
            )


class Checkpoints:
    """The checkpoints under `folder`, an output_dir."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.unfinished = folder / UNFINISHED

    def place(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def all(self) -> list[Path]:
        """Folders named like checkpoints, lowest step first."""
        return list(checkpoints_of(self.folder).values())

    def last(self) -> tuple[SavedState | None, list[str]]:
        """The complete checkpoint that was written last, and the faults of the incomplete ones."""
        whole, faults = [], []
        for path in self.all():
            try:
                state = SavedState.of(path)
                state.check_files()
            except CheckpointError as error:
                faults.append(str(error))
            else:
                whole.append(state)
        return max(whole, key=lambda state: (state.written, state.step), default=None), faults

    def _times(self) -> Iterator[float]:
        """When each readable checkpoint was written."""
        for path in self.all():
            with suppress(CheckpointError):
                yield SavedState.of(path).written

    def find(self, wanted: str | PathLike[str] | bool | None) -> SavedState | None:
        """The checkpoint to resume from; None to start a new run.

        Args:
            wanted: True: the last complete checkpoint, if there is one. A path: that checkpoint. None or False: none.
                Each value may also be text, as on a command line.

        Raises:
            CheckpointError: The checkpoint at the path, or every checkpoint in the folder, is incomplete.
            ConfigError: The path does not exist, `wanted` is something else, or it is None or False and the folder
                contains checkpoints.
            DataError: The system refuses the path.
        """
        wanted = wants_to_resume(wanted)
        if not wanted:
            if there := self.all():
                raise ConfigError(
                    f"{self.folder} contains {there[-1].name} of an earlier run. A new run would mix with it. To "
                    "continue the earlier run, set resume_from_checkpoint to true. To start a new one, choose another "
                    "output_dir or delete this folder."
                )
            return None
        last, faults = self.last()
        if wanted is True:
            if last is None and faults:
                raise CheckpointError(
                    f"No checkpoint in {self.folder} is complete. {faults[-1]} Delete them to start a new run."
                )
            for fault in faults:
                logger.warning(f"A checkpoint is not used: {fault}", main_process_only=True)
            return last
        state = None
        try:
            if not os.path.isdir(wanted):
                raise ConfigError(f"resume_from_checkpoint is {wanted}; expected a folder, true or false.")
            state = SavedState.of(Path(wanted))
            state.check_files()
        except (CheckpointError, ConfigError) as error:
            way_out = (
                f"The last complete checkpoint is {last.folder}."
                if last
                else f"{self.folder} contains no complete checkpoint."
            )
            raise type(error)(f"{error} {way_out}") from error
        return state

    def clear(self) -> None:
        """Removes the incomplete checkpoints and weights of a killed run. Renames complete checkpoints to their final
        names."""
        for path in partial_weights(self.folder):
            path.unlink(missing_ok=True)
        for path in self.unfinished.glob("checkpoint-*"):
            try:
                SavedState.of(path).check_files()
            except CheckpointError:
                continue
            if not (self.folder / path.name).exists():
                path.rename(self.folder / path.name)
        shutil.rmtree(self.unfinished, ignore_errors=True)

    def finish(
        self,
        step: int,
        *,
        identity: RunIdentity,
        between_generations: bool,
        owes_evaluation: bool,
        passes: int,
        steps_in_pass: int,
    ) -> Path:
        """Completes the unfinished checkpoint of that step, moves it to its final path and returns that path."""
        folder, place = self.unfinished / f"checkpoint-{step}", self.place(step)
        written = max([time.time(), *(before + 1 for before in self._times())])  # also if the clock was set back
        state = {
            "step": step,
            "written": written,
            "between_generations": between_generations,
            "owes_evaluation": owes_evaluation,
            "passes": passes,
            "steps_in_pass": steps_in_pass,
            "identity": identity.as_dict(),
            "versions": {name: version(name) for name in VERSIONS},
            "files": {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)},
        }
        (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", "utf-8")
        for path in [*folder.rglob("*"), folder]:
            _flush_to_disk(path)
        replaced = self.unfinished / f"replaced-{step}"
        if place.exists():
            place.rename(replaced)
        folder.rename(place)
        os.utime(place, (written, written))  # `rotate_checkpoints` reads it
        _flush_to_disk(self.folder)
        shutil.rmtree(self.unfinished, ignore_errors=True)
        return place


def changed_versions(then: Mapping[str, str]) -> list[str]:
    """The packages whose installed version differs from `then`, each as "name old → new"."""
    return [f"{name} {then[name]} → {version(name)}" for name in VERSIONS if then[name] != version(name)]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
