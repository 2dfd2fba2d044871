r"""Converts one row of a dataset from a published layout to {prompt, answer, task, id, level}.

| layout | question | accepted answers |
|---|---|---|
| this project's | `prompt`: text or messages | `answer`: text, a number, yes or no, or a list |
| benchmarks | `question`, `problem` | `answer`, `golden_answers`, `answers`, `ground_truth`, `expected_answer`, … |
| verl (the paper, DAPO, Search-R1) | `prompt`: messages | `reward_model.ground_truth`: one, a list, `{target: […]}` |
| RLVR | `messages` that end with the user's | `ground_truth` |
| worked solutions (NuminaMath, OpenR1) | `problem` | the last `\boxed{…}` of `solution` |
| GSM8K | `question` | the text after `####` at the end of `answer` |
| SQuAD, TriviaQA | `question` | `answers.text`; `answer.value` with `aliases` |
| MuSiQue, ASearcher | `question` | `answer` with `answer_aliases`, `aug_answer` |
| multiple choice (MMLU, ARC, MedQA, C-Eval, GPQA) | `question` with `choices`, `options` or columns | label, text |

A column map replaces the names of fields. Pure: no files, no network. `fields` reads values, `golds` the answers and
`choices` the choices.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import difflib
import json
import math
from collections.abc import Iterable, Mapping
from functools import lru_cache
from typing import Any

from arpo_trl.common.user_files import shown
from arpo_trl.data.choices import CHOICE_FIELDS, chosen, find_choices
from arpo_trl.data.fields import at, decoded, first, has_printed_key, is_blank, named, printed, text_of
from arpo_trl.data.golds import accepted, aliases, find_answer
from arpo_trl.data.prompts import SYSTEM_PROMPTS
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.rewards.answers import TASKS, Task

Message = dict[str, str]

MAPPABLE = ("prompt", "question", "answer", "choices", "task", "id", "level")
"""The keys of a column map."""

MESSAGE_FIELDS = ("role", "content", "name", "tool_call_id", "reasoning_content", "thinking")
"""The fields of messages that a prompt keeps: those with text that chat templates read."""

QUESTION_FIELDS = ("prompt", "question", "Question", "problem", "Problem", "question_stem", "Prompt", "query")
_STORY_FIELDS = {"Question": "Body", "question": "body"}
"""Question field → the field with the story that precedes the question, in SVAMP and ASDiv."""
_ID_FIELDS = (
    *("id", "_id", "ID", "idx", "unique_id", "uuid", "qid", "question_id", "problem_id", "task_id", "instance_id"),
    "Record ID",
)
_LEVEL_FIELDS = ("level", "Level")
_REQUIRED = ("prompt", "question", "answer")
"""The keys of a column map whose fields cannot be null."""
_REPLACED = {
    "prompt": (*QUESTION_FIELDS, "messages"),
    "question": (*QUESTION_FIELDS, "messages", *_STORY_FIELDS.values()),  # the mapped text is the whole question
    "choices": CHOICE_FIELDS,
    "task": ("task", "ability"),
    "id": _ID_FIELDS,
    "level": _LEVEL_FIELDS,
}
"""Key of a column map → the fields that are not read then. `golds` does this for the answer."""
_ABILITIES: dict[str, Task] = {
    "math": "math",
    "mathematics": "math",
    "qa": "qa",
    "fact-reasoning": "qa",  # Search-R1
}
"""verl's `ability`, in lower case → task."""
_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant"}
_ROLES = ("system", "developer", "user", "assistant", "tool")
_NEAR_ROLE = 0.66
"""A role that is at least this similar to a known one counts as misspelt. Roles of some chat templates, such as
tool_call, are less similar."""
_CIPHERTEXT_CHARS = 24


def convert_row(
    raw: Mapping[str, Any],
    number: int,
    system_text: str | None,
    *,
    task: Task | None = None,
    columns: Mapping[str, str] | None = None,
    own_reward: bool = False,
    of_questions: str | None = SYSTEM_PROMPTS["reasoning"],
) -> dict[str, Any] | None:
    """The row in this project's layout; None if it has no answer by design (`golds.find_answer`).

    `task` is None if the row has none. With `own_reward`, `answer` is None if the row has none, and [] if that is by
    design.

    Args:
        number: The row's number in its dataset. It becomes the id of a row without an id.
        system_text: Replaces the system message. None: only a plain question gets one, `of_questions`.
        task: Overrides the row's own task.
        columns: Key of `MAPPABLE` → field that replaces the usual ones. Dots select nested fields.
        own_reward: The row is for a reward function of the user: it needs no answer, and its task may be any text. An
            answer that cannot be read is still an error, and so is a missing one that `columns` names.
        of_questions: The text of the system message of plain questions.

    Raises:
        DataError: The row cannot be converted; names the field.
    """
    row, mapped = _renamed(raw, columns or {}), columns or {}
    has_answer = not own_reward or _has_answer(row, mapped)
    answer = find_answer(row, mapped) if has_answer else None
    if answer is None and not own_reward:
        return None
    golds = [] if answer is None else accepted(*answer) + ([] if "answer" in mapped else aliases(row))
    prompt = _prompt(row)
    is_question = isinstance(prompt, str)
    if is_question and system_text is None:
        system_text = of_questions
    if (choices := find_choices(row, golds)) is not None:
        golds = [] if answer is None else chosen(golds, answer[0], choices)
        if is_question:
            prompt = "\n".join([prompt, *(f"{label}. {text}" for label, text in choices.items())])
    level = first(row, _LEVEL_FIELDS)
    return {
        "prompt": _with_system(_checked_prompt(prompt), system_text),
        "answer": list(dict.fromkeys(golds)) if has_answer else None,
        "task": task or (_own_task(row) if own_reward else _stated_task(row)),
        "id": text_of(_identity(row, number), "id"),
        "level": text_of(level, "level") if is_plain(level) else None,
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
    """The text of a system prompt given by its name or as text.

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


def shared_system_prompt(prompts: Iterable[Any]) -> str | None:
    """The value of the setting `system_prompt` with which all `prompts` stay as they are.

    It is the name of their system message in `SYSTEM_PROMPTS` or, if it has none, the text; "" if no prompt has a
    system message. None: there is no such value, because system messages differ, a prompt is no list of messages, or
    the setting does not accept the text.
    """
    shared = None
    for prompt in prompts:
        text = _system_of(prompt)
        if text is None or (shared is not None and text != shared):
            return None
        shared = text
    if shared is None:
        return None
    setting = next((name for name, text in SYSTEM_PROMPTS.items() if text == shared), shared)
    with contextlib.suppress(ConfigError):
        return setting if system_prompt_text(setting) == shared else None
    return None


def _system_of(prompt: Any) -> str | None:
    """The text of a prompt's system message, "" without one; None if a system prompt cannot express it."""
    if not isinstance(prompt, list) or not prompt or not isinstance(prompt[0], Mapping):
        return None
    role, content = prompt[0].get("role"), prompt[0].get("content")
    if role != "system":
        return None if role == "developer" else ""
    return content if isinstance(content, str) and content.strip() else None


def check_prompt(prompt: Any) -> None:
    """Checks that `prompt` is text or a list of messages, and not blank; see `loading.validate_rows`.

    Raises:
        DataError: The check failed. Names the message.
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    if not isinstance(messages, list) or not messages:
        raise DataError(f"'prompt' is {shown(prompt)}; expected text or a list of messages, not empty.")
    for position, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str) or not message["role"]:
            raise DataError(f"message {position} of 'prompt' is {shown(message)}; expected role and content.")
        content = message.get("content")
        if not isinstance(content, str | list) and not (content is None and message.get("tool_calls")):
            raise DataError(f"message {position} of 'prompt' has the content {shown(content)}; expected text.")
        check_role(message["role"], f"message {position} of 'prompt'")
    if all(is_blank(message.get("content")) for message in messages):
        raise DataError(f"'prompt' is {shown(prompt)}; expected some text in it.")


def why_rejected(prompt: str | Iterable[Mapping[str, Any]], error: Exception) -> str:
    """Why the tokenizer's chat template raised `error` for the messages of a prompt, and the remedy."""
    messages = [] if isinstance(prompt, str) else list(prompt)
    if any(isinstance(message.get("content"), list) for message in messages):
        return (
            f"the content of a message is a list of parts, and the tokenizer's chat template takes text: {error}. "
            "Write the parts as one text. Images are not supported."
        )
    return (
        f"the tokenizer's chat template rejects its messages, whose roles are {[each['role'] for each in messages]}: "
        f"{error}. Use roles that the template accepts (for example, put the system message at the start of the first "
        "user message), or set `tokenizer.chat_template` (arpo-trl sft: chat_template_path)."
    )


def check_role(role: str, message: str) -> None:
    """Checks that a role is not a misspelt one, which most chat templates would render without an error. Other unknown
    roles are left to the chat template.

    Args:
        role: The role.
        message: Names the message in the error.

    Raises:
        DataError: The role is almost a known one, or ShareGPT's name of one.
    """
    if role != (meant := _meant_role(role)):
        raise DataError(f"{message} has the role {role!r}; did you mean {meant!r}?")


@lru_cache  # a dataset repeats a few roles in all its messages
def _meant_role(role: str) -> str:
    near = difflib.get_close_matches(role.lower(), _ROLES, n=1, cutoff=_NEAR_ROLE)
    return _SHAREGPT_ROLES.get(role, near[0] if near else role)


# Fields


def _renamed(raw: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row with the fields that the column map names also under their usual names."""
    row = dict(raw)
    for name, field in columns.items():
        try:
            row[name] = at(raw, field)
        except KeyError:
            raise DataError(
                f"the row has no field {field!r}, to which the column map maps {name}; it has {sorted(map(str, raw))}."
            ) from None
        if row[name] is None and name in _REQUIRED:
            raise DataError(
                f"{field!r}, to which the column map maps {name}, is null; expected a value. Correct or "
                "remove the row."
            )
    for name in columns:  # a mapped field that is blank must not fall back to another one
        for other in {*_REPLACED.get(name, ())}.difference(columns):
            row.pop(other, None)
    return row


def is_plain(value: Any) -> bool:
    """Whether a value can be an id or a level: text or a finite number."""
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int) and not isinstance(value, bool)


def _identity(row: Mapping[str, Any], number: int) -> Any:
    extra = decoded(row.get("extra_info"))
    index = extra.get("index") if isinstance(extra, Mapping) else None
    known = (*(row.get(field) for field in _ID_FIELDS), index)
    return next((value for value in known if is_plain(value) and not is_blank(value)), number)


def _has_answer(row: Mapping[str, Any], mapped: Mapping[str, str]) -> bool:
    """Whether `find_answer` finds an answer that is not blank, or the sign that there is none by design."""
    try:
        answer = find_answer(row, mapped)
    except DataError:
        return False
    return answer is None or "answer" in mapped or not is_blank(answer[0])


def _own_task(row: Mapping[str, Any]) -> str | None:
    """The task that the row states or, if that is no known one, its field `task` as text; None if it has none."""
    try:
        return _stated_task(row)
    except DataError:
        return text_of(row["task"], "task") if is_plain(row.get("task")) else None


def _stated_task(row: Mapping[str, Any]) -> Task | None:
    fields: tuple[tuple[str, Mapping[str, Task]], ...] = (
        ("task", {task: task for task in TASKS}),
        ("ability", _ABILITIES),
    )
    for field, known in fields:
        if is_blank(stated := row.get(field)):
            continue
        if isinstance(stated, str) and (task := known.get(stated.strip().lower())) is not None:
            return task
        raise DataError(
            f"{field!r} is {shown(stated)}; expected one of {list(known)}. To give all rows the same task, set task "
            "to math or qa."
        )
    return None


# Prompts


def _prompt(row: Mapping[str, Any]) -> Any:
    """The prompt of a row: text if it is a plain question, else messages, which are not checked yet."""
    messages = decoded(row.get("messages"))
    if is_blank(first(row, QUESTION_FIELDS)) and not is_blank(messages):
        _refuse_printed(messages, "messages")
        last = _message(messages[-1]) if isinstance(messages, list) else None
        if isinstance(last, Mapping) and last.get("role") == "user":
            return messages
        if isinstance(last, Mapping) and last.get("role") in ("assistant", "tool"):
            raise DataError(
                f"'messages' ends with a message of the role {last['role']!r}, so the row is a demonstration; "
                "expected a question, which ends with the user's message. Train on demonstrations with sft.py, or "
                "remove the answer from the messages."
            )
    field = named(row, QUESTION_FIELDS, "prompt or question")
    prompt = row[field]
    if isinstance(prompt, str):
        _refuse_ciphertext(prompt, field, row)
        parsed = decoded(prompt)
        if isinstance(parsed, list) and parsed and any(map(_is_message, parsed)):
            return parsed
        _refuse_printed(prompt, field)
        body = row.get(_STORY_FIELDS.get(field, ""))
        return f"{body.strip()} {prompt}" if isinstance(body, str) else prompt
    if isinstance(prompt, Mapping):
        if isinstance(prompt.get("text"), str):  # Natural Questions
            return prompt["text"]
        return [prompt] if _is_message(prompt) else prompt
    return prompt


def _refuse_printed(value: Any, field: str) -> None:
    """Only messages: a question may be about a list or a dict of Python."""
    if isinstance(value, str) and has_printed_key(value, ("role", "from")):
        raise printed(value, field)


def _is_message(value: Any) -> bool:
    return isinstance(value, Mapping) and ("role" in value or "from" in value)


def _refuse_ciphertext(question: str, field: str, row: Mapping[str, Any]) -> None:
    """Some benchmarks encrypt their questions with a canary, so that crawlers do not read them."""
    if is_blank(row.get("canary")) or len(question) < _CIPHERTEXT_CHARS or not question.isascii():
        return
    try:
        base64.b64decode(question, validate=True)
    except binascii.Error:
        return
    raise DataError(
        f"{field!r} is encrypted with the row's 'canary'. Decrypt the dataset first, with its authors' code."
    )


def _message(message: Any) -> Any:
    """A message with role and content, whose content is text if it consists of text parts."""
    if not isinstance(message, Mapping):
        return message
    if "role" not in message and isinstance(message.get("from"), str):  # ShareGPT
        message = {"role": _SHAREGPT_ROLES.get(message["from"], message["from"]), "content": message.get("value")}
    content = message.get("content")
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        texts = [part.get("text") for part in content]
        if all(isinstance(text, str | None) for text in texts):
            content = "\n".join(text or "" for text in texts)
    elif content is None and message.get("role") == "system":
        content = ""
    return {**message, "content": content}


def _checked_prompt(prompt: Any) -> list[Message]:
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    messages = [_message(message) for message in messages] if isinstance(messages, list) else messages
    check_prompt(messages)
    for position, message in enumerate(messages):
        if message.get("tool_calls"):
            raise DataError(
                f"message {position} of 'prompt' has tool_calls, which load_arpo_dataset would drop. Pass a dataset "
                "with such prompts to ARPOTrainer directly."
            )
        content = message.get("content")
        if not isinstance(content, str) or not (content.strip() or message["role"] == "system"):
            raise DataError(f"message {position} of 'prompt' has the content {shown(content)}; expected text.")
    return [
        {name: text_of(message[name], "prompt") for name in MESSAGE_FIELDS if isinstance(message.get(name), str)}
        for message in messages
    ]


def _with_system(messages: list[Message], system_text: str | None) -> list[Message]:
    """The messages with the given system message; "" removes it. None: unchanged."""
    if system_text is None:
        return messages
    others = messages[messages[0]["role"] == "system" :]
    return [{"role": "system", "content": system_text}, *others] if system_text else others
