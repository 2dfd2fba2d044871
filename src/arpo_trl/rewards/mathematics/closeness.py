"""Equality of numbers and formulas: exact, or to the number of digits of a decimal fraction."""

from __future__ import annotations

import random
from collections.abc import Sequence

import sympy
from sympy import Expr, Rational, S, Symbol
from sympy.core.function import AppliedUndef

ROUNDED_DIGITS = 6
"""A decimal fraction with at least this many significant digits equals the number that it rounds: 0.333333 and 1/3."""
FLOAT_DIGITS = 15
"""A decimal fraction with at least this many digits is a printed float, whose last digits are noise:
0.30000000000000004."""
_MOST_FLOAT_DIGITS = 17
_FLOAT_NOISE = 1e-13
_PRECISION = 120  # decimal digits of numeric evaluation, more if the answers have more
_EXACT_DIGITS = 1000
_SAMPLES = 8
_WHOLE = frozenset("n k m N".split())  # names that usually denote integers


def close(a: Expr, b: Expr, a_digits: int = 0, b_digits: int = 0) -> bool:
    """Whether two expressions are equal: exactly, or to the digits of the decimal fractions in one of them."""
    if a.has(S.NaN, S.ComplexInfinity) or b.has(S.NaN, S.ComplexInfinity):
        return False
    if a == b:
        return True
    if a.has(sympy.oo, -sympy.oo) or b.has(sympy.oo, -sympy.oo):
        return False
    a, b = without_functions(a), without_functions(b)
    digits = max(a_digits, b_digits)
    if digits >= ROUNDED_DIGITS:  # the digits are those of the terms that differ
        a, b = _without_common_terms(a, b)
    symbols = sorted(a.free_symbols | b.free_symbols, key=str)
    if not symbols:
        if isinstance(a, Rational) and isinstance(b, Rational) and digits < ROUNDED_DIGITS:
            return False
        return _close_numbers(a, b, a_digits, b_digits)
    return _close_formulas(a, b, symbols, digits)


def digits_of_sum(terms: Sequence[tuple[Expr, int]]) -> int:
    """Return the significant digits of a sum of terms, each with the digits of its decimal fraction, 0 without one.

    A decimal fraction fixes the place of the last digit: 1000 + 0.333333 has ten digits. In a formula, the constant
    terms determine them.
    """
    most = max(digits for _, digits in terms)
    if most < ROUNDED_DIGITS:
        return most
    constants = [(term, digits) for term, digits in terms if term.is_number and term.is_real and term.is_finite]
    total = sympy.Add(*(term for term, _ in constants))
    approximate = [(term, digits) for term, digits in constants if digits and term != 0]
    if not approximate or total == 0:
        return most
    last = max(_exponent_of(term) - digits for term, digits in approximate)
    counted = _exponent_of(total) - last
    if FLOAT_DIGITS <= counted <= _MOST_FLOAT_DIGITS and most < FLOAT_DIGITS:  # not a printed float
        counted = _MOST_FLOAT_DIGITS + 1
    return max([counted, *(digits for term, digits in terms if not term.is_number)])


def _exponent_of(value: Expr) -> int:
    return _exponent(abs(value if isinstance(value, Rational) else _rational(sympy.N(value, _PRECISION))))


def without_functions(value: Expr) -> Expr:
    """Replace each application of an unknown function, such as f(x), by a symbol."""
    applied = sorted(value.atoms(AppliedUndef), key=lambda f: -len(str(f)))
    return value.xreplace({f: Symbol(str(f), real=True) for f in applied}) if applied else value


def _without_common_terms(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    terms, others = sympy.Add.make_args(a), sympy.Add.make_args(b)
    common = {term for term in terms if term.free_symbols} & set(others)
    return tuple(sympy.Add(*(term for term in side if term not in common)) for side in (terms, others))


def _close_numbers(a: Expr, b: Expr, a_digits: int, b_digits: int) -> bool:
    if isinstance(a, Rational) and isinstance(b, Rational):
        parts = [(a, b)]
    elif isinstance(gap := a - b, Rational) and max(a_digits, b_digits) < ROUNDED_DIGITS:  # e^1000 + 1 and e^1000
        return bool(gap == 0)
    else:
        precision = max(_PRECISION, a_digits + 10, b_digits + 10)
        x, y = sympy.N(a, precision), sympy.N(b, precision)
        if not (x.is_number and y.is_number) or x.has(sympy.nan, sympy.zoo) or y.has(sympy.nan, sympy.zoo):
            return False
        if _vanishes(gap):
            return True
        parts = [(_rational(f(x)), _rational(f(y))) for f in (sympy.re, sympy.im)]
    if a_digits == b_digits < FLOAT_DIGITS:  # with the same precision, neither is a rounding of the other
        return False
    return any(
        digits >= ROUNDED_DIGITS and all(_is_rounding(*pair, digits) for pair in ordered)
        for digits, ordered in ((a_digits, parts), (b_digits, [(other, one) for one, other in parts]))
    )


def _vanishes(gap: Expr, digits: int = _EXACT_DIGITS) -> bool:
    """Whether a difference is zero, up to `digits` digits of its largest term."""
    size = max(abs(sympy.N(term, 3)) for term in sympy.Add.make_args(gap))
    return bool(abs(sympy.N(gap, 3, maxn=2 * digits)) <= size / Rational(10) ** digits)


def _rational(value: Expr) -> Rational:
    return Rational(str(value)) if value.is_Float else Rational(value)


def _is_rounding(decimal: Rational, exact: Rational, digits: int) -> bool:
    """Whether a decimal with `digits` significant digits is `exact`, rounded, truncated or printed as a float."""
    gap = abs(decimal - exact)
    if gap == 0:
        return True
    if FLOAT_DIGITS <= digits <= _MOST_FLOAT_DIGITS and gap <= Rational(_FLOAT_NOISE) * max(abs(decimal), abs(exact)):
        return True
    if decimal == 0 or exact == 0:
        return False
    unit = Rational(10) ** (_exponent(abs(decimal)) - digits + 1)  # in the last place
    return bool(2 * gap <= unit or (0 < abs(exact) - abs(decimal) < unit and decimal * exact > 0))


def _exponent(value: Rational) -> int:
    """The e for which 10^e ≤ value < 10^(e+1)."""
    guess = len(str(value.p)) - len(str(value.q))
    return guess if value >= Rational(10) ** guess else guess - 1


def _close_formulas(a: Expr, b: Expr, symbols: Sequence[Symbol], digits: int) -> bool:
    """Whether two formulas agree at random points, positive and negative, where both are defined.

    Polynomials and fractions are compared exactly, because the points are rational. By the Schwartz–Zippel lemma, a
    wrong formula passes with negligible probability.
    """
    tolerance = Rational(1, 2) / Rational(10) ** (digits - 1)
    draw = random.Random(0)
    agreed = 0
    for attempt in range(3 * _SAMPLES):
        point = {symbol: sample(symbol, draw, positive=attempt % 3 == 0) for symbol in symbols}
        x, y = (value.xreplace(point) for value in (a, b))
        gap = x - y
        if isinstance(x, Rational) and isinstance(y, Rational):
            if x != y and digits < ROUNDED_DIGITS:
                return False
        else:
            x, y = (sympy.N(value, max(_PRECISION, digits + 10)) for value in (x, y))
        if any(value.has(sympy.nan, sympy.zoo, sympy.oo, -sympy.oo) for value in (x, y)):
            continue
        if not (x.is_number and y.is_number):
            return False
        if digits >= ROUNDED_DIGITS:
            if abs(x - y) > tolerance * max(abs(x), abs(y)):
                return False
        # Many digits, which take long, at one point: they tell e^1000 + x from e^1000.
        elif not _vanishes(gap, _PRECISION // 2 if agreed else _EXACT_DIGITS):
            return False
        agreed += 1
        if agreed == _SAMPLES:
            return True
    return agreed >= 3


def sample(symbol: Symbol, draw: random.Random, positive: bool) -> Rational:
    sign = 1 if positive or draw.random() < 0.5 else -1
    if symbol.name in _WHOLE:
        return Rational(sign * draw.randint(1, 12))
    return Rational(sign * draw.randint(3, 400), draw.choice((97, 101, 103)))
