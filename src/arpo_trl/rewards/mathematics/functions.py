"""The functions and constants that answers may use. They reject arguments whose result would be too large."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import sympy
from sympy import Expr, Integer, Rational, S

from arpo_trl.rewards.mathematics.tokens import MAX_DIGITS, Unreadable

MAX_ROOT_DIGITS = 300
"""The most decimal digits of a number whose root is computed, because sympy factors the number."""
_SQUARE = Integer(2)


def expr(value: Any) -> Expr:
    if isinstance(value, Expr):
        return value
    raise Unreadable(f"a {type(value).__name__} in a formula")


def digits(value: Expr) -> float:
    """The most decimal digits of the rational numbers in an expression; 1 if there are none."""
    return max((abs(n.p).bit_length() + n.q.bit_length() for n in value.atoms(Rational)), default=1) * math.log10(2)


def power(base: Expr, exponent: Expr) -> Expr:
    if exponent.is_number:
        size = (
            abs(float(exponent))
            if exponent.is_real and digits(exponent) < 300
            else (0.0 if exponent.is_real is False else math.inf)
        )
        if size * max(digits(base), 1) > MAX_DIGITS or (not base.is_number and size > 1000):
            raise Unreadable("too large a power")
        if not exponent.is_Integer and digits(base) > MAX_ROOT_DIGITS:
            raise Unreadable("the root of too large a number")
    return sympy.Pow(base, exponent)


def factorial(value: Expr) -> Expr:
    if value.is_number and not (value.is_Integer and 0 <= value <= 4000):
        raise Unreadable("factorial")
    return sympy.factorial(value)


def gamma(value: Expr) -> Expr:
    if value.is_number and not abs(value) <= 4000:
        raise Unreadable("too large a gamma function")
    return sympy.gamma(value)


def double_factorial(value: Expr) -> Expr:
    if not (value.is_Integer and 0 <= value <= 4000):
        raise Unreadable("double factorial")
    return sympy.factorial2(value)


def binomial(n: Expr, k: Expr) -> Expr:
    if n.is_number and not abs(n) <= 10_000:
        raise Unreadable("too large a binomial coefficient")
    return sympy.binomial(n, k)


def permutations(n: Expr, k: Expr) -> Expr:
    if not (n.is_Integer and k.is_Integer and 0 <= k <= n):
        raise Unreadable("permutations")
    return factorial(n) / factorial(n - k)


def root(value: Expr, degree: Expr = _SQUARE) -> Expr:
    if degree.is_Integer and degree % 2 == 1 and value.is_negative:
        return -power(-value, 1 / degree)
    return power(value, 1 / degree)


def log(value: Expr, base: Expr | None = None) -> Expr:
    return sympy.log(value) if base is None else sympy.log(value) / sympy.log(base)


def quotient(over: Expr, under: Expr) -> Expr:
    if under == 0:
        raise Unreadable("division by zero")
    return over / under


TRIGONOMETRIC: dict[str, Callable[..., Expr]] = {
    name: getattr(sympy, name) for name in "sin cos tan cot sec csc sinh cosh tanh coth".split()
} | {"tg": sympy.tan, "ctg": sympy.cot, "cosec": sympy.csc}
INVERSES: dict[str, Callable[..., Expr]] = {
    name: getattr(sympy, f"a{name}") for name in "sin cos tan cot sec csc sinh cosh tanh coth".split()
}
FUNCTIONS: dict[str, Callable[..., Expr]] = {
    **TRIGONOMETRIC,
    **{f"{prefix}{name}": function for name, function in INVERSES.items() for prefix in ("a", "arc", "ar")},
    "arctg": sympy.atan, "ln": sympy.log, "log": log, "lg": lambda x: log(x, Integer(10)),
    "exp": lambda x: power(S.Exp1, x), "sqrt": root, "cbrt": lambda x: root(x, Integer(3)), "root": root,
    "abs": sympy.Abs, "Abs": sympy.Abs,
    "floor": sympy.floor, "ceil": sympy.ceiling, "ceiling": sympy.ceiling, "factorial": factorial, "gamma": gamma,
    "binomial": binomial, "comb": binomial, "perm": permutations, "gcd": sympy.gcd, "lcm": sympy.lcm,
    "GCD": sympy.gcd,
    "LCM": sympy.lcm, "max": sympy.Max, "min": sympy.Min, "Max": sympy.Max, "Min": sympy.Min, "Rational": quotient,
    "Fraction": quotient,
    "Integer": lambda x: x, "Float": lambda x: x, "Decimal": lambda x: x,
    "tensor": lambda x: x, "sgn": sympy.sign, "sign": sympy.sign,
    "re": sympy.re, "im": sympy.im, "Re": sympy.re, "Im": sympy.im, "conjugate": sympy.conjugate, "pow": power,
}  # fmt: skip
TAKES_SEVERAL = frozenset("gcd lcm GCD LCM max min Max Min log root Rational Fraction binomial comb perm pow".split())
"""The functions that may have more than one argument."""
CONSTANTS: dict[str, Expr] = {
    "pi": S.Pi, "e": S.Exp1, "i": S.ImaginaryUnit, "inf": S.Infinity, "infty": S.Infinity, "infinity": S.Infinity,
    "Infinity": S.Infinity, "oo": S.Infinity,
}  # fmt: skip
SPLIT_OFF = tuple("sqrt arcsin arccos arctan sin cos tan cot sec csc log ln lg exp pi".split())
"""Names that are split from adjacent letters: sinx, kpi."""
OF_LETTERS = re.compile(rf"[xyz]?(?:(?:{'|'.join(SPLIT_OFF[:-1])})[xyz])+")
"""Functions of letters without spaces: sinx, xlnx, sinxcosx."""
