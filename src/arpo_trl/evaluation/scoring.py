"""Scores of one sample: its predicted answer, compared with the golds in several ways.

math        mathematical equality; for rows of the task "math"
f1          token F1 by SQuAD's rules; for rows of the task "qa"
f1_paper    token F1 of the paper's evaluation, which normalizes only case and spaces; for rows of the task "qa"
em          exact match of the tokens, including signs, decimal points and relations of numbers and formulas
judge       the verdict of a language model; None if it returns none. Without a request it is 1 if `math` (or `em`, for
            rows of the task "qa") is 1, and 0 if there is no answer
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from arpo_trl.evaluation.benchmarks import Benchmark, Scorer
from arpo_trl.rewards.answers import MATH, exact_match, extract_answer, spaced_f1, task_accuracy
from arpo_trl.rewards.judge import Judgement, question_of

JUDGE = "judge"


class Judge(Protocol):
    """What judges answers, such as an `LLMJudge`."""

    def verdicts(self, judgements: Sequence[Judgement]) -> list[bool | None]: ...


class _NotAsked:
    def verdicts(self, judgements: Sequence[Judgement]) -> list[bool | None]:
        return [None] * len(judgements)


NOT_ASKED: Judge = _NotAsked()
"""A judge without verdicts, so that they stay open."""


def predicted(turns: Sequence[str]) -> str | None:
    """Return the final answer in a model's turns, by the paper's rule; None if it is missing or empty."""
    return extract_answer("\n".join(turns)) or None


def rule_scores(prediction: str | None, golds: Sequence[str], task: str) -> dict[str, float]:
    """Return the scores that need no judge. The main score of the task is first."""
    accuracy = 0.0 if prediction is None else task_accuracy(prediction, golds, task)
    exact = {"em": float(exact_match(prediction or "", golds))}
    if task == MATH:
        return {"math": accuracy, **exact}
    return {"f1": accuracy, "f1_paper": spaced_f1(prediction or "", golds), **exact}


def score(prediction: str | None, row: Mapping[str, Any], judge: Judge | None) -> dict[str, float | None]:
    """Return all scores of a prediction for a row {prompt, answer, task}."""
    golds = row["answer"]
    scores: dict[str, float | None] = {**rule_scores(prediction, golds, row["task"])}
    if judge is not None:
        if prediction is None:
            scores[JUDGE] = 0.0
        elif scores.get("math", scores["em"]) == 1.0:
            scores[JUDGE] = 1.0
        else:
            judgement = Judgement(question=question_of(row["prompt"]), golds=tuple(golds), prediction=prediction)
            (verdict,) = judge.verdicts([judgement])
            scores[JUDGE] = None if verdict is None else float(verdict)
    return scores


def main_metric(benchmark: Benchmark, names: Sequence[str]) -> str:
    """Return the main score of a benchmark: the judge's score if the benchmark uses a judge and there is one,
    otherwise the rule's."""
    if benchmark.scorer is Scorer.JUDGE and JUDGE in names:
        return JUDGE
    return "math" if "math" in names else "f1"
