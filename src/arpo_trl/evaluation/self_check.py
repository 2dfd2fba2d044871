"""Whether the scorers can be trusted on a benchmark: golds as predictions score 1, other questions' golds do not."""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from arpo_trl.evaluation.benchmarks import Questions
from arpo_trl.evaluation.scoring import predicted, rule_scores


@dataclass(frozen=True, slots=True)
class ScorerCheck:
    """One scorer on one benchmark: its mean over golds as predictions, and over golds of other questions."""

    benchmark: str
    scorer: str
    items: int
    gold: float
    wrong: float


@dataclass(frozen=True, slots=True)
class Malformed:
    """An accepted answer that, predicted word for word, does not score 1, and by which scorers."""

    benchmark: str
    number: int
    gold: str
    scorers: tuple[str, ...]


def check(questions: Questions, seed: int) -> tuple[list[ScorerCheck], list[Malformed]]:
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
    checks = []
    for scorer in dict.fromkeys(key for each in golds for key in each):
        right = [each[scorer] for each in golds if scorer in each]
        others = [each[scorer] for each in wrong if scorer in each]
        checks.append(ScorerCheck(name, scorer, len(right), statistics.fmean(right), statistics.fmean(others)))
    return checks, malformed


def _scores_of(answer: str, row: Mapping[str, Any]) -> dict[str, float]:
    return rule_scores(predicted([f"<answer>\\boxed{{{answer}}}</answer>"]), row["answer"], row["task"])


def _shuffled(rows: Sequence[Mapping[str, Any]], seed: int) -> list[str]:
    """For each row the first gold of another one; with a single row its own."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    after = {number: order[(i + 1) % len(order)] for i, number in enumerate(order)}
    return [rows[after[number]]["answer"][0] for number in range(len(rows))]
