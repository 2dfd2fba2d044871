"""Selects the parts of a long text that match a question. Has few imports, because a page's worker imports it."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

from arpo_trl.tools.search.words import tokenize

_WINDOW_CHARS = 600
_GAP = "\n[…]\n"
_CUT = " …"
_SATURATION, _LENGTH_WEIGHT = 1.5, 0.75  # BM25's k1 and b, with the values of bm25s


def excerpt(text: str, goal: str, max_chars: int) -> str:
    """Return at most `max_chars` of `text`: the windows that match `goal` best, in text order. If none match, its
    beginning."""
    text = text.strip()
    if len(text) <= max_chars:
        return text
    windows = _windows(text, min(_WINDOW_CHARS, max_chars - len(_GAP)))
    kept: list[int] = []
    left = max_chars
    for number in _best(windows, goal):
        cost = len(windows[number]) + len(_GAP)
        if cost <= left:
            kept.append(number)
            left -= cost
    if not kept:
        return text[: max_chars - len(_CUT)] + _CUT
    shown = ""
    for before, number in zip([None, *sorted(kept)], sorted(kept), strict=False):
        joint = "" if before is None else "\n" if number == before + 1 else _GAP
        shown += joint + windows[number]
    return shown


def _windows(text: str, chars: int) -> list[str]:
    """Split `text` into pieces of at most `chars`, between lines, or between words of long lines."""
    pieces = (piece for line in text.split("\n") for piece in re.findall(rf".{{1,{chars}}}(?:\s|$)|\S+", line))
    windows: list[str] = []
    for piece in filter(None, map(str.strip, pieces)):
        for start in range(0, len(piece), chars):  # a longer word is encoded data
            part = piece[start : start + chars]
            if windows and len(windows[-1]) + len(part) < chars:
                windows[-1] += "\n" + part
            else:
                windows.append(part)
    return windows


def _best(windows: Sequence[str], goal: str) -> list[int]:
    """Return the positions of the windows that share a word with `goal`, best first by Lucene's BM25; ties in
    order."""
    wanted = Counter(tokenize(goal))
    if not wanted:
        return []
    counts = [Counter(tokenize(window)) for window in windows]
    mean_length = sum(count.total() for count in counts) / len(counts)
    found = {word: sum(word in count for count in counts) for word in wanted}
    rarity = {word: math.log(1 + (len(counts) - n + 0.5) / (n + 0.5)) for word, n in found.items()}
    scores = []
    for count in counts:
        length = 1 - _LENGTH_WEIGHT + _LENGTH_WEIGHT * count.total() / mean_length if mean_length else 1.0
        scores.append(
            sum(
                times * rarity[word] * count[word] / (count[word] + _SATURATION * length)
                for word, times in wanted.items()
                if word in count
            )
        )
    return sorted((i for i, value in enumerate(scores) if value > 0), key=lambda i: -scores[i])
