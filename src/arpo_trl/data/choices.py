"""Multiple choice: the choices of a row, and which of them its answer names. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import takewhile
from string import ascii_uppercase
from typing import Any

from arpo_trl.common.user_files import repeated, shown
from arpo_trl.data.fields import decoded, first, is_blank, text_of
from arpo_trl.errors import DataError

CHOICE_FIELDS = ("choices", "options")
_TEXT_KEYS, _LABEL_KEYS = ("text", "content", "value"), ("label", "key")
_RIGHT, _WRONG = "Correct Answer", "Incorrect Answer "  # GPQA
_NAMED_CHOICE = re.compile(r"\(?\s*(?P<label>\w)\s*(?:[).:]\s*(?P<text>.*))?", re.DOTALL)
"""How an answer names a choice: `B`, `(B)`, `B.`, `B) heart`."""


def find_choices(row: Mapping[str, Any], golds: Sequence[str]) -> dict[str, str] | None:
    """Label → text of the choices; None if the row is not a multiple-choice question.

    Args:
        golds: The answers. The columns A, B, … (C-Eval) are choices only if one of them is the answer.

    Raises:
        DataError: The choices cannot be read.
    """
    value = decoded(first(row, CHOICE_FIELDS))
    if value is None:
        return _of_columns(row, golds)
    given, texts = _labels_and_texts(value)
    if isinstance(given, list | tuple) and given:
        labels = [text_of(label, "choices") for label in given]
    else:
        labels = _letters(len(texts))
    if len(labels) != len(texts):
        raise DataError(f"'choices' has {len(labels)} labels for {len(texts)} texts; expected one label per text.")
    if twice := repeated(labels):
        raise DataError(f"'choices' has the label {twice[0]!r} twice; expected different labels.")
    return _without_labels(dict(zip(labels, (text_of(text, "choices").strip() for text in texts), strict=True)))


def _labels_and_texts(value: Any) -> tuple[Any, list[Any]]:
    """The labels, None if there are none, and the texts of choices that stand in one field."""
    if isinstance(value, Mapping) and isinstance(value.get("text"), list | tuple):  # ARC
        return value.get("label"), list(value["text"])
    if isinstance(value, Mapping):  # MedQA
        given = {str(label): text for label, text in value.items() if text is not None}
        return list(given), list(given.values())
    if not isinstance(value, list | tuple):
        raise DataError(f"'choices' is {shown(value)}; expected a list of texts, or labels with texts.")
    if not all(isinstance(choice, Mapping) for choice in value):
        return None, list(value)
    labels = [first(choice, _LABEL_KEYS) for choice in value]
    is_labelled = all(isinstance(label, str) for label in labels)
    return labels if is_labelled else None, [first(choice, _TEXT_KEYS) for choice in value]


def chosen(golds: Sequence[str], value: Any, choices: Mapping[str, str]) -> list[str]:
    """The label and the text of each correct choice.

    Args:
        value: The answer as it stands in the row. A whole number is a place from 0, as in MMLU.

    Raises:
        DataError: An answer is none of the choices.
    """
    places = value if isinstance(value, list | tuple) else [value]
    is_place = all(
        isinstance(place, int | float) and not isinstance(place, bool) and place == int(place) for place in places
    )
    found = {gold: _label_of(gold, choices, is_place=is_place) for gold in golds}
    is_yes_or_no = any(isinstance(place, bool) for place in places)  # of several words, one is a choice
    for gold, label in found.items():
        if label is None and not (is_yes_or_no and any(found.values())):
            raise DataError(f"the answer is {shown(gold)}; expected one of the choices {shown(dict(choices))}.")
    return [part for label in found.values() if label is not None for part in (label, choices[label]) if part]


def _label_of(gold: str, choices: Mapping[str, str], *, is_place: bool) -> str | None:
    labels = list(choices)
    if gold in choices:
        return gold
    if is_place:
        return next((label for place, label in enumerate(labels) if gold == str(place)), None)
    if (label := next((label for label, text in choices.items() if text == gold), None)) is not None:
        return label
    if (name := _NAMED_CHOICE.fullmatch(gold)) is not None:
        label = next((label for label in labels if label.lower() == name["label"].lower()), None)
        if label is not None and (name["text"] or choices[label]) == choices[label]:
            return label
    return next((label for label, text in choices.items() if text.lower() == gold.lower()), None)


def _of_columns(row: Mapping[str, Any], golds: Sequence[str]) -> dict[str, str] | None:
    """The choices of a row that has a column for each of them."""
    if not is_blank(row.get(_RIGHT)):
        wrong = [row[name] for name in row if str(name).startswith(_WRONG) and not is_blank(row[name])]
        # The order of the alphabet does not tell which one is right.
        texts = sorted(text_of(text, _RIGHT).strip() for text in (row[_RIGHT], *wrong))
        return dict(zip(_letters(len(texts)), texts, strict=True)) if wrong else None
    labels = list(takewhile(lambda label: not is_blank(row.get(label)), ascii_uppercase))
    if len(labels) < 2 or not golds or not set(golds) <= set(labels):
        return None
    return {label: text_of(row[label], label).strip() for label in labels}


def _without_labels(choices: dict[str, str]) -> dict[str, str]:
    """The choices without the labels that their texts begin with, as in `A) liver`, if all of them do."""
    bare = {label: re.sub(rf"\A\(?{re.escape(label)}[).:]\s*", "", text) for label, text in choices.items()}
    return bare if all(bare[label] not in ("", choices[label]) for label in choices) else choices


def _letters(count: int) -> list[str]:
    if count > len(ascii_uppercase):
        raise DataError(f"'choices' contains {count} texts; expected at most 26, one per letter.")
    return list(ascii_uppercase[:count])
