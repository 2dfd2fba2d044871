"""The state of a rollout: its groups, their live paths, and the calls of a path's turn that wait for results."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

from arpo_trl.rollout.batch import SampledGroup
from arpo_trl.rollout.engines.base import Turn
from arpo_trl.rollout.protocols import BadCall, ToolProtocol
from arpo_trl.rollout.rules.base import BranchContext, Candidate, LivePath
from arpo_trl.rollout.tree import Address, ExecutedCall, RolloutTree, Span
from arpo_trl.tools.calls import ToolCall
from arpo_trl.tools.sharing import SubmittedCall
from arpo_trl.tools.spec import ToolSet
from arpo_trl.tools.state import PathStates
from arpo_trl.tools.toolbox import ToolResult


@dataclass(slots=True, kw_only=True)
class Group:
    """The state of one prompt's rollout."""

    id: int
    tree: RolloutTree
    context: BranchContext
    branches: bool
    """Whether the group started with a branch budget. Without one the rule decides nothing."""
    protocol: ToolProtocol
    tools: ToolSet | None
    """The tools that the group's paths may call; None: all."""
    started_s: float = field(default_factory=time.perf_counter)
    error: Exception | None = None
    """The error that ended the group, in a stream."""
    starts: int = 0
    longest_chain: int = 0
    spans: dict[int, Span] = field(default_factory=dict)
    live: dict[Address, LivePath] = field(default_factory=dict)
    candidates: list[tuple[Path, Candidate]] = field(default_factory=list)
    """Observations that the rule must still decide on, or may decide on again, with the paths that continue them."""
    made: dict[Hashable, SubmittedCall[tuple[Calling, int]]] = field(default_factory=dict)
    """The calls that paths with the same history may share, by `sharing_keys`."""
    states_after: dict[bytes, PathStates] = field(default_factory=dict)
    """A fork of the states after each shareable turn that acted on them, by the history up to and including that
    turn."""

    @property
    def sampled(self) -> SampledGroup:
        return SampledGroup(tree=self.tree, turns_in_sequence=self.longest_chain, spans=self.spans)


@dataclass(frozen=True, slots=True, kw_only=True)
class Path:
    """A live path: the prefix of its current turn, its counts and its limits."""

    group: Group
    address: Address
    parent: int
    """The root or observation above the current turn; once the turn is finished, the turn itself."""
    ids: list[int]
    """The ids of the prompt and of the path down to `parent`, inclusive."""
    states: PathStates
    """The state that the path's tool calls read and change."""
    states_for_branches: PathStates | None = None
    """A fork of the states at the observation above the current turn; None if it cannot branch, or the rule has
    decided."""
    depth: int = 0
    """Turns down to `parent`, inclusive, inherited ones included."""
    waited: int = 0
    """Turns outside the path that ran one after another before this path could start."""
    results: int = 0
    """Tool results received, including the replies to malformed calls."""
    calls_of: Mapping[str, int] = field(default_factory=dict)
    """Number of calls to each tool, without calls that were not run."""
    history: bytes = b""
    """`history_after` the calls made so far; empty if calls are not shared."""
    may_call: bool = True
    decides: bool = False
    """Whether the branch rule has not yet seen the observation above the current turn."""
    root_entropies: Sequence[float] = ()
    last_entropies: Sequence[float] = ()
    last_request: int | None = None
    """The request id of the last turn above the current one."""
    written: Turn | None = None
    """The current turn so far, if it continues after a stop string that is only text."""
    since_s: float = 0.0
    """When the current turn, or the calls under it, were submitted, in seconds since the start of the group."""


@dataclass(slots=True, kw_only=True)
class Calling:
    """The calls of one turn. Its path continues when all calls have a result."""

    path: Path
    calls: Sequence[ToolCall | BadCall]
    answered: dict[int, ExecutedCall] = field(default_factory=dict)

    @property
    def in_order(self) -> list[ExecutedCall]:
        return [self.answered[i] for i in range(len(self.calls))]

    @property
    def done(self) -> bool:
        return len(self.answered) == len(self.calls)

    def answer(self, i: int, result: ToolResult) -> None:
        call = self.calls[i]
        assert isinstance(call, ToolCall)
        self.answered[i] = ExecutedCall(
            name=call.name,
            arguments=call.arguments,
            text=result.text,
            failure=result.failure,
            seconds=result.seconds,
            source=result.source,
        )
