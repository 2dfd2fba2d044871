"""Whether this machine has an accelerator."""

from __future__ import annotations

from transformers.utils import is_torch_xla_available


def has_accelerator() -> bool:
    """Whether torch has found a GPU or another accelerator."""
    import torch  # not at the top, so that the settings do not import it

    return torch.accelerator.is_available() or is_torch_xla_available()
