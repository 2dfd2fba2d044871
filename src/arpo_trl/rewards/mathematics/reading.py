"""The possible meanings of an answer: words, a multiple-choice option, or a value that the grammar accepts."""

from __future__ import annotations

import itertools
import re

import sympy
from sympy import Expr, S

from arpo_trl.rewards.mathematics.functions import CONSTANTS, FUNCTIONS, OF_LETTERS
from arpo_trl.rewards.mathematics.parser import Parser, symbol_of
from arpo_trl.rewards.mathematics.text import canonical, clean
from arpo_trl.rewards.mathematics.tokens import Unreadable
from arpo_trl.rewards.mathematics.values import Choice, Group, Quantity, Text, Value
from arpo_trl.rewards.mathematics.vocabulary import GREEK, WORDS

_SCIENTIFIC_OR_E = re.compile(r"(?<![\d.])\d+e[+-]\d(?!\d)")  # 2e-1 is 0.2 or 2e − 1
_ROMAN = re.compile("[IVX]{2}")
"""Roman numerals: IV is not VI."""
_DATE = re.compile(r"\d{4}-\d{1,2}-\d{1,2}|\d{1,2}([/-])\d{1,2}\1\d{4}")  # not a difference and not a quotient
_POINT_OR_COUNT = re.compile(r"(?<![A-Za-z])P\(\d+,\s*\d+\)")  # P(5, 2) is a point or 20 permutations
_LIST_OR_NUMBER = re.compile(r"(?:[a-z] ?= ?)?\d{3}(?:,\d{3})+")  # 101,103

_LABEL = re.compile(r"\(?([A-J]|[a-j](?=\s*\)$))\s*(?:\)|[.:](?=\s|$))\s*(.*)", re.DOTALL)
"""The label of a multiple-choice option, and its content."""


def readings(text: str, several: bool = False) -> list[Value]:
    """Return the possible values of an answer: at least one, and several only if its notation is ambiguous.

    `several`: whether several values are expected, so that 101,103 may also be a list.
    """
    cleaned = clean(text)
    if label := _LABEL.fullmatch(cleaned):
        letter = Quantity(symbol_of(label[1]))
        if not label[2]:
            return [letter]
        if not re.match(r"[=_^,;&]|(?:and|or)\b", label[2]):
            contents = readings(label[2])
            # "A) B) C)" would equal each of its letters.
            if _LABEL.fullmatch(clean(label[2])) or any(map(_is_option, contents)):
                return [Text(canonical(cleaned))]
            return [Choice(label[1], value) for value in contents]
    if _DATE.fullmatch(cleaned):
        return [Text(cleaned)]
    if words := _words(cleaned):
        return [words]
    found: list[Value] = []
    for spelling, scientific, points in itertools.product(
        (cleaned, cleaned.replace(",", ", ")) if several and _LIST_OR_NUMBER.fullmatch(cleaned) else (cleaned,),
        (True, False) if _SCIENTIFIC_OR_E.search(cleaned) else (True,),
        (True, False) if _POINT_OR_COUNT.search(cleaned) else (True,),
    ):
        try:
            found.append(Parser(spelling, scientific, points).whole())
        # `Unreadable` comes from the grammar; sympy raises the others for values that it cannot combine.
        except (Unreadable, RecursionError, ArithmeticError, TypeError, ValueError, NotImplementedError):
            continue
    return found or [_listed(cleaned) or Text(canonical(cleaned))]


def _is_option(value: Value) -> bool:
    """Whether a value is the letter of an option, an option with its content, or several of them."""
    if isinstance(value, Group):
        return any(map(_is_option, value.items))
    return isinstance(value, Choice) or (isinstance(value, Quantity) and str(value.value) in tuple("ABCDEFGHIJ"))


def _words(cleaned: str) -> Value | None:
    """Return the text as words; None if it may be a formula."""
    if not re.fullmatch(r"[^\W\d_]+(?:[ '-]+[^\W\d_]+)*", cleaned):
        return None
    words = re.findall(r"[^\W\d_]+", cleaned)
    if len(words) == 1 and (words[0] in CONSTANTS or words[0] in GREEK):
        return None
    if all(len(word) == 1 and word.isascii() for word in words):
        return None
    if len(words) > 1 and ("and" in words or "or" in words):
        return None
    if all(
        len(word) == 1 or word in FUNCTIONS or word in CONSTANTS or word in GREEK or OF_LETTERS.fullmatch(word)
        for word in words
    ):
        return None
    is_word = words[0].lower() in WORDS or _ROMAN.fullmatch(words[0]) is not None
    if len(words) == 1 and len(words[0]) == 2 and not is_word:
        return None
    letters = None
    if len(words) == 1 and len(words[0]) <= 4 and words[0].isascii() and words[0].lower() not in WORDS:
        letters = Quantity(sympy.Mul(*(_letter(char) for char in words[0])))
    bare = re.sub(r"^(?:an?|the) (?=[a-z]{3})", "", cleaned, flags=re.IGNORECASE)
    return Text(canonical(bare), letters)


def _listed(cleaned: str) -> Value | None:
    """Return a list of several texts, "red and blue", as a group; None if the text is not a list."""
    if re.search(r"[\\(\[{|]", cleaned):
        return None
    parts = [part for part in re.split(r"\s*(?:[,;]|\band\b|\bor\b)\s*", cleaned) if part]
    if len(parts) < 2:
        return None
    joiner = next((word for word in ("and", "or") if re.search(rf"\b{word}\b", cleaned)), "")
    return Group("", tuple(readings(part)[0] for part in parts), "", joiner)


def _letter(name: str) -> Expr:
    return {"e": S.Exp1, "i": S.ImaginaryUnit}.get(name) or symbol_of(name)
