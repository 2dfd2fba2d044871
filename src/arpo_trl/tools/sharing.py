"""Call-history sharing: the paths of one group with the same history of calls share one execution of the next call.

    path 1   search(iron) ── python(1538 − 1000) ── …          each call runs
    path 2   search(iron) ── python(1538 − 1000) ── …          both results come from path 1
    path 3   search(gold) ── python(1538 − 1000) ── …          another history: both calls run

A history consists of the calls of a path (tool and arguments), in order, turn by turn. Suppose that a result depends
only on the call, the calls before it on its path, and chance. Then there is one random result for each history and
call. A path reads it at most once, and no path chooses its tokens depending on a result that it has not read. So each
path has exactly the same distribution as without sharing, even if the tool is stochastic or has a state. Paths that
share a random result are no longer independent of each other.

Failures and timeouts are results like any other. If they were retried, a path would fail less often than without
sharing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

from arpo_trl.errors import ConfigError
from arpo_trl.tools.calls import CallSource, ToolCall
from arpo_trl.tools.spec import ToolSpec
from arpo_trl.tools.toolbox import ToolResult

Waiter = TypeVar("Waiter")


@dataclass(slots=True, kw_only=True)
class SubmittedCall(Generic[Waiter]):
    """A submitted call and the waiters for its result: first the path that made it, then the paths that share it.

    call = SubmittedCall(waiting=[first, second])
    list(call.deliver(result))                 # [(first, result), (second, the same with the source SHARED)]
    """

    waiting: list[Waiter] = field(default_factory=list)
    result: ToolResult | None = None
    """None while the call runs."""

    def deliver(self, result: ToolResult) -> Iterator[tuple[Waiter, ToolResult]]:
        """Store the result and yield it for each waiter."""
        self.result = result
        waiting, self.waiting = self.waiting, []
        for waiter in waiting:
            yield waiter, result
            result = as_shared(result)


def as_shared(result: ToolResult) -> ToolResult:
    """Return the result for a path that did not make the call. A refusal stays a refusal, because nothing ran."""
    return result if result.source is CallSource.REFUSED else replace(result, source=CallSource.SHARED)


def check_shareable(specs: Mapping[str, ToolSpec]) -> None:
    """Check that the calls of all tools may be shared.

    Raises:
        ConfigError: A tool is declared neither deterministic nor dependent on calls only, or its state is created
            with the path. Names the tool.
    """
    for name, spec in specs.items():
        if getattr(spec.create_state, "at_start", False):
            raise ConfigError(
                f"share_calls is 'history', but the state of tool {name!r} is created with the path, such as an "
                "environment or the session of an MCP server with per_path. A path that reuses the result of another "
                "path's call still needs a state after the call, and a fork or a replay costs as much as the call. "
                "Set share_calls: off, or remove the tool."
            )
        if not (spec.deterministic or spec.depends_on_calls_only):
            raise ConfigError(
                f"share_calls is 'history', but tool {name!r} has neither of the attributes deterministic and "
                "depends_on_calls_only; expected one of them to be True. If its results depend only on the path's "
                f"calls and on chance, set {name}.depends_on_calls_only = True. Otherwise set share_calls: off, or "
                "remove the tool."
            )


def history_after(history: bytes, calls: Sequence[ToolCall]) -> bytes:
    """Return the history of a path after a turn with these calls. `history` is the previous history, b"" at the root.

    Histories are equal if and only if the turns' calls are equal, in order, up to collisions of a 128-bit hash.
    """
    written = json.dumps([[call.name, call.arguments] for call in calls], sort_keys=True, default=repr)
    return hashlib.blake2b(history + written.encode(), digest_size=16).digest()


def sharing_keys(history: bytes, calls: Sequence[ToolCall], specs: Mapping[str, ToolSpec]) -> list[Hashable]:
    """Return a key for each call of a turn: calls with equal keys may share one execution.

    Calls of tools without state are shared even if the turns differ in later calls. If a call of the turn acts on a
    state, turns share all calls or none, because the state is known only after the whole turn.
    """
    if any(call.name in specs and specs[call.name].create_state is not None for call in calls):
        whole = history_after(history, calls)
        return [(whole, i) for i in range(len(calls))]
    return [history_after(history, calls[: i + 1]) for i in range(len(calls))]
