"""Merges a LoRA adapter into its base model. The result does not need peft and runs on every server."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig

from arpo_trl.common.adapters import base_revision, merged, refuse_adapted_base, tokenizer_of
from arpo_trl.common.files import whole_folder
from arpo_trl.common.pretrained import causal_model, why_not_loaded
from arpo_trl.common.run_files import ADAPTER_CONFIG, EVALUATION, TRAINER_STATE, TRAINING_CONFIG
from arpo_trl.common.user_files import model_name
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.publishing.model_card import Card
from arpo_trl.rollout.protocols.generation_ends import eos_ids_of
from arpo_trl.visible import without_secrets

_CARRIED = (TRAINING_CONFIG, EVALUATION, TRAINER_STATE)
_WAY_OUT = (
    "Merge with --dtype float32 and keep the result in that precision, or use the adapter as it is: arpo-trl eval "
    "--adapter, or vllm serve --enable-lora."
)


def merge_adapter(
    adapter: str,
    output: Path,
    *,
    base: str | None = None,
    dtype: str | None = None,
    repo_id: str | None = None,
    trust_remote_code: bool = False,
) -> None:
    """Saves base model + adapter to the new folder `output`, with the adapter's tokenizer, chat template and card.

    Args:
        adapter: Folder or Hub id.
        base: The base model. None: the model named in the adapter's configuration, in the revision named there.
        dtype: The dtype in which the sum is computed and saved. None: the base model's.
        repo_id: The repository named in the card. None: the name of the folder.
        trust_remote_code: Whether code of the base model's repository may run.

    Raises:
        ConfigError: `output` exists, there is no such dtype, the base model is an adapter, is not a causal language
            model or lacks weights, the adapter lacks weights of its new tokens, or the tokenizer cannot be loaded.
        DataError: `adapter` is not an adapter, its base model cannot be loaded, it belongs to another base model, or
            its tokenizer cannot be saved.
    """
    adapter, base = model_name(adapter, "adapter"), None if base is None else model_name(base, "base")
    if os.path.lexists(output):  # also a link to nothing, which the merged folder could not replace
        raise ConfigError(f"--output {output} exists. Pass a new folder, or remove this one.")
    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ConfigError(f"--dtype is {dtype!r}; expected a dtype such as bfloat16, float16 or float32.")
    try:
        config: Any = PeftConfig.from_pretrained(adapter)
        folder = Path(adapter)
        if not folder.is_dir():
            folder = Path(snapshot_download(adapter, allow_patterns=list(_CARRIED)))
    except Exception as error:  # peft, transformers and safetensors raise many kinds of errors for broken files
        raise DataError(
            f"{adapter} is not an adapter: it has no readable {ADAPTER_CONFIG}. Pass the output_dir of a run "
            f"with use_peft, or one of its checkpoints."
        ) from error
    name = base or config.base_model_name_or_path
    if not name:
        raise DataError(f"{adapter} does not name its base model. Name it with --base.")
    refuse_adapted_base(adapter, name, "pass FOLDER as --base")
    revision, trusted = base_revision(config, name), {"trust_remote_code": trust_remote_code}
    try:
        # Not quantized, even if the model was quantized in training: rounding the sum to 4 bits would lose the trained
        # difference.
        model = causal_model(name, revision=revision, dtype=dtype or "auto", **trusted)
    except ConfigError:
        raise
    except Exception as error:  # transformers and safetensors raise many kinds of errors, some without a text
        told = f"{why_not_loaded('base model', name, error)} Name another one with --base."
        if "trust_remote_code" in str(error):
            told = "loading it runs code of its repository. If you trust that code, add --trust-remote-code."
        raise DataError(f"The base model {name!r} of {adapter} cannot be loaded: {told}") from error
    try:
        model = merged(model, adapter, _WAY_OUT)
    except ConfigError:
        raise
    except Exception as error:  # different sizes or layer names, weights that are not finite, or a broken file
        raise DataError(
            f"{adapter} does not fit its base model {name!r}: {without_secrets(str(error))[:300]}"
        ) from error
    tokenizer = tokenizer_of(adapter, name, revision, **trusted)
    ends = eos_ids_of(model.generation_config)
    if tokenizer.eos_token_id not in (None, *ends):  # that of a cold start with another eos_token
        model.config.get_text_config().eos_token_id = tokenizer.eos_token_id
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *ends]
    with whole_folder(output) as partial:
        model.save_pretrained(partial)
        try:
            tokenizer.save_pretrained(partial)
        except (TypeError, ValueError) as error:  # such as half a surrogate pair, which UTF-8 cannot express
            raise DataError(f"The tokenizer of {adapter} cannot be saved: {error}") from error
        for file in _CARRIED:
            if (folder / file).is_file():
                shutil.copyfile(folder / file, partial / file)
        card = Card.of(partial, repo_id or output.name)
        if card is not None:
            (card if base is None else dataclasses.replace(card, base_model=base)).write(partial)
