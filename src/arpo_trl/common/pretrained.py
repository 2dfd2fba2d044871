"""Loads models and tokenizers by folder or Hub id. If loading fails, one sentence explains the reason."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, TypeVar

import transformers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.trainer_utils import get_last_checkpoint

from arpo_trl.common.hub_cache import cache_remedy
from arpo_trl.common.run_files import ADAPTER_CONFIG
from arpo_trl.common.user_files import has_form_of_path, is_url
from arpo_trl.common.working_folder import working_folder
from arpo_trl.errors import ConfigError
from arpo_trl.visible import without_secrets

T = TypeVar("T")


def load_pretrained(what: str, name: str, load: Callable[..., T], **arguments: Any) -> T:
    """Return `load(name, **arguments)`.

    Args:
        what: The kind of object, for the message.
        name: A folder or a Hub id.

    Raises:
        ConfigError: Loading failed. For a folder without the files of a model, the message names the newest checkpoint
            in it.
    """
    try:
        return load(name, **arguments)
    except ConfigError:
        raise
    except Exception as error:  # transformers, peft and the Hub client raise many kinds of errors
        raise ConfigError(f"The {what} of {name!r} cannot be loaded: {why_not_loaded(what, name, error)}") from error


def causal_config(name: str, **arguments: Any) -> Any:
    """The configuration of a causal language model.

    A class of a repository's own code, and a configuration that names no class, are accepted.

    Raises:
        ConfigError: It names a class of transformers that does not generate text, or has an encoder.
    """
    config = AutoConfig.from_pretrained(name, **arguments)
    architecture = (getattr(config, "architectures", None) or [""])[0]
    can_generate = getattr(getattr(transformers, architecture, None), "can_generate", lambda: True)
    if getattr(config, "is_encoder_decoder", False) or not can_generate():
        raise ConfigError(
            f"{name!r} is a {architecture or 'model with an encoder'} (architectures in its config.json); expected a "
            "causal language model, such as Qwen3ForCausalLM, to generate text token by token."
        )
    return config


def causal_model(name: str, **arguments: Any) -> PreTrainedModel:
    """The causal language model `name`, with all its weights.

    Raises:
        ConfigError: See `causal_config` and `check_complete`.
    """
    causal_config(name, **{key: arguments[key] for key in ("revision", "trust_remote_code") if key in arguments})
    model, report = AutoModelForCausalLM.from_pretrained(name, output_loading_info=True, **arguments)
    check_complete(name, model, report["missing_keys"])
    return model


def check_complete(name: str, model: PreTrainedModel, missing: Collection[str]) -> None:
    """Checks that all weights of `model` were in its files. transformers only warns, and fills in random numbers.

    Args:
        missing: The `missing_keys` of transformers' loading info. It has no tied weights, but may have buffers.

    Raises:
        ConfigError: Some are missing.
    """
    weights = {key for key, _ in model.named_parameters(remove_duplicate=False)}
    if lost := sorted(weights.intersection(missing)):
        raise ConfigError(
            f"{len(lost)} weights of {type(model).__name__} are missing from the files of {name!r}: "
            f"{', '.join(lost[:3])}{', …' if lost[3:] else ''}. They would be random. Copy or download the model "
            "again, or pass a model whose files have all weights."
        )


def why_not_loaded(what: str, name: str, error: Exception) -> str:
    """The sentence that explains why `load_pretrained` failed with `error`, and the way out."""
    folder = Path(name)
    if "trust_remote_code" in str(error):
        return "loading it runs code of its repository. If you trust that code, set trust_remote_code."
    told = f"{type(error).__name__}: {' '.join(without_secrets(str(error)).split())[:300].rstrip('.')}"
    if not os.path.exists(folder):  # unlike Path.exists, false for a name that the system refuses
        if is_url(name):
            return "that is a web address; expected a folder or a Hub id, such as Qwen/Qwen2.5-3B-Instruct."
        where = "" if folder.is_absolute() else f" in {working_folder()}"
        if has_form_of_path(name):
            return f"there is no such folder{where}. Check the path."
        remedy = cache_remedy(error) or "Check the name and the connection."
        return f"there is no such folder{where}, and the Hub does not provide it ({told}). {remedy}"
    if not folder.is_dir():
        return "that is a file; expected the folder that it is in, or a Hub id."
    if not any(folder.iterdir()):
        return "the folder is empty. Check the path."
    finished = any((folder / file).exists() for file in ("config.json", ADAPTER_CONFIG))
    if not finished and (newest := get_last_checkpoint(name)) is not None:
        return f"the folder has checkpoints, but no finished model. Pass the newest checkpoint: {newest}."
    lacks = {"configuration": "config.json", "tokenizer": "tokenizer_config.json"}.get(what)
    if lacks and not (folder / lacks).exists() and (folder / ADAPTER_CONFIG).exists():
        return f"it is an adapter. Merge it into its model first: arpo-trl merge {shlex.quote(name)} --output FOLDER"
    return f"{told}. Expected a folder that save_pretrained wrote, or a Hub id."
