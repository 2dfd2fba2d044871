"""Units after a number: 5 cm^2, 60 miles per hour, 12%, 5 apples."""

from __future__ import annotations

import re

from sympy import Expr, S

from arpo_trl.rewards.mathematics.functions import CONSTANTS, FUNCTIONS, OF_LETTERS
from arpo_trl.rewards.mathematics.tokens import Cursor, Token
from arpo_trl.rewards.mathematics.vocabulary import (
    CHANGING,
    CHANGING_CHINESE,
    CURRENCIES,
    GREEK,
    JOINERS,
    MODS,
    PARTS,
    RELATIONS,
    SCALES,
    UNITS,
    unit_name,
)


class Units(Cursor):
    """A cursor that distinguishes units from variables and names."""

    def __init__(self, tokens: list[Token]):
        super().__init__(tokens)
        words = {token.text for token in tokens if token.kind == "word"}
        self.constants: dict[str, Expr] = CONSTANTS
        if any(token.text in ("*", "**") for token in tokens):  # Python notation, where I and E are constants
            self.constants = CONSTANTS | {"I": S.ImaginaryUnit, "E": S.Exp1}
        elif words - FUNCTIONS.keys() - CONSTANTS.keys() == {"I"}:
            self.constants = CONSTANTS | {"I": S.ImaginaryUnit}

    def unit_at(self, pos: int) -> tuple[str, int] | None:
        """Return the unit that starts at a token, with the position after it; None unless it ends the quantity."""
        parts: list[str] = []
        start, exponent_of_next, divide = pos, 1, False
        while pos < len(self.tokens):
            token = self.tokens[pos]
            if token.text in ("%", r"\%"):
                name = "%"
            elif token.text in CURRENCIES:
                name = CURRENCIES[token.text]
            elif token.text == "per" and parts:
                divide, pos = True, pos + 1
                continue
            elif token.text in ("/", "*", r"\cdot") and parts and self._is_word(pos + 1):
                divide, pos = token.text == "/", pos + 1
                continue
            elif self._is_word(pos):
                if not parts and not self._starts_unit(token):
                    return None
                if token.text in ("square", "sq", "cubic"):
                    exponent_of_next, pos = (3 if token.text == "cubic" else 2), pos + 1
                    parts.append("")
                    continue
                name = unit_name(token.text)
            else:
                break
            pos += 1
            exponent = 1
            if pos + 1 < len(self.tokens) and self.tokens[pos].text in ("^", "**"):
                here, self.pos = self.pos, pos + 1
                raw = self.raw_group()
                if raw in ("-", "+"):
                    raw += self.next().text
                pos, self.pos = self.pos, here
                if not re.fullmatch(r"[+-]?\d", raw):
                    return None
                exponent = int(raw)
            exponent *= -exponent_of_next if divide else exponent_of_next
            parts.append((name if exponent == 1 else f"{name}^{exponent}") if name else "")
            exponent_of_next, divide = 1, False
        if not parts or not (
            pos == len(self.tokens)
            or self.tokens[pos].text in (",", ";", ")", "]", "}", r"\}", "\\\\", "&", "|")
            or self.tokens[pos].text in RELATIONS
            or self.tokens[pos].text in JOINERS
        ):
            return None
        return (" ".join(sorted(part for part in parts if part)), pos) if pos > start else None

    def _is_word(self, pos: int) -> bool:
        if pos >= len(self.tokens):
            return False
        token = self.tokens[pos]
        if token.text in JOINERS or token.text in CHANGING or token.text in MODS or self.is_scale(pos):
            return False
        if token.kind == "foreign":
            return CHANGING_CHINESE.search(token.text) is None
        return token.kind == "word" and (
            token.text in UNITS or not (self.is_mathematical(token.text) or OF_LETTERS.fullmatch(token.text))
        )

    def is_scale(self, pos: int) -> bool:
        """Whether a token multiplies the number before it: 5 million, 3万, 2 thirds."""
        if pos >= len(self.tokens) or self.tokens[pos].text not in SCALES:
            return False
        followed = pos + 1 < len(self.tokens) and self.tokens[pos + 1].kind == "word"
        return not (followed and self.tokens[pos].text in PARTS)

    def is_mathematical(self, word: str) -> bool:
        return word in self.constants or word in FUNCTIONS or word in GREEK

    def _starts_unit(self, token: Token) -> bool:
        if token.kind == "foreign":
            return True
        if len(token.text) == 1:
            return token.spaced and token.text in UNITS
        if token.text in UNITS or token.text == "sq":
            return True
        return len(token.text) >= (3 if token.spaced else 4)
