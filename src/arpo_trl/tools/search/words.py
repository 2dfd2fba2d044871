"""Splits texts into search words. Has few imports, because the worker that reads a page imports it."""

from __future__ import annotations

import re
import unicodedata

# Texts in these scripts have no spaces between words, so each of their characters, with its marks, is a search word.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_THAI = "\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46"
_LAO = "\u0e81-\u0eb0\u0eb2\u0eb3\u0ebd-\u0ec6\u0edc-\u0edf"
_MYANMAR = "\u1000-\u102a\u103f\u1050-\u1055\u105a-\u105d\u1061\u1065\u1066\u106e-\u1070\u1075-\u1081\u108e"
_KHMER = "\u1780-\u17b3\u17d7\u17dc"
_SINGLE = _CJK + _THAI + _LAO + _MYANMAR + _KHMER
_MARKS = (
    "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u17b4-\u17d3\u17dd\u102b-\u103e\u1056-\u1059"
    "\u105e-\u1060\u1062-\u1064\u1067-\u106d\u1071-\u1074\u1082-\u108d\u108f\u109a-\u109d"
)
_WORD = re.compile(rf"[{_SINGLE}][{_MARKS}]*|[^\s{_SINGLE}]+")
_POSSESSIVE = re.compile(r"['’]s\b", re.IGNORECASE)
# The second part is the list of bm25s. The first part adds question words, or "who is …" would match all "who is …".
STOP_WORDS = frozenset(
    """what which who whom whose when where why how do does did has have had were can could
    a an and are as at be but by for if in into is it no not of on or such that the their then there these they this
    to was will with""".split()
)


def tokenize(text: str) -> list[str]:
    """Return the search words of `text`: lower case, without accents and without the most common English words.

    Unlike `bm25s.tokenize`, it keeps words of one letter or digit, because chemical symbols and digits carry meaning.
    The marks of Indian and South-East Asian scripts are letters, not accents. The time grows with the square of the
    longest run of accents in `text`.
    """
    # In this order, because ℝ, 𝐀 and ㎆ have a lower case only after the decomposition.
    folded = unicodedata.normalize("NFKD", _POSSESSIVE.sub("", text)).casefold()
    return [word for word in _WORD.findall(folded.translate(_FOLDED)) if word not in STOP_WORDS]


class _Folded(dict[int, str]):
    """For `str.translate`: accents are left out, and what is in no word becomes a space."""

    def __missing__(self, code: int) -> str:
        character = chr(code)
        kind = unicodedata.combining(character)
        is_accent = kind >= 200 or (0 < kind < 84 and kind != _VIRAMA)  # 84 to 199 are vowels and tones
        if is_accent or code == _ZERO_WIDTH_JOINER or unicodedata.name(character, "").startswith(_SELECTOR):
            folded = ""
        else:
            is_in_word = character.isalnum() or character == "_" or unicodedata.category(character) in ("Mn", "Mc")
            folded = character if is_in_word else " "
        return self.setdefault(code, folded)


_VIRAMA = 9
"""The class of the marks that join the consonants of Indian scripts."""
_ZERO_WIDTH_JOINER = 0x200D
_SELECTOR = "VARIATION SELECTOR"
_FOLDED = _Folded()
