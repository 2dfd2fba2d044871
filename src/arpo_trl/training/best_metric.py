"""Checks that `metric_for_best_model` names a metric of the evaluations, and one that tells which model is better."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from arpo_trl.common.user_code import parameters_of
from arpo_trl.config import ARPOConfig
from arpo_trl.errors import ConfigError

_OF_EACH_DATASET = ("runtime", "samples_per_second", "steps_per_second")
"""The metrics whose names contain the name of the dataset, if there are several. The others are GRPO's."""


def refuse_loss(args: ARPOConfig, eval_dataset: Any) -> None:
    """Checks that `metric_for_best_model` is not a loss, which transformers sets if it is None.

    The advantages of a group have a mean of 0, and so does GRPO's loss, up to rounding. It would choose an arbitrary
    checkpoint, stop a run early, or lower the learning rate, whatever the model has learned.

    Raises:
        ConfigError: It is the loss of the evaluation, or of one of its datasets.
    """
    name = args.metric_for_best_model
    losses = {"eval_loss"} | {f"eval_{each}_loss" for each in (eval_dataset if isinstance(eval_dataset, dict) else ())}
    is_best_unset = name is None and args.save_strategy == "best"
    if args.eval_strategy != "no" and (is_best_unset or (name is not None and _full(name) in losses)):
        raise ConfigError(
            f"metric_for_best_model is {name!r} (default: 'loss'), but GRPO's loss stays around 0, however good "
            "the model is. Set metric_for_best_model: eval_reward."
        )


def check_best_metric(
    args: ARPOConfig, eval_dataset: Any, reward_names: Sequence[str], reward_functions: Sequence[Any]
) -> None:
    """Checks at the start that `metric_for_best_model` can be a metric. Other metrics may come from `log_metric`.

    Raises:
        ConfigError: It is the speed of one dataset, but there are several, or the reward of a function
            that does not exist.
    """
    if args.metric_for_best_model is None or args.eval_strategy == "no":
        return
    name = _full(args.metric_for_best_model)
    bare = name.removeprefix("eval_")
    if isinstance(eval_dataset, dict) and bare in _OF_EACH_DATASET:
        raise _no_metric(args, [f"eval_{dataset}_{bare}" for dataset in eval_dataset])
    of_reward = re.fullmatch(r"rewards/(.*)/(mean|std)", bare)
    if of_reward and of_reward[1] not in reward_names and not any(map(_may_log, reward_functions)):
        raise _no_metric(args, [f"eval_rewards/{reward}/{of_reward[2]}" for reward in reward_names])


def check_evaluated(args: ARPOConfig, metrics: Mapping[str, Any]) -> None:
    """Checks that `metrics`, those of an evaluation, contain a number for `metric_for_best_model`.

    Raises:
        ConfigError: They do not. The message lists those that have one.
    """
    if args.metric_for_best_model is not None and metrics.get(_full(args.metric_for_best_model)) is None:
        raise _no_metric(
            args, sorted(name for name, value in metrics.items() if name.startswith("eval_") and value is not None)
        )


def _full(name: str) -> str:
    return name if name.startswith("eval_") else f"eval_{name}"  # as transformers looks it up


def _no_metric(args: ARPOConfig, available: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"metric_for_best_model is {args.metric_for_best_model!r}, but evaluation has no number of that name; "
        f"expected one of {available}, with or without 'eval_'."
    )


def _may_log(function: Any) -> bool:
    """Whether a reward function asks for TRL's `log_metric`, which adds metrics of any name."""
    return "log_metric" in (parameters_of(function) or ())  # a model's name has none
