"""What a sampler receives and returns: its settings, the requests of a batch, and the batch of finished trees."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace

from arpo_trl.common.user_code import text_of
from arpo_trl.options import RolloutSchedule, ShareCalls
from arpo_trl.rollout.protocols import ToolProtocol
from arpo_trl.rollout.rules.base import BranchRule
from arpo_trl.rollout.rules.threshold import Threshold
from arpo_trl.rollout.tree import Leaf, RolloutTree, Span
from arpo_trl.tools.spec import ToolSet
from arpo_trl.visible import for_people

Score = Callable[[int, RolloutTree], Sequence[float]]
"""(request id, tree) → the rewards of the finished leaves, in the order of `tree.leaves()`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeSettings:
    """The sampling settings of a group. Lengths are in tokens. `max_length` is the model's context, prompt included.

    `max_tool_calls` limits the calls of a path to all tools together. At the limit the path must answer.
    `max_calls_of` limits the calls to single tools. Calls beyond it get a notice, and the path can call other tools.

        TreeSettings(
            num_generations=16, initial_rollouts=8, max_completion_length=4096, max_length=8192, max_tool_calls=6
        )
    """

    num_generations: int
    initial_rollouts: int
    max_completion_length: int
    max_length: int
    max_tool_calls: int
    entropy_probe_tokens: int = 20
    rule: BranchRule = field(default_factory=Threshold)
    schedule: RolloutSchedule = RolloutSchedule.OVERLAP
    share_calls: ShareCalls = ShareCalls.OFF
    max_calls_of: Mapping[str, int] = field(default_factory=dict)

    def without_branching(self, num_generations: int) -> TreeSettings:
        """The same settings for evaluation: every path starts at the root, and paths do not share calls."""
        return replace(
            self,
            num_generations=num_generations,
            initial_rollouts=num_generations,
            share_calls=ShareCalls.OFF,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Kit:
    """The tools that the paths of a group may call, and the protocol that offers them.

    tools = ToolSet([search])
    Kit(tools=tools, protocol=TagProtocol(tokenizer, tools.specs))
    """

    tools: ToolSet
    protocol: ToolProtocol


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRequest:
    """One prompt to roll out. `id` is its number within the step, unique across all ranks.

    GroupRequest(id=0, prompt_ids=protocol.encode_prompt("When does iron melt?"))
    """

    id: int
    prompt_ids: list[int]
    kit: Kit | None = None
    """None: all tools of the sampler, and its protocol."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledGroup:
    """The finished tree of one request.

    SampledGroup(tree=tree, turns_in_sequence=3)
    """

    tree: RolloutTree
    turns_in_sequence: int
    """The longest chain of turns that ran one after another, including the turns before the start of a late path."""
    spans: dict[int, Span] = field(default_factory=dict)
    """Node → when its turn was submitted and finished, or its calls were submitted and answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The outcome of one request of a stream: its tree or its error, and the seconds from its start to its end.

    `cause` is the exception that `error` describes.

    Finished(id=0, group=None, error="EngineError: The server answered 400.", seconds=1.5)
    """

    id: int
    group: SampledGroup | None
    error: str | None
    seconds: float
    cause: Exception | None = None

    @property
    def tree(self) -> RolloutTree | None:
        return None if self.group is None else self.group.tree


def error_text(error: Exception) -> str:
    """An exception as the `error` of a `Finished`: files and reports contain it, so it has no secret."""
    return for_people(f"{type(error).__name__}: {text_of(error)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutTimes:
    """Seconds of one `sample` call: in total, in model forwards, waiting for tools, and syncing weights.

    RolloutTimes(total_s=12.0, forward_s=9.0, tool_wait_s=2.0, sync_s=0.5).own_s  # 0.5
    """

    total_s: float
    forward_s: float
    tool_wait_s: float
    sync_s: float

    @property
    def own_s(self) -> float:
        """Seconds in the sampler itself: the total without forwards, waiting for tools and syncing weights."""
        return self.total_s - self.forward_s - self.tool_wait_s - self.sync_s

    def __add__(self, other: RolloutTimes) -> RolloutTimes:
        return RolloutTimes(**{x.name: getattr(self, x.name) + getattr(other, x.name) for x in fields(self)})

    def __sub__(self, other: RolloutTimes) -> RolloutTimes:
        return RolloutTimes(**{x.name: getattr(self, x.name) - getattr(other, x.name) for x in fields(self)})


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutBatch:
    """The finished groups, in the order of their requests.

    RolloutBatch(groups=[SampledGroup(tree=tree, turns_in_sequence=3)], times=times)
    """

    groups: list[SampledGroup]
    times: RolloutTimes

    @property
    def trees(self) -> list[RolloutTree]:
        return [group.tree for group in self.groups]

    @property
    def leaves(self) -> list[Leaf]:
        """The leaves of all trees, tree after tree."""
        return [leaf for tree in self.trees for leaf in tree.leaves()]

    @property
    def prompt_ids(self) -> list[list[int]]:
        """The prompt of each leaf."""
        return [tree.root.ids for tree in self.trees for _ in tree.leaves()]

    @property
    def turns_in_sequence(self) -> list[int]:
        return [group.turns_in_sequence for group in self.groups]

    @property
    def spans(self) -> list[dict[int, Span]]:
        return [group.spans for group in self.groups]
