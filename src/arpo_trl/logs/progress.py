"""Terminal output of a run: a progress bar with the most important metrics, and the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from transformers import ProgressCallback, Trainer

WATCHED = {
    "loss": "loss",
    "reward": "reward",
    "arpo/accuracy": "accuracy",
    "eval_arpo/accuracy": "held out",
    "arpo/tools/calls_per_leaf": "calls",
    "arpo/tree/sharing_ratio": "sharing",
    "arpo/alarm/truncated": "cut",
}
"""Logged metric → its label beside the bar."""


class CompactProgress(ProgressCallback):
    """transformers' progress bar with a few metrics beside it, instead of all metrics above it."""

    def __init__(self) -> None:
        super().__init__()
        self._shown: dict[str, str] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any) -> None:
        if state.is_world_process_zero and self.training_bar is not None:
            for name, label in WATCHED.items():
                value = (logs or {}).get(name)
                if isinstance(value, float):
                    self._shown[label] = f"{value:.3f}"
            if "reward" in self._shown:
                self._shown.pop("loss", None)  # a policy gradient's loss does not indicate progress
            self.training_bar.set_postfix(self._shown)


@contextmanager
def closed_bars(trainer: Trainer) -> Iterator[None]:
    """Closes the trainer's progress bar on an error, so that the error message starts on a new line."""
    try:
        yield
    except BaseException:
        for callback in trainer.callback_handler.callbacks:
            if isinstance(callback, ProgressCallback) and callback.training_bar is not None:
                callback.training_bar.close()
        raise


def show_log() -> None:
    """Shows this package's log on standard error, from level INFO."""
    logging.basicConfig(format="%(message)s")
    logging.getLogger("arpo_trl").setLevel(logging.INFO)


def show_compactly(trainer: Trainer) -> None:
    """Replaces the trainer's progress bar, if it has one, by the compact one. `report_to` still gets all metrics."""
    if trainer.pop_callback(ProgressCallback) is not None:
        trainer.add_callback(CompactProgress())
