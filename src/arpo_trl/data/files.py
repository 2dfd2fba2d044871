"""Reads the rows of files, folders and datasets on the Hub, unconverted."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet

from arpo_trl.common.short_floats import as_written
from arpo_trl.common.user_files import (
    is_url,
    json_lines,
    not_utf_8,
    read_json,
    refuse_pipe,
    repeated,
    shown,
    user_path,
)
from arpo_trl.data.fields import SUFFIXES
from arpo_trl.data.layouts import QUESTION_FIELDS
from arpo_trl.errors import DataError
from arpo_trl.net.hub_dataset import load_from_hub
from arpo_trl.visible import get_logger

logger = get_logger(__name__)

_PART = re.compile(r"(?P<number>\d+)[-_]of[-_](?P<count>\d+)")
_SHOWN = 10
"""The number of missing parts that an error names."""
_LFS_POINTER = b"version https://git-lfs."

Places = Iterator[tuple[str, Mapping[str, Any]]]
"""Pairs of a row and, before it, its place for messages, such as `rows.jsonl, line 3`."""


def read_rows(path_or_hub_id: str | Path, split: str) -> Places:
    """Yields the place and the fields of each unconverted row of a file, of a split of a folder, or of one of a
    dataset on the Hub.

    Raises:
        DataError: There is no such file, folder or split, or it cannot be read.
    """
    if is_url(path_or_hub_id):
        raise DataError(
            f"{path_or_hub_id} is a web address; expected a file, a folder or a Hub id. Download the file."
        )
    path, name = user_path(path_or_hub_id, "dataset"), str(path_or_hub_id)
    refuse_pipe(path, f"dataset {name}")
    if not isinstance(split, str):
        raise DataError(f"split is {shown(split)}; expected the name of a split, as text.")
    if any((path / file).is_file() for file in ("dataset_dict.json", "state.json")):
        yield from numbered(path, _saved_rows(path, split))
        return
    if path.is_dir():
        files = _files_of_split(path, split)
    elif path.exists():
        files = [path]
    elif path.suffix in SUFFIXES or path.is_absolute() or name.startswith(".") or len(path.parts) > 2:
        raise DataError(f"The file or folder {name} does not exist; expected a dataset. Check the path.")
    else:
        yield from numbered(name, load_from_hub(name, split))
        return
    for file in files:
        yield from read_file(file)


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """A file such as train.jsonl or train_10k.parquet, or parts such as train-00000-of-00002.parquet, sorted by name.

    Raises:
        DataError: There is no such file, parts are missing, or files that differ in more than the name of a part may
            hold the same rows.
    """
    readable = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    files = [path for path in readable if re.match(rf"{re.escape(split)}(?![A-Za-z0-9])", path.name)]
    if not readable and (folder / "data").is_dir():  # a snapshot of a dataset on the Hub
        return _files_of_split(folder / "data", split)
    if not files:
        raise DataError(
            f"The folder {folder} has no file of the split {split!r}; expected {split}*{{{','.join(SUFFIXES)}}}, got "
            f"{listed(path.name for path in readable) or 'no dataset file'}. Give the path of a file, or another "
            "split."
        )
    kinds = {_kind_of_part(path, split): path for path in files}
    if len(kinds) > 1:
        one, other, *_ = sorted(path.name for path in kinds.values())
        raise DataError(
            f"The folder {folder} has {one} and {other} for the split {split!r}, which may hold the same rows; "
            f"expected one file, or parts of one format, such as {split}-0.jsonl and {split}-1.jsonl. Give the path "
            "of one file, or rename or remove the other."
        )
    _check_parts(folder, files)
    if others := [path.name for path in readable if path not in files and path.name.startswith(split)]:
        logger.warning(
            "%s: not read, since other characters follow the name of the split %r: %s. If they belong to the split, "
            "name its files %s-0%s, %s-1%s and so on.",
            folder,
            split,
            listed(others),
            *(split, files[0].suffix) * 2,
        )
    return files


def _kind_of_part(path: Path, split: str) -> tuple[str, bool, str | None]:
    """What all parts of a split share: the format, whether the name is that of a whole split, and the number of
    parts."""
    part = _PART.search(path.stem)
    return path.suffix, path.stem == split, part and part["count"]


def _check_parts(folder: Path, files: Sequence[Path]) -> None:
    """Checks that of files such as train-00001-of-00003 there is each part once. Parts count from 0 or from 1.

    Raises:
        DataError: One is missing, as after an interrupted download, there are two of one number, or one more.
    """
    series: dict[str, dict[int, Path]] = {}
    for path in files:
        if (part := _PART.search(path.stem)) is None:
            continue
        numbers = series.setdefault(path.stem[: part.start()], {})
        if (other := numbers.setdefault(int(part["number"]), path)) != path:
            raise DataError(
                f"The folder {folder} has {other.name} and {path.name}, which are the same part; expected each part "
                "once. Remove one of them."
            )
    for numbers in series.values():
        name = next(iter(numbers.values())).name
        count = int(_PART.search(name)["count"])  # type: ignore[index]  # it matched above
        first = 1 if count in numbers and 0 not in numbers else 0  # some programs count from 1
        expected = f"expected the parts {first} to {first + count - 1}"
        if extra := [path.name for number, path in numbers.items() if not first <= number < first + count]:
            raise DataError(
                f"The folder {folder} has {extra[0]} beside other parts; {expected}. Remove what is wrong."
            )
        if missing := count - len(numbers):
            absent = islice((part for part in range(first, first + count) if part not in numbers), _SHOWN)
            more = f" and {missing - _SHOWN} more" if missing > _SHOWN else ""
            raise DataError(
                f"The folder {folder} has {name} and {len(numbers) - 1} other(s) of {count} parts; {expected}, but "
                f"{', '.join(map(str, absent))}{more} are missing, as after an interrupted download. Download them. "
                "To read only those that exist, rename them without -of-, or give the path of one."
            )


def _saved_rows(folder: Path, split: str) -> Iterable[Mapping[str, Any]]:
    """The rows of a folder that `save_to_disk` of datasets wrote."""
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:  # errors of datasets, of pyarrow or of the file system
        raise DataError(
            f"{folder} is not a readable folder of save_to_disk ({type(error).__name__}: {error}). Save it again."
        ) from error
    if isinstance(saved, datasets.DatasetDict):
        if split not in saved:
            raise DataError(f"The saved dataset {folder} has no split {split!r}; expected one of {list(saved)}.")
        saved = saved[split]
    return as_written(saved, saved.features.arrow_schema)


def numbered(source: str | Path, rows: Iterable[Any]) -> Iterator[tuple[str, Any]]:
    """The rows with their numbers, from 0, as places."""
    return ((f"{source}, row {number}", row) for number, row in enumerate(rows))


def read_file(path: str | Path, bad: list[str] | None = None) -> Places:
    """Yields the place and the fields of each unconverted row of a file.

    Args:
        bad: Unreadable rows are excluded, and the reasons are appended to this list. None: they raise an error.

    Raises:
        DataError: The file, or a row of it, cannot be read.
    """
    path = user_path(path, "path")
    _refuse_pointer(path)
    rows: Iterable[tuple[str, Any]]
    match path.suffix:
        case ".parquet":
            try:
                table = pyarrow.parquet.read_table(path)
                rows = numbered(path, as_written(table.to_pylist(), table.schema))
            except (pyarrow.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
                raise DataError(f"{path} is not a readable parquet file: {error}") from error
        case ".jsonl":
            rows = _lines(path, bad)
        case ".json":
            rows = _rows_of_json(path)
        case ".csv":
            rows = _rows_of_csv(path)
        case _:
            raise DataError(f"{path} is not a dataset file; expected one of {SUFFIXES}. Save its rows as one.")
    for where, row in rows:
        if isinstance(row, dict):
            yield where, row
            continue
        problem = f"{where}: got a {type(row).__name__}; expected an object with named fields."
        if bad is None:
            raise DataError(problem)
        bad.append(problem)


def _lines(path: Path, bad: list[str] | None = None) -> Iterator[tuple[str, Any]]:
    return ((f"{path}, line {number}", row) for number, row in json_lines(path, bad))


def _rows_of_csv(path: Path) -> list[tuple[str, dict[str, str | None]]]:
    """The rows of a .csv file with a header, with their last lines as places. All values are text: 007 is not 7."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        csv.field_size_limit(1 << 30)  # by default cells have at most 131,072 characters
        reader = csv.DictReader(file, strict=True)
        try:
            rows = [(f"{path}, line {reader.line_num}", row) for row in reader]
        except csv.Error as error:
            raise DataError(f"{path}, after line {reader.line_num}: not a readable CSV file ({error}).") from error
        except UnicodeDecodeError as error:
            raise not_utf_8(str(path), error) from error
    if twice := repeated(name for name in reader.fieldnames or () if name):
        raise DataError(f"{path}: the header names {twice[0]!r} twice. Rename one of the columns.")
    if long := [where for where, row in rows if None in row]:
        raise DataError(f"{long[0]}: more values than the header has names. Quote values with commas.")
    return rows


def _refuse_pointer(path: Path) -> None:
    """A clone of a Git repository without Git LFS has small text files in place of the data."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    if start == _LFS_POINTER:
        raise DataError(f"{path} is a pointer of Git LFS, not the data. Fetch the data: git lfs pull.")


def _rows_of_json(path: Path) -> Iterable[tuple[str, Any]]:
    """Reads a .json file: a list of rows, an object with one such list, or JSON Lines under that name."""
    try:
        value = read_json(path)
    except DataError as whole:
        try:
            rows = list(_lines(path))
        except DataError:
            raise whole from None
        if not rows:
            raise
        return rows
    if isinstance(value, dict):
        lists = [part for part in value.values() if isinstance(part, list) and part and isinstance(part[0], dict)]
        # An object without such a list is JSON Lines with one line. Several lists may be splits, so neither is read.
        questions = [value[name] for name in ("messages", *QUESTION_FIELDS) if name in value]
        if any(map(_is_column, questions)):
            raise DataError(
                f"{path} contains one object of columns; expected a list of objects, one per row. With pandas, save "
                'it with to_json(…, orient="records").'
            )
        value = [value] if questions else lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise DataError(f"{path} contains a {type(value).__name__}; expected a list of objects, one per row.")
    return numbered(path, value)


def _is_column(question: Any) -> bool:
    """Whether a question is in fact a column of them: a list without messages, or the dict of places that pandas
    writes."""
    if isinstance(question, list):
        return bool(question) and not isinstance(question[0], dict)
    return isinstance(question, dict) and "0" in question


def listed(items: Iterable[object], limit: int = 10) -> str:
    names = [str(item) for item in items]
    return "; ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
