"""What an adapter says about its base model and brings along."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

from transformers.utils import cached_file

if TYPE_CHECKING:
    from peft import PeftConfig


def of_revision(adapter: PeftConfig | None, revision: str | None) -> PeftConfig | None:
    """The configuration of a new adapter, with the revision of its base model, which TRL does not write into it."""
    if adapter is None or adapter.revision is not None or revision in (None, "main"):
        return adapter
    adapter = copy.copy(adapter)
    adapter.revision = revision
    return adapter


def base_revision(adapter: PeftConfig, base: str) -> str:
    """The revision of the model `base` that the adapter was trained on; main for another model than the adapter's."""
    return (adapter.base_model_name_or_path == base and adapter.revision) or "main"


def has_tokenizer(name: str) -> bool:
    """Whether a folder or a repository on the Hub has a tokenizer, which an adapter may lack."""
    return cached_file(name, "tokenizer_config.json", _raise_exceptions_for_missing_entries=False) is not None
