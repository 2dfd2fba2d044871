r"""Converts one row of a dataset from a published layout to {prompt, answer, task, id, level}.

| layout | question | accepted answers |
|---|---|---|
| this project's | `prompt`: text or messages | `answer`: text, a number, or a list |
| benchmarks | `question`, `problem` | `answer`, `golden_answers`, `answers`, `ground_truth`, `expected_answer`, … |
| verl (the paper, DAPO, Search-R1) | `prompt`: messages | `reward_model.ground_truth`: one, a list, `{target: […]}` |
| worked solutions (NuminaMath, OpenR1) | `problem` | the last `\boxed{…}` of `solution` |
| GSM8K | `question` | the text after `####` at the end of `answer` |
| SQuAD, TriviaQA | `question` | `answers.text`; `answer.value` with `aliases` |
| MuSiQue | `question` | `answer` with `answer_aliases` |
| multiple choice (MMLU, ARC, MedQA) | `question` with `choices` or `options` | the label, and the choice itself |

A column map replaces the names of fields. Pure: no files, no network.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from decimal import Decimal
from typing import Any, Literal, get_args

from arpo_trl.common.user_files import shown
from arpo_trl.data.prompts import SYSTEM_PROMPTS
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.rewards.answers import extract_answer

Task = Literal["math", "qa"]
TASKS: tuple[Task, ...] = get_args(Task)
Message = dict[str, str]

MAPPABLE = ("prompt", "question", "answer", "choices", "task", "id", "level")
"""The keys of a column map."""

_QUESTION_FIELDS = ("question", "Question", "problem", "Problem")
_ANSWER_FIELDS = (
    "answer",
    "Answer",
    "final_answer",
    "Final answer",
    "golden_answers",
    "answers",
    "ground_truth",
    "expected_answer",
    "answerKey",
)
_ALIAS_FIELDS = ("answer_aliases", "aliases")
_SOLUTION_FIELDS = ("solution", "Solution")
_CHOICE_FIELDS = ("choices", "options")
_ID_FIELDS = ("id", "_id", "idx", "unique_id", "task_id")
_LEVEL_FIELDS = ("level", "Level")
_ABILITIES: dict[str, Task] = {
    "math": "math",
    "mathematics": "math",
    "qa": "qa",
    "fact-reasoning": "qa",  # Search-R1
}
"""verl's `ability`, in lower case → task."""

_WORKED_SOLUTION = re.compile(r"(?:\A|\n)####\s*([^\n]+?)\s*\Z")  # GSM8K's last line
_LOST_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


DEFAULT_SYSTEM_PROMPT = SYSTEM_PROMPTS["reasoning"]
"""The system message of a plain question, if no other one is set."""


def convert_row(
    raw: Mapping[str, Any],
    number: int,
    system_text: str | None,
    *,
    task: Task | None = None,
    columns: Mapping[str, str] | None = None,
) -> dict[str, Any] | None:
    """The row in this project's layout; None if it is a verl row with a blank answer. `task` is None if the row has
    none.

    Args:
        number: The row's number in its dataset. It becomes the id of a row without an id.
        system_text: Replaces the system message. None: only a plain-text prompt gets one,
            `SYSTEM_PROMPTS["reasoning"]`.
        task: Overrides the row's own task.
        columns: Key of `MAPPABLE` → field that replaces the usual ones. Dots select nested fields.

    Raises:
        DataError: The row cannot be converted; names the field.
    """
    row, mapped = dict(raw), columns or {}
    for name, field in mapped.items():
        if (value := _at(raw, field)) is None:
            raise DataError(
                f"the row has no field {field!r}, to which the column map maps {name}; it has {sorted(map(str, raw))}."
            )
        row[name] = value
    if "question" in mapped and "prompt" not in mapped:
        row.pop("prompt", None)  # the map overrides the row's own prompt
    golds = _golds(row, mapped)
    if golds is None:
        return None
    prompt = row["prompt"] if row.get("prompt") is not None else _named(row, _QUESTION_FIELDS, "prompt or question")
    is_question = isinstance(prompt, str)
    if (choices := _choices(row)) is not None:
        golds = _chosen(golds, row, choices)
        if is_question:
            prompt = "\n".join([prompt, *(f"{label}. {text}" for label, text in choices.items())])
    level = _first(row, _LEVEL_FIELDS)
    return {
        "prompt": _with_system(_checked_prompt(prompt), system_text, is_question=is_question),
        "answer": list(dict.fromkeys(golds)),
        "task": task or _stated_task(row),
        "id": _text(_identity(row, number), "id"),
        "level": None if level is None else _text(level, "level"),
    }


def read_columns(columns: Any) -> dict[str, str] | None:
    """Reads a column map from a setting, which is a mapping, JSON text or None.

    Raises:
        ConfigError: It is not a column map.
    """
    if columns is None:
        return None
    read = columns
    if isinstance(columns, str):
        with contextlib.suppress(ValueError, RecursionError):
            read = json.loads(columns)
    if not isinstance(read, Mapping) or not all(isinstance(field, str) and field for field in read.values()):
        raise ConfigError(
            f"columns is {shown(columns)}; expected a mapping to field names, such as {{question: problem}}."
        )
    if unknown := [name for name in read if name not in MAPPABLE]:
        raise ConfigError(f"columns has the keys {unknown}; expected some of {list(MAPPABLE)}.")
    return dict(read)


def system_prompt_text(system_prompt: str | None) -> str | None:
    """The text of a system prompt, given by its name or as text.

    Raises:
        ConfigError: `system_prompt` is a single word that is not a name in `SYSTEM_PROMPTS`.
    """
    if not system_prompt:
        return system_prompt
    if system_prompt in SYSTEM_PROMPTS:
        return SYSTEM_PROMPTS[system_prompt]
    if len(system_prompt.split()) < 2:  # probably a misspelt name
        raise ConfigError(
            f"system_prompt is {system_prompt!r}; expected one of {list(SYSTEM_PROMPTS)}, or a text of several words."
        )
    return system_prompt


def check_prompt(prompt: Any) -> None:
    """Checks that `prompt` is text or a list of messages, and not blank; see `loading.validate_rows`.

    Raises:
        DataError: The check failed. Names the message.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not messages:
        raise DataError(f"'prompt' is {shown(prompt)}; expected text or a list of messages, not empty.")
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise DataError(f"message {position} of 'prompt' is {shown(message)}; expected role and content.")
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            raise DataError(f"message {position} of 'prompt' has the content {shown(content)}; expected text.")
    if not any(message.get("content") and str(message["content"]).strip() for message in messages):
        raise DataError(f"'prompt' is {shown(prompt)}; expected some text in it.")


# Fields


def _at(row: Mapping[str, Any], field: str) -> Any:
    """The value of a field, or of nested fields with dots between their names; None if there is none."""
    if field in row:
        return row[field]
    value: Any = row
    for part in field.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _first(row: Mapping[str, Any], fields: Sequence[str]) -> Any:
    return next((row[field] for field in fields if row.get(field) is not None), None)


def _named(row: Mapping[str, Any], fields: Sequence[str], meaning: str) -> Any:
    value = _first(row, fields)
    if value is None:
        nulls = [field for field in fields if field in row]
        got = f"{nulls[0]!r} is null" if nulls else f"the row has the fields {sorted(map(str, row))}"
        raise DataError(
            f"no {meaning}: {got}; expected a value under one of {list(fields)}. To name other fields, set columns."
        )
    return value


def _identity(row: Mapping[str, Any], number: int) -> Any:
    extra = row.get("extra_info")
    index = extra.get("index") if isinstance(extra, Mapping) else None
    return next((value for value in (_first(row, _ID_FIELDS), index) if value is not None), number)


def _stated_task(row: Mapping[str, Any]) -> Task | None:
    fields: tuple[tuple[str, Mapping[str, Task]], ...] = (
        ("task", {task: task for task in TASKS}),
        ("ability", _ABILITIES),
    )
    for field, known in fields:
        if (stated := row.get(field)) is None:
            continue
        if isinstance(stated, str) and (task := known.get(stated.lower())) is not None:
            return task
        raise DataError(
            f"{field!r} is {shown(stated)}; expected one of {list(known)}. To give all rows the same task, set task "
            "to math or qa."
        )
    return None


# Answers


def _golds(row: Mapping[str, Any], mapped: Mapping[str, str]) -> list[str] | None:
    """The accepted answers, at least one; None if the answer of a verl row is blank."""
    verl = row.get("reward_model")
    if "answer" in mapped:
        return _accepted(row["answer"], mapped["answer"])
    if isinstance(verl, Mapping):
        gold = _named(verl, ("ground_truth",), "reward_model.ground_truth")
        return None if isinstance(gold, str) and not gold.strip() else _accepted(gold, "reward_model.ground_truth")
    field = next((name for name in _ANSWER_FIELDS if row.get(name) is not None), None)
    if field is not None:
        golds = _accepted(row[field], field)
        for name in _ALIAS_FIELDS:
            golds += _accepted(row[name], name) if row.get(name) else []
        return golds
    if (solution := _first(row, _SOLUTION_FIELDS)) is not None:
        boxed = extract_answer(f"<answer>{solution}</answer>")
        if not boxed:
            raise DataError(r"'solution' has no \boxed{…}, and no other field has an answer; expected one.")
        return [boxed]
    _named(row, _ANSWER_FIELDS, "answer")  # raises
    raise AssertionError


def _accepted(value: Any, field: str) -> list[str]:
    """The answers in a value, as text. Numbers are written in full; for a worked solution of GSM8K, the result is
    returned."""
    texts: list[str] = []
    for gold in _flat(value, field):
        text = _text(gold, field).strip()
        if (solution := _WORKED_SOLUTION.search(text)) is not None:
            text = solution.group(1).replace(",", "")
        if not text:
            raise DataError(f"{field!r} is {shown(value)}; expected at least one answer, none of them blank.")
        texts.append(text)
    if not texts:
        raise DataError(f"{field!r} contains no answer ({shown(value)}); expected at least one.")
    return texts


def _flat(value: Any, field: str) -> Iterable[Any]:
    """The answers in a value: the value itself, the items of a list, or the answers in the dict of a known dataset."""
    if isinstance(value, Mapping):
        if value.get("value") is not None:  # TriviaQA
            return [value["value"], *(value.get("aliases") or ())]
        for key in ("target", "text"):  # Search-R1, SQuAD
            if value.get(key) is not None:
                return _flat(value[key], field)
    return value if isinstance(value, list | tuple) else [value]


def _text(value: Any, field: str) -> str:
    """A value as text. Numbers are written in digits, without an exponent and without a fraction of zero."""
    if isinstance(value, float) and not math.isfinite(value):
        raise DataError(f"{field!r} contains {value}; expected text or a finite number.")
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise DataError(f"{field!r} contains {shown(value)}; expected text or a number, or a list of them.")
    if isinstance(value, float):
        digits = format(Decimal(repr(value)), "f")
        return digits.rstrip("0").rstrip(".") if "." in digits else digits
    try:
        text = _restore_escapes(str(value))
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{field!r} contains a lone surrogate (character {error.start}); expected valid Unicode. Repair the row."
        ) from error
    except ValueError as error:
        raise DataError(f"{field!r} contains a number with too many digits. Write it as text.") from error
    return text


# Multiple choice


def _choices(row: Mapping[str, Any]) -> dict[str, str] | None:
    """Label → text of the choices; None if the row is not a multiple-choice question."""
    value = _first(row, _CHOICE_FIELDS)
    if value is None or (isinstance(value, list | tuple) and not value):
        return None
    if isinstance(value, Mapping) and isinstance(value.get("text"), list | tuple):  # ARC
        texts = list(value["text"])
        labels = [_text(label, "choices") for label in value.get("label") or _letters(len(texts))]
    elif isinstance(value, Mapping):  # MedQA
        labels, texts = [str(label) for label in value], list(value.values())
    elif isinstance(value, list | tuple):
        labels, texts = _letters(len(value)), list(value)
    else:
        raise DataError(f"'choices' is {shown(value)}; expected a list of texts, or labels with texts.")
    if len(labels) != len(texts):
        raise DataError(f"'choices' has {len(labels)} labels for {len(texts)} texts; expected one label per text.")
    return dict(zip(labels, (_text(text, "choices").strip() for text in texts), strict=True))


def _letters(count: int) -> list[str]:
    if count > 26:
        raise DataError(f"'choices' contains {count} texts; expected at most 26, one per letter.")
    return [chr(ord("A") + i) for i in range(count)]


def _chosen(golds: Sequence[str], row: Mapping[str, Any], choices: Mapping[str, str]) -> list[str]:
    """The label and the text of each correct choice."""
    labels, chosen = list(choices), []
    is_place = isinstance(_first(row, _ANSWER_FIELDS), int)  # an index from 0, as in MMLU
    for gold in golds:
        if gold in choices:
            label = gold
        elif is_place:
            label = labels[int(gold)] if int(gold) in range(len(labels)) else ""
        else:
            label = next((label for label, text in choices.items() if text == gold), "")
        if not label:
            raise DataError(f"the answer is {shown(gold)}; expected one of the choices {shown(dict(choices))}.")
        chosen += [label, choices[label]]
    return chosen


# Prompts


def _checked_prompt(prompt: Any) -> list[Message]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    check_prompt(messages)
    for position, message in enumerate(messages):
        content = message.get("content")
        if not isinstance(content, str) or not (content.strip() or message["role"] == "system"):
            raise DataError(f"message {position} of 'prompt' has the content {shown(content)}; expected text.")
        if message.get("tool_calls"):
            raise DataError(
                f"message {position} of 'prompt' has tool_calls, which load_arpo_dataset would drop. Pass a dataset "
                "with such prompts to ARPOTrainer directly."
            )
    return [{"role": message["role"], "content": _text(message["content"], "prompt")} for message in messages]


def _with_system(messages: list[Message], system_text: str | None, *, is_question: bool) -> list[Message]:
    """The messages with the given system message; "" removes it. For None, only a plain question gets a system
    message."""
    if system_text is None:
        if not is_question:
            return messages
        system_text = DEFAULT_SYSTEM_PROMPT
    others = messages[messages[0]["role"] == "system" :]
    return [{"role": "system", "content": system_text}, *others] if system_text else others


def _restore_escapes(text: str) -> str:
    r"""Restores `\boxed` and `\frac` whose backslash was read as an escape; removes other control characters."""
    return _LOST_CONTROL.sub("", text.replace("\x08oxed", r"\boxed").replace("\x0crac", r"\frac"))
