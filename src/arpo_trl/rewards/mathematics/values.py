"""The values that an answer can have. A `Value` is one of the classes below; they contain sympy expressions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import sympy


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number or a formula, with its unit ("" without a unit, "%" for a percentage).

    `digits`: the significant digits of its longest decimal fraction, which makes it an approximation; 0 without one.
    """

    value: sympy.Expr
    unit: str = ""
    digits: int = 0


@dataclass(frozen=True, slots=True)
class Based:
    """A numeral with an explicit base: 2516_8."""

    numeral: str
    base: int


@dataclass(frozen=True, slots=True)
class Ratio:
    """A ratio such as 3 : 4 : 5. `clock`: its notation is also that of a time of day, 9:05."""

    parts: tuple[sympy.Expr, ...]
    unit: str = ""
    clock: bool = False


@dataclass(frozen=True, slots=True)
class Residue:
    """A number modulo `modulus`: 3 for 13 mod 5, but 13 for 13 (mod 5)."""

    value: sympy.Expr
    modulus: sympy.Expr


@dataclass(frozen=True, slots=True)
class Group:
    """Several values, mostly in brackets.

    `opening` and `closing`: "{" and "}" for a set; "(" or "[" with ")" or "]" for a tuple, a list or an interval,
    which only the other answer can distinguish; "" for a list without brackets, whose order does not matter. `joiner`
    is "or" or "and" if the text contains it, otherwise "".
    """

    opening: str
    items: tuple[Value, ...]
    closing: str
    joiner: str = ""


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain sides[0] ops[0] sides[1] ops[1] … of = ≠ < ≤ > ≥ ≈ ∈ ≡ and others. A missing left side is None."""

    sides: tuple[Value | None, ...]
    ops: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NumberSet:
    """A set of numbers as a sympy set: ℝ, a union of intervals, ∅."""

    value: sympy.Set


@dataclass(frozen=True, slots=True)
class SetOperation:
    """∪, ∩ or ∖ of two sets."""

    op: str
    left: Value
    right: Value


@dataclass(frozen=True, slots=True)
class Builder:
    """A set {element | condition}."""

    element: Value
    condition: Value


@dataclass(frozen=True, slots=True)
class Table:
    """A matrix, or with `cases` a piecewise function, whose rows are (value, condition)."""

    rows: tuple[tuple[Value, ...], ...]
    cases: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """A multiple-choice option with its letter and its content: "C. 7"."""

    letter: str
    content: Value


@dataclass(frozen=True, slots=True)
class Text:
    """Words, or a text that the parser rejects. Only the same text equals it.

    `letters`: the product of its letters, if the text can also be read as one.
    """

    canonical: str
    letters: Quantity | None = field(default=None, compare=False)


Value: TypeAlias = (
    Quantity | Based | Ratio | Residue | Group | Relation | NumberSet | SetOperation | Builder | Table | Choice | Text
)
