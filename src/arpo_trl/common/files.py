"""Atomic writes of files and folders: a reader never sees an incomplete one, even after a crash.

    with whole_file(Path("report.md")) as partial:
        partial.write_text("…")

The content is written to a file with the final name plus `.partial-` and an id, so that two writers of one file or
folder do not share it. It gets its final name when the block ends without an error. After an error it is removed.
After a crash it remains. An error of a full disk names the file.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

from arpo_trl.common.full_disk import naming

T = TypeVar("T")
PARTIAL = ".partial"
REPLACING_S = 10.0
"""The most time that replacing files may take: they are only renamed."""


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields the file to write. At the end it becomes `path` and replaces an existing file. The folder must exist.

    A link stays, and the file that it names is replaced. A device or a pipe stays, and gets the content.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        with tempfile.TemporaryDirectory() as folder:
            whole = Path(folder) / path.name
            yield whole
            with naming(path), whole.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
        return
    final = Path(os.path.realpath(path)) if path.is_symlink() else path
    partial = _partial(final)
    try:
        with naming(path):
            yield partial
            partial.replace(final)
    except BaseException as error:
        with suppress(OSError):  # not the error to report
            partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (partial, str(partial)):
            error.filename = str(path)  # the name that the user knows
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a new, empty folder. At the end it becomes `path`, which must not exist. Creates missing parents.

    Raises:
        FileExistsError: Another process has written `path` meanwhile.
    """
    partial = _partial(path)
    try:
        with naming(path):
            partial.mkdir(parents=True)
            yield partial
            share_weights(partial)
            try:
                partial.replace(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                    raise
                raise FileExistsError(errno.EEXIST, "Another process has written it meanwhile", str(path)) from None
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


def final_name(path: Path) -> str:
    """The name that a file or folder has when it is whole; its own if it is no partial one."""
    return path.name.partition(PARTIAL)[0] or path.name


def share_weights(folder: Path) -> None:
    """Gives the weights in `folder` the permissions to read and write of the folder. safetensors creates files that
    only their owner can read, whatever the umask."""
    with suppress(OSError):  # a file of another user, or a file system without permissions
        mode = folder.stat().st_mode & 0o666
        for file in folder.glob("*.safetensors"):
            file.chmod(mode)


@contextmanager
def files_with_mark(folder: Path, mark: str) -> Iterator[Path]:
    """Yields a new, empty folder for files of which `mark` says that they are complete and belong together.

    At the end the files replace those of the same names in `folder`, which must exist; its other files are kept. Until
    the last file is in place, there is no `mark`. Files that another process has open or mapped stay as they are for
    it, which would not be so if they were written in place. Processes that write to the same folder take turns.
    """
    partial = folder / PARTIAL
    with _alone_in(folder):
        shutil.rmtree(partial, ignore_errors=True)
        try:
            with naming(folder):
                partial.mkdir()
                yield partial
                (folder / mark).unlink(missing_ok=True)
                for path in sorted(partial.iterdir(), key=lambda path: path.name == mark):
                    path.replace(folder / path.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def read_with_mark(folder: Path, mark: str, read: Callable[[], T]) -> T:
    """Return the result of `read`, which reads files of `files_with_mark` in `folder`.

    If they are being replaced meanwhile, this repeats it for up to `REPLACING_S`, so that all files belong together.
    """
    deadline = time.monotonic() + REPLACING_S
    while True:
        before = _version(folder / mark)
        try:
            result = read()
        except Exception:
            if _is_settled(folder, mark, before) or time.monotonic() > deadline:
                raise
        else:
            if before is not None and before == _version(folder / mark):
                return result
        time.sleep(0.02)


def _is_settled(folder: Path, mark: str, version: tuple[int, int] | None) -> bool:
    """Whether the files are still those of `version`, and no other process is replacing them."""
    return version == _version(folder / mark) and (version is not None or not (folder / PARTIAL).exists())


def _version(mark: Path) -> tuple[int, int] | None:
    """What differs between the marks of two versions; None without a mark."""
    try:
        status = mark.stat()
    except OSError:
        return None
    return status.st_ino, status.st_mtime_ns


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """A context that waits for other processes and threads in such a context for `folder`, if the system can lock."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (folder / ".lock").open("a") as file:
        with suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            with suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)  # a forked process may have the file, too


def write_whole(path: Path, text: str, *, errors: str = "strict") -> None:
    """Writes `text` to the file `path` in UTF-8. `errors` sets the treatment of lone surrogates, as in
    `str.encode`."""
    with whole_file(path) as partial:
        partial.write_text(text, "utf-8", errors=errors)


def _partial(path: Path) -> Path:
    return path.with_name(f"{path.name}{PARTIAL}-{uuid4().hex[:8]}")
