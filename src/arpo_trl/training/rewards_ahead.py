"""Calls reward functions earlier than TRL, and returns the results when TRL calls the functions.

Rollouts ahead call them outside the trainer's thread. Dynamic sampling calls them only for the new completions of a
round. TRL still runs reward models: on the trainer's device, in the trainer's thread, for all completions.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from arpo_trl.trl_seam import is_async_callable

_NO_COLUMNS = ("prompt", "completion", "completion_ids")
"""Keys of a row that TRL does not pass on as columns."""


@dataclass(slots=True, kw_only=True)
class Scored:
    """The results and log calls of the reward functions, and their duration in seconds."""

    count: int
    """The number of scored completions, including replaced ones."""
    rewards: list[list[Any] | None]
    """One entry per reward function, with one value per completion; None for a reward model."""
    columns: list[tuple[str, list[Any]]] = field(default_factory=list)
    """The calls of `log_extra`."""
    metrics: list[tuple[str, float]] = field(default_factory=list)
    """The calls of `log_metric`."""
    seconds: float = 0.0

    def with_new(self, new: Scored, places: Sequence[int]) -> Scored:
        """The scores of all completions after those in `new` have replaced the ones at `places`.

        A metric is then the mean over all scored completions, including replaced ones.
        """
        columns, of_new = _joined(self.columns), _joined(new.columns)
        completions = next((len(old) for old in self.rewards if old is not None), 0)
        unknown = [None] * completions
        totals: dict[str, tuple[float, int]] = {}
        for part in (self, new):
            for name, values in _joined([(name, [value]) for name, value in part.metrics]).items():
                total, count = totals.get(name, (0.0, 0))
                totals[name] = total + part.count * sum(values) / len(values), count + part.count
        return Scored(
            count=self.count + new.count,
            rewards=[
                None if old is None or own is None else _placed(old, own, places)
                for old, own in zip(self.rewards, new.rewards, strict=True)
            ],
            columns=[
                (name, _placed(columns.get(name, unknown), of_new.get(name, []), places))
                for name in columns.keys() | of_new.keys()
            ],
            metrics=[(name, total / count) for name, (total, count) in totals.items()],
            seconds=self.seconds + new.seconds,
        )

    def replaying(self, functions: Sequence[Any]) -> list[Any]:
        """Functions that return the stored rewards, as replacements of `functions`. The first one repeats the log
        calls."""
        pending = [self]

        def replay(i: int) -> Any:
            def replayed(*, log_extra: Any, log_metric: Any, **_: Any) -> list[Any]:
                if pending:
                    pending.clear()
                    for name, values in self.columns:
                        log_extra(name, values)
                    for name, value in self.metrics:
                        log_metric(name, value)
                rewards = self.rewards[i]
                assert rewards is not None
                return rewards

            return replayed

        return [function if self.rewards[i] is None else replay(i) for i, function in enumerate(functions)]


def score(
    functions: Sequence[Any],
    rows: Sequence[Mapping[str, Any]],
    completions: Sequence[Any],
    completion_ids: Sequence[list[int]],
    fields: Mapping[str, Sequence[Any]],
    *,
    state: Any,
    loop: asyncio.AbstractEventLoop | None,
) -> Scored:
    """Call the reward functions with TRL's arguments: sync ones one by one, then async ones together.

    Args:
        functions: TRL's `reward_funcs`, checked (`checked_reward`).
        rows: The dataset's rows, one per completion.
        fields: Additional columns, from the rollout.
        state: The trainer's state.
        loop: The event loop of async functions; None if there are none.
    """
    start = time.perf_counter()
    scored = Scored(count=len(rows), rewards=[None] * len(functions))
    arguments = {name: [row[name] for row in rows] for name in rows[0] if name not in _NO_COLUMNS} | {
        **fields,
        "prompts": [row["prompt"] for row in rows],
        "completions": completions,
        "completion_ids": completion_ids,
        "trainer_state": state,
        "log_extra": lambda name, values: scored.columns.append((name, values)),
        "log_metric": lambda name, value: scored.metrics.append((name, value)),
    }
    waiting = {}
    for i, function in enumerate(functions):
        if isinstance(function, torch.nn.Module):
            continue
        if is_async_callable(function):
            waiting[i] = function(**arguments)
        else:
            scored.rewards[i] = function(**arguments)
    if waiting:
        assert loop is not None

        async def together() -> list[Any]:
            return await asyncio.gather(*waiting.values())

        for i, rewards in zip(waiting, asyncio.run_coroutine_threadsafe(together(), loop).result(), strict=True):
            scored.rewards[i] = rewards
    scored.seconds = time.perf_counter() - start
    return scored


def _joined(calls: Sequence[tuple[str, list[Any]]]) -> dict[str, list[Any]]:
    """The values of all calls by name, joined as in TRL."""
    joined: dict[str, list[Any]] = {}
    for name, values in calls:
        joined.setdefault(name, []).extend(values)
    return joined


def _placed(old: Sequence[Any], new: Sequence[Any], places: Sequence[int]) -> list[Any]:
    """`old` with the values of `new` at `places`; None if there is no value."""
    values = dict(enumerate(old)) | dict.fromkeys(places) | dict(zip(places, new, strict=False))
    return [values.get(i) for i in range(max(values, default=-1) + 1)]
