r"""Loads datasets as rows {prompt, answer, task, id} for `ARPOTrainer` and the rewards.

`layouts` defines the layouts of rows. Some published texts have lost backslashes: `\b` and `\f` were read as escapes,
so `\boxed` became a backspace and `oxed`, and `\frac` a form feed and `rac`. Loading restores them.
"""

from __future__ import annotations

import csv
import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow
import pyarrow.parquet

from arpo_trl.common.columns import shown_columns
from arpo_trl.common.short_floats import as_written
from arpo_trl.common.user_files import is_url, json_lines, not_utf_8, read_json, repeated, shown, user_path
from arpo_trl.data.fields import text_of
from arpo_trl.data.golds import NoResultError
from arpo_trl.data.layouts import (
    MESSAGE_FIELDS,
    QUESTION_FIELDS,
    check_prompt,
    convert_row,
    is_plain,
    read_columns,
    system_prompt_text,
)
from arpo_trl.data.prompts import SYSTEM_PROMPTS
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.net.hub_dataset import load_from_hub
from arpo_trl.rewards.answers import TASKS
from arpo_trl.visible import get_logger

logger = get_logger(__name__)

SUFFIXES = (".jsonl", ".json", ".parquet", ".csv")
_NUMBER_OR_LATEX = re.compile(r"[-+]?[\d.,/]+%?|.*[\\^$=].*", re.DOTALL)
_MATH_SHARE, _QA_SHARE = 0.75, 0.25
_PART = re.compile(r"(?P<number>\d+)[-_]of[-_](?P<count>\d+)")
_SHOWN = 10
"""The number of missing parts that an error names."""
_LFS_POINTER = b"version https://git-lfs."

CONVERTED = ("prompt", "answer", "task", "id", "level")
"""The columns of a loaded dataset."""
ROLLOUT_COLUMNS = ("turns", "turns_without_calls", "tool_calls", "stop_reason")
"""Columns that `ARPOTrainer` passes to reward functions in addition to the dataset's, with one value per
completion."""
TRL_COLUMNS = (
    *("prompts", "completions", "completion_ids", "trainer_state", "log_extra", "log_metric", "environments"),
    *("image", "images"),
)
"""Names that TRL uses for its own arguments of reward functions, or to detect rows with images."""
EMPTY = "The dataset is empty; expected at least one row."


class _Loaded(NamedTuple):
    """A converted row."""

    where: str
    """Its file, and its line or number there."""
    row: dict[str, Any]
    raw: Mapping[str, Any]
    """The row as read; empty if it is not needed."""


def load_arpo_dataset(
    path_or_hub_id: str | Path,
    split: str = "train",
    *,
    system_prompt: str | None = None,
    task: str | None = None,
    columns: Mapping[str, str] | None = None,
    own_reward: bool = False,
    default_system_prompt: str = "reasoning",
) -> datasets.Dataset:
    """Loads a dataset with the columns prompt, answer, task and id, and level if the rows have it.

    A prompt is a list of messages, an answer the list of accepted answers. With `own_reward`, the rows' other fields
    are columns too.

    Args:
        path_or_hub_id: A `.jsonl`, `.json`, `.parquet` or `.csv` file (`split` is ignored); a folder of such files
            (only those whose names start with the split are read: one, or parts of one format); a folder that
            `save_to_disk` of datasets wrote; or a dataset on the Hub. All values of a `.csv` file are text.
        split: The split of a folder or a Hub dataset.
        system_prompt: None: prompts that are messages stay unchanged, and plain questions get
            `default_system_prompt`, which is logged. A name in `SYSTEM_PROMPTS`, or a text, replaces the system
            message of every row. "": no row has a system message.
        task: Overrides the task of all rows. None: each row's own `task` or, if it has none, verl's `ability`. If rows
            have neither, their answers together determine the task, with a warning: math if at least 75 % are a number
            or LaTeX, qa if at most 25 % are.
        columns: Names of fields that replace the usual ones, such as `{"question": "body", "answer": "meta.gold"}`.
            The keys are those of `layouts.MAPPABLE`. Dots select nested fields.
        own_reward: The rows are for your own reward function. They need no answer, their task may be any text, and
            their other fields stay, under their own names. `answer` and `task` are None in rows without them, and are
            no columns if no row has them.
        default_system_prompt: The system message of plain questions: a name in `SYSTEM_PROMPTS`, or a text.

    Rows without an answer by design are excluded with a warning: a verl row with a blank answer (the published data
    has one), a proof in NuminaMath, and a worked solution without a box if at most half of the rows are such. With
    `own_reward` they stay if no other row has an answer. In other layouts a missing answer is an error, and with
    `own_reward` a warning if other rows have one.

    Raises:
        ConfigError: A system prompt, `task` or a key of `columns` is not known.
        DataError: There is no readable file, or a row cannot be converted. Names the file, the line (from 1) or, in
            parquet files and lists, the row (from 0), and the field. With `own_reward`: the values of a field have
            different types.
    """
    override = next((known for known in TASKS if known == task), None)
    if override is None and task is not None:
        raise ConfigError(f"task is {task!r}; expected one of {TASKS}, or None to read it from the rows.")
    columns = read_columns(columns)
    system_text, of_questions = map(system_prompt_text, (system_prompt, default_system_prompt))
    loaded: list[_Loaded] = []
    skipped: list[str] = []
    without_result: dict[str, NoResultError] = {}
    for number, (where, raw) in enumerate(_read_rows(path_or_hub_id, split)):
        try:
            row = convert_row(
                raw,
                number,
                system_text,
                task=override,
                columns=columns,
                own_reward=own_reward,
                of_questions=of_questions,
            )
        except NoResultError as error:
            without_result[where] = error
            continue
        except DataError as error:
            raise DataError(f"{where}: {error}") from error
        if row is None:
            skipped.append(where)
        else:
            loaded.append(_Loaded(where, row, raw if own_reward else {}))
    if own_reward:
        loaded, skipped = _without_blanks(loaded)
    _report_without_result(without_result, len(loaded))
    if skipped:
        logger.warning("%d row(s) without an answer excluded: %s", len(skipped), _listed(skipped))
    if not loaded:
        raise DataError(f"{path_or_hub_id} (split {split!r}) contains no rows; expected at least one.")
    without = [where for where, row, _ in loaded if row["answer"] is None]
    if 0 < len(without) < len(loaded):
        logger.warning(
            "%d of %d rows have no answer, so the reward gets None: %s", len(without), len(loaded), _listed(without)
        )
    if continued := [where for where, row, _ in loaded if row["prompt"][-1]["role"] == "assistant"]:
        logger.warning(
            "%d of %d prompts end with a message of the assistant, after which the model writes its own turn. If that "
            "message is the answer, remove it: %s",
            len(continued),
            len(loaded),
            _listed(continued),
        )
    _guess_task(loaded, path_or_hub_id, own_reward=own_reward)
    rows = [row for _, row, _ in loaded]
    if system_text is None and (told := sum(row["prompt"][0]["content"] == of_questions for row in rows)):
        name = f'"{default_system_prompt}"' if default_system_prompt in SYSTEM_PROMPTS else "of this run's tools"
        logger.info(
            "%s: %d row(s) have the system prompt %s, which explains the tools and the answer format. It is "
            'the default for plain questions. Set system_prompt for another one, or to "" for none.',
            path_or_hub_id,
            told,
            name,
        )
    dataset = _as_dataset(rows)
    return _with_other_fields(dataset, loaded) if own_reward else dataset


def validate_rows(dataset: datasets.Dataset) -> None:
    """Checks that every row has a valid prompt.

    A prompt is text, or a list of messages, each with a role and a content. The content is text, a list of parts, or
    null if the message has `tool_calls`. At least one message has text. Other columns are for the reward functions.
    They are not checked, but must not have a name in `ROLLOUT_COLUMNS` or `TRL_COLUMNS`.

    Raises:
        DataError: The dataset is empty, lacks `prompt` or has a column with a reserved name, or a row has no valid
            prompt. Names row (from 0) and field.
    """
    _check_columns(dataset.column_names, shown_columns(dataset))
    if len(dataset) == 0:
        raise DataError(EMPTY)
    for number, prompt in enumerate(dataset["prompt"]):
        _check_prompt_of_row(prompt, number)


def validate_row(row: Mapping[str, Any], number: int) -> None:
    """Checks one row of a streamed dataset like `validate_rows`.

    Raises:
        DataError: The row lacks `prompt`, has a column with a reserved name, or has no valid prompt.
    """
    _check_columns(list(row), f"{list(row)}")
    _check_prompt_of_row(row["prompt"], number)


def _check_columns(columns: Sequence[str], listed: str) -> None:
    if "prompt" not in columns:
        raise DataError(
            f"The dataset has no column 'prompt'; it has {listed}. Rename a column, or load the data with "
            "load_arpo_dataset, which supports the common layouts."
        )
    refuse_taken_columns(columns)


def _check_prompt_of_row(prompt: Any, number: int) -> None:
    try:
        check_prompt(prompt)
    except DataError as error:
        raise DataError(f"Dataset row {number}: {error}") from error


def refuse_taken_columns(columns: Iterable[str]) -> None:
    """Checks that no column has a name that `ARPOTrainer` or TRL uses for another purpose.

    Raises:
        DataError: A column has such a name. It would be overwritten, or the first step would fail.
    """
    columns = set(columns)
    if taken := sorted(columns.intersection(ROLLOUT_COLUMNS)):
        raise DataError(
            f"The dataset has the column(s) {taken}, but rewards receive the rollouts under these names. Rename the "
            "column(s): dataset.rename_column."
        )
    if taken := sorted(columns.intersection(TRL_COLUMNS)):
        raise DataError(
            f"The dataset has the column(s) {taken}, but TRL uses these names itself. Rename or drop the column(s): "
            "dataset.rename_column, dataset.remove_columns."
        )


# Reading


Places = Iterator[tuple[str, Mapping[str, Any]]]
"""Pairs of a row and, before it, its place for messages, such as `rows.jsonl, line 3`."""


def _read_rows(path_or_hub_id: str | Path, split: str) -> Places:
    if is_url(path_or_hub_id):
        raise DataError(
            f"{path_or_hub_id} is a web address; expected a file, a folder or a Hub id. Download the file."
        )
    path, name = user_path(path_or_hub_id, "dataset"), str(path_or_hub_id)
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
            f"{_listed(path.name for path in readable) or 'no dataset file'}. Give the path of a file, or another "
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
            _listed(others),
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


# Converting


def _report_without_result(errors: Mapping[str, NoResultError], others: int) -> None:
    """Warn about rows that are excluded since their worked solution has no result, such as proofs.

    Args:
        errors: Place of a row → why it has no result.
        others: The number of other rows.

    Raises:
        DataError: They are more than the other rows, so `solution` is probably not a worked solution.
    """
    if len(errors) > others:
        where, error = next(iter(errors.items()))
        raise DataError(
            f"{where}: {error} {len(errors)} of {len(errors) + others} rows are like it. Name the "
            "field of the answer in columns, such as {answer: solution}."
        ) from error
    if errors:
        logger.warning(
            "%d of %d rows excluded, since their solution has no \\boxed{…}, as in a proof: %s",
            len(errors),
            len(errors) + others,
            _listed(errors),
        )


def _guess_task(loaded: Sequence[_Loaded], source: str | Path, *, own_reward: bool) -> None:
    """Sets the task of rows that have an answer and do not state a task, from the form of their answers. With
    `own_reward`, it stays None if the answers do not determine it."""
    silent = [each for each in loaded if each.row["task"] is None and each.row["answer"] is not None]
    if not silent:
        return
    golds = [each.row["answer"][0] for each in silent]
    share = sum(_NUMBER_OR_LATEX.fullmatch(gold) is not None for gold in golds) / len(golds)
    if _QA_SHARE < share < _MATH_SHARE:
        if own_reward:
            return
        raise DataError(
            f"{source}: {len(silent)} row(s), the first of them {silent[0].where}, do not state their task, and their "
            f"answers do not determine it ({share:.0%} are a number or LaTeX). Set task to {' or '.join(TASKS)} (in "
            "Python: task=), or add a `task` column."
        )
    task = "math" if share >= _MATH_SHARE else "qa"
    logger.warning(
        "%s: %d row(s) do not state their task. It is set to %s, since %.0f %% of their answers are a number "
        "or LaTeX. Set task to choose it yourself.",
        source,
        len(silent),
        task,
        100 * share,
    )
    for each in silent:
        each.row["task"] = task


def _as_dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    text = datasets.Value("string")
    used = {name for row in rows for message in row["prompt"] for name in message}
    features = {
        "prompt": datasets.List({name: text for name in MESSAGE_FIELDS if name in used}),
        "answer": datasets.List(text),
        "task": text,
        "id": text,
        "level": text,
    }
    for name in ("answer", "task", "level"):
        if all(row[name] is None for row in rows):
            del features[name]
    columns = {name: [row[name] for row in rows] for name in features}
    columns["prompt"] = [[{**dict.fromkeys(used), **message} for message in prompt] for prompt in columns["prompt"]]
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _without_blanks(loaded: list[_Loaded]) -> tuple[list[_Loaded], list[str]]:
    """The rows without those that have no answer by design, and the places of the rows left out.

    For rows with a reward of the user. If no row has an answer, all rows stay.
    """
    blank = [each.where for each in loaded if each.row["answer"] == []]
    if blank and not any(each.row["answer"] for each in loaded):
        return [each._replace(row={**each.row, "answer": None}) for each in loaded], []
    return [each for each in loaded if each.row["answer"] != []], blank


def _with_other_fields(dataset: datasets.Dataset, loaded: Sequence[_Loaded]) -> datasets.Dataset:
    """The dataset with the fields of the rows as read, except those that conversion changes, as further columns."""
    found = dict.fromkeys(name for each in loaded for name in each.raw)
    names = [name for name in found if not _is_changed(name, loaded)]
    parts = [dataset.remove_columns([name for name in dataset.column_names if name in names])]
    for name in names:
        values = [each.raw.get(name) for each in loaded]
        made = _column(name, values)
        if isinstance(made, Exception):
            ends = range(1, len(values) + 1)
            end = bisect_left(ends, True, key=lambda end: isinstance(_column(name, values[:end]), Exception))
            raise DataError(
                f"{loaded[end].where}: the field {name!r} is {shown(values[end])}, which cannot be in one column for "
                f"the reward with the values before it ({str(made).splitlines()[0]}). Give the field one type in all "
                "rows, or remove it."
            ) from made
        parts.append(made)
    return datasets.concatenate_datasets(parts, axis=1)


def _is_changed(name: str, loaded: Sequence[_Loaded]) -> bool:
    """Whether conversion does more to a field than to write its values as text, or to drop them. It also counts as
    more if they are of several types, since only as text they can be one column."""
    if name in ("task", "id", "level"):
        return isinstance(_column(name, [each.raw.get(name) for each in loaded]), Exception) or any(
            (made := each.row[name]) is not None
            and not (is_plain(value := each.raw.get(name)) and text_of(value, name) == made)
            for each in loaded
        )
    return name in CONVERTED


def _column(name: str, values: list[Any]) -> datasets.Dataset | Exception:
    """The values as a dataset of one column, or why they cannot be one."""
    try:
        return datasets.Dataset.from_dict({name: values})
    except (pyarrow.ArrowException, TypeError, ValueError, OverflowError) as error:
        return error


def _listed(items: Iterable[object], limit: int = 10) -> str:
    names = [str(item) for item in items]
    return "; ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")
