"""Tied weights in checkpoints: two names of one tensor, which is saved under one of them."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel


def without_tied_keys(model: PreTrainedModel, loaded: Any) -> Any:
    """Returns the result of `load_state_dict` without missing names of tensors that were loaded by another name.

    Args:
        loaded: The named tuple (missing_keys, unexpected_keys).
    """
    tied = getattr(model, "all_tied_weights_keys", {})
    missing = set(loaded.missing_keys)
    there = {key for key in missing if key in tied and tied[key] not in missing}
    return loaded._replace(missing_keys=[key for key in loaded.missing_keys if key not in there])
