r"""The accepted answers of a row, as text.

    the column map's field ─▶ `reward_model.ground_truth` ─▶ a field such as `answer` ─▶ the box of a `solution`
    first of these with a value ─▶ lists, dicts of known datasets, JSON text ─▶ texts ─▶ + aliases

Pure.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from arpo_trl.common.user_files import shown
from arpo_trl.data.fields import (
    decoded,
    first,
    first_field,
    has_printed_key,
    is_blank,
    is_printed_list,
    named,
    printed,
    text_of,
)
from arpo_trl.errors import DataError
from arpo_trl.rewards.answers import extract_answer

ANSWER_FIELDS = (
    "reference_answer",  # MegaScience: the result of the worked answer in `answer`
    "answer",
    "Answer",
    "final_answer",
    "Final answer",
    "golden_answers",
    "answers",
    "possible_answers",  # PopQA
    "ground_truth",
    "expected_answer",
    "answerKey",
    "correct_answer",  # SciQ
    "best_answer",  # TruthfulQA
    "Correct Answer",  # GPQA
)
_ALIAS_FIELDS = ("answer_aliases", "aliases", "aug_answer")  # MuSiQue, TriviaQA, ASearcher
_SOLUTION_FIELDS = ("solution", "Solution")
_DICT_KEYS = ("value", "target", "text", "answer", "answers")
"""The keys under which a dict stores its answers: TriviaQA, Search-R1, SQuAD, others."""
_KIND_FIELDS = ("question_type", "problem_type")
_NO_ANSWERS = ("proof", "notfound", "n/a")
"""NuminaMath 1.5 and OpenMathReasoning write these instead of an answer."""
HIDDEN_ANSWER = ("Final answer", "?")
"""The answer field of GAIA and its value in the test split."""

_WORKED_SOLUTION = re.compile(r"(?:\A|\n)####\s*([^\n]+?)\s*\Z")  # GSM8K's last line
_WITH_THOUSANDS = re.compile(r"[-+$]*\d{1,3}(?:,\d{3})+(?:\.\d+)?")
_TAGGED = re.compile(r"<answer>(.*)</answer>", re.DOTALL)
_OTHER_BOX = re.compile(r"\\fbox(?=\s*\{)|\\boxed\s+(?P<bare>[^\s{}$.,;]+)")
_LATEX_WORD = re.compile(r"\\(?:text|mathrm|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
_WORD = re.compile(r"[A-Za-z]{2,}")


class NoResultError(DataError):
    """A row's only answer is a worked solution that does not mark its result."""


def find_answer(row: Mapping[str, Any], mapped: Mapping[str, str]) -> tuple[Any, str] | None:
    """The value that holds the answer, and the name of its field; None if the row has none by design.

    That is a verl row with a blank answer, a proof in NuminaMath, or a question whose answer GAIA does not publish.

    Raises:
        DataError: No field has an answer. `NoResultError`: the only one is a solution without a box.
    """
    if "answer" in mapped:
        return row["answer"], mapped["answer"]
    field = first_field(row, ANSWER_FIELDS)
    has_answer = field is not None and not is_blank(row[field])
    verl = decoded(row.get("reward_model"))
    if isinstance(verl, str) and has_printed_key(verl, ("ground_truth",)):
        raise printed(verl, "reward_model")
    if isinstance(verl, Mapping) and not (has_answer and is_blank(verl.get("ground_truth"))):
        gold = verl[named(verl, ("ground_truth",), "reward_model.ground_truth")]
        return None if isinstance(gold, str) and not gold.strip() else (gold, "reward_model.ground_truth")
    if field is not None and has_answer:
        has_none = row[field] in _NO_ANSWERS and any(kind in row for kind in _KIND_FIELDS)
        return None if has_none or (field, row[field]) == HIDDEN_ANSWER else (row[field], field)
    if (solution := first(row, _SOLUTION_FIELDS)) is not None:
        return _result_of(solution), "solution"
    field = named(row, ANSWER_FIELDS, "answer")
    return row[field], field


def accepted(value: Any, field: str) -> list[str]:
    """The answers in a value, as text, at least one.

    Numbers are written in full, a boolean is yes or no, and a worked solution gives its result.

    Raises:
        DataError: There is none, or one of them is blank or cannot be written as text.
    """
    texts: list[str] = []
    for gold in _flat(value, field):
        if isinstance(gold, bool):
            texts += ["yes", "true"] if gold else ["no", "false"]
            continue
        text = text_of(gold, field).strip()
        text = tagged.group(1).strip() if (tagged := _TAGGED.fullmatch(text)) is not None else text
        if (solution := _WORKED_SOLUTION.search(text)) is not None:
            text = solution.group(1)
            text = text.replace(",", "") if _WITH_THOUSANDS.fullmatch(text) else text
        text = text if (boxed := _last_box(text)) is None else boxed
        if is_blank(text):
            raise DataError(f"{field!r} is {shown(value)}; expected at least one answer, none of them blank.")
        texts.append(text)
    if not texts:
        raise DataError(f"{field!r} contains no answer ({shown(value)}); expected at least one.")
    return texts


def aliases(row: Mapping[str, Any]) -> list[str]:
    """The other names of the answer."""
    return [text for name in _ALIAS_FIELDS if not is_blank(row.get(name)) for text in accepted(row[name], name)]


def _flat(value: Any, field: str) -> Iterable[Any]:
    """The answers in a value: the value itself, the items of a list, or the answers in the dict of a known dataset."""
    parsed = decoded(value)
    if isinstance(parsed, Mapping):
        key = first_field(parsed, _DICT_KEYS)
        if key is None:
            return [value]
        other = parsed.get("aliases")
        golds = list(_flat(parsed[key], field)) if not is_blank(parsed[key]) or is_blank(other) else []
        return golds + (list(_flat(other, field)) if not is_blank(other) else [])
    if isinstance(value, str):  # [1, 2] is a mathematical answer, ["a", "b"] is a list of answers
        is_list = isinstance(parsed, list) and parsed and all(isinstance(item, str) for item in parsed)
        if parsed is value and (is_printed_list(value) or has_printed_key(value, _DICT_KEYS)):
            raise DataError(f"{printed(value, field)} A text that is itself the answer goes into a list.")
        return parsed if is_list else [value]
    if not isinstance(value, list | tuple):
        return [value]
    if len(value) == 1 and isinstance(value[0], list):  # a tuple is an entry of a parquet map
        return _flat(value[0], field)
    return [gold for item in value for gold in (_flat(item, field) if isinstance(item, Mapping) else [item])]


def _result_of(solution: Any) -> Any:
    """The result of a worked solution; a solution that is itself a result, such as `34`, is returned as it is."""
    text = text_of(solution[-1] if isinstance(solution, list) else solution, "solution").strip()
    if box := _last_box(text):
        return box
    if "\n" in text or _WORD.search(_LATEX_WORD.sub(" ", text)):
        raise NoResultError(r"'solution' has no \boxed{…}, and no other field has an answer; expected one.")
    return text


def _last_box(text: str) -> str | None:
    r"""The content of the last `\boxed{…}`, `\boxed 2` or `\fbox{…}`; None if there is none."""
    if r"\boxed" not in text and r"\fbox" not in text:
        return None
    text = _OTHER_BOX.sub(lambda box: f"\\boxed{{{box['bare']}}}" if box["bare"] else r"\boxed", text)
    return extract_answer(f"<answer>{text}</answer>")
