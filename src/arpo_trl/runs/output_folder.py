"""Prevents a new run from mixing with, or replacing, an earlier run in the output folder."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from io import FileIO
from os import PathLike
from pathlib import Path

from arpo_trl.common.run_files import FILES, FOLDERS, TRAINER_STATE, TRAJECTORIES
from arpo_trl.common.user_files import expect, read_json, user_path
from arpo_trl.common.waiting import is_first_rank
from arpo_trl.errors import ConfigError, DataError

_WEIGHTS = re.compile(r"(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?")
_PARTIAL_WEIGHTS = re.compile(r"\.tmp[A-Za-z0-9]{6}")
"""The name under which safetensors writes a file, before it renames it."""

LOCK = "_lock"
"""The name begins with _ so that transformers does not push the file to the Hub."""
_ATTEMPTS = 10
"""On a file system on which a file cannot be recognized, a lock is not attempted for ever."""


def wants_to_resume(wanted: str | PathLike[str] | bool | None) -> str | bool:
    """`resume_from_checkpoint` as True (the last checkpoint), False, or a path. The input may be text, as in a
    flag, and a path may begin with ~.

    Raises:
        ConfigError: It is something else.
        DataError: The system refuses the path.
    """
    if wanted is None or isinstance(wanted, bool):
        return bool(wanted)
    if not isinstance(wanted, str | PathLike):
        raise ConfigError(f"resume_from_checkpoint is {wanted!r}; expected true, false or a checkpoint's folder.")
    if isinstance(wanted, str) and wanted.strip().lower() in ("true", "false", "none", ""):
        return wanted.strip().lower() == "true"
    return str(user_path(os.fspath(wanted), "resume_from_checkpoint"))


@contextmanager
def sole_run(folder: str, setting: str = "output_dir") -> Iterator[None]:
    """A context in which no other run uses `folder` for its output: rank 0 locks a file in it.

    The system releases the lock when the process ends, also if it is killed. Where files cannot be locked, such as on
    some network file systems, or the folder cannot be written, the context has no effect.

    Args:
        setting: The setting that names the folder, for errors.

    Raises:
        ConfigError: Another run uses the folder. Names its process and host.
        DataError: The system refuses the name of the folder.
    """
    if not is_first_rank():
        yield
        return
    output = user_path(folder, setting).absolute()
    is_new = not output.exists()
    file = _locked(output / LOCK, f"{setting} {folder}", setting)
    try:
        yield
    finally:
        if file is not None:
            with suppress(OSError):
                (output / LOCK).unlink(missing_ok=True)  # while it is locked: later it may be that of another run
            file.close()
        if is_new:
            with suppress(OSError):  # something was written
                output.rmdir()


def _locked(path: Path, subject: str, setting: str) -> FileIO | None:
    """The open file `path`, locked and with this process in it; None if the system cannot lock it."""
    try:
        import fcntl
    except ImportError:  # Windows
        return None
    for _ in range(_ATTEMPTS):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = FileIO(path, "a+")
        except OSError:
            return None
        try:
            # Unlike flock's, this lock does not pass to forked processes, which may outlive a killed run.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            with file, suppress(OSError):
                file.seek(0)
                holder = file.read().decode("utf-8", "replace")
            raise ConfigError(
                f"{subject} is in use by another run ({holder or 'unknown process'}), and both would write the same "
                f"files. Wait until that run has ended, or choose another {setting}."
            ) from None
        except OSError:  # a file system without locks
            file.close()
            return None
        if _is_still_at(file, path):
            with suppress(OSError):  # a full disk
                file.truncate(0)
                file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            return file
        file.close()  # the run that held the lock has just ended and removed the file
    return None


def _is_still_at(file: FileIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except OSError:
        return False


def check_output(
    folder: str, *, resume: str | bool | None, overwrite: bool, model: str | None = None, setting: str = "output_dir"
) -> None:
    """Checks that a run may write to `folder`. With `overwrite`, that `remove_earlier_run` may remove an earlier run.

    Only the process of rank 0 checks.

    Args:
        resume: The run's `resume_from_checkpoint`.
        model: Path or Hub id of the model to train, which must not be removed.
        setting: The setting that names the folder, for errors. A program with another one than output_dir cannot
            resume.

    Raises:
        ConfigError: The folder contains a finished model, trajectories or checkpoints of an earlier run, and the run
            neither resumes nor overwrites. Or it does both, or it would remove its own model. Or the folder has a
            README.md that is no model card, or a name that the run needs is taken.
        DataError: The system refuses the name of a folder.
    """
    if not is_first_rank():
        return
    output, resume = user_path(folder, setting), wants_to_resume(resume)
    if overwrite and resume:
        raise ConfigError(
            "overwrite_output_dir and resume_from_checkpoint are both set, but a run cannot continue from files that "
            "it removes. Unset one of them."
        )
    found = None if overwrite else _earlier_run(output, resume)
    if not resume and _has_own_readme(output):
        raise ConfigError(
            f"{setting} {folder} contains a README.md that is no model card, and the run's model card would replace "
            f"it. Choose another {setting}."
        )
    if overwrite:
        _check_that_the_model_stays(output, model)
    elif found is not None:
        can_resume = setting == "output_dir" and last_checkpoint(output) and not resume
        ways = "To continue it, set resume_from_checkpoint to true. " if can_resume else ""
        raise ConfigError(
            f"{setting} {folder} contains {found} of an earlier run, which this run would replace or mix with. {ways}"
            f"To keep it, choose another {setting}. To remove it, set overwrite_output_dir to true."
        )
    check_names(output)


def check_names(output: Path) -> None:
    """Checks that no name that a run creates in `output` belongs to a file instead of a folder, or the reverse.

    Raises:
        ConfigError: One does. The run would fail when it first writes there, perhaps at its end.
    """
    for path in (*checkpoints_of(output).values(), *(output / name for name in FOLDERS)):
        if os.path.lexists(path) and not path.is_dir():
            raise _is_taken(path, "file", "folder")
    for name in (*FILES, "README.md", "model.safetensors", "adapter_model.safetensors"):
        if (output / name).is_dir():
            raise _is_taken(output / name, "folder", "file")


def _is_taken(path: Path, found: str, wanted: str) -> ConfigError:
    return ConfigError(
        f"{path} is a {found}, but a run creates a {wanted} of this name. Move it, or choose another output_dir."
    )


def _has_own_readme(output: Path) -> bool:
    """Whether the folder has a README.md that was not written as a model card, which starts with metadata."""
    try:
        with (output / "README.md").open("rb") as file:
            return file.read(3) != b"---"
    except OSError:
        return False


def _earlier_run(output: Path, resume: str | bool) -> str | None:
    """Describes the files in `output` of an earlier run that the new run does not continue; None if there are none."""
    newest = last_checkpoint(output)
    weights = _weights(output)
    if resume is True:
        continued = newest is not None or not weights
    else:
        continued = resume is not False and Path(resume).resolve().parent == output.resolve()
    if continued:
        return None
    if weights:
        return f"a finished model ({weights[0].name})"
    if any((output / TRAJECTORIES).glob("*.jsonl")):
        return TRAJECTORIES
    return None if newest is None else newest.name


def checkpoints_of(output: Path) -> dict[int, Path]:
    """Step → path of what is named like a checkpoint in `output`, lowest step first."""
    steps = {path: path.name.removeprefix("checkpoint-") for path in output.glob("checkpoint-*")}
    return dict(sorted((int(step), path) for path, step in steps.items() if step.isdecimal()))


def last_checkpoint(output: Path) -> Path | None:
    """The checkpoint of the highest step in `output`, complete or not; None if there is none."""
    return next((path for path in reversed(checkpoints_of(output).values()) if path.is_dir()), None)


def last_whole_checkpoint(output: Path) -> tuple[Path | None, list[str]]:
    """The checkpoint of the highest step in `output` that is complete, and the faults of those of higher steps.

    Unlike `Checkpoints.last`, it also takes those that transformers wrote, which may have been killed meanwhile.
    """
    faults: list[str] = []
    for path in reversed(checkpoints_of(output).values()):
        if path.is_dir():
            try:
                _check_whole(path)
                return path, faults
            except DataError as error:
                faults.append(str(error))
    return None, faults


def _check_whole(checkpoint: Path) -> None:
    state = checkpoint / TRAINER_STATE  # transformers writes it last
    expect(read_json(state), {"global_step": int}, str(state))
    # FSDP and DeepSpeed write shards into folders.
    if not _weights(checkpoint) and not any(path.is_dir() for path in checkpoint.iterdir()):
        raise DataError(f"{checkpoint} contains no weights.")


def _check_that_the_model_stays(output: Path, model: str | None) -> None:
    if model is None or not os.path.isdir(model):  # unlike Path.is_dir, false for a name that the system refuses
        return
    needed = Path(model).resolve()
    lost = [path for path in _written_by_a_run(output) if needed in (path.resolve(), path.resolve().parent)]
    if lost:
        raise ConfigError(
            f"overwrite_output_dir would remove {lost[0]}, which model_name_or_path needs. Choose another output_dir."
        )


def remove_earlier_run(folder: str) -> None:
    """Removes the files of an earlier run from `folder`. Other files are kept.

    Call it after everything that can fail at the start, so that a mistake in the settings of the new run does not
    cost the earlier one. Only the process of rank 0 removes.
    """
    if not is_first_rank():
        return
    for path in list(_written_by_a_run(Path(folder))):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _written_by_a_run(output: Path) -> Iterator[Path]:
    yield from (*_weights(output), *partial_weights(output), *checkpoints_of(output).values())
    yield from (path for name in (*FOLDERS, *FILES) if os.path.lexists(path := output / name))


def partial_weights(output: Path) -> list[Path]:
    """The files in `output` that a process which was killed during its final save has left."""
    return [path for path in output.glob(".tmp*") if _PARTIAL_WEIGHTS.fullmatch(path.name) and path.is_file()]


def _weights(output: Path) -> list[Path]:
    return sorted(path for path in output.glob("*model*") if _WEIGHTS.fullmatch(path.name))
