"""Files and folders that are written whole or not at all: a reader, or a crash, never sees half of one.

    with whole_file(Path("report.md")) as partial:
        partial.write_text("…")

What is written has the final name with `.partial` after it, and takes the final name when the block ends without an
error. After an error, or a crash, the partial one stays behind; the next writer replaces it.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """The file to write, in an existing folder, which becomes `path` and replaces the file that is there."""
    partial = _partial(path)
    yield partial
    partial.replace(path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """The new, empty folder to fill, which becomes `path`; `path` must not exist. Makes missing parents."""
    partial = _partial(path)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    yield partial
    partial.replace(path)


def write_whole(path: Path, text: str, *, errors: str = "strict") -> None:
    """Writes `text` to the file `path` in UTF-8; `errors` says what becomes of lone surrogates, as in `str.encode`."""
    with whole_file(path) as partial:
        partial.write_text(text, "utf-8", errors=errors)


def _partial(path: Path) -> Path:
    return path.with_name(path.name + ".partial")
