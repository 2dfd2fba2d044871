"""Checks that all ranks of a run have the same output folder, and resume from the same checkpoint of it."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

from accelerate import Accelerator
from accelerate.utils import gather_object

from arpo_trl.errors import ArpoError, ConfigError
from arpo_trl.runs.checkpoints import Checkpoints, SavedState

SEEN_WITHIN_S = 30.0
"""A network file system may show a new file to other nodes after some seconds."""
_EVERY_S = 0.1
_REMEDY = "Put it on a file system that all nodes share, and give all processes the same path."


def check_shared(folder: Path, accelerator: Accelerator) -> None:
    """Checks that `folder`, an output_dir, is one folder for all ranks: a checkpoint has files of each of them. Rank 0
    writes a file, and the others look for it. A collective.

    Raises:
        ConfigError: It is not, or rank 0 cannot write to it. On all ranks.
    """
    if accelerator.num_processes == 1:
        return
    marker, failure = folder.absolute() / f"_shared-{uuid4().hex}", None
    try:
        if accelerator.is_main_process:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                marker.touch()
            except OSError as error:
                failure = str(error)
        name, failure = gather_object([(marker.name, failure)])[0]
        if failure is not None:
            raise ConfigError(f"output_dir {folder} cannot be written by rank 0 ({failure}). Choose another one.")
        sees = gather_object([_appears(name, folder.absolute())])
    finally:
        if accelerator.is_main_process:
            marker.unlink(missing_ok=True)
    if not all(sees):
        blind = ", ".join(str(rank) for rank, does in enumerate(sees) if not does)
        raise ConfigError(
            f"output_dir of rank {blind} is not the folder of rank 0, so each checkpoint would lack files. This is "
            f"rank {accelerator.process_index}, with {folder}. {_REMEDY}"
        )


def _appears(name: str, folder: Path) -> bool:
    end = time.monotonic() + SEEN_WITHIN_S
    while True:
        with suppress(OSError):
            if name in os.listdir(folder):  # unlike a look at one name, it is not answered from a cache of NFS
                return True
        if time.monotonic() > end:
            return False
        time.sleep(_EVERY_S)


def found_by_all(checkpoints: Checkpoints, wanted: str | bool, accelerator: Accelerator) -> SavedState | None:
    """`Checkpoints.find` on all ranks. A collective.

    Raises:
        CheckpointError, ConfigError: As `find`. ConfigError on all ranks if their results differ.
    """
    found: SavedState | None = None
    failure: ArpoError | None = None
    try:
        found = checkpoints.find(wanted)
    except ArpoError as error:
        failure = error
    own = "an error" if failure else "none" if found is None else f"step {found.step}"
    results = gather_object([own]) if accelerator.num_processes > 1 else [own]
    if len(set(results)) > 1:
        listed = ", ".join(f"rank {rank} {result}" for rank, result in enumerate(results))
        place = wanted if isinstance(wanted, str) else checkpoints.folder
        raise ConfigError(
            f"The processes do not find the same checkpoint in {place}: {listed}. {_REMEDY}"
        ) from failure
    if failure is not None:
        raise failure
    return found
