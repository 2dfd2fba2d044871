"""Statistics over the scores of samples: pass@k, majority vote, bootstrap intervals and tests. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
_CHUNK = 2_000_000
"""The maximum number of numbers that a bootstrap has in memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimate:
    """A mean and its 95 % bootstrap interval. Example: `Estimate(mean=0.5, low=0.4, high=0.6)`."""

    mean: float
    low: float
    high: float


def pass_at_k(scores: Sequence[float], k: int) -> float:
    """Return the expected best score of k samples drawn from the n without replacement.

    It is an unbiased estimate for k new samples. If c of n scores are 1 and the others are 0, it is
    1 − C(n−c, k) / C(n, k). For scores between 0 and 1, each sorted score s_i is weighted by the probability that it
    is the best of k: Σ s_i · C(i−1, k−1) / C(n, k).

    Raises:
        ValueError: k is not in 1 … n.
    """
    n = len(scores)
    if not 1 <= k <= n:
        raise ValueError(f"k is {k} with {n} samples; expected 1 ≤ k ≤ {n}.")
    best = sum(score * math.comb(i, k - 1) for i, score in enumerate(sorted(scores)))
    return best / math.comb(n, k)


def majority(predictions: Sequence[str | None], same: Callable[[str, str], bool]) -> int | None:
    """Return the index of the first sample with the most frequent answer; None if no sample has an answer.

    `same`, which may be slow, decides whether two different texts are the same answer. In a tie, the answer that
    occurs first wins.
    """
    votes: dict[int, int] = {}
    first_of: dict[str, int] = {}
    for i, prediction in enumerate(predictions):
        if prediction:
            if prediction not in first_of:
                first_of[prediction] = next((j for j in votes if same(str(predictions[j]), prediction)), i)
            first = first_of[prediction]
            votes[first] = votes.get(first, 0) + 1
    return max(votes, key=lambda i: (votes[i], -i), default=None)


def bootstrap(scores: Sequence[float], seed: int) -> Estimate:
    """Return the mean over questions with the interval from resampling questions. For one question the interval is a
    point."""
    values = np.asarray(scores, dtype=float)
    low, high = np.quantile(_resampled_means(values, seed), (0.025, 0.975))
    return Estimate(mean=float(values.mean()), low=float(low), high=float(high))


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The mean difference B − A over the same questions, its 95 % interval, and the two-sided bootstrap p-value.

    Example: `Difference(mean=0.05, low=0.01, high=0.09, p=0.02)`.
    """

    mean: float
    low: float
    high: float
    p: float


def paired_bootstrap(a: Sequence[float], b: Sequence[float], seed: int) -> Difference:
    """Return the difference of B from A. Both have the same questions in the same order."""
    differences = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    means = _resampled_means(differences, seed)
    low, high = np.quantile(means, (0.025, 0.975))
    tail = min((means <= 0).mean(), (means >= 0).mean())
    return Difference(mean=float(differences.mean()), low=float(low), high=float(high), p=float(min(1.0, 2 * tail)))


@dataclass(frozen=True, slots=True, kw_only=True)
class McNemar:
    """The numbers of questions that only A and only B answered correctly, and the exact two-sided p-value.

    Example: `McNemar(only_a=1, only_b=3, p=0.625)`.
    """

    only_a: int
    only_b: int
    p: float


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> McNemar:
    """Return McNemar's exact test. Null hypothesis: if the runs disagree, either is right with probability 1/2."""
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return McNemar(only_a=only_a, only_b=only_b, p=min(1.0, 2 * tail / 2**n))


def _resampled_means(values: np.ndarray, seed: int) -> np.ndarray:
    rng, n = np.random.default_rng(seed), len(values)
    chunk = max(1, _CHUNK // n)
    sizes = [min(chunk, RESAMPLES - start) for start in range(0, RESAMPLES, chunk)]
    return np.concatenate([values[rng.integers(0, n, (size, n))].mean(axis=1) for size in sizes])
