"""A reward function as the trainer calls it: given what it names, checked, and interruptible; and the rewards' sum."""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, SupportsFloat

import torch

from arpo_trl.errors import Interrupted, RewardError
from arpo_trl.runs.interrupts import Interrupts
from arpo_trl.trl_seam import get_callable_name, is_async_callable

REWARD_POLL_S = 0.2
"""How often waiting for an async reward function looks for an interrupt."""


def checked_reward(function: Any, interrupts: Interrupts) -> Any:
    """`function` as TRL may call it; reward models, and names of them, are TRL's own affair and returned as they are.

    - A function without `**kwargs` is given what it names. TRL hands over all there is, and we add columns to that.
    - What it returns is checked: TRL reads a NaN as "not applicable" and goes on without a word.
    - An interrupt ends it with rewards of nothing, so that this rank still comes to where all ranks decide to stop.

    Raises:
        RewardError: From the result: something asked for is not there, or it did not return one finite number, or
            None, for each completion.
    """
    if not callable(function) or isinstance(function, torch.nn.Module):
        return function
    name = get_callable_name(function)
    select = _selection(function, name)

    if is_async_callable(function):

        async def checked_async(*, completions: Sequence[Any], **columns: Any) -> Any:
            task = asyncio.ensure_future(function(**select({"completions": completions, **columns})))
            while not (await asyncio.wait([task], timeout=REWARD_POLL_S))[0]:
                if interrupts.told is not None:
                    task.cancel()
                    return [0.0] * len(completions)
            return _checked(task.result(), name, len(completions))

        wrapper: Any = checked_async
    else:

        def checked(*, completions: Sequence[Any], **columns: Any) -> Any:
            try:
                with interrupts.raising():
                    rewards = function(**select({"completions": completions, **columns}))
            except Interrupted:
                return [0.0] * len(completions)
            return _checked(rewards, name, len(completions))

        wrapper = checked
    wrapper.__name__ = name
    return wrapper


def total_rewards(rewards: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(B,) sums of (B, F) rewards, weighted by (F,). NaN rewards do not apply; the sum is NaN where none applies."""
    total = (rewards * weights.to(rewards.device)).nansum(dim=1)
    return total.masked_fill(rewards.isnan().all(dim=1), math.nan)


def _selection(function: Any, name: str) -> Callable[[Mapping[str, Any]], Mapping[str, Any]]:
    """What picks the arguments for `function` from all that there are."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # of a function written in C
        return lambda given: given
    kinds = {parameter.kind for parameter in parameters}
    named = [parameter.name for parameter in parameters if parameter.kind not in (_VAR_KEYWORD, _VAR_POSITIONAL)]
    required = [parameter.name for parameter in parameters if parameter.name in named and parameter.default is _EMPTY]

    def select(given: Mapping[str, Any]) -> Mapping[str, Any]:
        if missing := [needed for needed in required if needed not in given]:
            raise RewardError(
                f"The reward function {name!r} asks for {missing}, which is no column of the dataset. There are: "
                f"{', '.join(sorted(given))}."
            )
        return given if _VAR_KEYWORD in kinds else {key: given[key] for key in named if key in given}

    return select


_VAR_KEYWORD, _VAR_POSITIONAL = inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL
_EMPTY = inspect.Parameter.empty


def _checked(rewards: Any, name: str, count: int) -> Any:
    is_one = isinstance(rewards, str | bytes | Mapping) or getattr(rewards, "ndim", None) == 0
    listed = list(rewards) if isinstance(rewards, Iterable) and not is_one else None
    if listed is None or len(listed) != count:
        got = repr(rewards)[:80] if listed is None else f"{len(listed)} rewards"
        raise RewardError(
            f"The reward function {name!r} returned {got} for {count} completions; expected a list of one number, or "
            "None, for each."
        )
    for i, reward in enumerate(listed):
        if reward is not None and not (isinstance(reward, SupportsFloat) and math.isfinite(reward)):
            raise RewardError(
                f"The reward function {name!r} returned {reward!r} for completion {i}; expected a finite number, or "
                "None where it does not apply."
            )
    return listed
