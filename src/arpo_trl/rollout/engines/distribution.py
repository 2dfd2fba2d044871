"""From a model's logits to the probabilities that a turn is sampled from.

That is `generate`'s distribution for the same settings, by transformers' own processors in its own order: the settings
of a run (temperature, top_k, top_p, min_p, repetition_penalty), and what else `generate` would read: the run's
`generation_kwargs` and, for what these leave open, the model's `generation_config.json`. What changes the distribution
in another way than row by row is refused by name. Rows have no padding here, so a rule that counts tokens counts a
row's own; each turn is a `generate` of its own to them, after a prompt that ends in the tool result.

Training scores tokens by the model's logits over the temperature, as TRL does: no other processor is in it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopHLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from arpo_trl.errors import ConfigError
from arpo_trl.rollout.engines.base import SamplingSettings
from arpo_trl.rollout.engines.rows import RowState

HONOURED = {
    "sequence_bias": None,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "remove_invalid_values": False,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "top_h": None,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
"""Rules of `generate` that are applied, with the value at which they do nothing; None does nothing for any."""
REFUSED = {
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "exponential_decay_length_penalty": None,
    "encoder_repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "watermarking_config": None,
    "guidance_scale": 1.0,
    "token_healing": False,
    "num_beams": 1,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "num_return_sequences": 1,
    "constraints": None,
    "force_words_ids": None,
    "penalty_alpha": 0.0,
    "dola_layers": None,
    "stop_strings": None,
    "max_time": None,
}
"""Rules that change what is drawn and are not applied, likewise."""
ELSEWHERE = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_completion_length",
    "max_length": "max_completion_length",
}
"""What `generation_kwargs` may not say again, with the setting that says it."""

Rules = dict[str, Any]
"""Of `HONOURED`, those that do something."""
_Step = Callable[[torch.Tensor, RowState], torch.Tensor]


def rules_of(model: GenerationConfig | None, kwargs: Mapping[str, Any] | None, min_p: float | None = None) -> Rules:
    """What `generate` would apply besides a run's own settings.

    Args:
        model: The model's; it has a say where `kwargs` have none.
        kwargs: `generation_kwargs` of the run.
        min_p: The run's own, which goes before the model's.

    Raises:
        ConfigError: Something that would change the distribution cannot be applied.
    """
    for name, value in (kwargs or {}).items():
        if setting := ELSEWHERE.get(name):
            raise ConfigError(
                f"generation_kwargs sets {name}, which {setting} says. Set {setting} to {value!r} instead."
            )
        if name not in HONOURED and not (name in REFUSED and _inert(value, REFUSED[name])):
            raise ConfigError(
                f"generation_kwargs sets {name}, but the tree sampler does not read it. Unset it; it reads "
                f"{', '.join(name for name in HONOURED if name not in ELSEWHERE)}."
            )
    theirs = {} if model is None else model.to_dict()
    for name, without in REFUSED.items():
        if (kwargs or {}).get(name) is None and not _inert(theirs.get(name), without):
            raise ConfigError(
                f"The model's generation_config sets {name} to {theirs[name]!r}, which changes what is sampled, but "
                f"the tree sampler does not apply it. Set model.generation_config.{name} to {without!r}, or take it "
                "out of generation_config.json."
            )
    found = {}
    for name, without in HONOURED.items():
        value = (kwargs or {}).get(name)
        if value is None and not (name == "min_p" and min_p is not None):
            value = theirs.get(name)
        if not _inert(value, without):
            found[name] = value
    try:
        Distribution(SamplingSettings((0,)), found, torch.device("cpu"))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"generation_kwargs, or the model's generation_config, set {', '.join(found)}, of which transformers "
            f"says: {error}"
        ) from error
    return found


def refuse_rules(model: GenerationConfig | None, kwargs: Mapping[str, Any] | None, engine: str) -> None:
    """Returns if there is nothing that `engine`, which is not told of it, would leave out.

    Raises:
        ConfigError: There is.
    """
    if kwargs:
        raise ConfigError(
            f"generation_kwargs sets {', '.join(kwargs)}, but {engine} is not asked for it. Unset it, or sample with "
            "transformers (use_vllm: false), which applies what it can and names what it cannot."
        )
    if rules := rules_of(model, None):
        raise ConfigError(
            f"The model's generation_config sets {', '.join(rules)}, which changes what is sampled, but {engine} is "
            "not asked for it. Take it out of generation_config.json (or set it to None in model.generation_config), "
            "or sample with transformers (use_vllm: false)."
        )


class Distribution:
    """Probabilities of the next token, row by row.

    Args:
        settings: Of the run.
        rules: What `generate` would apply besides.
        device: Where the logits are.
    """

    def __init__(self, settings: SamplingSettings, rules: Rules, device: torch.device):
        self.needs_ids = settings.repetition_penalty != 1.0
        """Whether rows must keep the ids of their prompts."""
        self._device = device
        eos_ids = list(settings.eos_ids)
        steps: list[_Step] = []
        if "sequence_bias" in rules:
            steps.append(self._row_by_row(SequenceBiasLogitsProcessor(rules["sequence_bias"])))
        if settings.repetition_penalty != 1.0:
            penalty = RepetitionPenaltyLogitsProcessor(settings.repetition_penalty)
            steps.append(lambda logits, rows: penalty(rows.history(len(logits)), logits))
        if "no_repeat_ngram_size" in rules:
            steps.append(self._row_by_row(NoRepeatNGramLogitsProcessor(rules["no_repeat_ngram_size"])))
        if "bad_words_ids" in rules:
            steps.append(self._row_by_row(NoBadWordsLogitsProcessor(rules["bad_words_ids"], eos_ids)))
        if "min_length" in rules:
            steps.append(self._without(eos_ids, lambda rows: rows.position + 1 < rules["min_length"]))
        if "min_new_tokens" in rules:
            steps.append(self._without(eos_ids, lambda rows: rows.written < rules["min_new_tokens"]))
        if "remove_invalid_values" in rules:
            steps.append(_everywhere(InfNanRemoveLogitsProcessor()))
        if "suppress_tokens" in rules:
            steps.append(_everywhere(SuppressTokensLogitsProcessor(rules["suppress_tokens"], device)))
        if "begin_suppress_tokens" in rules:
            steps.append(self._without(rules["begin_suppress_tokens"], lambda rows: rows.written == 0))
        min_p = settings.min_p if settings.min_p is not None else rules.get("min_p")
        sampled = settings.temperature != 0.0  # else `generate` would have no warpers
        warpers = (
            (settings.temperature not in (0.0, 1.0), lambda: TemperatureLogitsWarper(float(settings.temperature))),
            (sampled and "top_h" in rules, lambda: TopHLogitsWarper(rules["top_h"])),
            (settings.top_k, lambda: TopKLogitsWarper(settings.top_k)),
            (settings.top_p < 1.0, lambda: TopPLogitsWarper(settings.top_p)),
            (min_p is not None, lambda: MinPLogitsWarper(min_p)),
            (sampled and "typical_p" in rules, lambda: TypicalLogitsWarper(rules["typical_p"])),
            (sampled and "epsilon_cutoff" in rules, lambda: EpsilonLogitsWarper(rules["epsilon_cutoff"])),
            (sampled and "eta_cutoff" in rules, lambda: EtaLogitsWarper(rules["eta_cutoff"], device=str(device))),
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

    def _without(self, ids: list[int], where: Callable[[RowState], torch.Tensor]) -> _Step:
        """No token of `ids` in the rows that `where` (rows,) names."""
        suppress = SuppressTokensLogitsProcessor(ids, self._device)

        def step(logits: torch.Tensor, rows: RowState) -> torch.Tensor:
            named = where(rows)[: len(logits)].unsqueeze(1)
            return torch.where(named, suppress(None, logits), logits)

        return step


def _everywhere(processor: LogitsProcessor) -> _Step:
    """A processor that reads no ids."""
    return lambda logits, rows: processor(None, logits)


def _inert(value: Any, without: Any) -> bool:
    return value is None or value == without or (isinstance(value, (list, dict, tuple)) and not value)


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
