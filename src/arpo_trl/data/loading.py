r"""Loads datasets as rows {prompt, answer, task, id} for `ARPOTrainer` and the rewards.

`layouts` defines the layouts of rows. Some published texts have lost backslashes: `\b` and `\f` were read as escapes,
so `\boxed` became a backspace and `oxed`, and `\frac` a form feed and `rac`. Loading restores them.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import pyarrow

from arpo_trl.common.columns import shown_columns
from arpo_trl.common.user_files import shown
from arpo_trl.data.fields import text_of
from arpo_trl.data.files import listed, read_rows
from arpo_trl.data.golds import NoResultError
from arpo_trl.data.layouts import MESSAGE_FIELDS, check_prompt, convert_row, is_plain, read_columns, system_prompt_text
from arpo_trl.data.prompts import SYSTEM_PROMPTS
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.rewards.answers import TASKS
from arpo_trl.visible import get_logger

logger = get_logger(__name__)

_NUMBER_OR_LATEX = re.compile(r"[-+]?[\d.,/]+%?|.*[\\^$=].*", re.DOTALL)
_MATH_SHARE, _QA_SHARE = 0.75, 0.25

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
    for number, (where, raw) in enumerate(read_rows(path_or_hub_id, split)):
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
        logger.warning("%d row(s) without an answer excluded: %s", len(skipped), listed(skipped))
    if not loaded:
        raise DataError(f"{path_or_hub_id} (split {split!r}) contains no rows; expected at least one.")
    without = [where for where, row, _ in loaded if row["answer"] is None]
    if 0 < len(without) < len(loaded):
        logger.warning(
            "%d of %d rows have no answer, so the reward gets None: %s", len(without), len(loaded), listed(without)
        )
    if continued := [where for where, row, _ in loaded if row["prompt"][-1]["role"] == "assistant"]:
        logger.warning(
            "%d of %d prompts end with a message of the assistant, after which the model writes its own turn. If that "
            "message is the answer, remove it: %s",
            len(continued),
            len(loaded),
            listed(continued),
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
            listed(errors),
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
