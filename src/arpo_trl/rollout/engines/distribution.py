"""Turns a model's logits into the probabilities from which a turn is sampled.

This is the distribution of `generate` for the same settings. It applies transformers' processors in the order of
`generate`: the processors for a run's settings (temperature, top_k, top_p, min_p, repetition_penalty) and for the
rules of `generation_rules.py`. Rows have no padding here, so a rule that counts tokens counts only the row's tokens.
For these rules each turn is a separate call of `generate`, with a prompt that ends in the tool result.

Training scores tokens by the model's logits divided by the temperature, as TRL does, without the other processors.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from arpo_trl.rollout.engines.base import SamplingParams
from arpo_trl.rollout.engines.generation_rules import Rules, processors
from arpo_trl.rollout.engines.rows import RowState

_Step = Callable[[torch.Tensor, RowState], torch.Tensor]


class Distribution:
    """Computes the probabilities of each row's next token.

    Args:
        settings: The settings of the run.
        rules: The other rules that `generate` would apply.
        device: The device of the logits.
    """

    def __init__(self, settings: SamplingParams, rules: Rules, device: torch.device):
        self.needs_ids = settings.repetition_penalty != 1.0
        """Whether `RowState` must keep each row's ids, prompt included."""
        made = processors(rules, settings.eos_ids, device)
        no_eos = SuppressTokensLogitsProcessor(list(settings.eos_ids), device)
        steps: list[_Step] = []
        if "sequence_bias" in made:
            steps.append(self._row_by_row(made["sequence_bias"]))
        if settings.repetition_penalty != 1.0:
            penalty = RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)
            steps.append(lambda logits, rows: penalty(rows.history(len(logits)), logits))
        if "no_repeat_ngram_size" in made:
            steps.append(self._row_by_row(made["no_repeat_ngram_size"]))
        if "bad_words_ids" in made:
            steps.append(self._row_by_row(made["bad_words_ids"]))
        if "min_length" in rules:
            steps.append(_without(no_eos, lambda rows: rows.position + 1 < rules["min_length"]))
        if "min_new_tokens" in rules:
            steps.append(_without(no_eos, lambda rows: rows.written < rules["min_new_tokens"]))
        if "remove_invalid_values" in made:
            steps.append(_everywhere(made["remove_invalid_values"]))
        if "suppress_tokens" in made:
            steps.append(_everywhere(made["suppress_tokens"]))
        if "begin_suppress_tokens" in made:
            steps.append(_without(made["begin_suppress_tokens"], lambda rows: rows.written == 0))
        min_p = settings.min_p if settings.min_p is not None else rules.get("min_p")
        sampled = settings.temperature != 0.0  # greedy `generate` has no warpers
        warpers = (
            (settings.temperature not in (0.0, 1.0), lambda: TemperatureLogitsWarper(float(settings.temperature))),
            (sampled and "top_h" in made, lambda: made["top_h"]),
            (settings.top_k, lambda: TopKLogitsWarper(settings.top_k)),
            (settings.top_p < 1.0, lambda: TopPLogitsWarper(settings.top_p)),
            (min_p is not None, lambda: MinPLogitsWarper(min_p)),
            (sampled and "typical_p" in made, lambda: made["typical_p"]),
            (sampled and "epsilon_cutoff" in made, lambda: made["epsilon_cutoff"]),
            (sampled and "eta_cutoff" in made, lambda: made["eta_cutoff"]),
        )
        self._steps = [*steps, *(_everywhere(make()) for wanted, make in warpers if wanted)]

    def __call__(self, logits: torch.Tensor, rows: RowState) -> torch.Tensor:
        """(n, vocabulary) probabilities for float32 `logits` (n, vocabulary) of the first n rows in `rows`."""
        for step in self._steps:
            logits = step(logits, rows)
        return torch.softmax(logits, dim=-1)

    def _row_by_row(self, processor: LogitsProcessor) -> _Step:
        """Apply a processor that reads ids to each row separately, without padding."""
        self.needs_ids = True

        def step(logits: torch.Tensor, rows: RowState) -> torch.Tensor:
            return torch.cat([processor(rows.history_of(i), logits[i : i + 1]) for i in range(len(logits))])

        return step


def _without(suppress: LogitsProcessor, where: Callable[[RowState], torch.Tensor]) -> _Step:
    """Apply `suppress` to the rows for which `where` (rows,) is true."""

    def step(logits: torch.Tensor, rows: RowState) -> torch.Tensor:
        named = where(rows)[: len(logits)].unsqueeze(1)
        return torch.where(named, suppress(None, logits), logits)

    return step


def _everywhere(processor: LogitsProcessor) -> _Step:
    """Apply a processor that reads no ids to all rows."""
    return lambda logits, rows: processor(None, logits)


def sample(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """(rows,) token ids: the inverse of each row's cumulative distribution at `uniform` in [0, 1).

    Tokens of probability zero are never drawn: their cumulative sum equals their predecessor's, and the search returns
    the position to the right of equal sums.
    """
    cumulative = probs.cumsum(dim=-1)
    # Rounding can make the last sum less than 1. Scaling by it keeps every draw in range.
    target = (uniform * cumulative[:, -1]).unsqueeze(1)
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=probs.size(1) - 1)


def entropy(probs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Entropies in nats of the distributions in `rows`, a (n,) bool mask; 0·log 0 counts as 0."""
    selected = probs[rows]
    return -(selected * selected.clamp(min=torch.finfo(selected.dtype).tiny).log()).sum(dim=-1)
