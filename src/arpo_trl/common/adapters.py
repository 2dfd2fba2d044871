"""Adapters, and how they fit their base model: its revision, the tokenizer, the number of embeddings."""

from __future__ import annotations

import copy
import math
import os
import re
import shlex
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from transformers import AutoTokenizer

from arpo_trl.common.pretrained import load_pretrained
from arpo_trl.common.run_files import ADAPTER_CONFIG
from arpo_trl.errors import CheckpointError, ConfigError
from arpo_trl.visible import get_logger

if TYPE_CHECKING:
    from accelerate import Accelerator
    from peft import PeftConfig

logger = get_logger(__name__)
_TOKENIZER = "tokenizer_config.json"
_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
"""A model that may be on the Hub; the oldest ones, such as gpt2, have no owner."""


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


def refuse_adapted_base(adapter: str, base: str, then: str) -> None:
    """Raises ConfigError if `base`, the base model of an adapter, is the folder of an adapter itself. `then` says how
    to pass the merged model."""
    if Path(base, ADAPTER_CONFIG).is_file() and not Path(base, "config.json").is_file():
        raise ConfigError(
            f"The base model {base!r} of {adapter} is an adapter itself; expected a whole model. Merge it first "
            f"(arpo-trl merge {shlex.quote(base)} --output FOLDER), then {then}."
        )


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


def check_adapter(model: Any, accelerator: Accelerator) -> None:
    """Checks that the run can train and save the adapter of `model`, if it has one.

    TRL's fused head reads the weight and the bias of the language modeling head, and does not call the module. Under
    FSDP, PEFT's wrap policy makes the trained copy of the head a unit of its own: its weight would be gathered as a
    replicated tensor, and each rank would keep its own gradient. FSDP's activation checkpointing renames the weights,
    and PEFT would not find them when it saves and loads the adapter.

    Raises:
        ConfigError: FSDP shards the trained copy of the head or checkpoints activations, or the adapter trains single
            tokens of tied embeddings.
    """
    from peft import PeftModel
    from peft.utils.other import AuxiliaryTrainingWrapper, TrainableTokensWrapper

    if not isinstance(model, PeftModel):
        return
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    if plugin is not None and plugin.activation_checkpointing:
        raise ConfigError(
            "FSDP checkpoints activations (fsdp_activation_checkpointing: true), which renames the weights, so that "
            "the adapter would be saved without them. Set fsdp_activation_checkpointing: false in the configuration "
            "of accelerate, and gradient_checkpointing: true in that of the run."
        )
    head = model.get_output_embeddings()
    if isinstance(head, TrainableTokensWrapper):
        raise ConfigError(
            "The adapter trains single tokens (new ones of chat_template_path, or trainable_token_indices) of "
            "embeddings that the model shares with its head, which TRL cannot compute. Use a chat template without "
            "new tokens (a .jinja file), or train all weights (use_peft: false)."
        )
    sharded = plugin is not None and accelerator.num_processes > 1
    if sharded and isinstance(head, AuxiliaryTrainingWrapper):
        raise ConfigError(
            "The adapter trains the language modeling head (lora_modules_to_save) under FSDP, which would not sum the "
            "gradients of the head over the ranks. Use accelerate_configs/zero3.yaml or ddp.yaml, or remove the head "
            "from lora_modules_to_save."
        )
    if accelerator.is_main_process:
        _warn_of_changed_base(model)


_COMPARED_LAYERS, _COMPARED_ROWS = 8, 16
"""Of the adapted layers, as many as a block has, and of their weights, as many rows are compared with the files."""


def _warn_of_changed_base(model: Any) -> None:
    """Warns if weights under the adapter are not those of the files of the model's name, here or in the Hub's cache.

    It skips weights that it cannot compare: quantized, sharded or converted ones, and those that the initialization
    of the adapter changes.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors import safe_open

    base, starts_at_zero = model.get_base_model(), (True, False, "gaussian")
    name, folder = base.name_or_path, Path(base.name_or_path)
    if not name or getattr(model.active_peft_config, "init_lora_weights", True) not in starts_at_zero:
        return
    if not folder.is_dir() and _HUB_ID.fullmatch(name):
        revision = getattr(base.config, "_commit_hash", None)
        cached = try_to_load_from_cache(name, "config.json", revision=revision)
        folder = Path(cached).parent if isinstance(cached, str) else folder
    layers = [(key, layer) for key, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)]
    weights = {f"{key.removeprefix('base_model.model.')}.weight": layer for key, layer in layers[:_COMPARED_LAYERS]}
    digits = {torch.float32, torch.bfloat16, torch.float16}
    for file in sorted(folder.glob("model*.safetensors")):
        with safe_open(file, "pt") as saved:
            for key in sorted(weights.keys() & set(saved.keys())):
                given, original = weights[key].get_base_layer().weight.data, saved.get_slice(key)
                if type(given) is not torch.Tensor or list(given.shape) != original.get_shape():
                    continue
                given, original = given[:_COMPARED_ROWS].cpu(), original[:_COMPARED_ROWS]
                if not {given.dtype, original.dtype} <= digits:
                    continue
                # One may be the other in fewer digits.
                if not any(torch.equal(given.to(dtype), original.to(dtype)) for dtype in digits):
                    logger.warning(
                        f"The adapter is trained on a model whose weights are not those of {name!r} ({key} differs), "
                        "as after merging another adapter in memory. It fits only this model, but names the other one "
                        "as its base, so arpo-trl eval and merge would use that one. Save this model and its "
                        "tokenizer with save_pretrained, and pass the path of that folder as model."
                    )
                    return


def check_saved(model: Any, weights: dict[str, Any] | None) -> None:
    """Checks that the adapters of `model`, if it has any, are about to be saved with their weights.

    Args:
        weights: The weights by name; None: those of `model`.

    Raises:
        CheckpointError: PEFT finds no weight of an adapter.
    """
    from peft import PeftModel, get_peft_model_state_dict

    for name in model.peft_config if isinstance(model, PeftModel) else ():
        if not get_peft_model_state_dict(model, weights, name, save_embedding_layers=False):
            raise CheckpointError(
                f"The adapter {name!r} would be saved without weights: PEFT finds none of them under their names in "
                "the model. Train without what wraps its layers, such as FSDP's activation checkpointing."
            )


def _warn_of_other_base(model: str, adapter: str) -> None:
    """Warns if the adapter names another base model than `model`, unless that is a folder that is gone. Of a folder
    and a repository, the last parts of the names are compared: one may be a copy of the other."""
    from peft import PeftConfig

    trained_on = PeftConfig.from_pretrained(adapter).base_model_name_or_path or model
    folders = [os.path.isdir(name) for name in (trained_on, model)]
    if all(folders):
        is_other = not os.path.samefile(trained_on, model)
    else:
        may_exist = folders[0] or _HUB_ID.fullmatch(trained_on) is not None
        is_other = may_exist and Path(trained_on).name.lower() != Path(model).name.lower()
    if is_other:
        logger.warning(
            f"The adapter {adapter!r} was trained on {trained_on!r}, but is added to {model!r}. Unless both have the "
            "same weights, the result is of no use: name the adapter's own base model, or none."
        )


def adapted(model: Any, adapter: str) -> Any:
    """The model with the adapter in the folder or repository `adapter`, which computes as in training: not merged.

    Training with new tokens (`chat_template_path`) changes the number of embeddings. The adapter then contains the
    embeddings and the head, and the model gets as many.

    Raises:
        ConfigError: The adapter has another number of tokens, and not both layers of a model that does not tie them.
    """
    from peft import PeftModel, load_peft_weights

    _warn_of_other_base(model.name_or_path, adapter)
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    saved = load_peft_weights(adapter, device="cpu")
    counts = {
        names[layer]: len(weights)
        for layer in (embeddings, head)
        for key, weights in saved.items()
        if re.fullmatch(rf"base_model\.model\.{re.escape(names[layer])}\.(.*base_layer\.)?weight", key)
    }
    if new := {count for count in counts.values() if count != embeddings.num_embeddings}:
        if head.weight is not embeddings.weight and len(counts) == 1:
            both = ", ".join(names[layer].rpartition(".")[2] for layer in (embeddings, head))
            raise ConfigError(
                f"The adapter {adapter!r} was trained with {max(new)} tokens, its base model has "
                f"{embeddings.num_embeddings}, and the adapter has the new tokens' weights only of "
                f"{next(iter(counts))}. Train it again with lora_modules_to_save: [{both}]."
            )
        model.resize_token_embeddings(max(new), mean_resizing=False)
    return PeftModel.from_pretrained(model, adapter)


LOST = 0.3
"""The part of what was trained that a merge may lose without a warning. The rest then has 0.91 of the squared norm."""


def merged(model: Any, adapter: str, way_out: str) -> Any:
    """The model with the weights of the adapter in the folder or repository `adapter` added to its own.

    An adapter of the embeddings or of the head changes only one of them, so if they share their weights, the head gets
    its own.

    A sum in 16 bits is rounded: a difference of less than half a unit of a weight's last digit is lost. If much is
    lost, a warning tells how much of it: ‖sum in 16 bits − exact sum‖ / ‖exact sum − base‖ over all merged weights.

    Args:
        way_out: A sentence for this warning that says how to keep what was trained.

    Raises:
        ConfigError: See `adapted`.
        ValueError: A sum is not finite, or the adapter does not fit the model or cannot be merged.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from torch.nn import Parameter

    whole = adapted(model, adapter)
    layers = model.get_output_embeddings(), model.get_input_embeddings()
    head, embeddings = (layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer for layer in layers)
    if layers != (head, embeddings) and head.weight is embeddings.weight:
        head.weight = Parameter(head.weight.detach().clone())
        model.config.get_text_config().tie_word_embeddings = model.config.tie_word_embeddings = False
    lost = _merge_layers(layer for layer in whole.modules() if isinstance(layer, BaseTunerLayer))
    if lost > LOST:
        logger.warning(
            f"Merging loses {lost:.0%} of what was trained: its differences are smaller than the digits of "
            f"{str(model.dtype).removeprefix('torch.')}. {way_out}"
        )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All adapters are already merged")
        return whole.merge_and_unload(safe_merge=True)


def _merge_layers(layers: Iterable[Any]) -> float:
    """Add adapters to the weights of their layers, in float32; returns the part of what was trained that is lost when
    the sums are rounded to the weights' dtype."""
    import torch

    lost = trained = 0.0
    for layer in layers:
        short = [
            (weight, weight.data)
            for weight in layer.get_base_layer().parameters()
            if weight.dtype in (torch.bfloat16, torch.float16)
        ]
        for weight, base in short:
            weight.data = base.float()
        layer.merge(safe_merge=True)
        for weight, base in short:
            exact = weight.data
            weight.data = exact.to(base.dtype)
            lost += float(torch.dist(exact, weight.data.float())) ** 2
            trained += float(torch.dist(exact, base.float())) ** 2
    if not math.isfinite(lost):
        raise ValueError("the sum of the adapter and its base model is too large for float16")
    return math.sqrt(lost / trained) if trained else 0.0
