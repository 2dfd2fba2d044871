"""Agentic Reinforced Policy Optimization as a TRL trainer.

from arpo_trl import ARPOConfig, ARPOTrainer
"""

from __future__ import annotations

from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from arpo_trl.config import ARPOConfig
    from arpo_trl.training.trainer import ARPOTrainer

__all__ = ["ARPOConfig", "ARPOTrainer"]
__version__ = version("arpo-trl")

_HOMES = {"ARPOConfig": "arpo_trl.config", "ARPOTrainer": "arpo_trl.training.trainer"}


def __getattr__(name: str) -> Any:
    """Loads a public name on first use: `arpo-trl --help` should not wait for torch."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
