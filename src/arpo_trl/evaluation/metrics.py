"""From the verdicts on samples to numbers with their uncertainty. Pure."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
_CHUNK = 2_000_000
"""Most numbers that a bootstrap holds at once."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean and its 95 % bootstrap interval."""

    mean: float
    low: float
    high: float


def pass_at_k(scores: Sequence[float], k: int) -> float:
    """The expected best of k of the n samples drawn without replacement: an unbiased estimate for k fresh samples.

    With verdicts of 0 and 1, c of n right, it is 1 − C(n−c, k) / C(n, k). With scores between, each sorted score s_i
    counts as often as it is the best of k: Σ s_i · C(i−1, k−1) / C(n, k).
    """
    n = len(scores)
    if not 1 <= k <= n:
        raise ValueError(f"k is {k} but there are {n} samples; expected 1 ≤ k ≤ n")
    best = sum(score * math.comb(i, k - 1) for i, score in enumerate(sorted(scores)))
    return best / math.comb(n, k)


def majority(predictions: Sequence[str | None], same: Callable[[str, str], bool]) -> int | None:
    """Index of the first sample that gave the answer most samples gave, by `same`; None if nobody answered.

    Of answers that are given equally often the earliest wins.
    """
    votes: dict[int, int] = {}
    for i, prediction in enumerate(predictions):
        if prediction:
            first = next((j for j in votes if same(str(predictions[j]), prediction)), i)
            votes[first] = votes.get(first, 0) + 1
    return max(votes, key=lambda i: (votes[i], -i), default=None)


def bootstrap(scores: Sequence[float], seed: int, resamples: int = RESAMPLES) -> Estimate:
    """The mean over questions, with the interval from resampling questions; of one question it is a point."""
    values = np.asarray(scores, dtype=float)
    low, high = np.quantile(_resampled_means(values, seed, resamples), (0.025, 0.975))
    return Estimate(float(values.mean()), float(low), float(high))


@dataclass(frozen=True, slots=True)
class Difference:
    """The mean difference B − A over the same questions, its 95 % interval, and the two-sided bootstrap p-value."""

    mean: float
    low: float
    high: float
    p: float


def paired_bootstrap(a: Sequence[float], b: Sequence[float], seed: int, resamples: int = RESAMPLES) -> Difference:
    """How B differs from A on the same questions, in the same order."""
    differences = np.asarray(b, dtype=float) - np.asarray(a, dtype=float)
    means = _resampled_means(differences, seed, resamples)
    low, high = np.quantile(means, (0.025, 0.975))
    tail = min((means <= 0).mean(), (means >= 0).mean())
    return Difference(float(differences.mean()), float(low), float(high), float(min(1.0, 2 * tail)))


@dataclass(frozen=True, slots=True)
class McNemar:
    """Questions that only A, and that only B, got right, and the exact two-sided p-value of their being so unequal."""

    only_a: int
    only_b: int
    p: float


def mcnemar(a: Sequence[bool], b: Sequence[bool]) -> McNemar:
    """The exact test: where the runs disagree, either is right with probability one half."""
    only_a = sum(x and not y for x, y in zip(a, b, strict=True))
    only_b = sum(y and not x for x, y in zip(a, b, strict=True))
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return McNemar(only_a, only_b, min(1.0, 2 * tail / 2**n))


def _resampled_means(values: np.ndarray, seed: int, resamples: int) -> np.ndarray:
    rng, n = np.random.default_rng(seed), len(values)
    at_once = max(1, _CHUNK // n)
    sizes = [min(at_once, resamples - start) for start in range(0, resamples, at_once)]
    return np.concatenate([values[rng.integers(0, n, (size, n))].mean(axis=1) for size in sizes])
