r"""A check that the scorers work on a benchmark.

A gold as the prediction must score 1, and the gold of another question must not score 1. Equal text counts as equal
without parsing. So for mathematics each gold is also rewritten (`\dfrac{1}{2}` for `0.5`), which must score 1, and
changed to another number, which must not score 1.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class ScorerCheck:
    """The check of one scorer on one benchmark.

    Attributes:
        benchmark: The name of the benchmark.
        scorer: The name of the score.
        items: The number of questions.
        gold: The mean score with the golds as predictions.
        wrong: The mean score with the golds of other questions as predictions.
        rewritten: The mean score with rewritten golds; None if the scorer compares words or no gold can be rewritten.
        changed: The mean score with golds whose number is changed; None if the scorer compares words or no gold has a
            number.
    """

    benchmark: str
    scorer: str
    items: int
    gold: float
    wrong: float
    rewritten: float | None = None
    changed: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Malformed:
    """An accepted answer that `scorers` get wrong.

    `prediction` is None if the answer itself does not score 1. Otherwise it is either the rewritten answer, which does
    not score 1 although it is `equal`, or the changed answer, which scores 1 although it is not `equal`.
    """

    benchmark: str
    number: int
    gold: str
    scorers: tuple[str, ...]
    prediction: str | None = None
    equal: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class TextOnly:
    """An accepted answer to a mathematical question that only the same text equals."""

    benchmark: str
    number: int
    gold: str


def check(questions: Questions, seed: int) -> tuple[list[ScorerCheck], list[Malformed], list[TextOnly]]:
    r"""Check every rule that scores the benchmark, with each accepted answer as the prediction, in `\boxed{…}`.

    The gold score of a question is the lowest over its accepted answers. The wrong answers are the first golds, moved
    to other questions by a seeded cycle through all questions. If a moved gold happens to be right, it raises the
    wrong score.

    Returns:
        One check per scorer, the answers that a scorer scores wrongly, and the answers that only the same text equals.
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
                malformed.append(Malformed(benchmark=name, number=number, gold=gold, scorers=low))
    wrong = [_scores_of(gold, row) for gold, row in zip(_shuffled(rows, seed), rows, strict=True)]
    means, misjudged, text_only = _mathematics(name, rows)
    checks = []
    for scorer in dict.fromkeys(key for each in golds for key in each):
        right = [each[scorer] for each in golds if scorer in each]
        others = [each[scorer] for each in wrong if scorer in each]
        checks.append(
            ScorerCheck(
                benchmark=name,
                scorer=scorer,
                items=len(right),
                gold=statistics.fmean(right),
                wrong=statistics.fmean(others),
                **(means if scorer == "math" else {}),
            )
        )
    return checks, malformed + misjudged, text_only


def rewritten(gold: str) -> str | None:
    r"""Return an equal answer in another notation: \dfrac{1}{2} for 0.5, \left( 1,2 \right) for (1,2); otherwise
    None."""
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
    """Return the answer with its last run of digits increased by one, which makes it wrong; None without a number."""
    numbers = list(re.finditer(r"(?<![\d.])\d+", gold))
    if not numbers:
        return None
    last = numbers[-1]
    return f"{gold[: last.start()]}{int(last[0]) + 1:0{len(last[0])}d}{gold[last.end() :]}"


def _mathematics(
    benchmark: str, rows: Sequence[Mapping[str, Any]]
) -> tuple[dict[str, float], list[Malformed], list[TextOnly]]:
    """Check mathematical equality with the rewritten and the changed golds.

    Returns:
        The means, "rewritten" and "changed", of those that exist, the answers that are compared wrongly, and the
        answers that only the same text equals.
    """
    found: dict[str, list[bool]] = {}
    malformed, text_only = [], []
    for number, row in enumerate(rows):
        for gold in row["answer"] if row["task"] == MATH else ():
            if math_worker().is_text(gold):
                text_only.append(TextOnly(benchmark=benchmark, number=number, gold=gold))
                continue
            for kind, other, equal in (("rewritten", rewritten(gold), True), ("changed", changed(gold), False)):
                if other is None:
                    continue
                found.setdefault(kind, []).append(math_equal(other, gold))
                if found[kind][-1] != equal:
                    malformed.append(
                        Malformed(
                            benchmark=benchmark,
                            number=number,
                            gold=gold,
                            scorers=("math",),
                            prediction=other,
                            equal=equal,
                        )
                    )
    return {kind: statistics.fmean(values) for kind, values in found.items()}, malformed, text_only


def _scores_of(answer: str, row: Mapping[str, Any]) -> dict[str, float]:
    return rule_scores(predicted([f"<answer>\\boxed{{{answer}}}</answer>"]), row["answer"], row["task"])


def _shuffled(rows: Sequence[Mapping[str, Any]], seed: int) -> list[str]:
    """Return for each row the first gold of another row; a single row gets its own first gold."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    after = {number: order[(i + 1) % len(order)] for i, number in enumerate(order)}
    return [rows[after[number]]["answer"][0] for number in range(len(rows))]
