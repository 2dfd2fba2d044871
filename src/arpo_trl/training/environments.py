"""Creates a trainer's environments from its arguments: checks before the first step, prompts and rewards."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from datasets import Dataset

from arpo_trl.common.user_code import parameters_of
from arpo_trl.config import ARPOConfig
from arpo_trl.errors import ConfigError
from arpo_trl.logs.metrics import Tally
from arpo_trl.options import ShareCalls
from arpo_trl.rollout.tree import RolloutTree
from arpo_trl.tools.environments.instances import Counts, Instances
from arpo_trl.tools.environments.kind import EnvironmentKind, Forking, Kinds, environment_kind
from arpo_trl.tools.environments.state import Environments
from arpo_trl.tools.toolbox import ToolBox
from arpo_trl.visible import get_rank_logger

logger = get_rank_logger(__name__)

NO_PROMPT = [{"role": "user", "content": ""}]
"""The prompt of rows without a prompt. The text of `reset` is appended to it, as in TRL."""


def environments_for(
    args: ARPOConfig, factory: Any, reward_funcs: Collection[Any], datasets: Sequence[Any]
) -> Environments | None:
    """Return the environments that `factory` creates, after all possible checks; None without a factory.

    Args:
        factory: A class or function. Or, as in TRL, a dict of several; each row names one of them in its column
            `environment`.
        reward_funcs: The user's reward functions. A function with an argument `environments`, or with `**kwargs`, may
            read the environments.
        datasets: The training dataset first, then the evaluation datasets. Streamed datasets and None are not checked.

    Raises:
        ConfigError: The factory or its class cannot be used, or `environment_concurrency` is too small.
        DataError: A row names no class of a dict.
        ToolSpecError: A method of the class cannot be a tool.
    """
    if factory is None:
        return None
    if args.share_calls != ShareCalls.OFF:
        raise ConfigError(
            f"share_calls is {args.share_calls!r}, but there is an environment_factory. A path that reuses the result "
            f"of another path's call still needs an environment in the state after the call, and a fork or a replay "
            f"costs as much as the call. Set share_calls to 'off'."
        )
    if args.dynamic_sampling_rounds:
        raise ConfigError(
            f"dynamic_sampling_rounds is {args.dynamic_sampling_rounds}, but there is an environment_factory, and the "
            "environments of a prompt are open for one round. Set dynamic_sampling_rounds to 0."
        )
    if isinstance(factory, dict):
        if not factory:
            raise ConfigError("environment_factory is an empty dict; expected a class for each name in the rows.")
        if datasets[0] is None:
            raise ConfigError(
                f"environment_factory is a dict of {list(factory)}, which requires a `train_dataset` whose rows "
                f"select one of them. Pass a dataset with a column 'environment', or pass one class."
            )
        if args.remove_unused_columns:
            raise ConfigError(
                f"remove_unused_columns is true, which removes all columns but the prompt, but environment_factory is "
                f"a dict of {list(factory)}, which reads the column 'environment'. Set remove_unused_columns to false."
            )
        made: Any = {name: environment_kind(each, args.tool_timeout_s) for name, each in factory.items()}
    else:
        made = environment_kind(factory, args.tool_timeout_s)
    kinds = Kinds(made)
    for dataset in datasets:
        if isinstance(dataset, Dataset):
            kinds.check_rows(dataset)
    classes = list(kinds.by_name.values())
    keeps = any(kind.offers("get_reward") for kind in classes) or any(map(_may_read_environments, reward_funcs))
    _check_concurrency(args, keeps=keeps, evaluates=any(dataset is not None for dataset in datasets[1:]))
    return Environments(made, timeout_s=args.tool_timeout_s, limit=args.environment_concurrency, keeps=keeps)


def all_environments(
    environments: Environments | None, tools: Sequence[Callable[..., Any]], limit: int | None
) -> list[Environments]:
    """Return the environments of a trainer: those of its factory, and those of its tools, such as sessions of MCP
    servers. The latter then have the limit, too."""
    of_tools = [create for tool in tools if isinstance(create := getattr(tool, "create_state", None), Environments)]
    made = list(dict.fromkeys([*([] if environments is None else [environments]), *of_tools]))
    for each in made:
        each.instances.limit = limit
    return made


def without_impossible_branches(args: ARPOConfig, environments: Environments | None) -> ARPOConfig:
    """Return `args`, or if there are classes that cannot be forked, a copy with N = M, after a warning."""
    kinds = () if environments is None else environments.kinds.by_name.values()
    names = [kind.name for kind in kinds if kind.forking is Forking.NONE]
    if not names or args.initial_rollouts == args.num_generations:
        return args
    logger.warning(
        f"The environment {names[0]} has no fork(), is not copyable and not replayable, so no branch can get its "
        f"state. All {args.num_generations} paths of a group start at the prompt (initial_rollouts = "
        "num_generations)."
    )
    copied = copy.copy(args)  # another trainer may get the same settings
    copied.initial_rollouts = args.num_generations
    return copied


def _may_read_environments(function: Any) -> bool:
    if not callable(function) or isinstance(function, torch.nn.Module):
        return False
    parameters = parameters_of(function)
    return parameters is None or any(
        name == "environments" or of.kind is of.VAR_KEYWORD for name, of in parameters.items()
    )


def _check_concurrency(args: ARPOConfig, *, keeps: bool, evaluates: bool) -> None:
    assert args.steps_per_generation is not None
    rollouts = 1 + args.rollouts_ahead  # at the same time
    batches = [(rollouts * args.per_device_train_batch_size * args.steps_per_generation, args.num_generations)]
    if evaluates:
        batches.append((args.per_device_eval_batch_size, args.num_generations_eval or args.num_generations))
    of = "completions" if keeps else "prompts"
    # A batch that is no multiple of its groups' size has a tree for each row (`leaves_per_tree`).
    least = max(rows if keeps or rows % size else rows // size for rows, size in batches)
    if args.environment_concurrency is not None and args.environment_concurrency < least:
        rollouts_have = "a rollout has" if rollouts == 1 else f"{rollouts} rollouts (rollouts_ahead) have"
        until = (
            "Rewards may read the environment of each completion, so all stay open until the rewards are computed"
            if keeps
            else "One environment of each prompt is open before the paths start"
        )
        raise ConfigError(
            f"environment_concurrency is {args.environment_concurrency}, but {rollouts_have} {least} {of}. {until}. "
            f"Set it to at least {least}, or lower the batch size or steps_per_generation"
            + (
                ", or let the reward functions name their arguments, without environments and **kwargs."
                if keeps
                else "."
            )
        )


def with_prompts(datasets: Sequence[Any]) -> list[Any]:
    """Return the datasets, with None for those without a prompt column, since environments provide the prompts."""
    return [
        None if isinstance(dataset, Dataset) and "prompt" not in dataset.column_names else dataset
        for dataset in datasets
    ]


def without_rows(args: ARPOConfig) -> Dataset:
    """Return a dataset for a run without a dataset, like TRL: rows with the prompt `NO_PROMPT`, for `max_steps` steps.

    Raises:
        ConfigError: `max_steps` does not set the length of training.
    """
    if args.max_steps <= 0:
        raise ConfigError(
            f"There is no train_dataset, and max_steps is {args.max_steps}. Set max_steps to the number of steps to "
            "train, or pass a dataset."
        )
    assert args.generation_batch_size is not None and args.num_generations is not None
    return Dataset.from_dict({"prompt": [NO_PROMPT] * (args.generation_batch_size // args.num_generations)})


def with_text(prompt: Any, text: str | None) -> Any:
    """Return the prompt with the text of `reset` at the end of its last message, or of its text."""
    if text is None:
        return prompt
    if isinstance(prompt, str):
        return prompt + text
    content = prompt[-1]["content"]
    added: Any = text if isinstance(content, str) else [{"type": "text", "text": text}]
    return [*prompt[:-1], {**prompt[-1], "content": content + added}]


def begun(
    environments: Environments,
    rows: Sequence[dict[str, Any]],
    size: int,
    first_group: int,
    toolbox: ToolBox,
    between_events: Callable[[], None],
) -> list[dict[str, Any]]:
    """Return the rows with the result of `reset` in their prompts. The environments of their first paths are then
    open.

    Args:
        rows: `size` for each group.
        first_group: The id of the first group.
        toolbox, between_events: As in `Environments.begin`, whose errors this raises.
    """
    groups = {first_group + i: rows[i * size] for i in range(len(rows) // size)}
    texts = environments.begin(groups, toolbox, between_events)
    return [
        row | {"prompt": with_text(row.get("prompt", NO_PROMPT), texts[first_group + i // size])}
        for i, row in enumerate(rows)
    ]


def of_leaves(environments: Environments, trees: Sequence[RolloutTree], first_group: int) -> list[Any] | None:
    """Return the environment object of each leaf, tree by tree, for the rewards; None if no reward reads them.

    An object that could not be created is None.

    Raises:
        ToolSpecError: The state of an object is not the one after its last call.
    """
    if not environments.keeps:
        return None
    kept = [
        environments.kept[group, leaf.address]
        for group, tree in enumerate(trees, first_group)
        for leaf in tree.leaves()
    ]
    environments.instances.check_all_unchanged([instance for instance in kept if instance is not None])
    return [None if instance is None else instance.value for instance in kept]


def owned_rewards(environments: Environments | None) -> list[Callable[..., Any]]:
    """Return a reward function for each class with a `get_reward`. The function calls it on the environments of that
    class.

    It is named after the class, as in TRL, and returns None for environments of other classes.
    """
    if environments is None:
        return []
    classes = {kind.type: kind for kind in environments.kinds.by_name.values() if kind.offers("get_reward")}
    return [_owned_reward(environments.instances, kind) for kind in classes.values()]


def _owned_reward(instances: Instances, kind: EnvironmentKind) -> Callable[..., Any]:
    def reward(environments: Sequence[Any]) -> list[Any]:
        """None for environments of other classes."""
        return [instances.reward_of(each) if kind.made(each) else None for each in environments]

    reward.__name__ = kind.name
    return reward


def with_owned(given: Any, functions: Sequence[Any], owned: Sequence[Any]) -> list[Any] | None:
    """Return `given`, the `reward_processing_classes` of `functions`, with None for each of `owned`. None stays None.

    Raises:
        ConfigError: There is not one for each of `functions`. TRL's error would count `owned`, too.
    """
    if given is None:
        return None
    listed = given if isinstance(given, list) else [given]  # as in TRL
    if len(listed) != len(functions):
        raise ConfigError(
            f"The number of reward processing classes ({len(listed)}) must match the number of reward functions "
            f"({len(functions)}). Pass a list with a tokenizer for each reward model, and None for each function."
        )
    return [*listed, *(None for _ in owned)]


@contextmanager
def weighted(args: ARPOConfig, owned: Sequence[Any]) -> Iterator[None]:
    """A context in which `reward_weights` also has a weight of 1 for each of `owned`."""
    weights = args.reward_weights
    if weights is not None:
        args.reward_weights = [*weights, *(1.0 for _ in owned)]
    try:
        yield
    finally:
        args.reward_weights = weights


def tally_environments(environments: Sequence[Environments], tally: Tally) -> None:
    """Count the events of a rollout's environments in `tally`."""
    if not environments:
        return
    taken = [each.instances.take_counts() for each in environments]
    counts = {field.name: sum(getattr(each, field.name) for each in taken) for field in fields(Counts)}
    for name in ("resets", "forks", "replays", "refused_forks", "failed"):
        tally.totals[f"environments/{name}"] += counts[name]
    for name in ("reset", "fork", "replay"):
        if count := counts[f"{name}s"]:
            tally.add(f"environments/{name}_s", counts[f"{name}_s"], count)
    tally.add("environments/live_max", counts["live_max"])
