"""Parsing of numbers: mixed, repeating, scientific, complex, or in another base."""

from __future__ import annotations

import re

from sympy import Expr, Integer, Rational, S

from arpo_trl.rewards.mathematics.closeness import ROUNDED_DIGITS
from arpo_trl.rewards.mathematics.functions import binomial, permutations
from arpo_trl.rewards.mathematics.tokens import Cursor, Token, Unreadable
from arpo_trl.rewards.mathematics.values import Based
from arpo_trl.rewards.mathematics.vocabulary import BASES


class Numerals(Cursor):
    """A cursor that reads numbers and tracks the digits of their decimal fractions."""

    def __init__(self, tokens: list[Token]):
        super().__init__(tokens)
        self.digits = 0  # significant digits of the longest decimal fraction in the current quantity
        self.has_i = any(token.text == "i" for token in tokens)

    def number(self, mixed: bool) -> Expr:
        token = self.next().text
        if "." in token and (repeated := self._repetend()):
            return _repeating(token, repeated)
        if "." in token and self.take(r"\ldots"):
            return self._continued(token)
        mantissa = re.split("[eE]", token)[0]
        if "." in token.rstrip(".") or "e" in token.lower():
            self.digits = max(self.digits, len(mantissa.replace(".", "").lstrip("0")))
        elif "." not in token:
            if self.peek() in ("C", "P") and self.kind(1) == "number" and not self.spaced():  # 5C2
                ways = binomial if self.next().text == "C" else permutations
                return ways(Integer(token), Integer(self.next().text))
            if mixed and (fraction := self._fraction_ahead()) is not None:
                return Integer(token) + fraction
        if self.peek() == "j" and not self.spaced() and not self.has_i:  # Python's complex numbers
            self.pos += 1
            return Rational(token.rstrip(".")) * S.ImaginaryUnit
        return Rational(token.rstrip(".") if "e" not in token.lower() else token)

    def _fraction_ahead(self) -> Expr | None:
        """Read the proper fraction of a mixed number, 3 1/2 or 3\\frac{1}{2}; None if there is none."""
        start, tokens = self.pos, list(self.tokens)
        if self.spaced() and self.kind() == "number" and self.peek(1) == "/" and self.kind(2) == "number":
            over, under = self.peek(), self.peek(2)
            self.pos += 3
        elif self.take(r"\frac"):
            parts: list[str] = []
            for _ in range(2):
                if self.kind() == "number" and len(self.peek()) > 1:
                    self.split(1)
                parts.append(self.raw_group() if self.peek() else "")
            over, under = parts
        else:
            return None
        if over.isdecimal() and under.isdecimal() and 0 < int(over) < int(under):
            return Rational(int(over), int(under))
        self.tokens, self.pos = tokens, start
        return None

    def _repetend(self) -> str:
        r"""Read the repeating digits of 0.\overline{27}, 0.\dot{1}4\dot{2} or 0.(3); "" if there are none."""
        if self.peek() in (r"\overline", r"\bar"):
            braced = self.peek(1) == "{" and self.peek(2).isdecimal()
            if braced or (self.peek(1).isdecimal() and len(self.peek(1)) == 1):
                self.pos += 1
                return self.raw_group()
        if self.peek() == "(" and not self.spaced() and self.kind(1) == "number" and self.peek(2) == ")":
            digits = self.peek(1)
            if digits.isdecimal():
                self.pos += 3
                return digits
        if self.take(r"\dot"):
            digits = self.raw_group()
            if self.kind() == "number" and self.peek(1) == r"\dot":
                digits += self.next().text
            if self.take(r"\dot"):
                digits += self.raw_group()
            return digits
        return ""

    def _continued(self, token: str) -> Expr:
        """Return the value of a decimal with an ellipsis: 1/3 for 0.333…; without a repeating end, its digits.

        Raises:
            Unreadable: There are too few digits to determine the value, as in 1.2….
        """
        whole, _, fraction = token.partition(".")
        for length in range(1, len(fraction) // 2 + 1):
            block = fraction[-length:]
            rest = fraction
            while rest.endswith(block):
                rest = rest.removesuffix(block)
            times = (len(fraction) - len(rest)) // length
            if times >= (3 if length == 1 else 2):
                return _repeating(f"{whole}.{rest}", block)
        digits = len(token.replace(".", "").lstrip("0"))
        if digits < ROUNDED_DIGITS:
            raise Unreadable("a decimal fraction that goes on")
        self.digits = max(self.digits, digits)
        return Rational(token)


def based_numeral(text: str) -> Based:
    """Return a numeral with its base, from 2516_8 or 0x1F.

    Raises:
        Unreadable: The base is not in 2 … 36, or a digit does not exist in it.
    """
    if text[:2] in ("0x", "0X", "0b"):
        numeral, base = text[2:].upper(), 16 if text[1] in "xX" else 2
    else:
        numeral, _, written = text.partition("_")
        name = re.sub(r"[\s{}()]", "", written)
        numeral = numeral.strip()
        base = BASES.get(name, 0) if name.isalpha() else int(name[:4])
    if not 2 <= base <= 36 or any(int(digit, 36) >= base for digit in numeral):
        raise Unreadable("a base that is not supported, or a digit that does not exist in it")
    return Based(numeral.lstrip("0") or "0", base)


def _repeating(token: str, block: str) -> Expr:
    """Return the value of `token`, the digits before the repetition, and the repeating `block`: 1/6 for 0.1 and 6."""
    if not block.isdecimal():
        raise Unreadable("a repeating decimal")
    places = len(token.partition(".")[2])
    return Rational(token.rstrip(".") or "0") + Rational(int(block), (10 ** len(block) - 1) * 10**places)
