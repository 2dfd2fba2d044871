"""Sets of numbers: conversion of intervals, relations, unions and {x | …} to sympy sets, and equality of sets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import sympy
from sympy import Expr, S, Symbol
from sympy.core.function import AppliedUndef

from arpo_trl.rewards.mathematics.closeness import close
from arpo_trl.rewards.mathematics.values import Builder, Group, NumberSet, Quantity, Relation, SetOperation, Value
from arpo_trl.rewards.mathematics.vocabulary import NUMBER_SETS

T = TypeVar("T")
FLIPPED = {
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
ORDER = ("<", "≤", ">", "≥")


def is_set(value: Value) -> bool:
    if isinstance(value, Relation):
        return any(op in (*ORDER, "≠", "∈") for op in value.ops)
    if isinstance(value, Group) and value.opening == "":
        return bool(value.items) and all(isinstance(item, Relation) and is_set(item) for item in value.items)
    return isinstance(value, NumberSet | SetOperation | Builder)


def as_set(value: Value | None) -> sympy.Set | None:
    """Return the set of numbers that a value is or may denote; None if it is not a set."""
    if isinstance(value, NumberSet):
        return value.value
    if isinstance(value, Quantity) and isinstance(value.value, Symbol) and value.value.name in tuple("RZQN"):
        return NUMBER_SETS[value.value.name]
    if isinstance(value, Group):
        return _set_of_group(value)
    if isinstance(value, SetOperation):
        left, right = (
            sympy.FiniteSet(side.value) if isinstance(side, Quantity) and side.value.is_number else as_set(side)
            for side in (value.left, value.right)  # a single number: {0} in plain braces parses as 0, as in ℝ∖{0}
        )
        if left is None or right is None:
            return None
        return {"∪": sympy.Union, "∩": sympy.Intersection, "∖": sympy.Complement}[value.op](left, right)
    if isinstance(value, Builder):
        condition = value.condition
        if not _bounds_element(value):
            return None
        if isinstance(value.element, Relation) and value.element.ops == ("∈",):
            domain, chosen = as_set(value.element.sides[1]), as_set(condition)
            return None if domain is None or chosen is None else sympy.Intersection(domain, chosen)
        return as_set(condition) if isinstance(condition, Relation | Group) else None
    if isinstance(value, Relation):
        return _set_of_relation(value)
    return None


def _set_of_group(group: Group) -> sympy.Set | None:
    if group.opening == "" and is_set(group):
        parts = [as_set(item) for item in group.items]
        if None in parts or len({variable(item) for item in group.items}) > 1:
            return None
        if group.joiner == "or":
            return sympy.Union(*parts)
        both = sympy.Intersection(*parts)
        if both != S.EmptySet:
            return both
        return None if group.joiner else sympy.Union(*parts)  # "x < 1 and x > 3" may mean either of two sets
    values = [item.value for item in group.items if isinstance(item, Quantity) and not item.unit]
    if len(values) != len(group.items):
        return None
    if group.opening == "{":
        return sympy.FiniteSet(*values)
    if len(values) == 2 and group.opening in ("(", "[") and all(v.is_extended_real is not False for v in values):
        return _interval(values[0], values[1], group.opening == "(", group.closing == ")")
    return None


def _interval(low: Expr, high: Expr, left_open: bool, right_open: bool) -> sympy.Set | None:
    if low.is_number and high.is_number and not low < high:  # "(7, 2)" is not an interval, and not an empty one
        return None if low != high or left_open or right_open else sympy.FiniteSet(low)
    return sympy.Interval(low, high, left_open, right_open)


def _bounds_element(builder: Builder) -> bool:
    """Whether the condition of {element | condition} is about its element."""
    element = builder.element.sides[0] if isinstance(builder.element, Relation) else builder.element
    conditions = builder.condition.items if isinstance(builder.condition, Group) else (builder.condition,)
    return isinstance(element, Quantity) and all(variable(one) in (None, element.value) for one in conditions)


def member_of(relation: Relation) -> Value | None:
    """Return the right side of x ∈ A, or None if the relation is another or bounds a formula, as −x ∈ A does."""
    if relation.ops != ("∈",):
        return None
    left = relation.sides[0]
    is_name = not isinstance(left, Quantity) or isinstance(left.value, Symbol | AppliedUndef) or left.value == S.Exp1
    return relation.sides[1] if is_name else None


def variable(value: Value) -> Expr | None:
    """Return the variable that a relation bounds, x for −1 < x ≤ 2; None if there is not exactly one."""
    if isinstance(value, Relation):
        sides = [side.value for side in value.sides if isinstance(side, Quantity)]
        names = [side for side in sides if isinstance(side, Symbol) or side == S.Exp1]
        return names[0] if len(names) == 1 else None
    return None


def _set_of_relation(relation: Relation) -> sympy.Set | None:
    if relation.ops == ("∈",):
        return as_set(member_of(relation))
    if not all(op in (*ORDER, "≠", "=") for op in relation.ops) or len(relation.ops) > 2:
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
        seen = op if i == at else FLIPPED[op]  # the operator with the name on the left
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


def same_pieces(a: sympy.Set | None, b: sympy.Set | None) -> bool:
    """Whether two sets are equal. End points are compared as numbers."""
    if a is None or b is None:
        return False
    if a == b:
        return True
    pieces = [list(s.args) if isinstance(s, sympy.Union) else [s] for s in (a, b)]
    return matched(pieces[0], pieces[1], _same_piece)


def _same_piece(a: sympy.Set, b: sympy.Set) -> bool:
    if isinstance(a, sympy.Interval) and isinstance(b, sympy.Interval):
        return (
            (a.left_open, a.right_open) == (b.left_open, b.right_open)
            and close(a.start, b.start)
            and close(a.end, b.end)
        )
    if isinstance(a, sympy.FiniteSet) and isinstance(b, sympy.FiniteSet):
        return matched(list(a.args), list(b.args), close)
    return bool(a == b)


def matched(p: Sequence[T], g: Sequence[T], same: Callable[[T, T], bool]) -> bool:
    """Whether the items of `p` and `g` can be paired one to one, in any order."""
    left = list(g)
    for one in p:
        at = next((i for i, other in enumerate(left) if same(one, other)), None)
        if at is None:
            return False
        del left[at]
    return not left
