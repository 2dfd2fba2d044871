"""Adapters, and how they fit their base model: its revision, the tokenizer, the number of embeddings."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoTokenizer

from arpo_trl.common.pretrained import load_pretrained
from arpo_trl.errors import ConfigError
from arpo_trl.visible import get_logger

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftConfig

logger = get_logger(__name__)
_TOKENIZER = "tokenizer_config.json"


def of_revision(adapter: PeftConfig | None, revision: str | None) -> PeftConfig | None:
    """The configuration of a new adapter, with the revision of its base model, which TRL does not write into it."""
    # TRL itself refuses what is no configuration, and has no revision.
    if adapter is None or revision in (None, "main") or getattr(adapter, "revision", revision) is not None:
        return adapter
    adapter = copy.copy(adapter)
    adapter.revision = revision
    return adapter


def base_revision(adapter: PeftConfig, base: str) -> str:
    """The revision of the model `base` that the adapter was trained on; main for another model than the adapter's."""
    return (adapter.base_model_name_or_path == base and adapter.revision) or "main"


def tokenizer_of(adapter: str | None, base: str, revision: str, *, trust_remote_code: bool) -> Any:
    """The tokenizer of an adapter, a folder or a repository on the Hub; that of its base model if it has none.

    Raises:
        ConfigError: The tokenizer cannot be loaded, or the Hub does not tell whether the adapter has one.
    """
    trusted = {"trust_remote_code": trust_remote_code}
    if adapter is not None and _has_tokenizer(adapter):
        return load_pretrained("tokenizer", adapter, AutoTokenizer.from_pretrained, **trusted)
    return load_pretrained("tokenizer", base, AutoTokenizer.from_pretrained, revision=revision, **trusted)


def _has_tokenizer(adapter: str) -> bool:
    if os.path.exists(adapter):
        return Path(adapter, _TOKENIZER).is_file()
    return load_pretrained("tokenizer", adapter, _is_on_hub)


def _is_on_hub(adapter: str) -> bool:
    try:
        hf_hub_download(adapter, _TOKENIZER)
    except LocalEntryNotFoundError:  # an EntryNotFoundError too, although the Hub was not asked or did not answer
        if not is_offline_mode():
            raise
        if try_to_load_from_cache(adapter, _TOKENIZER) is _CACHED_NO_EXIST:
            return False
        logger.warning(
            f"The cache of the Hub has no tokenizer of the adapter {adapter!r}, so that of its base model is used. If "
            "the adapter has its own, download it first: run once without HF_HUB_OFFLINE."
        )
        return False
    except EntryNotFoundError:
        return False
    return True


def check_head(model: Any, accelerator: Accelerator) -> None:
    """Checks that TRL's fused head can read the language modeling head that an adapter trains.

    TRL reads the weight and the bias, and does not call the module. Under FSDP, PEFT's wrap policy makes the trained
    copy of the head a unit of its own: its weight would be gathered as a replicated tensor, and each rank would keep
    its own gradient.

    Raises:
        ConfigError: FSDP shards the trained copy of the head, or the adapter trains single tokens of tied embeddings.
    """
    from peft import PeftModel
    from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper

    head = model.get_output_embeddings() if isinstance(model, PeftModel) else None
    if isinstance(head, TrainableTokensWrapper):
        raise ConfigError(
            "The adapter trains single tokens (new ones of chat_template_path, or trainable_token_indices) of "
            "embeddings that the model shares with its head, which TRL cannot compute. Use a chat template without "
            "new tokens (a .jinja file), or train all weights (use_peft: false)."
        )
    sharded = getattr(accelerator.state, "fsdp_plugin", None) is not None and accelerator.num_processes > 1
    if sharded and isinstance(head, AuxiliaryTrainingWrapper):
        raise ConfigError(
            "The adapter trains the language modeling head (lora_modules_to_save) under FSDP, which would not sum the "
            "gradients of the head over the ranks. Use accelerate_configs/zero3.yaml or ddp.yaml, or remove the head "
            "from lora_modules_to_save."
        )


def merged(model: Any, adapter: str) -> Any:
    """The model with the weights of the adapter in the folder or repository `adapter` added to its own.

    A cold start with new tokens (`chat_template_path`) changes the number of embeddings. The adapter then contains the
    embeddings, and the model gets as many. An adapter of the embeddings or of the head changes only one of them, so
    if they share their weights, the head gets its own.
    """
    from peft import PeftModel, load_peft_weights
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch.nn import Parameter

    embeddings = model.get_input_embeddings()
    name = next(name for name, module in model.named_modules() if module is embeddings)
    own = [
        weights
        for key, weights in load_peft_weights(adapter, device="cpu").items()
        if key.startswith(f"base_model.model.{name}.") and key.endswith(".weight")
    ]
    if own and len(own[0]) != embeddings.num_embeddings:
        model.resize_token_embeddings(len(own[0]), mean_resizing=False)
    adapted = PeftModel.from_pretrained(model, adapter)
    layers = model.get_output_embeddings(), model.get_input_embeddings()
    head, embeddings = (layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers)
    if layers != (head, embeddings) and head.weight is embeddings.weight:
        head.weight = Parameter(head.weight.detach().clone())
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    return adapted.merge_and_unload(safe_merge=True)
