"""Atomic writes of files and folders: a reader never sees an incomplete one, even after a crash.

    with whole_file(Path("report.md")) as partial:
        partial.write_text("…")

The content is written to a file with the final name plus `.partial`. It gets its final name when the block ends
without an error. After an error it is removed. After a crash it remains, and the next write replaces it. An error of a
full disk names the file.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from arpo_trl.common.full_disk import naming


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields the file to write. At the end it becomes `path` and replaces an existing file. The folder must exist."""
    partial = _partial(path)
    try:
        with naming(path):
            yield partial
            partial.replace(path)
    except BaseException:
        with suppress(OSError):  # not the error to report
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """Yields a new, empty folder. At the end it becomes `path`, which must not exist. Creates missing parents."""
    partial = _partial(path)
    shutil.rmtree(partial, ignore_errors=True)
    try:
        with naming(path):
            partial.mkdir(parents=True)
            yield partial
            partial.replace(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def files_with_mark(folder: Path, mark: str) -> Iterator[Path]:
    """Yields a new, empty folder for files of which `mark` says that they are complete and belong together.

    At the end the files replace those of the same names in `folder`, which must exist; its other files are kept. Until
    the last file is in place, there is no `mark`. Files that another process has open or mapped stay as they are for
    it, which would not be so if they were written in place.
    """
    partial = folder / ".partial"
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


def write_whole(path: Path, text: str, *, errors: str = "strict") -> None:
    """Writes `text` to the file `path` in UTF-8. `errors` sets the treatment of lone surrogates, as in
    `str.encode`."""
    with whole_file(path) as partial:
        partial.write_text(text, "utf-8", errors=errors)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
