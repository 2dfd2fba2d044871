"""The words of an answer to a question of fact, as SQuAD compares them, and the marks that change what it says.

SQuAD deletes all punctuation, which makes 9 of -9, 35 of 3.5 and <5 of >5. Here a mark within a number or a formula
stays: signs, decimal points, relations, and the operators of a formula. Everything else goes, as it does there.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable

# Scripts written without spaces: kana, and the ideographs of Chinese, Japanese and Korean. Hangul has spaces.
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_ONE_SPELLING = str.maketrans(
    {**dict.fromkeys("‐‑‒–—―−﹣", "-"), "⁄": "/", "∕": "/", "≦": "≤", "≧": "≥", "⩽": "≤", "⩾": "≥"}
)
# Marks that stay are written as characters of private use until the punctuation is gone.
_KEPT = {mark: chr(0xE000 + at) for at, mark in enumerate(".-+*/^=<>:")}
_BACK = str.maketrans({kept: mark for mark, kept in _KEPT.items()})

_FUNCTION = r"(?:sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|inf|infty|infinity|oo)(?![A-Za-z])"
_LEFT = rf"(?:\d|[)\]}}!]|(?<![A-Za-z])[a-z]|(?<![A-Za-z]){_FUNCTION}|\\[A-Za-z]+)"  # what an operator may follow
_RIGHT = rf"(?:[-+]?[$€£¥]?\.?\d|[(\[{{\\|]|[a-z](?![A-Za-z])|{_FUNCTION})"  # and precede


def _keep(pattern: str) -> Callable[[str], str]:
    compiled = re.compile(pattern)
    return lambda text: compiled.sub(
        lambda match: "".join(_KEPT.get(char, char) for char in match[0] if char != " "), text
    )


_PROSE = re.compile(rf"(?<![A-Za-z\\])(?!{_FUNCTION})[A-Za-z]{{3,}}")
_SPACED_MINUS = _keep(rf"{_LEFT}\s*-\s*(?={_RIGHT})")  # a dash where there are words: 1633 - 16 September 1701

_DATE = re.compile(r"(?<![\d.])(\d+)([-/.])(\d+)\2(\d+)(?![\d.]*\d)")

_MARKS: tuple[Callable[[str], str], ...] = (
    # A date or a version: one separator, whichever.
    lambda text: _DATE.sub(lambda match: _KEPT["-"].join(match.group(1, 3, 4)), text),
    lambda text: re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text),  # 1,234
    lambda text: re.sub(r"(?<=\d),(?=\d)", " ", text),
    lambda text: re.sub(r"(?<![\w.)])\.(?=\d)", "0.", text),
    _keep(r"(?<=\d)[.:](?=\d)"),
    lambda text: re.sub(r"\*\*(?=\s*[-+(]?\w)", "^", text) if re.search(rf"{_LEFT}\s*\*\*\s*{_RIGHT}", text) else text,
    lambda text: re.sub(r"<=|=<", "≤", re.sub(r">=", "≥", re.sub(r"!=|/=", "≠", text.replace("==", "=")))),
    _keep(r"(?<![-=])\s*[<>=](?!/?[A-Za-z]+>)\s*"),
    lambda text: re.sub(r"\s*([≤≥≠≈])\s*", r"\1", text),
    # Between the parts of a formula, with or without spaces.
    _keep(r"(?<=[\w)\]}])\s*\+\s*(?=[\w(\[{\\$.-])"),
    _keep(rf"{_LEFT}(?:\s*[*/^]\s*|-)(?={_RIGHT})"),
    lambda text: text if _PROSE.search(text) else _SPACED_MINUS(text),
    # A sign: of a number, of a letter, of a blood group or an ion.
    _keep(rf"(?<![\w)\]}}])-(?={_RIGHT})"),
    _keep(r"(?<![A-Za-z0-9])[A-Za-z]{1,2}\d*[+-]+(?![\w+-])"),
)  # fmt: skip

# An article is followed by the word it belongs to: "Vitamin A" and "A, B or C" have none.
_ARTICLE = re.compile(r"(?<![\w.'’-])(?:a|an|the)(?=\s+[^\w\s]*(?!(?:and|or)\b)\w)")
_LETTERED = re.compile(
    r"\b(?:vitamin|hepatitis|influenza|class|type|group|grade|category|section|appendix|part|plan|team|series?|option|"
    r"choice|point|side|block|level|figure|exhibit|schedule|model|line|platform|gate)\s+$"
)
_ARTICLES = frozenset(("a", "an", "the"))


def normalized_tokens(text: str) -> list[str]:
    """Words of `text` as SQuAD compares them: lower case, without punctuation, without articles, split at spaces.

    Beyond SQuAD, whose rules are for English in ASCII: compatibility forms are unified (NFKC), all of Unicode's
    punctuation goes, and every Chinese or Japanese character is a token. A text of nothing but articles or punctuation
    ("A", "The The", "!!!") keeps them, since it would equal every other such text. Signs, decimal points, relations
    and operators within numbers and formulas stay, spaced or not: "-9" is not "9", "2n + 1" is "2n+1" and not "2n-1".
    An "a" that no word follows is a letter: "Vitamin A" is not "Vitamin".
    """
    text = unicodedata.normalize("NFKC", text.translate(_ONE_SPELLING)).translate(_ONE_SPELLING)
    text = " ".join(text.split())
    marked = text
    for mark in _MARKS:
        marked = mark(marked)
    if "\\" in marked:  # LaTeX: braces part what they enclose
        marked = re.sub(r"[{}]", " ", marked)
    marked, text = marked.lower(), text.lower()
    words = _without_punctuation(marked).split()
    if words and not _ARTICLES.issuperset(words):
        marked = _without_articles(marked)
    for candidate in (_without_punctuation(marked), text):
        if tokens := _UNSPACED.sub(r" \g<0> ", candidate).translate(_BACK).split():
            return tokens
    return []


def _without_punctuation(text: str) -> str:
    return "".join(
        char for char in text if char not in string.punctuation and not unicodedata.category(char).startswith("P")
    )


def _without_articles(text: str) -> str:
    def replace(match: re.Match[str]) -> str:
        named = match[0] == "a" and _LETTERED.search(text, max(0, match.start() - 20), match.start())
        return match[0] if named else " "

    return _ARTICLE.sub(replace, text)
