"""Texts → the words by which they are searched. Light: a page's worker starts with it."""

from __future__ import annotations

import re
import unicodedata

# Chinese and Japanese put no spaces between words: each of their characters is searched for by itself.
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff"
_WORD = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+")
_POSSESSIVE = re.compile(r"['’]s\b")
# The second list is bm25s's, which has no question words: without them "who is …" would match every other "who is …".
STOP_WORDS = frozenset(
    """what which who whom whose when where why how do does did has have had were can could
    a an and are as at be but by for if in into is it no not of on or such that the their then there these they this
    to was will with""".split()
)


def tokenize(text: str) -> list[str]:
    """The words of `text` that are searched for: lower case, without accents, without the commonest English words.

    Words of one letter or digit stay, unlike in `bm25s.tokenize`: chemical symbols and single figures carry meaning.
    Time grows with the square of the longest run of accents in `text`.
    """
    decomposed = unicodedata.normalize("NFKD", _POSSESSIVE.sub("", text.casefold()))
    words = _WORD.findall("".join(character for character in decomposed if not unicodedata.combining(character)))
    return [word for word in words if word not in STOP_WORDS]
