"""Hides messages of other packages that are irrelevant to users, most of them on machines without an accelerator.

The programs call `hide_noise` before they import these packages, since some of the messages appear during imports.
"""

from __future__ import annotations

import logging
import warnings

LOGGED = {"DeepSpeed": "Setting accelerator to CPU", "vllm.triton_utils.importing": "Disabling Triton"}
"""Logger → a part of its message.

- DeepSpeed found no accelerator. This package logs the same.
- vLLM cannot use Triton, which its CPU build never does.
"""
WARNED = (".*'pin_memory' argument is set as true but no accelerator", r"`\w*gradient_checkpointing\w*` is deprecated")
"""Parts of warnings.

- PyTorch does not pin memory.
- TRL and accelerate use names that transformers 5.24 has replaced.
"""


def hide_noise() -> None:
    """Hides the messages of `LOGGED` and `WARNED`. With an accelerator, those of `LOGGED` are shown."""
    for message in WARNED:
        warnings.filterwarnings("ignore", message=message)
    for name in LOGGED:
        logging.getLogger(name).addFilter(_is_relevant)


def _is_relevant(record: logging.LogRecord) -> bool:
    if LOGGED[record.name] not in record.getMessage():
        return True
    import torch  # has been imported by the package that logs

    return torch.accelerator.is_available()
