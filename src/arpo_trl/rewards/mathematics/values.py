"""What an answer can be. A `Value` is one of the classes below; sympy has what is inside them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import sympy


@dataclass(frozen=True, slots=True)
class Quantity:
    """A number or a formula, with its unit ("" where none is written, "%" for a percentage).

    `digits`: significant digits of the longest decimal fraction in it, which is then an approximation; 0 without one.
    """

    value: sympy.Expr
    unit: str = ""
    digits: int = 0


@dataclass(frozen=True, slots=True)
class Based:
    """A numeral in a base that is written with it: 2516_8."""

    numeral: str
    base: int


@dataclass(frozen=True, slots=True)
class Ratio:
    """3 : 4 : 5. `clock`: it is written as a time of day is, 9:05, and may be one."""

    parts: tuple[sympy.Expr, ...]
    unit: str = ""
    clock: bool = False


@dataclass(frozen=True, slots=True)
class Residue:
    """A number up to multiples of the modulus."""

    value: sympy.Expr
    modulus: sympy.Expr


@dataclass(frozen=True, slots=True)
class Group:
    """Several values between two brackets.

    `opening` and `closing`: "{" "}" for a set; "(", "[" and their partners for tuples, lists and intervals, which only
    the other answer tells apart; "" for a bare list, whose order says nothing. `joiner` is "or" or "and" where one is
    written.
    """

    opening: str
    items: tuple[Value, ...]
    closing: str
    joiner: str = ""


@dataclass(frozen=True, slots=True)
class Relation:
    """A chain: sides[0] ops[0] sides[1] ops[1] …; ops are = ≠ < ≤ > ≥ ≈ ∈ ≡. An unwritten left side is None."""

    sides: tuple[Value | None, ...]
    ops: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class NumberSet:
    """A set of numbers that sympy knows: ℝ, a union of intervals, ∅."""

    value: sympy.Set


@dataclass(frozen=True, slots=True)
class SetOperation:
    """∪, ∩ or ∖ of two sets."""

    op: str
    left: Value
    right: Value


@dataclass(frozen=True, slots=True)
class Builder:
    """{element | condition}."""

    element: Value
    condition: Value


@dataclass(frozen=True, slots=True)
class Table:
    """A matrix, or the rows of a function given by cases (`cases`: value, condition)."""

    rows: tuple[tuple[Value, ...], ...]
    cases: bool = False


@dataclass(frozen=True, slots=True)
class Choice:
    """An option with its letter and its content: "C. 7"."""

    letter: str
    content: Value


@dataclass(frozen=True, slots=True)
class Text:
    """Words, or what cannot be read: equal to the same text only. `letters`: its reading as a product, if any."""

    canonical: str
    letters: Quantity | None = field(default=None, compare=False)


Value: TypeAlias = (
    Quantity | Based | Ratio | Residue | Group | Relation | NumberSet | SetOperation | Builder | Table | Choice | Text
)
