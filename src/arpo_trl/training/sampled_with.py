"""Checks that attributes of TRL's trainer that determine its samples keep their values.

TRL reads `trainer.temperature` or `trainer.generation_config` before each generation, so callbacks can anneal them.
Here engines get their settings when the trainer is created. A later change would only reach the loss.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trl import GRPOTrainer

from arpo_trl.errors import ConfigError

ATTRIBUTES = (
    *("temperature", "top_p", "top_k", "min_p", "repetition_penalty"),
    *("max_completion_length", "num_generations", "max_tool_calling_iterations"),
)
"""The attributes of `GRPOTrainer`, besides `generation_config`, which only the transformers engine has."""


def sampled_with(trainer: GRPOTrainer) -> dict[str, Any]:
    """The values of the attributes by name, with those of `generation_config`."""
    generation = getattr(trainer, "generation_config", None)
    values = {} if generation is None else {f"generation_config.{k}": v for k, v in generation.to_dict().items()}
    return {name: getattr(trainer, name) for name in ATTRIBUTES} | values


def check_unchanged(trainer: GRPOTrainer, before: Mapping[str, Any]) -> None:
    """Checks that the attributes have the values `before`, from `sampled_with`.

    Raises:
        ConfigError: One has another value.
    """
    now = sampled_with(trainer)
    for name in sorted(before.keys() | now.keys()):
        if now.get(name) != before.get(name):
            raise ConfigError(
                f"trainer.{name} was changed from {before.get(name)!r} to {now.get(name)!r}, but sampling keeps the "
                "value with which the trainer was created. Create another trainer with the new value, from the saved "
                "model."
            )
