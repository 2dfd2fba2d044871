"""What `generate` would apply to the logits besides a run's own settings: which rules, and transformers' processors.

Rules come from the run's `generation_kwargs` and, for what these leave open, from the model's
`generation_config.json`. `distribution.py` applies them row by row; a rule that cannot be applied so is refused by
name. No torch is imported here, so that a configuration can check its rules.
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
"""How each of `HONOURED` is made from its value; the two that compare lengths need no processor."""


def processors(rules: Rules, eos_ids: Sequence[int] = (0,), device: Any = "cpu") -> dict[str, LogitsProcessor]:
    """transformers' processors of `rules`, by name.

    Args:
        eos_ids: The tokens that end a turn.
        device: Where the logits are, a `torch.device` or its name.

    Raises:
        TypeError, ValueError: transformers objects to a value.
    """
    return {
        name: _PROCESSORS[name](value, list(eos_ids), device) for name, value in rules.items() if name in _PROCESSORS
    }


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
        processors(found)
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


def _inert(value: Any, without: Any) -> bool:
    return value is None or value == without or (isinstance(value, (list, dict, tuple)) and not value)
