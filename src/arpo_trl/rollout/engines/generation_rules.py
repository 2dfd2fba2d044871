"""The rules that `generate` would apply to the logits in addition to a run's settings, with their processors.

Rules come from the run's `generation_kwargs`. For names that these do not set, they come from the model's
`generation_config.json`. `distribution.py` applies them row by row. A rule that it cannot apply is an error that names
the rule. This module does not import torch, so that a configuration can check its rules.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    GenerationConfig,
    InfNanRemoveLogitsProcessor,
    LogitsProcessor,
    MinPLogitsWarper,
    NoBadWordsLogitsProcessor,
    NoRepeatNGramLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TopHLogitsWarper,
    TypicalLogitsWarper,
)

from arpo_trl.errors import ConfigError

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
"""The rules of `generate` that are applied, each with the value that disables it. None disables every rule."""
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
"""The rules that would change the distribution but are not applied, each with the value that disables it."""
NO_EFFECT = {"do_sample": True, "renormalize_logits": True, "use_cache": True}
"""Names that `generation_kwargs` may set to these values, since the sampler does the same in any case."""
ELSEWHERE = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_completion_length",
    "max_length": "max_completion_length",
}
"""Names that `generation_kwargs` must not set, each with the setting to use instead."""

Rules = dict[str, Any]
"""The rules in `HONOURED` that are enabled, with their values."""

_PROCESSORS: dict[str, Callable[[Any, list[int], Any], LogitsProcessor]] = {
    "sequence_bias": lambda value, eos_ids, device: SequenceBiasLogitsProcessor(value),
    "no_repeat_ngram_size": lambda value, eos_ids, device: NoRepeatNGramLogitsProcessor(value),
    "bad_words_ids": lambda value, eos_ids, device: NoBadWordsLogitsProcessor(value, eos_ids),
    "remove_invalid_values": lambda value, eos_ids, device: InfNanRemoveLogitsProcessor(),
    "suppress_tokens": lambda value, eos_ids, device: SuppressTokensLogitsProcessor(value, device),
    "begin_suppress_tokens": lambda value, eos_ids, device: SuppressTokensLogitsProcessor(value, device),
    "top_h": lambda value, eos_ids, device: TopHLogitsWarper(value),
    "min_p": lambda value, eos_ids, device: MinPLogitsWarper(value),
    "typical_p": lambda value, eos_ids, device: TypicalLogitsWarper(value),
    "epsilon_cutoff": lambda value, eos_ids, device: EpsilonLogitsWarper(value),
    "eta_cutoff": lambda value, eos_ids, device: EtaLogitsWarper(value, device=str(device)),
}
"""Creates the processor of each rule in `HONOURED`. The two rules that compare lengths need no processor."""


def processors(rules: Rules, eos_ids: Sequence[int] = (0,), device: Any = "cpu") -> dict[str, LogitsProcessor]:
    """transformers' processors for `rules`, by name.

    Args:
        eos_ids: The tokens that end a turn.
        device: The device of the logits, a `torch.device` or its name.

    Raises:
        TypeError, ValueError: transformers rejects a value.
    """
    return {
        name: _PROCESSORS[name](value, list(eos_ids), device) for name, value in rules.items() if name in _PROCESSORS
    }


def rules_of(model: GenerationConfig | None, kwargs: Mapping[str, Any] | None, min_p: float | None = None) -> Rules:
    """The rules that `generate` would apply in addition to a run's settings.

    Args:
        model: The model's generation config, for the names that `kwargs` do not set.
        kwargs: The run's `generation_kwargs`.
        min_p: The run's setting, which overrides the model's.

    Raises:
        ConfigError: A rule that would change the distribution cannot be applied, or transformers rejects its value.
    """
    for name, value in (kwargs or {}).items():
        if setting := ELSEWHERE.get(name):
            raise ConfigError(
                f"generation_kwargs sets {name}, but the setting for this is {setting}. Set {setting} to {value!r} "
                "instead."
            )
        if name in NO_EFFECT and _inert(value, NO_EFFECT[name]):
            continue
        if name not in HONOURED and not (name in REFUSED and _inert(value, REFUSED[name])):
            raise ConfigError(
                f"generation_kwargs sets {name}, which the tree sampler does not support. Remove it. Supported are "
                f"{', '.join(name for name in HONOURED if name not in ELSEWHERE)}."
            )
    theirs = {} if model is None else model.to_dict()
    for name, without in REFUSED.items():
        if (kwargs or {}).get(name) is None and not _inert(theirs.get(name), without):
            raise ConfigError(
                f"The model's generation_config sets {name} to {theirs[name]!r}, which would change the sampling, but "
                f"the tree sampler does not support it. Set model.generation_config.{name} to {without!r}, or remove "
                "it from generation_config.json."
            )
    found = {}
    for name, without in HONOURED.items():
        value = (kwargs or {}).get(name)
        if value is None and not (name == "min_p" and min_p is not None):
            value = theirs.get(name)
        if not _inert(value, without):
            found[name] = value
    try:
        processors(found)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"generation_kwargs or the model's generation_config set {', '.join(found)}, and transformers rejects a "
            f"value: {error}. Correct or remove it."
        ) from error
    return found


def refuse_rules(
    model: GenerationConfig | None,
    kwargs: Mapping[str, Any] | None,
    engine: str,
    way_out: str = "sample with transformers (use_vllm: false)",
) -> None:
    """Check that no rule is set, since `engine` would ignore it. `way_out` names an alternative that applies the
    rules.

    Raises:
        ConfigError: `kwargs` or the model's generation config sets a rule.
    """
    if kwargs:
        raise ConfigError(
            f"generation_kwargs sets {', '.join(kwargs)}, which is not passed on to {engine}. Remove it, or "
            f"{way_out}, which applies the rules that it supports and names the others."
        )
    if rules := rules_of(model, None):
        raise ConfigError(
            f"The model's generation_config sets {', '.join(rules)}, which would change the sampling, but is not "
            f"passed on to {engine}. Remove it from generation_config.json (or set it to None in "
            f"model.generation_config), or {way_out}."
        )


def _inert(value: Any, without: Any) -> bool:
    return value is None or value == without or (isinstance(value, (list, dict, tuple)) and not value)
