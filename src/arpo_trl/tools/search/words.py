"""Splits texts into search words. Has few imports, because the worker that reads a page imports it."""

from __future__ import annotations

import re
import unicodedata

# Chinese and Japanese have no spaces between words, so each of their characters is a search word.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_POSSESSIVE = re.compile(r"['’]s\b")
# The second part is the list of bm25s. The first part adds question words, or "who is …" would match all "who is …".
STOP_WORDS = frozenset(
    """what which who whom whose when where why how do does did has have had were can could
    a an and are as at be but by for if in into is it no not of on or such that the their then there these they this
    to was will with""".split()
)


def tokenize(text: str) -> list[str]:
    """Return the search words of `text`: lower case, without accents and without the most common English words.

    Unlike `bm25s.tokenize`, it keeps words of one letter or digit, because chemical symbols and digits carry meaning.
    The time grows with the square of the longest run of accents in `text`.
    """
    decomposed = unicodedata.normalize("NFKD", _POSSESSIVE.sub("", text.casefold()))
    words = _WORD.findall("".join(character for character in decomposed if not unicodedata.combining(character)))
    return [word for word in words if word not in STOP_WORDS]
