"""Adapters, and how they fit their base model: its revision, the tokenizer, the number of embeddings."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from transformers.utils import cached_file

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


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


def adapted(model: Any, adapter: str) -> PeftModel:
    """The model with the adapter in the folder or repository `adapter`.

    A cold start with new tokens (`chat_template_path`) changes the number of embeddings. The adapter then contains the
    embeddings, and the model gets as many before it is loaded.
    """
    from peft import PeftModel, load_peft_weights

    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    own = [
        weights
        for key, weights in load_peft_weights(adapter, device="cpu").items()
        if key.startswith(f"base_model.model.{name}.") and key.endswith(".weight")
    ]
    if own and len(own[0]) != embeddings.num_embeddings:
        model.resize_token_embeddings(len(own[0]), mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter)
