"""Tokens of an answer to a factual question, normalized as SQuAD does, except for marks that change the meaning.

SQuAD deletes all punctuation, so that -9 becomes 9, 3.5 becomes 35, and <5 equals >5. Here the marks in a number or a
formula are kept: signs, decimal points, relations, operators, percent signs, primes and the brackets of intervals. All
other punctuation is deleted, as in SQuAD.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable

from arpo_trl.rewards.mathematics.text import TEXT_COMMANDS, unwrapped
from arpo_trl.visible import WITHOUT_MEANING

# Scripts written without spaces: kana, and the ideographs of Chinese, Japanese and Korean. Hangul has spaces.
_UNSPACED = re.compile("[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003134f]")
_ONE_SPELLING = WITHOUT_MEANING | str.maketrans(
    {**dict.fromkeys("‐‑‒–—―−﹣", "-"), "⁄": "/", "∕": "/", "≦": "≤", "≧": "≥", "⩽": "≤", "⩾": "≥"}
)
_OTHER_DIGIT = re.compile(r"(?![0-9])\d")
# While the punctuation is deleted, the kept marks are replaced by private-use characters.
_KEPT = {mark: chr(0xE000 + at) for at, mark in enumerate(".-+*/^=<>:!#%‰'\"[]|")}
_BACK = str.maketrans({kept: mark for mark, kept in _KEPT.items()})

# LaTeX's spaces, in numbers and between words: New~York, Boeing~747.
_THIN_SPACE = re.compile(r"(?<=\d)\\[,;:](?=\d{3}(?!\d))")  # 10\,000
_SPACE = re.compile(r"\\[,;:]|\\q?quad(?![A-Za-z])|(?<=[\w.,])~(?=[A-Z])|(?<=[A-Za-z][A-Za-z.])~(?=\d)")
_DEGREE = re.compile(r"\s*\^\s*(?:\\circ(?![A-Za-z])|\{\s*\\circ\s*\})(?:\s+(?=[CF](?![A-Za-z])))?")  # 25^\circ C
_TIMES = re.compile(r"\\times(?![A-Za-z])")
_FUNCTION = r"(?:sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|pi|inf|infty|infinity|oo)(?![A-Za-z])"
_SYMBOL = "[α-ωΑ-Ω∞√∛∫∑∏∂∇](?![α-ωΑ-Ω])"
_LEFT = rf"(?:\d|[)\]}}!|]|(?<![A-Za-z])[a-z]|(?<![A-Za-z]){_FUNCTION}|\\[A-Za-z]+|{_SYMBOL})"  # what operators follow
_RIGHT = rf"(?:[-+]?[$€£¥]?\.?\d|[(\[{{\\|]|[a-z](?![A-Za-z])|{_FUNCTION}|{_SYMBOL})"  # what it may precede
_SUPERSCRIPT = re.compile(r"(?:(?<=[0-9)\]}])|(?<=(?<![A-Za-z])[A-Za-z]))[⁺⁻]?[⁰¹²³⁴⁵⁶⁷⁸⁹]+")  # 2² is not 22


def _keep(pattern: str) -> Callable[[str], str]:
    compiled = re.compile(pattern)
    return lambda text: compiled.sub(
        lambda match: "".join(_KEPT.get(char, char) for char in match[0] if char != " "), text
    )


_PROSE = re.compile(rf"(?<![A-Za-z\\])(?!{_FUNCTION})[A-Za-z]{{3,}}")
_SPACED_MINUS = _keep(rf"{_LEFT}\s*-\s*(?={_RIGHT})")  # not in prose, where it is a dash: 1633 - 16 September 1701

_STAR = _keep(r"(?<=(?<![A-Za-z])[A-Z])\*")

_PERCENT = re.compile(r"(?<=[\d)\]}])\s*(?:\\?([%‰])|per ?cent\b)", re.IGNORECASE)
_BOUND = r"[-+]?(?:\d[\d.,/^]{0,40}|∞|\\infty|infinity|inf|oo)"
# The limit of a bound's length keeps the time linear in the length of a list, whose commas all may end the bound.
_INTERVAL = re.compile(rf"([\[(])\s*({_BOUND})\s*,\s*({_BOUND})\s*([\])])", re.IGNORECASE)
_QUOTED = re.compile(r"(?<!\w)['\"‘“]")


def _units(text: str) -> str:
    """Make percent signs words, like other units. 5%-10% is 5-10%."""
    text = re.sub(r"(?<=\d)\s*\\?%\s*-\s*(?=\d)", "-", text)
    return _PERCENT.sub(lambda match: f" {_KEPT[match[1] or '%']} ", text)


def _primes(text: str) -> str:
    """Keep the marks of minutes, feet, inches and derivatives: 6'2", f'(x). Quotation marks are deleted."""
    text = re.sub(r"(?<=[\dA-Za-z])(?:′′|(?<=\d)(?:''|”))", '"', text)
    text = re.sub(r"(?<=[\dA-Za-z])′|(?<=\d)’(?!\w*[A-Za-z])", "'", text)
    if _QUOTED.search(text):
        return _keep(r"(?<=\d)['\"](?=\s?\d)")(text)
    # Before a name, and after an n before a word, it is an apostrophe: Guns N' Roses, rock n' roll.
    apostrophe = r"\s+[A-Z][a-z]|(?<=[nN]['\"])\s+[A-Za-z]{2}"
    return _keep(rf"(?<=\d)['\"](?![A-Za-z])|(?<![A-Za-z]{{2}})(?<=[A-Za-z])['\"]+(?!\w|{apostrophe})")(text)


def _brackets(text: str) -> str:
    """Keep the brackets of an interval with a closed end: [1, 2) is not (1, 2]."""

    def kept(match: re.Match[str]) -> str:
        opening, low, high, closing = match.groups()
        if (opening, closing) == ("(", ")"):
            return match[0]
        return f" {_KEPT.get(opening, '')} {low}, {high} {_KEPT.get(closing, '')} "

    return _INTERVAL.sub(kept, text)


_DATE = re.compile(r"(?<![\d.])(\d+)([-/.])(\d+)\2(\d++)(?![\d.]*\d)")

_MARKS: tuple[Callable[[str], str], ...] = (
    lambda text: re.sub(rf"(?:(?<=[=(,<>^{{])\s*|\A)-\s+(?={_RIGHT})", "-", text),
    _brackets,
    _units,
    _primes,
    lambda text: re.sub(r"(?<=\d)\s*[~∼〜]\s*(?=\d)", "-", text),  # a range
    lambda text: re.sub(r"[~∼≃≅≒]\s*(?=[-+]?[$€£¥]?\.?\d)", "≈", text),
    lambda text: re.sub(r"(?<![\w)\]}!])[~!](?=[a-z(](?![A-Za-z]))", "¬", text),
    # A date or a version: every separator becomes a hyphen.
    lambda text: _DATE.sub(lambda match: _KEPT["-"].join(match.group(1, 3, 4)), text),
    lambda text: re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text),  # 1,234
    lambda text: re.sub(r"(?<=\d),(?=\d)", " ", text),
    lambda text: re.sub(r"(?<![\w.)])\.(?=\d)", "0.", text),
    _keep(r"(?<=\d)[.:](?=\d)"),
    lambda text: re.sub(r"\*\*(?=\s*[-+(]?\w)", "^", text) if re.search(rf"{_LEFT}\s*\*\*\s*{_RIGHT}", text) else text,
    lambda text: re.sub(r"<=|=<", "≤", re.sub(r">=", "≥", re.sub(r"!=|/=", "≠", text.replace("==", "=")))),
    _keep(r"(?<![-=])\s*[<>=](?!/?[A-Za-z]+>)\s*"),
    lambda text: re.sub(r"\s*([≤≥≠≈])\s*", r"\1", text),
    # Operators between the parts of a formula, with or without spaces.
    _keep(r"(?<=[\w)\]}|])\s*\+\s*(?=[\w(\[{\\$.|-])"),
    _keep(rf"{_LEFT}(?:\s*[*/^]\s*|-)(?={_RIGHT})"),
    lambda text: re.sub(rf"({_LEFT})\s*×\s*(?={_RIGHT})", r"\1×", text),
    lambda text: text if _PROSE.search(text) else _SPACED_MINUS(text),
    # The sign of a number, a letter, a blood group or an ion.
    _keep(rf"(?<![\w)\]}}])-(?={_RIGHT}|[A-Z](?![A-Za-z]))"),
    _keep(r"(?<![A-Za-z0-9.,])\d[\d.,]*\+(?![\w+])"),
    _keep(r"(?<=\d)E-(?=\d)"),
    _keep(r"(?<![A-Za-z0-9])[A-Za-z]{1,2}\d*[+-]+(?![\w+-])"),
    _keep(r"(?:(?<=\d)|(?<=(?<![A-Za-z])[a-z]))!(?![\w!])"),  # a factorial
    _keep(r"(?<=(?<![A-Za-z])[A-Z])#"),  # a language or a note
    lambda text: _STAR(text) if text.count("*") == 1 else text,  # A*, but not *Vitamin A*
    _keep(r"\|(?:(?![A-Za-z]{3})[^|])+\|"),  # an absolute value
)  # fmt: skip

# An article is followed by its word, so "Vitamin A" and "A, B or C" contain no article.
_ARTICLE = re.compile(r"(?<![\w.'’-])(?:a|an|the)(?=\s+[^\w\s]*(?!(?:and|or)\b)\w)")
_LETTERED = re.compile(
    r"\b(?:vitamin|hepatitis|influenza|class|type|group|grade|category|section|appendix|part|plan|team|series?|option|"
    r"choice|point|side|block|level|figure|exhibit|schedule|model|line|platform|gate)\s+$"
)
_ARTICLES = frozenset(("a", "an", "the"))


def normalized_tokens(text: str) -> list[str]:
    r"""Return the tokens of `text` by SQuAD's rules: without case, no punctuation, no articles, split at spaces.

    SQuAD's rules are for English in ASCII. In addition, compatibility forms are unified (NFKC), the digits of all
    scripts become ASCII, all Unicode punctuation is deleted, and every Chinese or Japanese character is a token. A
    text that consists only of articles or punctuation ("A", "The The", "!!!") keeps them, because otherwise it would
    equal every other such text. Signs, decimal points, relations and operators in numbers and formulas stay, with or
    without spaces around them: "-9" is not "9", "3!" is not "3", and "2n + 1" is "2n+1" but not "2n-1". A percent sign
    is a word: "5%" is "5 percent" but not "5" or "5‰". An "a" without a word after it is a letter: "Vitamin A" is not
    "Vitamin". LaTeX's commands of text and spaces are removed: "\text{New~York}" is "New York".
    """
    text = _SUPERSCRIPT.sub(lambda match: f"^{match[0]}", text.translate(_ONE_SPELLING))
    text = unicodedata.normalize("NFKC", text).translate(_ONE_SPELLING)
    text = _OTHER_DIGIT.sub(lambda match: str(unicodedata.decimal(match[0])), text)
    text = _TIMES.sub(" × ", _DEGREE.sub("°", unwrapped(text.replace("&amp;", "&"), TEXT_COMMANDS)))
    text = _SPACE.sub(" ", _THIN_SPACE.sub("", text))
    text = " ".join(text.split()).replace("+/-", "±").replace(" °", "°")
    marked = text
    for mark in _MARKS:
        marked = mark(marked)
    if "\\" in marked:  # LaTeX: braces separate tokens
        marked = re.sub(r"[{}]", " ", marked)
    marked, text = (form.casefold().replace("i\u0307", "i") for form in (marked, text))  # İstanbul
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
