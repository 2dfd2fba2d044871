"""One sample's verdicts: what was predicted, and how right each way of comparing finds it.

math        mathematical equality                                     benchmarks of mathematics
judge       a language model's verdict; None where it stays away. Right without asking where mathematics is equal, or
            the words of another answer are the same
f1          token F1 by SQuAD's rules                                 the others
f1_paper    token F1 as the paper's evaluation takes it: nothing but case and spaces is normalised
em          the same words, with the signs, points and relations of numbers and formulas
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from arpo_trl.evaluation.benchmarks import Benchmark, Scorer
from arpo_trl.rewards.answers import MATH, exact_match, extract_answer, math_equal, spaced_f1, token_f1
from arpo_trl.rewards.judge import Judgement, LLMJudge, question_of

JUDGE = "judge"


def predicted(turns: Sequence[str]) -> str | None:
    """The final answer in what a model wrote, by the paper's rule; None where there is none, or an empty one."""
    return extract_answer("\n".join(turns)) or None


def rule_scores(prediction: str | None, golds: Sequence[str], task: str) -> dict[str, float]:
    """The scores that need nobody, the task's own first."""
    if task == MATH:
        return {
            "math": float(prediction is not None and any(math_equal(prediction, gold) for gold in golds)),
            "em": float(exact_match(prediction or "", golds)),
        }
    return {
        "f1": token_f1(prediction or "", golds),
        "f1_paper": spaced_f1(prediction or "", golds),
        "em": float(exact_match(prediction or "", golds)),
    }


def score(prediction: str | None, row: Mapping[str, Any], judge: LLMJudge | None) -> dict[str, float | None]:
    """All scores of a prediction for a row {prompt, answer, task}."""
    golds = row["answer"]
    scores: dict[str, float | None] = {**rule_scores(prediction, golds, row["task"])}
    if judge is not None:
        if prediction is None:
            scores[JUDGE] = 0.0
        elif scores.get("math", scores["em"]) == 1.0:
            scores[JUDGE] = 1.0
        else:
            (verdict,) = judge.verdicts([Judgement(question_of(row["prompt"]), tuple(golds), prediction)])
            scores[JUDGE] = None if verdict is None else float(verdict)
    return scores


def main_metric(benchmark: Benchmark, names: Sequence[str]) -> str:
    """Which of the scores is the benchmark's: the judge's where it asks for one that is there, else the rule's."""
    if benchmark.scorer is Scorer.JUDGE and JUDGE in names:
        return JUDGE
    return "math" if "math" in names else "f1"
