r"""Datasets → rows {prompt, answer, task, id} that `ARPOTrainer` and the rewards read.

What a row may look like:

    {prompt, answer, task}                       this project's own layout; prompt is text or messages
    {question | problem, answer, …}              benchmarks; see `_QUESTION_FIELDS` and `_ANSWER_FIELDS`
    {prompt, reward_model: {ground_truth}, …}    verl, the layout of the paper's published rows

Published texts have lost backslashes: an escape was read as a control character, so that `\boxed` became a backspace
and `oxed`, `\frac` a form feed and `rac`. They are put back.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import datasets
import pyarrow
import pyarrow.parquet

from arpo_trl.errors import ConfigError, DataError
from arpo_trl.hub_dataset import load_from_hub
from arpo_trl.prompts import SYSTEM_PROMPTS

logger = logging.getLogger(__name__)

Task = Literal["math", "qa"]
Message = dict[str, str]

_TASKS: tuple[Task, ...] = ("math", "qa")
SUFFIXES = (".jsonl", ".json", ".parquet")
_QUESTION_FIELDS = ("question", "Question", "problem", "Problem")
_ANSWER_FIELDS = ("answer", "Answer", "final_answer")
_ID_FIELDS = ("id", "_id", "idx", "unique_id", "task_id")
_LEVEL_FIELDS = ("level", "Level")

_WORKED_SOLUTION = re.compile(r"(?:\A|\n)####\s*([^\n]+?)\s*\Z")  # GSM8K's last line
_LOST_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_NUMBER_OR_LATEX = re.compile(r"[-+]?[\d.,/]+%?|.*[\\^$=].*", re.DOTALL)
_MATH_SHARE, _QA_SHARE = 0.75, 0.25

ROLLOUT_COLUMNS = ("turns", "tool_calls", "stop_reason")
"""What `ARPOTrainer` hands to reward functions next to the dataset's columns, one value per completion."""


def load_arpo_dataset(
    path_or_hub_id: str, split: str = "train", *, system_prompt: str | None = None, task: Task | None = None
) -> datasets.Dataset:
    """A dataset with the columns prompt (messages), answer (list of accepted answers), task and id; level where given.

    Args:
        path_or_hub_id: A `.jsonl`, `.json` or `.parquet` file, which is one split whatever `split` says; a folder of
            them, of which those are read whose name starts with the split's; or a dataset on the Hub.
        split: Which split of a folder or a Hub dataset.
        system_prompt: None leaves prompts that are messages as they are, with or without a system message, and gives
            `SYSTEM_PROMPTS["reasoning"]` to a bare question. A name from `SYSTEM_PROMPTS`, or a text, replaces the
            system message in every row.
        task: The task of rows that do not say theirs. A row's own `task`, or else verl's `ability`, comes first. Where
            none of the three speaks, the rows that do not say are judged together by their answers, with a warning:
            math if at least 75 % are a number or LaTeX, qa if at most 25 % are.

    A row of the verl layout whose answer is blank is left out with a warning (the published rows have one); anywhere
    else that is an error.

    Raises:
        ConfigError: `system_prompt` or `task` is not known.
        DataError: nothing readable there, or a row that cannot be converted; names the file, the row (from 0) or the
            line (from 1), and the field.
    """
    if task is not None and task not in _TASKS:
        raise ConfigError(f"task is {task!r}; expected one of {_TASKS}, or None to read it from the rows.")
    system_text = system_prompt_text(system_prompt)
    rows, skipped = [], []
    for number, raw in enumerate(_read_rows(path_or_hub_id, split)):
        try:
            row = convert_row(raw, number, system_text)
        except DataError as error:
            raise DataError(f"{path_or_hub_id}, row {number}: {error}") from error
        if row is None:
            skipped.append(number)
        else:
            rows.append(row)
    if skipped:
        logger.warning(
            "%s: %d row(s) with a blank answer left out: %s", path_or_hub_id, len(skipped), _listed(skipped)
        )
    if not rows:
        raise DataError(f"{path_or_hub_id} (split {split!r}) holds no rows; expected at least one.")
    _fill_in_task(rows, task, path_or_hub_id)
    return _as_dataset(rows)


def validate_rows(dataset: datasets.Dataset) -> None:
    """Return if every row has a prompt that can be rolled out.

    A prompt is text, or a list of messages, each with a role and a content; the content is text, a list of parts, or
    null where the message has `tool_calls`. Somewhere in it there is text. Other columns are the reward functions' own
    affair, but for `ROLLOUT_COLUMNS`.

    Raises:
        DataError: the dataset is empty, lacks `prompt` or has one of `ROLLOUT_COLUMNS`, or a row does not hold this;
            names row (from 0) and field.
    """
    columns = dataset.column_names
    if "prompt" not in columns:
        raise DataError(
            f"The dataset has no column 'prompt'; it has {columns}. Rename yours, or load the data with "
            "load_arpo_dataset, which knows the common layouts."
        )
    refuse_rollout_columns(columns)
    if len(dataset) == 0:
        raise DataError("The dataset is empty; expected at least one row.")
    for number, prompt in enumerate(dataset["prompt"]):
        try:
            _check_prompt(prompt)
        except DataError as error:
            raise DataError(f"Dataset row {number}: {error}") from error


def refuse_rollout_columns(columns: Iterable[str]) -> None:
    """Return if none of `columns` has a name under which rewards receive what was rolled out.

    Raises:
        DataError: one has; it would be overwritten.
    """
    if taken := sorted(set(ROLLOUT_COLUMNS).intersection(columns)):
        raise DataError(
            f"The dataset has the column(s) {taken}, but under these names rewards receive what was rolled out. "
            "Rename yours: dataset.rename_column."
        )


# Reading


def _read_rows(path_or_hub_id: str, split: str) -> Iterator[Mapping[str, Any]]:
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        files = _files_of_split(path, split)
    elif path.exists():
        files = [path]
    elif path.suffix in SUFFIXES or path.is_absolute() or path_or_hub_id.startswith(".") or len(path.parts) > 2:
        raise DataError(f"There is no file or folder {path_or_hub_id}; expected a dataset there. Check the path.")
    else:
        yield from load_from_hub(path_or_hub_id, split)
        return
    for file in files:
        yield from read_file(file)


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """Files such as train.jsonl, train_10k.parquet or train-00000-of-00002.parquet, sorted by name."""
    readable = sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)
    files = [path for path in readable if re.match(rf"{re.escape(split)}(?![A-Za-z0-9])", path.name)]
    if not files:
        raise DataError(
            f"The folder {folder} has no file of the split {split!r}; expected {split}*{{{','.join(SUFFIXES)}}}, got "
            f"{_listed(path.name for path in readable) or 'no such file at all'}. Name the file itself, or another "
            "split."
        )
    return files


def read_file(path: Path, bad: list[str] | None = None) -> Iterator[Mapping[str, Any]]:
    """The rows of a file, as they are.

    Args:
        bad: What is wrong with each row that is left out for it goes here; None: the first one raises.

    Raises:
        DataError: The file, or a row of it, cannot be read.
    """
    match path.suffix:
        case ".parquet":
            try:
                table = pyarrow.parquet.read_table(path)
            except pyarrow.ArrowInvalid as error:
                raise DataError(f"{path} is not a readable parquet file: {error}") from error
            rows = table.to_pylist()
        case ".jsonl":
            rows = _read_jsonl(path, bad)
        case ".json":
            rows = _parse_json(_read_text(path), str(path))
            if not isinstance(rows, list):
                raise DataError(f"{path} holds a {type(rows).__name__}; expected a list of objects, one per row.")
        case _:
            raise DataError(f"{path} is no dataset file; expected one of {SUFFIXES}.")
    for number, row in enumerate(rows):
        if isinstance(row, dict):
            yield row
            continue
        problem = f"{path}, row {number}: got a {type(row).__name__}; expected an object with named fields."
        if bad is None:
            raise DataError(problem)
        bad.append(problem)


def _read_jsonl(path: Path, bad: list[str] | None) -> list[Any]:
    # Only \n ends a line: str.splitlines would also break at characters that JSON allows within a string.
    rows = []
    for number, line in enumerate(_read_text(path).split("\n"), 1):
        if line.strip():
            try:
                rows.append(_parse_json(line, f"{path}, line {number}"))
            except DataError as error:
                if bad is None:
                    raise
                bad.append(str(error))
    return rows


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error}.") from error
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path} is not UTF-8 text (byte {error.start}). Convert it, with iconv for example."
        ) from error


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{where}: not valid JSON ({error}).") from error


# Converting


def convert_row(raw: Mapping[str, Any], number: int, system_text: str | None) -> dict[str, Any] | None:
    """The row in our layout, `task` None where it does not say; None if it has a verl row's blank answer.

    Raises:
        DataError: it cannot be converted; names the field.
    """
    extra = raw.get("extra_info") or {}
    is_verl = isinstance(raw.get("reward_model"), Mapping)
    if is_verl:
        gold = _named(raw["reward_model"], ("ground_truth",), "reward_model.ground_truth")
        if isinstance(gold, str) and not gold.strip():
            return None
    else:
        gold = _named(raw, _ANSWER_FIELDS, "answer")
    prompt = raw["prompt"] if raw.get("prompt") is not None else _named(raw, _QUESTION_FIELDS, "prompt or question")
    stated = raw["task"] if raw.get("task") is not None else raw.get("ability")
    if stated is not None and stated not in _TASKS:
        field = "task" if raw.get("task") is not None else "ability"
        raise DataError(f"{field!r} is {stated!r}; expected one of {_TASKS}.")
    identity = _first(raw, _ID_FIELDS)
    if identity is None:
        identity = extra.get("index", number)
    level = _first(raw, _LEVEL_FIELDS)
    return {
        "prompt": _with_system(_checked_prompt(prompt), system_text, is_question=isinstance(prompt, str)),
        "answer": _accepted_answers(gold),
        "task": stated,
        "id": str(identity),
        "level": None if level is None else str(level),
    }


def _first(raw: Mapping[str, Any], fields: Sequence[str]) -> Any:
    return next((raw[field] for field in fields if raw.get(field) is not None), None)


def _named(raw: Mapping[str, Any], fields: Sequence[str], meaning: str) -> Any:
    value = _first(raw, fields)
    if value is None:
        nulls = [field for field in fields if field in raw]
        got = f"{nulls[0]!r} is null" if nulls else f"the row has the fields {sorted(raw)}"
        raise DataError(f"no {meaning}: {got}; expected a value under one of {list(fields)}.")
    return value


def _checked_prompt(prompt: Any) -> list[Message]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    _check_prompt(messages)
    for position, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, str) or not (content.strip() or message["role"] == "system"):
            raise DataError(f"message {position} of 'prompt' has the content {_shown(content)}; expected text.")
        if message.get("tool_calls"):
            raise DataError(
                f"message {position} of 'prompt' has tool_calls, which would be lost here. Give a dataset of such "
                "prompts to ARPOTrainer as it is."
            )
    return [{"role": message["role"], "content": _restore_escapes(message["content"])} for message in messages]


def _check_prompt(prompt: Any) -> None:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not messages:
        raise DataError(f"'prompt' is {_shown(prompt)}; expected text or a list of messages, not empty.")
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"message {position} of 'prompt' is {_shown(message)}; expected a role and a content.")
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            raise DataError(f"message {position} of 'prompt' has the content {_shown(content)}; expected text.")
    if not any(message.get("content") and str(message["content"]).strip() for message in messages):
        raise DataError(f"'prompt' is {_shown(prompt)}; expected some text in it.")


def _with_system(messages: list[Message], system_text: str | None, *, is_question: bool) -> list[Message]:
    """The messages with the asked-for system message; unasked, only a bare question gets one."""
    if system_text is None:
        if not is_question:
            return messages
        system_text = SYSTEM_PROMPTS["reasoning"]
    return [{"role": "system", "content": system_text}, *messages[messages[0]["role"] == "system" :]]


def system_prompt_text(system_prompt: str | None) -> str | None:
    """The text of a system prompt that is given by name or as it is; raises ConfigError for a name that is none."""
    if system_prompt is None:
        return None
    if system_prompt in SYSTEM_PROMPTS:
        return SYSTEM_PROMPTS[system_prompt]
    if len(system_prompt.split()) < 2:  # a misspelt name must not become the prompt
        raise ConfigError(
            f"system_prompt is {system_prompt!r}; expected a name from {list(SYSTEM_PROMPTS)}, or the text itself."
        )
    return system_prompt


def _accepted_answers(answer: Any) -> list[str]:
    """The accepted answers as text: one or several; numbers as text; of GSM8K's worked solutions only the result."""
    golds = answer if isinstance(answer, list) else [answer]
    texts = []
    for gold in golds:
        if isinstance(gold, bool) or not isinstance(gold, str | int | float):
            raise DataError(f"'answer' holds {_shown(gold)}; expected text or a number, or a list of them.")
        text = _restore_escapes(str(gold)).strip()
        if (solution := _WORKED_SOLUTION.search(text)) is not None:
            text = solution.group(1).replace(",", "")
        if not text:
            raise DataError(f"'answer' is {_shown(answer)}; expected at least one answer, none of them blank.")
        texts.append(text)
    if not texts:
        raise DataError("'answer' is an empty list; expected at least one accepted answer.")
    return texts


def _restore_escapes(text: str) -> str:
    r"""`\boxed` and `\frac` put back where an escape ate their backslash; other control characters dropped."""
    return _LOST_CONTROL.sub("", text.replace("\x08oxed", r"\boxed").replace("\x0crac", r"\frac"))


def _fill_in_task(rows: list[dict[str, Any]], task: Task | None, source: str) -> None:
    silent = [number for number, row in enumerate(rows) if row["task"] is None]
    if not silent:
        return
    if task is None:
        golds = [rows[number]["answer"][0] for number in silent]
        share = sum(_NUMBER_OR_LATEX.fullmatch(gold) is not None for gold in golds) / len(golds)
        if _QA_SHARE < share < _MATH_SHARE:
            raise DataError(
                f"{source}: {len(silent)} row(s), the first of them row {silent[0]}, do not say their task, and their "
                f"answers do not tell ({share:.0%} are a number or LaTeX). Add a `task` column that says "
                f"{' or '.join(_TASKS)}, or pass task=."
            )
        task = "math" if share >= _MATH_SHARE else "qa"
        logger.warning(
            "%s: %d row(s) do not say their task; taken as %s, since %.0f %% of their answers are a number or LaTeX. "
            "Pass task= to say so yourself.",
            source,
            len(silent),
            task,
            100 * share,
        )
    for number in silent:
        rows[number]["task"] = task


def _as_dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    text = datasets.Value("string")
    features = {
        "prompt": datasets.List({"role": text, "content": text}),
        "answer": datasets.List(text),
        "task": text,
        "id": text,
        "level": text,
    }
    if all(row["level"] is None for row in rows):
        del features["level"]
    columns = {name: [row[name] for row in rows] for name in features}
    return datasets.Dataset.from_dict(columns, features=datasets.Features(features))


def _listed(items: Iterable[object], limit: int = 10) -> str:
    names = [str(item) for item in items]
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" if len(names) > limit else "")


def _shown(value: Any) -> str:
    """The value's repr, short enough for a message."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
