"""From a model's logits to the probabilities that a turn is sampled from.

That is `generate`'s distribution for the same settings, by transformers' own processors in its own order: the settings
of a run (temperature, top_k, top_p, min_p, repetition_penalty), and the rules of `generation_rules.py`. Rows have no
padding here, so a rule that counts tokens counts a row's own; each turn is a `generate` of its own to them, after a
prompt that ends in the tool result.

Training scores tokens by the model's logits over the temperature, as TRL does: no other processor is in it.
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
    """Probabilities of the next token, row by row.

    Args:
        settings: Of the run.
        rules: What `generate` would apply besides.
        device: Where the logits are.
    """

    def __init__(self, settings: SamplingParams, rules: Rules, device: torch.device):
        self.needs_ids = settings.repetition_penalty != 1.0
        """Whether rows must keep the ids of their prompts."""
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
        sampled = settings.temperature != 0.0  # else `generate` would have no warpers
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
        """(rows, vocabulary) probabilities of float32 `logits` (rows, vocabulary), of the first rows of `rows`."""
        for step in self._steps:
            logits = step(logits, rows)
        return torch.softmax(logits, dim=-1)

    def _row_by_row(self, processor: LogitsProcessor) -> _Step:
        """A processor that reads the ids, each row's without padding."""
        self.needs_ids = True

        def step(logits: torch.Tensor, rows: RowState) -> torch.Tensor:
            return torch.cat([processor(rows.history_of(i), logits[i : i + 1]) for i in range(len(logits))])

        return step


def _without(suppress: LogitsProcessor, where: Callable[[RowState], torch.Tensor]) -> _Step:
    """`suppress` in the rows that `where` (rows,) names."""

    def step(logits: torch.Tensor, rows: RowState) -> torch.Tensor:
        named = where(rows)[: len(logits)].unsqueeze(1)
        return torch.where(named, suppress(None, logits), logits)

    return step


def _everywhere(processor: LogitsProcessor) -> _Step:
    """A processor that reads no ids."""
    return lambda logits, rows: processor(None, logits)


def sample(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """(rows,) token ids, the inverse of each row's cumulative distribution at `uniform` in [0, 1).

    A token of probability zero is never drawn: its cumulative sum equals its predecessor's, and the search goes right.
    """
    cumulative = probs.cumsum(dim=-1)
    # The last sum may fall short of 1 by rounding; scaling by it keeps every draw inside.
    target = (uniform * cumulative[:, -1]).unsqueeze(1)
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp(max=probs.size(1) - 1)


def entropy(probs: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Entropies in nats of the distributions that `rows` (bool) selects; 0·log 0 counts as 0."""
    selected = probs[rows]
    return -(selected * selected.clamp(min=torch.finfo(selected.dtype).tiny).log()).sum(dim=-1)
