"""Checks the kinds of the trainer's arguments, before anything is loaded."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from arpo_trl.common.user_files import shown
from arpo_trl.config import ARPOConfig
from arpo_trl.errors import ConfigError


def check_arguments(reward_functions: Sequence[Any], **given: Any) -> None:
    """Checks the kinds of the arguments for which TRL has no error of its own. It accepts all kinds that TRL can use.

    TRL itself names a wrong `train_dataset` or `peft_config`.

    Args:
        reward_functions: The reward functions, to which `reward_processing_classes` belong.
        given: The trainer's arguments by name.

    Raises:
        ConfigError: An argument has a wrong kind.
    """
    for name, value, is_accepted, expected in _checks(reward_functions, **given):
        if not is_accepted:
            raise ConfigError(f"{name} is {_named(value)}; expected {expected}.")


Check = tuple[str, Any, bool, str]
"""The name of an argument, or of a part of one; its value; whether it is accepted; the expected value in words."""


def _checks(
    reward_functions: Sequence[Any],
    *,
    model: Any,
    args: Any,
    train_dataset: Any,
    eval_dataset: Any,
    processing_class: Any,
    reward_processing_classes: Any,
    callbacks: Any,
    optimizers: Any,
    tools: Any,
    engine: Any,
) -> Iterator[Check]:
    """Each check runs after the earlier ones passed, so it may rely on them."""
    generates = _has(model, "config", "generation_config") and not getattr(model.config, "is_encoder_decoder", False)
    yield (
        "model",
        model,
        isinstance(model, str) or generates,
        "a folder or a Hub id, as text, or a causal language model",
    )
    yield "args", args, isinstance(args, ARPOConfig | None), "an ARPOConfig, which adds ARPO's settings"
    splits = f"with the splits {list(train_dataset)}" if isinstance(train_dataset, dict) else ""
    yield f"train_dataset {splits}".rstrip(), train_dataset, not splits, "one dataset, such as dataset['train']"
    yield from _datasets(eval_dataset, evaluates=args is not None and args.eval_strategy != "no")
    is_tokenizer = isinstance(processing_class, PreTrainedTokenizerBase | ProcessorMixin | None)
    yield "processing_class", processing_class, is_tokenizer, "a tokenizer, such as AutoTokenizer.from_pretrained(…)"
    yield from _reward_tokenizers(reward_functions, reward_processing_classes)
    yield "callbacks", callbacks, isinstance(callbacks, list | None), "a list of callbacks, such as [MyCallback()]"
    for i, callback in enumerate(callbacks or ()):
        yield f"callbacks[{i}]", callback, hasattr(callback, "on_init_end"), "a TrainerCallback, or a class of them"
    is_pair = isinstance(optimizers, tuple | list) and len(optimizers) == 2
    yield "optimizers", optimizers, is_pair, "a pair (optimizer, scheduler), in which each may be None"
    for i, kind in enumerate(("an optimizer", "a scheduler")):
        made = optimizers[i]
        is_made = not (callable(made) or isinstance(made, str | Mapping))
        yield f"optimizers[{i}]", made, is_made, f"{kind} that has been created, or None"
    is_list = not tools or isinstance(tools, list | tuple)  # TRL ignores any empty value
    yield "tools", tools, is_list, "a list of functions, such as [search]"
    is_engine = engine is None or _has(engine, "session", "submit", "poll")
    yield "engine", engine, is_engine, "an engine, such as ScriptedEngine(…)"


def _datasets(given: Any, *, evaluates: bool) -> Iterator[Check]:
    named = {"eval_dataset": given}
    if isinstance(given, dict):
        is_enough = bool(given) or not evaluates
        yield "eval_dataset", given, is_enough, "one with at least one dataset, since eval_strategy is set"
        for name in given:
            yield "A key of eval_dataset", name, isinstance(name, str), "a text, which metrics then contain"
        named = {f"eval_dataset[{shown(name)}]": dataset for name, dataset in given.items()}
    for name, dataset in named.items():
        if isinstance(dataset, list | tuple):  # TRL also evaluates on a list of rows
            is_accepted = all(isinstance(row, Mapping) for row in dataset)
        else:
            is_accepted = _has(dataset, "__iter__") or _has(dataset, "__getitem__") or given is None
        is_file = isinstance(dataset, str | bytes | PathLike)
        yield name, dataset, is_accepted and not is_file, "a dataset, such as load_dataset(…), or a dict of datasets"


def _reward_tokenizers(reward_functions: Sequence[Any], given: Any) -> Iterator[Check]:
    """Checks the entries for reward models. TRL ignores those for functions."""
    classes = given if isinstance(given, list) else [given]
    for i, (function, tokenizer) in enumerate(zip(reward_functions, classes, strict=False)):
        if isinstance(function, str | torch.nn.Module):
            is_accepted = tokenizer is None or _has(tokenizer, "pad_token_id")
            yield f"reward_processing_classes[{i}]", tokenizer, is_accepted, "the reward model's tokenizer, or None"


def _has(value: Any, *names: str) -> bool:
    return not inspect.isclass(value) and all(hasattr(value, name) for name in names)


def _named(value: Any) -> str:
    if inspect.isclass(value) or inspect.isroutine(value):
        return f"the {'class' if inspect.isclass(value) else 'function'} {value.__name__}"
    is_short = isinstance(value, str | bytes | int | float | PathLike | None)
    return shown(value) if is_short else f"a {type(value).__name__}"
