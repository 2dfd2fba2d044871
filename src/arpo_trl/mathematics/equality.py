"""Whether two answers mean the same: structure by structure, numbers by value, decimals to their own digits."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

import sympy
from sympy import Expr, Rational, S, Symbol
from sympy.core.function import AppliedUndef

from arpo_trl.mathematics.parser import product_of_letters, readings
from arpo_trl.mathematics.text import clean, unspaced
from arpo_trl.mathematics.values import (
    Based,
    Builder,
    Choice,
    Group,
    NumberSet,
    Quantity,
    Ratio,
    Relation,
    Residue,
    SetOperation,
    Table,
    Text,
    Value,
)

ROUNDED_DIGITS = 6
"""A decimal fraction of so many significant digits stands for the number it is the rounding of: 0.333333 for 1/3."""
FLOAT_DIGITS = 15
"""One of so many is what a float prints, the last of which are noise: 0.30000000000000004."""
_FLOAT_NOISE = 1e-13
_PRECISION = 120  # decimal digits that numbers are compared at
_EXACT = Rational(1, 10**100)
_SAMPLES = 8

T = TypeVar("T")
_FLIPPED = {
    "<": ">",
    ">": "<",
    "≤": "≥",
    "≥": "≤",
    "=": "=",
    "≠": "≠",
    "≈": "≈",
    "≡": "≡",
    "≅": "≅",
    "∼": "∼",
    "∥": "∥",
    "⊥": "⊥",
}
_ORDER = ("<", "≤", ">", "≥")
_WHOLE = frozenset("n k m N".split())  # letters that mostly stand for whole numbers


def equal(prediction: str, gold: str) -> bool:
    """Whether a prediction means the same as a gold, both LaTeX or plain.

    Not symmetric: brackets around two numbers in the gold are kept, where a prediction's may be a printed list.
    """
    if unspaced(clean(prediction)) == unspaced(clean(gold)):
        return True
    golds = readings(gold)
    return any(_same(one, other) for one in readings(prediction) for other in golds)


def is_text(answer: str) -> bool:
    """Whether an answer is one that nothing but the same text equals: words, or what cannot be read."""
    return all(isinstance(value, Text) for value in readings(answer))


def _same(p: Value, g: Value) -> bool:
    """Whether a prediction's value is the gold's."""
    if type(p) is type(g):
        return _COMPARE[type(p)](p, g)
    if isinstance(g, Choice):
        return _is_letter(p, g.letter) or _same(p, g.content)
    if isinstance(p, Choice):
        return _is_letter(g, p.letter) or _same(p.content, g)
    if isinstance(p, Text) or isinstance(g, Text):
        return _same_letters(p, g)
    if isinstance(p, Relation) and p.ops == ("∈",) and isinstance(g, Group):
        return p.sides[1] is not None and _same(p.sides[1], g)
    if isinstance(g, Relation) and g.ops == ("∈",) and isinstance(p, Group):
        return g.sides[1] is not None and _same(p, g.sides[1])
    if isinstance(p, Relation) and not _is_set(g) and p.ops[0] in ("=", "≈"):
        return any(_same(value, g) for value in _values_of(p, is_gold=False))
    if isinstance(g, Relation) and not _is_set(p) and g.ops[0] in ("=", "≈"):
        return any(_same(p, value) for value in _values_of(g, is_gold=True))
    if isinstance(p, Group) and len(p.items) == 1:
        return _same(p.items[0], g)
    if isinstance(g, Group) and len(g.items) == 1:
        return _same(p, g.items[0])
    if isinstance(p, Table) and isinstance(g, Group):
        return _is_vector(p, g)
    if isinstance(p, Group) and isinstance(g, Table):
        return _is_vector(g, p)
    if isinstance(p, Ratio) and isinstance(g, Quantity):
        return len(p.parts) == 2 and _same(Quantity(p.parts[0] / p.parts[1]), g) if p.parts[-1] != 0 else False
    if isinstance(p, Quantity) and isinstance(g, Ratio):
        return _same(g, p)
    if isinstance(p, Based) and isinstance(g, Quantity):
        return _same(g, p)
    if isinstance(p, Quantity) and isinstance(g, Based):
        return p.value.is_Integer and not p.unit and not p.digits and str(p.value) == g.numeral
    if isinstance(p, Residue) and isinstance(g, Quantity):
        return _same(g, p)
    if isinstance(p, Quantity) and isinstance(g, Residue):
        return _congruent(Residue(p.value, g.modulus), g)
    if _is_set(p) or _is_set(g):
        return _same_sets(p, g)
    return False


# Numbers and formulas -----------------------------------------------------------------------------------------------


def _same_quantities(p: Quantity, g: Quantity) -> bool:
    if p.unit != g.unit and p.unit and g.unit:
        return False
    if _close(p.value, g.value, p.digits, g.digits):
        return True
    if "%" in (p.unit, g.unit) and p.unit != g.unit:
        hundredth, other = (p, g) if p.unit == "%" else (g, p)
        return _close(hundredth.value / 100, other.value, hundredth.digits, other.digits)
    return _is_letter_of(p.value, g.value)


def _is_letter_of(p: Expr, g: Expr) -> bool:
    """c for C, and e for E: a lone letter is an option, or the same name."""
    names = [_letter_name(value) for value in (p, g)]
    return names[0] is not None and names[1] is not None and names[0].lower() == names[1].lower()


def _letter_name(value: Expr) -> str | None:
    if value in (S.Exp1, S.ImaginaryUnit):
        return "e" if value == S.Exp1 else "i"
    return value.name if isinstance(value, Symbol) and len(value.name) == 1 else None


def _is_letter(value: Value, letter: str) -> bool:
    return isinstance(value, Quantity) and (_letter_name(value.value) or "").lower() == letter.lower()


def _close(a: Expr, b: Expr, a_digits: int = 0, b_digits: int = 0) -> bool:
    """Whether two expressions are equal: exactly, or to the digits that the decimal fractions in one of them have."""
    if a.has(S.NaN, S.ComplexInfinity) or b.has(S.NaN, S.ComplexInfinity):
        return False
    if a == b:
        return True
    if a.has(sympy.oo, -sympy.oo) or b.has(sympy.oo, -sympy.oo):
        return False
    a, b = _without_functions(a), _without_functions(b)
    digits = max(a_digits, b_digits)
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if not symbols:
        if isinstance(a, Rational) and isinstance(b, Rational) and digits < ROUNDED_DIGITS:
            return False
        return _close_numbers(a, b, a_digits, b_digits)
    return _close_formulas(a, b, symbols, digits)


def _without_functions(value: Expr) -> Expr:
    """Unknown functions as symbols of their own: f(x) is some number."""
    applied = sorted(value.atoms(AppliedUndef), key=lambda f: -len(str(f)))
    return value.xreplace({f: Symbol(str(f), real=True) for f in applied}) if applied else value


def _close_numbers(a: Expr, b: Expr, a_digits: int, b_digits: int) -> bool:
    if isinstance(a, Rational) and isinstance(b, Rational):
        parts = [(a, b)]
    else:
        x, y = sympy.N(a, _PRECISION), sympy.N(b, _PRECISION)
        if not (x.is_number and y.is_number) or x.has(sympy.nan, sympy.zoo) or y.has(sympy.nan, sympy.zoo):
            return False
        parts = [(_rational(f(x)), _rational(f(y))) for f in (sympy.re, sympy.im)]
        size = max(abs(part) for pair in parts for part in pair)
        if all(abs(one - other) <= _EXACT * size for one, other in parts):
            return True
    if a_digits == b_digits < FLOAT_DIGITS:  # neither is the other's rounding
        return False
    return any(
        digits >= ROUNDED_DIGITS and all(_is_rounding(*pair, digits) for pair in ordered)
        for digits, ordered in ((a_digits, parts), (b_digits, [(other, one) for one, other in parts]))
    )


def _rational(value: Expr) -> Rational:
    return Rational(str(value)) if value.is_Float else Rational(value)


def _is_rounding(decimal: Rational, exact: Rational, digits: int) -> bool:
    """Whether a decimal of so many significant digits is the other number, rounded, cut off or printed as a float."""
    gap = abs(decimal - exact)
    if gap == 0:
        return True
    if digits >= FLOAT_DIGITS and gap <= Rational(_FLOAT_NOISE) * max(abs(decimal), abs(exact)):
        return True
    if decimal == 0 or exact == 0:
        return False
    unit = Rational(10) ** (_exponent(abs(decimal)) - digits + 1)  # in the last place
    return bool(2 * gap <= unit or (0 < abs(exact) - abs(decimal) < unit and decimal * exact > 0))


def _exponent(value: Rational) -> int:
    """e with 10^e ≤ value < 10^(e+1)."""
    guess = len(str(value.p)) - len(str(value.q))
    return guess if value >= Rational(10) ** guess else guess - 1


def _close_formulas(a: Expr, b: Expr, symbols: Sequence[Symbol], digits: int) -> bool:
    """Formulas are equal where they agree at random points, positive and negative ones, where both are defined.

    At rational points polynomials and fractions are compared exactly. By Schwartz and Zippel's lemma a wrong formula
    passes with a probability that is negligible.
    """
    tolerance = Rational(1, 2) / Rational(10) ** (digits - 1) if digits >= ROUNDED_DIGITS else _EXACT
    draw = random.Random(0)
    agreed = 0
    for attempt in range(3 * _SAMPLES):
        point = {symbol: _sample(symbol, draw, positive=attempt % 3 == 0) for symbol in symbols}
        x, y = (value.xreplace(point) for value in (a, b))
        if isinstance(x, Rational) and isinstance(y, Rational):
            if x != y and digits < ROUNDED_DIGITS:
                return False
        else:
            x, y = sympy.N(x, _PRECISION), sympy.N(y, _PRECISION)
        if any(value.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo) for value in (x, y)):
            continue
        if not (x.is_number and y.is_number):
            return False
        if abs(x - y) > tolerance * max(abs(x), abs(y)):
            return False
        agreed += 1
        if agreed == _SAMPLES:
            return True
    return agreed >= 3


def _sample(symbol: Symbol, draw: random.Random, positive: bool) -> Rational:
    sign = 1 if positive or draw.random() < 0.5 else -1
    if symbol.name in _WHOLE:
        return Rational(sign * draw.randint(1, 12))
    return Rational(sign * draw.randint(3, 400), draw.choice((97, 101, 103)))


# Other single values ------------------------------------------------------------------------------------------------


def _same_letters(p: Value, g: Value) -> bool:
    """A word against a product that is written as one."""
    word, other = (p, g) if isinstance(p, Text) else (g, p)
    if not isinstance(word, Text) or not isinstance(other, Quantity):
        return False
    product = product_of_letters(word)
    return product is not None and _same(product, other)


def _same_numerals(p: Based, g: Based) -> bool:
    return p == g


def _same_ratios(p: Ratio, g: Ratio) -> bool:
    if p.unit != g.unit and p.unit and g.unit:
        return False
    if len(p.parts) != len(g.parts):
        return False
    if p.unit or g.unit or (p.clock and g.clock) or 0 in (*p.parts, *g.parts):  # a time of day
        return all(_close(one, other) for one, other in zip(p.parts, g.parts, strict=True))
    return all(_close(one * g.parts[0], other * p.parts[0]) for one, other in zip(p.parts, g.parts, strict=True))


def _congruent(p: Residue, g: Residue) -> bool:
    if not _close(p.modulus, g.modulus) or g.modulus == 0:
        return False
    difference = p.value - g.value
    if difference.is_Integer and g.modulus.is_Integer:
        return bool(difference % g.modulus == 0)
    return _close(p.value, g.value)


def _same_tables(p: Table, g: Table) -> bool:
    return (
        p.cases == g.cases
        and [len(row) for row in p.rows] == [len(row) for row in g.rows]
        and all(_in_order(one, other) for one, other in zip(p.rows, g.rows, strict=True))
    ) or (p.cases and g.cases and len(p.rows) == len(g.rows) and _matched(p.rows, g.rows, _in_order))


def _is_vector(table: Table, group: Group) -> bool:
    """A row or column against a tuple, a matrix against a list of its rows."""
    if table.cases or group.opening == "{":
        return False
    if all(len(row) == 1 for row in table.rows) or len(table.rows) == 1:
        cells = [cell for row in table.rows for cell in row]
        if len(cells) == len(group.items) and _in_order(cells, group.items):
            return True
    rows = [item.items if isinstance(item, Group) else (item,) for item in group.items]
    return len(rows) == len(table.rows) and all(
        len(one) == len(other) and _in_order(one, other) for one, other in zip(table.rows, rows, strict=True)
    )


# Several values -----------------------------------------------------------------------------------------------------


def _in_order(p: Sequence[Value], g: Sequence[Value]) -> bool:
    return len(p) == len(g) and all(_same(one, other) for one, other in zip(p, g, strict=True))


def _matched(p: Sequence[T], g: Sequence[T], same: Callable[[T, T], bool]) -> bool:
    """Whether each has a partner of its own, in any order."""
    left = list(g)
    for one in p:
        at = next((i for i, other in enumerate(left) if same(one, other)), None)
        if at is None:
            return False
        del left[at]
    return not left


def _covered(p: Sequence[Value], g: Sequence[Value]) -> bool:
    """Whether they are the same set, whatever is repeated."""
    return all(any(_same(one, other) for other in g) for one in p) and all(
        any(_same(one, other) for one in p) for other in g
    )


def _same_groups(p: Group, g: Group) -> bool:
    if _is_set(p) != _is_set(g) and _same_sets(p, g):
        return True
    if (p.opening, p.closing) != (g.opening, g.closing):
        for one in (p, g):
            if len(one.items) == 1:
                return _same(p.items[0] if one is p else p, g.items[0] if one is g else g)
    kinds = {_kind(p), _kind(g)}
    if kinds == {"list"}:
        return _same_lists(p, g)
    if kinds <= {"list", "set"}:
        return _covered(p.items, g.items)
    if "set" in kinds:
        return p.opening == "[" and len(p.items) > 2 and _covered(p.items, g.items)
    if "list" in kinds:
        bare, bracketed = (p, g) if _kind(p) == "list" else (g, p)
        if all(isinstance(item, Relation) for item in bare.items):
            return _in_order([value for item in bare.items for value in _assigned(item)], bracketed.items)
        if bracketed.opening == "[" and bracketed.closing == "]":
            return (bracketed is p or len(g.items) > 2) and _matched(p.items, g.items, _same)
        return bracketed.opening == "(" and bracketed.closing == ")" and _in_order(p.items, g.items)
    if (p.opening, p.closing) != (g.opening, g.closing) and (
        len(p.items) == 2
        or "(]" in (p.opening + p.closing, g.opening + g.closing)
        or "[)" in (p.opening + p.closing, g.opening + g.closing)
    ):
        return False
    return _in_order(p.items, g.items)


def _kind(group: Group) -> str:
    return {"": "list", "{": "set"}.get(group.opening, "brackets")


def _same_lists(p: Group, g: Group) -> bool:
    if _is_set(p) and _is_set(g) and (sets := (_as_set(p), _as_set(g))) and None not in sets:
        return _same_pieces(*sets)
    if p.joiner != g.joiner and "" not in (p.joiner, g.joiner) and any(isinstance(item, Relation) for item in g.items):
        return False
    if all(_is_name(item) for item in (*p.items, *g.items)):
        if not (p.joiner or g.joiner):
            return _in_order(p.items, g.items)  # an order of names
        if p.joiner and g.joiner and p.joiner != g.joiner:
            return False
    return _matched(_components(p.items), _components(g.items), _same)


def _is_name(value: Value) -> bool:
    return isinstance(value, Text) or (isinstance(value, Quantity) and bool(value.value.free_symbols))


def _components(items: Sequence[Value]) -> list[Value]:
    """(a, b) = (1, 2) as a = 1, b = 2, where it is not one of several solutions."""
    if len(items) != 1:
        return list(items)
    return _split_equation(items[0])


def _split_equation(value: Value) -> list[Value]:
    if isinstance(value, Relation) and value.ops == ("=",):
        left, right = value.sides
        if isinstance(left, Group) and isinstance(right, Group) and len(left.items) == len(right.items) > 1:
            return [Relation(pair, ("=",)) for pair in zip(left.items, right.items, strict=True)]
    return [value]


def _assigned(value: Value) -> list[Value]:
    return _values_of(value, is_gold=True)[:1] if isinstance(value, Relation) else [value]


# Relations ----------------------------------------------------------------------------------------------------------


def _values_of(relation: Relation, is_gold: bool) -> list[Value]:
    """What is on the right of a name, for an answer without it: x = 5 is 5. Empty for an equation that is the answer.

    Where the chain ends in an approximation that holds, both of its sides.
    """
    if any(op not in ("=", "≈") for op in relation.ops):
        return []
    first, *rest = relation.sides
    if not rest or rest[-1] is None:
        return []
    if first is not None and not _is_quantity_name(first, is_gold, rest[-1]):
        if not (isinstance(first, Quantity) and first.value.is_number):
            return []
        rest = [first, *rest]  # 2/4 = 1/2, √11 ≈ 3.317
    values = [side for side in rest if side is not None]
    between = relation.ops[len(relation.ops) - len(values) + 1 :]
    for op, one, other in zip(between, values[:-1], values[1:], strict=True):
        if op == "=" and not _same(one, other) and not _has_letters(one):
            return []
    if "≈" in relation.ops[-1:] and len(values) > 1:
        return [values[-2], values[-1]] if _roughly(values[-2], values[-1]) else []
    return values[-1:]


def _roughly(one: Value, other: Value) -> bool:
    if not (
        isinstance(one, Quantity) and isinstance(other, Quantity) and one.value.is_number and other.value.is_number
    ):
        return False
    return abs(complex(one.value) - complex(other.value)) <= 0.01 * abs(complex(other.value))


def _has_letters(value: Value) -> bool:
    return not isinstance(value, Quantity) or bool(value.value.free_symbols)


def _is_quantity_name(side: Value, is_gold: bool, right: Value) -> bool:
    """Whether the left side of an equation names what was asked for, rather than being part of the answer.

    3x + 4y = 12 is an answer; x, P(A), sin x, ab and a/b are names. A prediction may also name a sum.
    """
    if isinstance(side, Group):
        return all(isinstance(item, Quantity) and bool(item.value.free_symbols) for item in side.items)
    if isinstance(side, Ratio):
        return all(bool(part.free_symbols) for part in side.parts)
    if not isinstance(side, Quantity):
        return False
    value = side.value
    if value in (S.Exp1, S.ImaginaryUnit) or isinstance(value, Symbol | AppliedUndef):
        return True
    if isinstance(value, sympy.Pow) and isinstance(value.base, Symbol):  # x² = 4 is an equation for x
        return False
    if not value.free_symbols or (isinstance(right, Quantity) and right.value == 0):
        return False
    terms = sympy.Add.make_args(value)
    if len(terms) > 1 and (is_gold or any(not term.free_symbols for term in terms)):
        return False
    if isinstance(right, Quantity) and right.value.free_symbols & value.free_symbols:
        return False
    return all(
        abs(term.as_coeff_Mul()[0]) == 1 or (abs(term.as_coeff_Mul()[0]) < 1 and len(terms) == 1) for term in terms
    )


def _same_relations(p: Relation, g: Relation) -> bool:
    if (sets := (_as_set(p), _as_set(g))) and None not in sets and "=" not in (*p.ops, *g.ops):
        return _variable(p) in (None, _variable(g)) or _variable(g) is None if _same_pieces(*sets) else False
    if any(len(_split_equation(value)) > 1 for value in (p, g)):
        return _in_order_of(_split_equation(p), _split_equation(g))
    if p.ops == g.ops and _sides_agree(p.sides, g.sides):
        return True
    flipped = _flip(p)
    if flipped is not None and flipped.ops == g.ops and _sides_agree(flipped.sides, g.sides):
        return True
    if _is_proportional(p, g) or (flipped is not None and _is_proportional(flipped, g)):
        return True
    return _same_ends(p, g)


def _in_order_of(p: list[Value], g: list[Value]) -> bool:
    return len(p) == len(g) and all(
        isinstance(one, Relation) and isinstance(other, Relation) and _sides_agree(one.sides, other.sides)
        for one, other in zip(p, g, strict=True)
    )


def _sides_agree(p: Sequence[Value | None], g: Sequence[Value | None]) -> bool:
    return len(p) == len(g) and all(_same_side(one, other) for one, other in zip(p, g, strict=True))


def _same_side(one: Value | None, other: Value | None) -> bool:
    if one is None or other is None:
        return one is other or (isinstance(one or other, Quantity) and isinstance((one or other).value, Symbol))  # type: ignore[union-attr]
    if (
        isinstance(one, Quantity)
        and isinstance(other, Quantity)
        and "" not in (one.unit, other.unit)
        and one.unit != other.unit
    ):
        return False
    if (
        isinstance(one, Quantity)
        and isinstance(other, Quantity)
        and isinstance(one.value, Symbol)
        and isinstance(other.value, Symbol)
    ):
        return bool(one.value == other.value)  # the case of a name counts
    return _same(one, other)


def _flip(relation: Relation) -> Relation | None:
    if not all(op in _FLIPPED for op in relation.ops):
        return None
    return Relation(tuple(reversed(relation.sides)), tuple(_FLIPPED[op] for op in reversed(relation.ops)))


def _is_proportional(p: Relation, g: Relation) -> bool:
    """2x + 2 = 0 is x + 1 = 0, and −x > 1 is x < −1: the differences of the sides have a constant ratio."""
    if len(p.ops) != 1 or len(g.ops) != 1 or p.ops[0] not in ("=", "≠", *_ORDER) or g.ops[0] not in _FLIPPED:
        return False
    ends = [side for relation in (p, g) for side in relation.sides]
    if not all(isinstance(side, Quantity) and not side.unit for side in ends):
        return False
    a, b = (r.sides[0].value - r.sides[1].value for r in (p, g))  # type: ignore[union-attr]
    symbols = sorted(_without_functions(a).free_symbols, key=str)
    if not symbols or set(symbols) != _without_functions(b).free_symbols:
        return False
    draw = random.Random(1)
    point = {symbol: _sample(symbol, draw, positive=True) for symbol in symbols}
    x, y = _without_functions(a).xreplace(point), _without_functions(b).xreplace(point)
    if (
        not (x.is_number and y.is_number)
        or x.is_zero
        or y.is_zero
        or x.has(sympy.zoo, sympy.nan)
        or y.has(sympy.zoo, sympy.nan)
    ):
        return False
    ratio = x / y
    if p.ops[0] in _ORDER:
        if not ratio.is_real or p.ops[0] != (g.ops[0] if ratio > 0 else _FLIPPED[g.ops[0]]):
            return False
    elif p.ops[0] != g.ops[0]:
        return False
    return _close(_without_functions(a), _without_functions(b) * ratio)


def _same_ends(p: Relation, g: Relation) -> bool:
    """x = 2/4 = 1/2 is x = 1/2: chains of equations by their first and last sides."""
    if set(p.ops) | set(g.ops) != {"="} or len(p.ops) == len(g.ops):
        return False
    return _sides_agree((p.sides[0], p.sides[-1]), (g.sides[0], g.sides[-1]))


# Sets of numbers ----------------------------------------------------------------------------------------------------


def _is_set(value: Value) -> bool:
    if isinstance(value, Relation):
        return any(op in (*_ORDER, "≠", "∈") for op in value.ops)
    if isinstance(value, Group) and value.opening == "":
        return bool(value.items) and all(isinstance(item, Relation) and _is_set(item) for item in value.items)
    return isinstance(value, NumberSet | SetOperation | Builder)


def _same_sets(p: Value, g: Value) -> bool:
    sets = _as_set(p), _as_set(g)
    return None not in sets and _same_pieces(*sets)


def _same_operations(p: SetOperation, g: SetOperation) -> bool:
    return _same_sets(p, g) or (p.op == g.op and _same(p.left, g.left) and _same(p.right, g.right))


def _same_builders(p: Builder, g: Builder) -> bool:
    return _same_sets(p, g) or (_same(p.element, g.element) and _same(p.condition, g.condition))


def _as_set(value: Value | None) -> sympy.Set | None:
    """The set of numbers that a value is or may be read as; None where it is none."""
    if isinstance(value, NumberSet):
        return value.value
    if isinstance(value, Quantity) and isinstance(value.value, Symbol) and value.value.name in ("R", "Z", "Q", "N"):
        return {"R": S.Reals, "Z": S.Integers, "Q": S.Rationals, "N": S.Naturals}[value.value.name]
    if isinstance(value, Group):
        return _set_of_group(value)
    if isinstance(value, SetOperation):
        left, right = (
            sympy.FiniteSet(side.value) if isinstance(side, Quantity) and side.value.is_number else _as_set(side)
            for side in (value.left, value.right)  # ℝ∖{0} in plain braces
        )
        if left is None or right is None:
            return None
        return {"∪": sympy.Union, "∩": sympy.Intersection, "∖": sympy.Complement}[value.op](left, right)
    if isinstance(value, Builder):
        condition = value.condition
        if isinstance(value.element, Relation) and value.element.ops == ("∈",):
            domain, chosen = _as_set(value.element.sides[1]), _as_set(condition)
            return None if domain is None or chosen is None else sympy.Intersection(domain, chosen)
        return _as_set(condition) if isinstance(condition, Relation | Group) else None
    if isinstance(value, Relation):
        return _set_of_relation(value)
    return None


def _set_of_group(group: Group) -> sympy.Set | None:
    if group.opening == "" and _is_set(group):
        parts = [_as_set(item) for item in group.items]
        if None in parts or len({_variable(item) for item in group.items}) > 1:
            return None
        if group.joiner == "or":
            return sympy.Union(*parts)
        both = sympy.Intersection(*parts)
        return sympy.Union(*parts) if both == S.EmptySet and not group.joiner else both
    values = [item.value for item in group.items if isinstance(item, Quantity) and not item.unit]
    if len(values) != len(group.items):
        return None
    if group.opening == "{":
        return sympy.FiniteSet(*values)
    if len(values) == 2 and group.opening in ("(", "[") and all(v.is_extended_real is not False for v in values):
        return _interval(values[0], values[1], group.opening == "(", group.closing == ")")
    return None


def _interval(low: Expr, high: Expr, left_open: bool, right_open: bool) -> sympy.Set | None:
    if low.is_number and high.is_number and not low < high:
        return S.EmptySet if low != high or left_open or right_open else sympy.FiniteSet(low)
    return sympy.Interval(low, high, left_open, right_open)


def _variable(value: Value) -> Expr | None:
    """What a relation bounds, for −1 < x ≤ 2; None where it is unwritten."""
    if isinstance(value, Relation):
        sides = [side.value for side in value.sides if isinstance(side, Quantity)]
        names = [side for side in sides if isinstance(side, Symbol) or side == S.Exp1]
        return names[0] if len(names) == 1 else None
    return None


def _set_of_relation(relation: Relation) -> sympy.Set | None:
    if relation.ops == ("∈",):
        return _as_set(relation.sides[1])
    if not all(op in (*_ORDER, "≠", "=") for op in relation.ops) or len(relation.ops) > 2:
        return None
    sides = [
        None if side is None else side.value if isinstance(side, Quantity) and not side.unit else S.NaN
        for side in relation.sides
    ]
    if S.NaN in sides:
        return None
    names = [at for at, side in enumerate(sides) if side is None or isinstance(side, Symbol) or side == S.Exp1]
    if len(relation.ops) == 2 and 1 in names:
        at = 1
    elif len(relation.ops) == 1 and names:
        at = names[0]
    else:
        return None
    if any(
        side is not None and sides[at] is not None and side.has(sides[at]) for i, side in enumerate(sides) if i != at
    ):
        return None
    parts = []
    for i, op in enumerate(relation.ops):
        bound = sides[i] if i != at else sides[i + 1]
        seen = op if i == at else _FLIPPED[op]  # as if the name stood on the left
        if bound is None or bound.is_extended_real is False:
            return None
        part = {
            "<": lambda b: sympy.Interval.open(-sympy.oo, b),
            "≤": lambda b: sympy.Interval(-sympy.oo, b),
            ">": lambda b: sympy.Interval.open(b, sympy.oo),
            "≥": lambda b: sympy.Interval(b, sympy.oo),
            "=": lambda b: sympy.FiniteSet(b),
            "≠": lambda b: sympy.Complement(S.Reals, sympy.FiniteSet(b)),
        }[seen](bound)
        parts.append(part)
    if len(parts) == 2 and all(isinstance(part, sympy.Interval) for part in parts):
        low = next((part for part in parts if part.start != -sympy.oo), None)
        high = next((part for part in parts if part.start == -sympy.oo), None)
        if low is not None and high is not None:
            return _interval(low.start, high.end, low.left_open, high.right_open)
    return sympy.Intersection(*parts)


def _same_pieces(a: sympy.Set | None, b: sympy.Set | None) -> bool:
    """Whether two sets are equal, ends compared as numbers."""
    if a is None or b is None:
        return False
    if a == b:
        return True
    pieces = [list(s.args) if isinstance(s, sympy.Union) else [s] for s in (a, b)]
    return _matched(pieces[0], pieces[1], _same_piece)


def _same_piece(a: sympy.Set, b: sympy.Set) -> bool:
    if isinstance(a, sympy.Interval) and isinstance(b, sympy.Interval):
        return (
            (a.left_open, a.right_open) == (b.left_open, b.right_open)
            and _close(a.start, b.start)
            and _close(a.end, b.end)
        )
    if isinstance(a, sympy.FiniteSet) and isinstance(b, sympy.FiniteSet):
        return _matched(list(a.args), list(b.args), _close)
    return bool(a == b)


_COMPARE: dict[type, Callable[..., bool]] = {
    Quantity: _same_quantities,
    Based: _same_numerals,
    Ratio: _same_ratios,
    Residue: _congruent,
    Group: _same_groups,
    Relation: _same_relations,
    NumberSet: _same_sets,
    SetOperation: _same_operations,
    Builder: _same_builders,
    Table: _same_tables,
    Text: lambda p, g: p.canonical == g.canonical,
    Choice: lambda p, g: p.letter == g.letter and _same(p.content, g.content),
}
