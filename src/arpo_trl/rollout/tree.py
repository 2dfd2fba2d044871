"""A group's rollouts as one tree that stores every token once.

    root ──┬─ turn ── observation ──┬─ turn ── …           root: the prompt
           │                        └─ turn (a branch)     turn: model tokens up to a call, the end or the length limit
           └─ turn ── …                                    observation: the tokens of a turn's tool results

Invariants, checked by `RolloutTree.check`:

- A turn's parent is the root or an observation. An observation's parent is a turn that has no other child. Branches
  are extra turns under one observation, so the tokens of a node are never split.
- A node contains only the tokens that it adds. The concatenated nodes of a path are exactly the ids that the model
  saw.
- Model tokens have mask 1 and a sampling logprob. Observation tokens have mask 0.
- A finished tree has exactly M leaves, which are distinct turns, sorted by address. Addresses do not depend on the
  order in which turns and tool calls finish.

Pure: no trl, no engine, no network.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from arpo_trl.errors import EngineError
from arpo_trl.tools.calls import CallSource, ToolFailure

T = TypeVar("T")

Address = tuple[int, ...]
"""Where a path starts: `(i,)` for the i-th path at the root. A branch appends `(depth, j)` to the address of its
parent path: it is the j-th extra turn under the observation that follows `depth` turns of that path."""


def address_text(address: Address) -> str:
    """The address in readable form: `0,2,1`."""
    return ",".join(map(str, address))


Span = tuple[float, float]
"""The times at which a node was requested and complete, in seconds since the start of its group."""


class NodeKind(StrEnum):
    ROOT = "root"
    TURN = "turn"
    OBSERVATION = "observation"


class StopReason(StrEnum):
    """Why a path ended."""

    EOS = "eos"
    """The model ended its last turn without a tool call."""
    LENGTH = "length"
    """The token limit left no room for another token, or for the requested tool result."""
    CALL_LIMIT = "call_limit"
    """The model called a tool again after the notice that no calls are left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutedCall:
    """One tool call of a path and its result, as rewards and logs receive it.

    `failure` is None if the tool ran and returned. `seconds` is the wall time of the execution (0.0 from a cache).

        ExecutedCall(
            name="search", arguments={"query": "iron"}, text="Iron melts at 1,538 °C.", failure=None, seconds=0.4,
            source=CallSource.EXECUTED,
        )
    """

    name: str
    arguments: dict[str, Any]
    text: str
    failure: ToolFailure | None
    seconds: float
    source: CallSource
    changed: str | None = None
    """The call's changes to its path's environment, if the environment can describe them; only for the log."""

    @property
    def ok(self) -> bool:
        return self.failure is None

    def as_row(self) -> dict[str, Any]:
        """The plain dict that reward functions receive in the `tool_calls` column."""
        return {
            "name": self.name,
            "arguments": self.arguments,
            "text": self.text,
            "ok": self.ok,
            "failure": None if self.failure is None else str(self.failure),
            "seconds": self.seconds,
            "source": str(self.source),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchDecision:
    """A branch rule's decision on one observation. If it fires and `granted` < Z, the budget ran out. `fires` is None
    if the rule could not choose, because no branch may start there.

    `entropy_nats`, `delta` (ΔH) and `probability` (P) are None under a rule that does not compute them. `reason`
    names what else the decision depends on, as text for users: a draw, a score, a planned width.

        BranchDecision(entropy_nats=1.2, delta=0.05, probability=0.51, fires=True, granted=1, reason="drew 0.312")
    """

    entropy_nats: float | None = None
    delta: float | None = None
    probability: float | None = None
    fires: bool | None = False
    granted: int = 0
    reason: str = ""


@dataclass(slots=True, kw_only=True)
class Node:
    """The tokens that one turn or observation adds to its path. Fields that do not apply to the kind are None or
    empty.

    A turn has `logprobs`, the natural-log probabilities under the sampling distribution, one per id. Its `entropies`
    are in nats and cover its first k tokens only. `versions` has one number per id: the trainer's step whose weights
    sampled it. It is empty if the engine does not report versions. `stop` is set on the turn that ends a path. That
    turn has its calls in `unread` if there was no room for their results. An observation has the `calls` of the turn
    above it: one, or several if the model made several calls in that turn.

        Node(index=2, parent=1, kind=NodeKind.OBSERVATION, ids=[50, 51], text="Iron melts at 1,538 °C.", calls=[call])
    """

    index: int
    parent: int | None
    kind: NodeKind
    ids: list[int]
    text: str
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    stop: StopReason | None = None
    unread: list[ExecutedCall] = field(default_factory=list)
    calls: list[ExecutedCall] = field(default_factory=list)
    decision: BranchDecision | None = None
    children: list[int] = field(default_factory=list)

    @property
    def known_logprobs(self) -> list[float]:
        """The logprobs without those that the engine could not compute (NaN)."""
        return [logprob for logprob in self.logprobs if not math.isnan(logprob)]

    @property
    def squared_score(self) -> float:
        """Σ (1 − p)² over the tokens of a turn, p their sampling probabilities. Unknown ones (NaN) add nothing."""
        return math.fsum(math.expm1(logprob) ** 2 for logprob in self.known_logprobs)

    @property
    def messages(self) -> list[dict[str, str]]:
        """A turn as an assistant message; an observation as tool messages, one per call."""
        if self.kind is NodeKind.TURN:
            return [{"role": "assistant", "content": self.text}]
        results = [{"role": "tool", "name": call.name, "content": call.text} for call in self.calls]
        return results or [{"role": "tool", "content": self.text}]  # the notice that no calls are left

    @property
    def tool(self) -> str | None:
        """The tool of this result, or None. Several tools: "several". Calls that were not run: "refusal"."""
        tools = {"refusal" if call.source is CallSource.REFUSED else call.name for call in self.calls}
        return None if not tools else tools.pop() if len(tools) == 1 else "several"


@dataclass(frozen=True, slots=True, kw_only=True)
class Leaf:
    """One finished path: a view of the nodes below the root, in order, up to the turn where the path stopped.

    Leaf(address=(0,), nodes=tree.path(3)).ids
    """

    address: Address
    nodes: tuple[Node, ...]

    @property
    def ids(self) -> list[int]:
        """Completion ids: every token after the prompt, model and tool tokens alike."""
        return _end_to_end(node.ids for node in self.nodes)

    @property
    def mask(self) -> list[int]:
        """1 for each token that the model sampled, 0 for each token of a tool result."""
        return _end_to_end([int(node.kind is NodeKind.TURN)] * len(node.ids) for node in self.nodes)

    @property
    def logprobs(self) -> list[float]:
        """Sampling logprobs; 0.0 for observation tokens, which the model did not sample."""
        return _end_to_end(
            node.logprobs if node.kind is NodeKind.TURN else [0.0] * len(node.ids) for node in self.nodes
        )

    @property
    def token_nodes(self) -> list[int]:
        """The index of the node that contains each completion token."""
        return _end_to_end([node.index] * len(node.ids) for node in self.nodes)

    @property
    def turns(self) -> list[str]:
        """The text of each turn, without the end-of-sequence token."""
        return [node.text for node in self.nodes if node.kind is NodeKind.TURN]

    @property
    def calls(self) -> list[ExecutedCall]:
        """The tool calls along the path whose results the model received, in order."""
        return [call for node in self.nodes for call in node.calls]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The path as alternating assistant and tool messages, as TRL's tool loop passes it to rewards."""
        return _end_to_end(node.messages for node in self.nodes)

    @property
    def stop(self) -> StopReason:
        stop = self.nodes[-1].stop
        assert stop is not None  # RolloutTree.end sets it on every leaf
        return stop


class RolloutTree:
    """The tree of one group. Only the sampler adds nodes to it."""

    def __init__(self, prompt_ids: Sequence[int]):
        self.nodes: list[Node] = [Node(index=0, parent=None, kind=NodeKind.ROOT, ids=list(prompt_ids), text="")]
        self._leaves: dict[Address, int] = {}
        self.topups = 0
        """Leaves that started at the root because branches could no longer supply them. They started last."""

    @property
    def root(self) -> Node:
        return self.nodes[0]

    def add_turn(
        self,
        parent: int,
        ids: list[int],
        text: str,
        logprobs: list[float],
        entropies: Sequence[float],
        versions: Sequence[int] = (),
    ) -> Node:
        """Add a turn under `parent`, the root or an observation, and return it.

        Raises:
            EngineError: The numbers of ids and logprobs differ.
        """
        if len(logprobs) != len(ids):
            raise EngineError(
                f"The engine returned a turn of {len(ids)} tokens with {len(logprobs)} logprobs; expected one logprob "
                "per sampled token."
            )
        return self._add(
            parent, NodeKind.TURN, ids, text, logprobs=logprobs, entropies=list(entropies), versions=list(versions)
        )

    def add_observation(self, parent: int, ids: list[int], calls: Sequence[ExecutedCall], text: str) -> Node:
        """Add an observation under the turn `parent` and return it.

        `calls` is empty for the notice that no calls are left.
        """
        return self._add(parent, NodeKind.OBSERVATION, ids, text, calls=list(calls))

    def _add(self, parent: int, kind: NodeKind, ids: list[int], text: str, **fields: Any) -> Node:
        node = Node(index=len(self.nodes), parent=parent, kind=kind, ids=ids, text=text, **fields)
        self.nodes.append(node)
        self.nodes[parent].children.append(node.index)
        return node

    def end(self, node: int, address: Address, reason: StopReason, unread: Sequence[ExecutedCall] = ()) -> None:
        """Mark the turn `node` as the leaf of the path that starts at `address`.

        `unread` are the calls of the turn if there was no room for their results.
        """
        self.nodes[node].stop, self.nodes[node].unread = reason, list(unread)
        self._leaves[address] = node

    def path(self, node: int) -> tuple[Node, ...]:
        """The nodes of the path to `node`, without the root."""
        path: list[Node] = []
        current: int | None = node
        while current:  # 0 is the root
            path.append(self.nodes[current])
            current = self.nodes[current].parent
        return tuple(reversed(path))

    def ids_to(self, node: int) -> list[int]:
        """The model's input for a turn under `node`: the ids of the prompt and of the path down to `node`."""
        return _end_to_end([self.root.ids, *(step.ids for step in self.path(node))])

    def leaves(self) -> list[Leaf]:
        """The finished paths in address order."""
        return [Leaf(address=address, nodes=self.path(self._leaves[address])) for address in sorted(self._leaves)]

    def writers(self) -> dict[int, Address]:
        """Node → the address of the path that wrote it. The path's branches share the nodes above their start."""
        writers: dict[int, Address] = {}
        for leaf in self.leaves():  # a path's address sorts before those of its branches
            for node in leaf.nodes:
                writers.setdefault(node.index, leaf.address)
        return writers

    def turns(self) -> Iterator[Node]:
        return (node for node in self.nodes if node.kind is NodeKind.TURN)

    def observations(self) -> Iterator[Node]:
        return (node for node in self.nodes if node.kind is NodeKind.OBSERVATION)

    def calls(self) -> list[ExecutedCall]:
        """All calls made in the tree, those without room for their results included."""
        return [call for node in self.nodes for call in (*node.calls, *node.unread)]

    def check(self, num_leaves: int) -> None:
        """Check the invariants in the module's docstring.

        Raises:
            EngineError: The tree breaks one of them.
        """
        expected_parent = {NodeKind.TURN: {NodeKind.ROOT, NodeKind.OBSERVATION}, NodeKind.OBSERVATION: {NodeKind.TURN}}
        for node in self.nodes[1:]:
            assert node.parent is not None
            if self.nodes[node.parent].kind not in expected_parent[node.kind]:
                raise EngineError(
                    f"Node {node.index} is a {node.kind} under a {self.nodes[node.parent].kind}; expected turns under "
                    "the root or an observation, and observations under a turn."
                )
            if node.kind is NodeKind.TURN and len(node.children) > 1:
                raise EngineError(f"Turn {node.index} has {len(node.children)} children; expected at most one.")
            if node.kind is NodeKind.TURN and not node.ids:
                raise EngineError(f"Turn {node.index} has no tokens; an engine must sample at least one.")
        ends = list(self._leaves.values())
        if len(ends) != num_leaves or len(set(ends)) != num_leaves:
            raise EngineError(f"The tree of a group has {len(set(ends))} distinct leaves; expected {num_leaves}.")


def _end_to_end(parts: Iterable[list[T]]) -> list[T]:
    whole: list[T] = []
    for part in parts:
        whole += part
    return whole
