"""Equality of two answers: structures part by part, numbers by value, decimal fractions up to their digits."""

from __future__ import annotations

import operator
import random
from collections.abc import Callable, Sequence

import sympy
from sympy import Expr, S, Symbol
from sympy.core.function import AppliedUndef

from arpo_trl.rewards.mathematics.closeness import close, sample, without_functions
from arpo_trl.rewards.mathematics.reading import readings
from arpo_trl.rewards.mathematics.sets import FLIPPED, ORDER, as_set, is_set, matched, member_of, same_pieces, variable
from arpo_trl.rewards.mathematics.text import clean, unspaced
from arpo_trl.rewards.mathematics.values import (
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


def equal(prediction: str, gold: str) -> bool:
    """Whether a prediction has the same meaning as a gold. Both are LaTeX or plain text.

    Not symmetric: square brackets around two numbers may be a printed list in the prediction, but not in the gold.
    """
    if unspaced(clean(prediction)) == unspaced(clean(gold)):
        return True
    golds = readings(gold)
    predictions = readings(prediction, several=any(isinstance(value, Group) for value in golds))
    return any(_same(one, other) for one in predictions for other in golds)


def is_text(answer: str) -> bool:
    """Whether only the same text equals an answer: it consists of words, or the parser rejects it."""
    return all(isinstance(value, Text) for value in readings(answer))


def _same(p: Value, g: Value) -> bool:
    """Whether a prediction's value equals a gold's value."""
    if type(p) is type(g):
        return _COMPARE[type(p)](p, g)
    if isinstance(g, Choice):
        return _is_letter(p, g.letter) or _same(p, g.content)
    if isinstance(p, Choice):
        return _is_letter(g, p.letter) or _same(p.content, g)
    if isinstance(p, Group) and isinstance(g, Text | Quantity) and _are_options(p, g):
        return True
    if isinstance(g, Group) and isinstance(p, Text | Quantity) and _are_options(g, p):
        return True
    if isinstance(p, Text) or isinstance(g, Text):
        return _same_letters(p, g)
    if isinstance(p, Relation) and p.ops == ("∈",) and isinstance(g, Group):
        return (members := member_of(p)) is not None and _same(members, g)
    if isinstance(g, Relation) and g.ops == ("∈",) and isinstance(p, Group):
        return (members := member_of(g)) is not None and _same(p, members)
    if isinstance(p, Relation) and not is_set(g) and p.ops[0] in ("=", "≈"):
        return any(_same(value, g) for value in _values_of(p, is_gold=False))
    if isinstance(g, Relation) and not is_set(p) and g.ops[0] in ("=", "≈"):
        return any(_same(p, value) for value in _values_of(g, is_gold=True))
    if isinstance(p, Group) and len(p.items) == 1 and not _is_set_of_set(p):
        return _same(p.items[0], g)
    if isinstance(g, Group) and len(g.items) == 1 and not _is_set_of_set(g):
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
    if isinstance(p, Relation) and isinstance(g, Residue):  # x ≡ 3 (mod 7) and 3 (mod 7)
        return (
            p.ops == ("≡",) and _is_variable(p.sides[0]) and isinstance(p.sides[1], Residue) and _same(p.sides[1], g)
        )
    if isinstance(p, Residue) and isinstance(g, Relation):
        return _same(g, p)
    if isinstance(p, Residue) and isinstance(g, Quantity):
        return _same(Quantity(p.value), g)  # not modulo its own modulus: 0 mod 1 would equal every integer
    if isinstance(p, Quantity) and isinstance(g, Residue):
        return _congruent(Residue(p.value, g.modulus), g)
    if is_set(p) or is_set(g):
        return _same_sets(p, g)
    return False


# Numbers and formulas -----------------------------------------------------------------------------------------------


def _same_quantities(p: Quantity, g: Quantity) -> bool:
    if p.unit != g.unit and p.unit and g.unit:
        return False
    if close(p.value, g.value, p.digits, g.digits):
        return True
    if "%" in (p.unit, g.unit) and p.unit != g.unit:
        hundredth, other = (p, g) if p.unit == "%" else (g, p)
        return close(hundredth.value / 100, other.value, hundredth.digits, other.digits)
    return _is_letter_of(p.value, g.value)


def _is_letter_of(p: Expr, g: Expr) -> bool:
    """Whether both are the same single letter in any case (c and C), as names or as multiple-choice options."""
    names = [_letter_name(value) for value in (p, g)]
    return names[0] is not None and names[1] is not None and names[0].lower() == names[1].lower()


def _letter_name(value: Expr) -> str | None:
    if value in (S.Exp1, S.ImaginaryUnit):
        return "e" if value == S.Exp1 else "i"
    return value.name if isinstance(value, Symbol) and len(value.name) == 1 else None


def _is_variable(side: Value | None) -> bool:
    return isinstance(side, Quantity) and isinstance(side.value, Symbol)


def _is_letter(value: Value, letter: str) -> bool:
    return isinstance(value, Quantity) and (_letter_name(value.value) or "").lower() == letter.lower()


# Other single values ------------------------------------------------------------------------------------------------


def _same_letters(p: Value, g: Value) -> bool:
    """Whether a word, read as the product of its letters, equals a formula."""
    word, other = (p, g) if isinstance(p, Text) else (g, p)
    if not isinstance(word, Text) or not isinstance(other, Quantity):
        return False
    return word.letters is not None and _same(word.letters, other)


def _are_options(group: Group, written_together: Text | Quantity) -> bool:
    """Whether a list of options equals the options written as one word: A, C, D and ACD."""
    letters = [item.value for item in group.items if isinstance(item, Quantity) and isinstance(item.value, Symbol)]
    if (
        group.opening
        or not 1 < len(letters) == len(group.items)
        or not all("A" <= str(name) <= "H" for name in letters)
    ):
        return False
    if isinstance(written_together, Text):
        return "".join(map(str, letters)).lower() == written_together.canonical
    return bool(sympy.Mul(*letters) == written_together.value) and not written_together.unit


def _same_ratios(p: Ratio, g: Ratio) -> bool:
    if p.unit != g.unit and p.unit and g.unit:
        return False
    if len(p.parts) != len(g.parts):
        return False
    if p.unit or g.unit or (p.clock and g.clock) or 0 in (*p.parts, *g.parts):  # a time of day
        return all(close(one, other) for one, other in zip(p.parts, g.parts, strict=True))
    return all(close(one * g.parts[0], other * p.parts[0]) for one, other in zip(p.parts, g.parts, strict=True))


def _congruent(p: Residue, g: Residue) -> bool:
    if not close(p.modulus, g.modulus) or g.modulus == 0:
        return False
    difference = p.value - g.value
    if difference.is_Integer and g.modulus.is_Integer:
        return bool(difference % g.modulus == 0)
    return close(p.value, g.value)


def _same_tables(p: Table, g: Table) -> bool:
    return (
        p.cases == g.cases
        and [len(row) for row in p.rows] == [len(row) for row in g.rows]
        and all(_in_order(one, other) for one, other in zip(p.rows, g.rows, strict=True))
    ) or (p.cases and g.cases and len(p.rows) == len(g.rows) and matched(p.rows, g.rows, _in_order))


def _is_vector(table: Table, group: Group) -> bool:
    """Whether a row or a column equals a tuple, or a matrix equals a list of its rows."""
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


def _covered(p: Sequence[Value], g: Sequence[Value]) -> bool:
    """Whether both have the same elements, regardless of order and repetition."""
    return all(any(_same_elements(one, other) for other in g) for one in p) and all(
        any(_same_elements(one, other) for one in p) for other in g
    )


def _same_elements(p: Value, g: Value) -> bool:
    """Whether two elements of sets are equal. {1} equals 1 as an answer, but not as an element."""
    return _is_set_of_elements(p) == _is_set_of_elements(g) and _same(p, g)


def _is_set_of_elements(value: Value) -> bool:
    return isinstance(value, Group) and value.opening == "{" and bool(value.items)


def _same_groups(p: Group, g: Group) -> bool:
    if is_set(p) != is_set(g) and _same_sets(p, g):
        return True
    if (p.opening, p.closing) != (g.opening, g.closing):
        for one in (p, g):
            if len(one.items) == 1 and not _is_set_of_set(one):
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
            return (bracketed is p or len(g.items) > 2) and matched(p.items, g.items, _same)
        return bracketed.opening == "(" and bracketed.closing == ")" and _in_order(p.items, g.items)
    if (p.opening, p.closing) != (g.opening, g.closing) and (
        len(p.items) == 2
        or "(]" in (p.opening + p.closing, g.opening + g.closing)
        or "[)" in (p.opening + p.closing, g.opening + g.closing)
    ):
        return False
    return _in_order(p.items, g.items)


def _is_set_of_set(group: Group) -> bool:
    """Whether a group is {∅}, {ℝ} or {{1, 2}}, which are not ∅, ℝ and {1, 2}."""
    return group.opening == "{" and (isinstance(group.items[0], NumberSet) or _is_set_of_elements(group.items[0]))


def _kind(group: Group) -> str:
    return {"": "list", "{": "set"}.get(group.opening, "brackets")


def _same_lists(p: Group, g: Group) -> bool:
    if is_set(p) and is_set(g) and (sets := (as_set(p), as_set(g))) and None not in sets:
        return same_pieces(*sets)
    if p.joiner != g.joiner and "" not in (p.joiner, g.joiner) and any(isinstance(item, Relation) for item in g.items):
        return False
    if all(_is_name(item) for item in (*p.items, *g.items)):
        if not (p.joiner or g.joiner):
            return _in_order(p.items, g.items)  # names may be a ranking, so their order matters
        if p.joiner and g.joiner and p.joiner != g.joiner:
            return False
    return matched(_components(p.items), _components(g.items), _same)


def _is_name(value: Value) -> bool:
    return isinstance(value, Text) or (isinstance(value, Quantity) and bool(value.value.free_symbols))


def _components(items: Sequence[Value]) -> list[Value]:
    """Return the items; split a single equation of tuples, (a, b) = (1, 2), into a = 1, b = 2."""
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
    """Return the values that a relation assigns to a name: 5 for x = 5. Empty if the equation itself is the answer.

    If the chain ends in a correct approximation, return both sides of it.
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
    if not (one.value.is_finite and other.value.is_finite) or (one.value.is_Integer and other.value.is_Integer):
        return False  # 1001 is no approximation of 1000
    return abs(complex(one.value) - complex(other.value)) <= 0.01 * abs(complex(other.value))


def _has_letters(value: Value) -> bool:
    return not isinstance(value, Quantity) or bool(value.value.free_symbols)


def _is_quantity_name(side: Value, is_gold: bool, right: Value) -> bool:
    """Whether the left side of an equation is a name for the answer and not a part of it.

    3x + 4y = 12 is an answer; x, P(A), sin x, ab and a/b are names. In a prediction, a sum may also be a name.
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
    value = without_functions(value)  # f(2) − f(1) = 3
    if isinstance(value, sympy.Pow) and isinstance(value.base, Symbol):  # x² = 4 is an equation for x
        return False
    names = value.free_symbols
    if len(names) == 1 and value.is_polynomial() and value.diff(*names).free_symbols:  # x² − x = 6
        return False
    if not names or (isinstance(right, Quantity) and right.value == 0):
        return False
    terms = sympy.Add.make_args(value)
    if len(terms) > 1 and (is_gold or any(not term.free_symbols for term in terms)):
        return False
    if isinstance(right, Quantity) and right.value.free_symbols & names:
        return False
    factors = [term.as_coeff_Mul()[0] for term in terms]
    whole = all(abs(factor) == 1 or (abs(factor) < 1 and len(terms) == 1) for factor in factors)
    return whole and max(factors) > 0  # −x = 5 is an equation for x


def _same_relations(p: Relation, g: Relation) -> bool:
    if (sets := (as_set(p), as_set(g))) and None not in sets and "=" not in (*p.ops, *g.ops):
        names = {name for name in map(variable, (p, g)) if name is not None}
        if len(names) < 2 and same_pieces(*sets):
            return True
        flipped = _flip(p)  # x < y and y > x
        return flipped is not None and flipped.ops == g.ops and _sides_agree(flipped.sides, g.sides)
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
        given = other if one is None else one
        return given is None or (isinstance(given, Quantity) and isinstance(given.value, Symbol))
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
        return bool(one.value == other.value)  # names in a relation are case-sensitive
    return _same(one, other)


def _flip(relation: Relation) -> Relation | None:
    if not all(op in FLIPPED for op in relation.ops):
        return None
    return Relation(tuple(reversed(relation.sides)), tuple(FLIPPED[op] for op in reversed(relation.ops)))


def _is_proportional(p: Relation, g: Relation) -> bool:
    """Whether the differences of the sides have a constant ratio: 2x + 2 = 0 and x + 1 = 0, −x > 1 and x < −1."""
    if len(p.ops) != 1 or len(g.ops) != 1 or p.ops[0] not in ("=", "≠", *ORDER) or g.ops[0] not in FLIPPED:
        return False
    ends = [side.value for r in (p, g) for side in r.sides if isinstance(side, Quantity) and not side.unit]
    if len(ends) < 4:  # two sides each
        return False
    a, b = ends[0] - ends[1], ends[2] - ends[3]
    symbols = sorted(without_functions(a).free_symbols, key=str)
    if not symbols or set(symbols) != without_functions(b).free_symbols:
        return False
    draw = random.Random(1)
    point = {symbol: sample(symbol, draw, positive=True) for symbol in symbols}
    x, y = without_functions(a).xreplace(point), without_functions(b).xreplace(point)
    if (
        not (x.is_number and y.is_number)
        or x.is_zero
        or y.is_zero
        or x.has(sympy.zoo, sympy.nan)
        or y.has(sympy.zoo, sympy.nan)
    ):
        return False
    ratio = x / y
    if p.ops[0] in ORDER:
        if not ratio.is_real or p.ops[0] != (g.ops[0] if ratio > 0 else FLIPPED[g.ops[0]]):
            return False
    elif p.ops[0] != g.ops[0]:
        return False
    return close(without_functions(a), without_functions(b) * ratio)


def _same_ends(p: Relation, g: Relation) -> bool:
    """Whether chains of equations have the same first and last sides: x = 2/4 = 1/2 and x = 1/2."""
    if set(p.ops) | set(g.ops) != {"="} or len(p.ops) == len(g.ops):
        return False
    if any(map(_is_variable, g.sides[1:-1])):  # a = b = 1 tells more than a = 1
        return False
    return _sides_agree((p.sides[0], p.sides[-1]), (g.sides[0], g.sides[-1]))


def _same_sets(p: Value, g: Value) -> bool:
    sets = as_set(p), as_set(g)
    return None not in sets and same_pieces(*sets)


def _same_operations(p: SetOperation, g: SetOperation) -> bool:
    return _same_sets(p, g) or (p.op == g.op and _same(p.left, g.left) and _same(p.right, g.right))


def _same_builders(p: Builder, g: Builder) -> bool:
    return _same_sets(p, g) or (_same(p.element, g.element) and _same(p.condition, g.condition))


_COMPARE: dict[type, Callable[..., bool]] = {
    Quantity: _same_quantities,
    Based: operator.eq,
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
