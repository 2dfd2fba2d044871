"""The words and LaTeX commands of the grammar, mapped to canonical names."""

from __future__ import annotations

import re

from sympy import Rational, S

BASES = {
    word: base for base, word in enumerate("two three four five six seven eight nine ten eleven twelve".split(), 2)
}
BASES["sixteen"] = 16
RELATIONS = {
    "=": "=", "==": "=", "<": "<", ">": ">", "<=": "≤", ">=": "≥", "!=": "≠", "<>": "≠",
    r"\lt": "<", r"\gt": ">", r"\le": "≤", r"\leq": "≤", r"\leqslant": "≤", r"\ge": "≥", r"\geq": "≥",
    r"\geqslant": "≥", r"\leqq": "≤", r"\geqq": "≥", r"\ne": "≠", r"\neq": "≠", r"\approx": "≈",
    r"\simeq": "≈", r"\doteq": "≈",
    r"\equiv": "≡", r"\in": "∈", r"\notin": "∉", r"\cong": "≅", r"\sim": "∼", r"\parallel": "∥", r"\perp": "⊥",
    r"\subset": "⊂", r"\subseteq": "⊆",
}  # fmt: skip
SET_OPS = {r"\cup": "∪", r"\bigcup": "∪", r"\cap": "∩", r"\setminus": "∖", r"\backslash": "∖"}
JOINERS = {
    "and": "and",
    "or": "or",
    r"\wedge": "and",
    r"\land": "and",
    r"\vee": "or",
    r"\lor": "or",
    "和": "and",
    "或": "or",
}
MODS = {"mod", r"\mod", r"\bmod", r"\pmod"}
CURRENCIES = {
    "$": "dollar",
    r"\$": "dollar",
    "£": "pound",
    "¥": "yuan",
    "€": "euro",
    "₹": "rupee",
    "₽": "ruble",
    "₩": "won",
    "¢": "cent",
}
CURRENCY_CODES = frozenset("USD EUR GBP RMB CNY INR JPY".split())
_LARGE = {
    "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12, "quadrillion": 10**15,
    "dozen": 12, "gross": 144, "grand": 1000, "lakh": 10**5, "crore": 10**7,
}  # fmt: skip
PARTS = {
    word: Rational(1, parts)
    for word, parts in {
        "half": 2, "third": 3, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8, "ninth": 9,
        "tenth": 10, "twelfth": 12, "hundredth": 100, "thousandth": 1000, "millionth": 10**6,
    }.items()
}  # fmt: skip
"""Scales only at the end of a number: 1 third, but 5 third graders are 5."""
SCALES = {
    **_LARGE, **PARTS, "halves": PARTS["half"], **{f"{word}s": value for word, value in (_LARGE | PARTS).items()},
    "十": 10, "百": 100, "千": 1000, "万": 10**4, "亿": 10**8,
}  # fmt: skip
"""Words after a number that multiply it."""
GREEK = frozenset(
    "alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau "
    "upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Upsilon Phi Psi Omega Pi ell hbar".split()
)
DECORATIONS = frozenset(
    r"\vec \hat \bar \overline \overrightarrow \tilde \widehat \widetilde \dot \ddot \mathcal \mathfrak \mathscr "
    r"\mathbb \mathbf \boldsymbol \bm \angle \triangle \odot \measuredangle \nabla \partial "
    r"\det \dim \deg \arg \ker".split()
)
NUMBER_SETS = {"R": S.Reals, "Q": S.Rationals, "Z": S.Integers, "N": S.Naturals, "C": S.Complexes}
APPLIED = frozenset("f g h F G H O P E T Theta Omega Phi".split())
# Short English words that must not be read as products of letters.
WORDS = frozenset(
    "no or on of in is it at as to so up us we he me my by be do go if an am all any but for not yes the one two "
    "six ten odd red day set sum man men min max per out its are was has had can may new old big low top end".split()
)
# Words that are products in a formula, be^{-x}, unless the text around them is prose. None has an o, a rare variable.
PRODUCTS = frozenset("in is it at as up us we he me my by be if an am".split())
# Words after a number that change its value, so they are not units.
CHANGING = frozenset(
    "squared cubed doubled halved tripled plus minus divided multiplied inverse reciprocal factorial less more fewer "
    "above below over under up out of to than not wrong false incorrect".split()
) | frozenset(BASES)  # 12 point five
CHANGING_CHINESE = re.compile("^[多余成折]|[半的不非错]|以[上下内外]|分之")
UNITS = {
    unit: name
    for name, units in {
        "m": "m meter metre", "cm": "cm centimeter centimetre", "mm": "mm millimeter millimetre",
        "km": "km kilometer kilometre", "cm^3": "cc",
        "in": "in inch inches", "ft": "ft foot feet", "yd": "yd yard", "mi": "mi mile", "g": "g gram gramme",
        "kg": "kg kilogram",
        "mg": "mg milligram", "A": "A amp ampere", "oz": "oz ounce", "s": "s sec second", "min": "min minute",
        "h": "h hr hrs hour",
        "day": "day", "L": "L l liter litre", "mL": "mL ml milliliter millilitre", "N": "N newton", "J": "J joule",
        "W": "W watt", "V": "V volt", "K": "K kelvin", "Hz": "Hz hertz", "kHz": "kHz", "kW": "kW",
        "Pa": "Pa pascal", "kPa": "kPa",
        "h^-1 mi": "mph", "h^-1 km": "kph kmh", "MB": "MB", "GB": "GB", "KB": "KB kB", "bit": "bit", "mol": "mol mole",
        "dollar": "dollar USD usd",
        "rupee": "rupee INR", "cent": "cent ¢", "pound": "pound GBP lb lbs", "euro": "euro EUR",
        "yuan": "yuan RMB CNY yen 元",
        "degree": "degree deg",
        "%": "percent", "am": "am", "pm": "pm", "": "unit 个 个单位", "rad": "rad radian", "kJ": "kJ", "eV": "eV",
        "ha": "ha hectare",
    }.items()
    for unit in units.split()
}  # fmt: skip


def unit_name(word: str) -> str:
    for form in (
        word,
        word.lower(),
        word.removesuffix("s"),
        word.lower().removesuffix("s"),
        word.lower().removesuffix("es"),
    ):
        if form in UNITS:
            return UNITS[form]
    return word.lower().removesuffix("s") if len(word) > 3 else word.lower()
