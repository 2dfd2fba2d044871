r"""Whether the scorers can be trusted on a benchmark.

Golds as predictions score 1, and other questions' golds do not. Equal text is equal before anything is read, so for
mathematics each gold is also predicted in another writing (`\dfrac{1}{2}` for `0.5`), which has to score 1, and with
another number in it, which must not.
"""

from __future__ import annotations

import random
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from arpo_trl.evaluation.benchmarks import Questions
from arpo_trl.evaluation.scoring import predicted, rule_scores
from arpo_trl.rewards.answers import MATH, math_equal
from arpo_trl.rewards.math_worker import math_worker


@dataclass(frozen=True, slots=True)
class ScorerCheck:
    """One scorer on one benchmark: its mean over golds as predictions, and over golds of other questions.

    `rewritten` and `changed` are the means over golds in another writing and over golds made wrong; None where the
    scorer compares words, or no gold can be written otherwise.
    """

    benchmark: str
    scorer: str
    items: int
    gold: float
    wrong: float
    rewritten: float | None = None
    changed: float | None = None


@dataclass(frozen=True, slots=True)
class Malformed:
    """An accepted answer that a scorer gets wrong, and by which scorers.

    `prediction` is what was predicted where it is not the answer itself: the answer in another writing, which does not
    score 1 (`equal`), or made wrong, which does.
    """

    benchmark: str
    number: int
    gold: str
    scorers: tuple[str, ...]
    prediction: str | None = None
    equal: bool = True


@dataclass(frozen=True, slots=True)
class TextOnly:
    """An accepted answer to a question of mathematics that nothing but the same text equals."""

    benchmark: str
    number: int
    gold: str


def check(questions: Questions, seed: int) -> tuple[list[ScorerCheck], list[Malformed], list[TextOnly]]:
    """The check of every scorer that a benchmark uses; each accepted answer is predicted, in an answer's usual form.

    An item's gold score is the least over its accepted answers. Wrong answers are the first golds, each moved to
    another question by a seeded cycle through all of them; those that happen to be right make up the wrong score.
    """
    rows = questions.rows
    name = questions.benchmark.name
    malformed: list[Malformed] = []
    golds: list[Mapping[str, float]] = []
    for number, row in enumerate(rows):
        scored = {gold: _scores_of(gold, row) for gold in row["answer"]}
        golds.append({key: min(each[key] for each in scored.values()) for key in next(iter(scored.values()))})
        for gold, scores in scored.items():
            if low := tuple(key for key, value in scores.items() if value < 1.0):
                malformed.append(Malformed(name, number, gold, low))
    wrong = [_scores_of(gold, row) for gold, row in zip(_shuffled(rows, seed), rows, strict=True)]
    mathematics = _Mathematics(name)
    for number, row in enumerate(rows):
        if row["task"] == MATH:
            for gold in row["answer"]:
                mathematics.try_out(number, gold)
    checks = []
    for scorer in dict.fromkeys(key for each in golds for key in each):
        right = [each[scorer] for each in golds if scorer in each]
        others = [each[scorer] for each in wrong if scorer in each]
        more = mathematics.means() if scorer == "math" else (None, None)
        checks.append(ScorerCheck(name, scorer, len(right), statistics.fmean(right), statistics.fmean(others), *more))
    return checks, malformed + mathematics.malformed, mathematics.text_only


def rewritten(gold: str) -> str | None:
    r"""A mathematical answer in another writing: 0.5 as \dfrac{1}{2}, (1,2) as \left( 1,2 \right); None without."""
    if re.fullmatch(r"-?\d+", gold):
        return f"{gold}.0"
    if re.fullmatch(r"-?\d*\.\d+", gold):
        value = Fraction(gold)
        return f"{'-' if value < 0 else ''}\\dfrac{{{abs(value.numerator)}}}{{{value.denominator}}}"
    if parts := re.fullmatch(r"(-?)\\[dt]?frac\{(\d+)\}\{(\d+)\}", gold):
        return f"{parts[1]}{parts[2]} / {parts[3]}"
    other = re.sub(r"\\frac(?![A-Za-z])", r"\\dfrac", gold)
    if other.count("(") == other.count(")") and r"\left" not in other and r"\(" not in other:
        other = other.replace("(", r"\left( ").replace(")", r" \right)")
    other = re.sub(r"(?<=[\w)}])\s*([+=])\s*(?=[\w(\\])", r" \1 ", other)
    return None if other == gold else other


def changed(gold: str) -> str | None:
    """A mathematical answer made wrong: its last whole number, or part of one, is one more; None without a number."""
    numbers = list(re.finditer(r"(?<![\d.])\d+", gold))
    if not numbers:
        return None
    last = numbers[-1]
    return f"{gold[: last.start()]}{int(last[0]) + 1:0{len(last[0])}d}{gold[last.end() :]}"


class _Mathematics:
    """What mathematical equality makes of the golds of one benchmark, written otherwise and made wrong."""

    def __init__(self, benchmark: str):
        self._benchmark = benchmark
        self._rewritten: list[bool] = []
        self._changed: list[bool] = []
        self.malformed: list[Malformed] = []
        self.text_only: list[TextOnly] = []

    def try_out(self, number: int, gold: str) -> None:
        if math_worker().is_text(gold):
            self.text_only.append(TextOnly(self._benchmark, number, gold))
            return
        if (other := rewritten(gold)) is not None:
            self._rewritten.append(math_equal(other, gold))
            if not self._rewritten[-1]:
                self.malformed.append(Malformed(self._benchmark, number, gold, ("math",), other))
        if (wrong := changed(gold)) is not None:
            self._changed.append(math_equal(wrong, gold))
            if self._changed[-1]:
                self.malformed.append(Malformed(self._benchmark, number, gold, ("math",), wrong, equal=False))

    def means(self) -> tuple[float | None, float | None]:
        return (
            statistics.fmean(self._rewritten) if self._rewritten else None,
            statistics.fmean(self._changed) if self._changed else None,
        )


def _scores_of(answer: str, row: Mapping[str, Any]) -> dict[str, float]:
    return rule_scores(predicted([f"<answer>\\boxed{{{answer}}}</answer>"]), row["answer"], row["task"])


def _shuffled(rows: Sequence[Mapping[str, Any]], seed: int) -> list[str]:
    """For each row the first gold of another one; with a single row its own."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    after = {number: order[(i + 1) % len(order)] for i, number in enumerate(order)}
    return [rows[after[number]]["answer"][0] for number in range(len(rows))]
