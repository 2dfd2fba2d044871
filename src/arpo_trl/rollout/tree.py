"""A group's rollouts as one tree that stores every token once.

    root ──┬─ turn ── observation ──┬─ turn ── …           root: the prompt
           │                        └─ turn (a branch)     turn: what the model wrote until it called, ended or ran out
           └─ turn ── …                                    observation: the tokens of a turn's tool results

Invariants, checked by `RolloutTree.check`:

- A turn's parent is the root or an observation; an observation's parent is a turn, which has no other child. Branches
  are extra turns under one observation, so a node never splits.
- A node holds only the tokens it adds. Concatenating the nodes of a path gives exactly the ids the model saw.
- Model tokens have mask 1 and a sampling logprob, observation tokens mask 0.
- A finished tree has exactly M leaves, distinct turn nodes, in a fixed order: that of their addresses, which do not
  depend on the order in which things happened to finish.

Pure: no trl, no engine, no network.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeVar

from arpo_trl.errors import EngineError
from arpo_trl.tools.calls import CallSource, ToolFailure

T = TypeVar("T")

Address = tuple[int, ...]
"""Where a path started: `(i,)` for the i-th at the root; a branch appends `(depth, j)`, the j-th extra turn under the
observation that follows `depth` turns of its parent path."""


class NodeKind(StrEnum):
    ROOT = "root"
    TURN = "turn"
    OBSERVATION = "observation"


class StopReason(StrEnum):
    """Why a path ended."""

    EOS = "eos"
    """The model ended its last turn itself."""
    LENGTH = "length"
    """No room was left for another token, or for the tool result it had asked for."""
    CALL_LIMIT = "call_limit"
    """It called a tool again after it had been told that it could not."""


@dataclass(frozen=True, slots=True)
class ExecutedCall:
    """One tool call of a path and what came of it, as rewards and logs receive it.

    `failure` is None when the tool ran and returned; `seconds` is the wall time of the execution (0.0 from a cache).
    """

    name: str
    arguments: dict[str, Any]
    text: str
    failure: ToolFailure | None
    seconds: float
    source: CallSource

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


@dataclass(frozen=True, slots=True)
class BranchDecision:
    """What a branch rule decided for one observation. `granted` < Z on a firing decision means the budget ran out.

    `entropy_nats`, `delta` (ΔH) and `probability` (P) are None under a rule that does not read or compute them.
    """

    entropy_nats: float | None = None
    delta: float | None = None
    probability: float | None = None
    fires: bool = False
    granted: int = 0


@dataclass(slots=True)
class Node:
    """The tokens one event adds to its path. Fields after `text` are None or empty where the kind has no use for them.

    `logprobs` are natural-log probabilities under the distribution sampled from, one per id of a turn; `entropies` are
    in nats and cover a turn's first probe tokens only. `stop` is set on the turn that ends a path. `calls` are those
    of the turn above an observation, one unless the model wrote several at once.
    """

    index: int
    parent: int | None
    kind: NodeKind
    ids: list[int]
    text: str
    logprobs: list[float] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    stop: StopReason | None = None
    calls: list[ExecutedCall] = field(default_factory=list)
    decision: BranchDecision | None = None
    children: list[int] = field(default_factory=list)

    @property
    def tool(self) -> str | None:
        """The tool whose result this is, `several` if they differ, `refusal` for calls that were not made, or None."""
        tools = {"refusal" if call.source is CallSource.REFUSED else call.name for call in self.calls}
        return None if not tools else tools.pop() if len(tools) == 1 else "several"


@dataclass(frozen=True, slots=True)
class Leaf:
    """One finished path, a view: the nodes after the root, in order, ending in the turn where it stopped."""

    address: Address
    nodes: tuple[Node, ...]

    @property
    def ids(self) -> list[int]:
        """Completion ids: every token after the prompt, the model's and the tools'."""
        return _end_to_end(node.ids for node in self.nodes)

    @property
    def mask(self) -> list[int]:
        """1 where the model sampled the token, 0 where a tool result brought it."""
        return _end_to_end([int(node.kind is NodeKind.TURN)] * len(node.ids) for node in self.nodes)

    @property
    def logprobs(self) -> list[float]:
        """Sampling logprobs; 0.0 on observation tokens, which nobody sampled."""
        return _end_to_end(
            node.logprobs if node.kind is NodeKind.TURN else [0.0] * len(node.ids) for node in self.nodes
        )

    @property
    def token_nodes(self) -> list[int]:
        """For each completion token the index of the node that holds it."""
        return _end_to_end([node.index] * len(node.ids) for node in self.nodes)

    @property
    def turns(self) -> list[str]:
        """What the model wrote, turn by turn, without the end-of-sequence token."""
        return [node.text for node in self.nodes if node.kind is NodeKind.TURN]

    @property
    def calls(self) -> list[ExecutedCall]:
        """The tool calls along the path, in order."""
        return [call for node in self.nodes for call in node.calls]

    @property
    def messages(self) -> list[dict[str, str]]:
        """The path as TRL's tool loop gives it to rewards: assistant and tool messages in turn."""
        messages = []
        for node in self.nodes:
            if node.calls:
                messages += [{"role": "tool", "name": call.name, "content": call.text} for call in node.calls]
            else:
                role = "assistant" if node.kind is NodeKind.TURN else "tool"
                messages.append({"role": role, "content": node.text})
        return messages

    @property
    def stop(self) -> StopReason:
        stop = self.nodes[-1].stop
        assert stop is not None  # RolloutTree.end is the only way to become a leaf
        return stop


class RolloutTree:
    """The tree of one group. Grown by the sampler, read by everyone else."""

    def __init__(self, prompt_ids: Sequence[int]):
        self.nodes: list[Node] = [Node(0, None, NodeKind.ROOT, list(prompt_ids), "")]
        self._leaves: dict[Address, int] = {}

    @property
    def root(self) -> Node:
        return self.nodes[0]

    def add_turn(
        self, parent: int, ids: list[int], text: str, logprobs: list[float], entropies: Sequence[float]
    ) -> Node:
        """The new turn under `parent`, which is the root or an observation."""
        if len(logprobs) != len(ids):
            raise EngineError(
                f"A turn came with {len(ids)} tokens but {len(logprobs)} logprobs; an engine must return one logprob "
                "per sampled token."
            )
        return self._add(parent, NodeKind.TURN, ids, text, logprobs=logprobs, entropies=list(entropies))

    def add_observation(self, parent: int, ids: list[int], calls: Sequence[ExecutedCall], text: str) -> Node:
        """The new observation under the turn `parent`; `calls` is empty for the notice that no calls are left."""
        return self._add(parent, NodeKind.OBSERVATION, ids, text, calls=list(calls))

    def _add(self, parent: int, kind: NodeKind, ids: list[int], text: str, **fields: Any) -> Node:
        node = Node(len(self.nodes), parent, kind, ids, text, **fields)
        self.nodes.append(node)
        self.nodes[parent].children.append(node.index)
        return node

    def end(self, node: int, address: Address, reason: StopReason) -> None:
        """Marks the turn `node` as the leaf of the path that started at `address`."""
        self.nodes[node].stop = reason
        self._leaves[address] = node

    def path(self, node: int) -> tuple[Node, ...]:
        """The nodes from just below the root down to `node`."""
        path: list[Node] = []
        current: int | None = node
        while current:  # 0 is the root
            path.append(self.nodes[current])
            current = self.nodes[current].parent
        return tuple(reversed(path))

    def ids_to(self, node: int) -> list[int]:
        """Everything the model sees before it writes under `node`: the prompt and the path, observations included."""
        return _end_to_end([self.root.ids, *(step.ids for step in self.path(node))])

    def leaves(self) -> list[Leaf]:
        """The finished paths in address order."""
        return [Leaf(address, self.path(self._leaves[address])) for address in sorted(self._leaves)]

    def turns(self) -> Iterator[Node]:
        return (node for node in self.nodes if node.kind is NodeKind.TURN)

    def observations(self) -> Iterator[Node]:
        return (node for node in self.nodes if node.kind is NodeKind.OBSERVATION)

    def check(self, num_leaves: int) -> None:
        """Raises EngineError if an invariant of the module's docstring is broken."""
        expected_parent = {NodeKind.TURN: {NodeKind.ROOT, NodeKind.OBSERVATION}, NodeKind.OBSERVATION: {NodeKind.TURN}}
        for node in self.nodes[1:]:
            assert node.parent is not None
            if self.nodes[node.parent].kind not in expected_parent[node.kind]:
                raise EngineError(f"Node {node.index} is a {node.kind} under a {self.nodes[node.parent].kind}.")
            if node.kind is NodeKind.TURN and len(node.children) > 1:
                raise EngineError(f"Turn {node.index} has {len(node.children)} children; a turn never splits.")
            if node.kind is NodeKind.TURN and not node.ids:
                raise EngineError(f"Turn {node.index} is empty; an engine must sample at least one token.")
        ends = list(self._leaves.values())
        if len(ends) != num_leaves or len(set(ends)) != num_leaves:
            raise EngineError(f"A group ended with {len(set(ends))} distinct leaves; expected {num_leaves}.")


def _end_to_end(parts: Iterable[list[T]]) -> list[T]:
    whole: list[T] = []
    for part in parts:
        whole += part
    return whole
