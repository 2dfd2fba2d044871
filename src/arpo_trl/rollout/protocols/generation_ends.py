"""A model's generation config and the ids at which it stops, read before the model is loaded."""

from __future__ import annotations

from transformers import AutoConfig, GenerationConfig


def eos_ids_of(config: GenerationConfig | None) -> tuple[int, ...]:
    """Return the ids of the EOS tokens in `config`; empty if it has none."""
    ends = None if config is None else config.eos_token_id
    return () if ends is None else (ends,) if isinstance(ends, int) else tuple(ends)


def saved_eos_ids(model: str, *, revision: str | None = None, trust_remote_code: bool = False) -> tuple[int, ...]:
    """Return the ids of the EOS tokens that the model `model`, a folder or a Hub id, will have when loaded."""
    return eos_ids_of(saved_generation_config(model, revision=revision, trust_remote_code=trust_remote_code))


def saved_generation_config(
    model: str, *, revision: str | None = None, trust_remote_code: bool = False
) -> GenerationConfig | None:
    """Return the generation config that the model `model`, a folder or a Hub id, will have when loaded.

    If the model has no generation config, transformers derives it from the model's configuration. None if neither
    exists: an evaluation on a server needs only the tokenizer.
    """
    source = {} if revision is None else {"revision": revision}
    try:
        return GenerationConfig.from_pretrained(model, **source)
    except OSError:
        pass
    try:
        config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code, **source)
    except (OSError, ValueError):
        return None
    return GenerationConfig.from_model_config(config)
