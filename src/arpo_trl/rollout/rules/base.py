"""The interface of a branch rule, the data that it reads, and the budget that all rules share.

The engine measures the entropies of the first k tokens after an observation while it samples them. `H_turn` is their
mean and `H_root` that of the path's first turn. Their difference, divided by the largest entropy over V tokens, is ΔH:

    ΔH = (H_turn − H_root) / ln V                 (the paper divides by V, which makes β inert: docs/algorithm.md)
    P  = α + β·ΔH                                 (Eq 5)
"""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from numbers import Integral
from typing import Any, ClassVar

from arpo_trl.common.alarm import Alarm
from arpo_trl.common.settings import check_fields, described
from arpo_trl.errors import ConfigError
from arpo_trl.rollout.tree import Address, BranchDecision, Node, NodeKind, RolloutTree

FIRE_RATE_COUNT = 200
"""Decisions after which the fire rate is checked."""


class Moment(Enum):
    """When a rule decides. This determines the data that it can read."""

    RESULT = "result"
    """When an observation is complete, before the turn under it starts."""
    PROBE = "probe"
    """When the first k tokens of the turn under an observation are known."""
    PATHS_DONE = "paths_done"
    """When no path is live: after the first N paths have ended, and again after the branches of each decision have
    ended."""
    LEAVES_SCORED = "leaves_scored"
    """Like PATHS_DONE, with the rewards of the finished leaves."""

    @property
    def waits(self) -> bool:
        """Whether the rule decides only when no path of the group is live."""
        return self in (Moment.PATHS_DONE, Moment.LEAVES_SCORED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """An observation that may branch. Entropies are in nats, one per probed token.

    `node` is the observation's index in `BranchContext.tree`, from which a rule can read its calls, ancestors and
    siblings.

        Candidate(node=2, address=(0,), depth=1, turn=[1.3, 0.2], before=[0.9], root=[0.9])
    """

    node: int
    address: Address
    """The address of the observation's path."""
    depth: int
    """The number of turns above the observation."""
    turn: Sequence[float]
    """Entropies of the first turn under the observation; empty at `Moment.RESULT`."""
    before: Sequence[float]
    """Entropies of the turn above the observation."""
    root: Sequence[float]
    """Entropies of the path's first turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LivePath:
    """An unfinished path: its address, its last node, and the number of further tool results at which it may branch.

    LivePath(address=(0,), node=3, results=2)
    """

    address: Address
    node: int
    results: int


@dataclass(slots=True, kw_only=True)
class BranchContext:
    """The data of one group that a rule can read, and the rule's state for this group.

    BranchContext(tree=RolloutTree([50, 51]), vocab_size=151_936, remaining=8, seed_of=lambda place: hash(place))
    """

    tree: RolloutTree
    vocab_size: int
    remaining: int
    """The remaining budget: of the M − N leaves that do not start at the root, the number that no decision has
    used."""
    seed_of: Callable[[tuple[int, ...]], int]
    """The seed of a place in the tree. It does not depend on the order in which paths finish."""
    rewards: Sequence[float] = ()
    """The rewards of `tree.leaves()`, in that order; only at `Moment.LEAVES_SCORED`."""
    state: Any = None
    """The return value of `BranchRule.start`."""

    def generator(self, *place: int) -> random.Random:
        """A new random generator for a place in this group's tree. The same place gives the same numbers."""
        return random.Random(self.seed_of(place))

    def coin(self, candidate: Candidate) -> float:
        """The candidate's random number, uniform in [0, 1)."""
        return self.generator(*candidate.address, candidate.depth).random()

    def drawn(self, candidate: Candidate, decision: BranchDecision) -> BranchDecision:
        """The decision of a rule that fires with the decision's probability."""
        coin = self.coin(candidate)
        assert decision.probability is not None
        return replace(decision, fires=coin < decision.probability, reason=f"drew {coin:.3f}")

    def measured(self, candidate: Candidate) -> tuple[float, float]:
        """The candidate's H_turn in nats, and its ΔH."""
        entropy = mean(candidate.turn)
        return entropy, rise(entropy, mean(candidate.root), self.vocab_size)

    def decisions_above(self, candidate: Candidate) -> list[BranchDecision]:
        """The decisions at the observations above the candidate on its path, nearest first."""
        above = [node for node in self.tree.path(candidate.node)[:-1] if node.kind is NodeKind.OBSERVATION]
        return [node.decision or BranchDecision(fires=False) for node in reversed(above)]


@dataclass(frozen=True, kw_only=True)
class BranchRule(ABC):
    """A branch rule: a frozen dataclass whose fields are its settings. One object serves all groups of a run.

    Most rules define only `judge`. A rule that spends the budget differently also overrides `wants`, `decide`,
    `supply` or `roots`, or derives from `Rounds` or `Planned`. A rule that estimates something over the run sets
    `learns` and overrides the methods from `lesson` on.

        @register_rule("always")
        @dataclass(frozen=True, kw_only=True)
        class Always(BranchRule):
            def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
                return BranchDecision(fires=True)

        Always(branches_per_fork=2)
    """

    name: ClassVar[str] = "unregistered"
    """The rule's name in the setting `branch_rule`; `register_rule` sets it."""
    moment: ClassVar[Moment] = Moment.PROBE
    alarms: ClassVar[Sequence[Alarm]] = ()
    """Warnings about metrics of runs with this rule, such as those of `fire_rate_alarms`."""
    sets_branches: ClassVar[bool] = False
    """Whether the rule itself sets the number of branches of an observation, so that Z has no effect."""
    learns: ClassVar[bool] = False
    """Whether the rule learns from finished trees with rewards."""

    branches_per_fork: int = field(
        default=1, metadata=described("Z: number of extra turns under an observation that branches.", at_least=1)
    )

    def __post_init__(self) -> None:
        """Checks the settings against the fields' metadata from `described`."""
        check_fields(self)

    @property
    def most_branches(self) -> int:
        """The maximum number of branches of one observation."""
        return self.branches_per_fork

    @property
    def reads_logprobs(self) -> bool:
        """Whether the rule reads the sampling logprobs of turns, so that the engine must return them."""
        return False

    def most_leaves(self, leaves: int, first_paths: int, results: int) -> int:
        """Return the maximum number of leaves that branches make of the N first paths, at most M.

        Args:
            leaves: M.
            first_paths: N.
            results: The maximum number of tool results of a path.
        """
        if results >= leaves:  # enough in both cases; avoids huge powers
            return leaves
        if self.moment.waits:  # one decision about all observations of the first paths
            return min(leaves, first_paths * (1 + self.most_branches * results))
        return min(leaves, first_paths * (1 + self.most_branches) ** results)

    def why_never(self) -> str | None:
        """Return why the rule never fires with its settings, and what to change; None if it can fire."""
        return None

    def first_paths(self, leaves: int) -> int:
        """Return the default of N for groups of `leaves` leaves."""
        return leaves // 2

    def check(self, leaves: int, first_paths: int, results: int | None) -> None:
        """Check that the rule can spend the budget of a run.

        Args:
            leaves: M.
            first_paths: N.
            results: The maximum number of tool results of a path; None: no limit.

        Raises:
            ConfigError: The rule cannot spend the budget, or a setting has no effect.
        """
        if self.sets_branches and self.branches_per_fork != 1:
            raise ConfigError(
                f"branches_per_fork is {self.branches_per_fork}, but the branch rule {self.name!r} sets the number of "
                "branches itself. Remove branches_per_fork."
            )
        if first_paths < leaves and (reason := self.why_never()) is not None:
            raise ConfigError(
                f"The branch rule {self.name!r} never branches: {reason}, or set initial_rollouts to num_generations, "
                "which is GRPO."
            )
        if not results or (most := self.most_leaves(leaves, first_paths, results)) >= leaves:
            return
        raise ConfigError(
            f"Under the branch rule {self.name!r} with max_tool_calling_iterations: {results}, the N = {first_paths} "
            f"first paths become at most {most} of M = {leaves} leaves, so branches cannot use the budget. Raise "
            f"initial_rollouts, max_tool_calling_iterations or the rule's number of branches."
        )

    def start(self, context: BranchContext) -> Any:
        """Return the rule's state for a new group. It is stored in `context.state`."""
        return None

    def roots(self, planned: int, context: BranchContext) -> int:
        """Return how many paths start at the root at the beginning; from 1 to M.

        The sampler calls this once per group with N < M, after `start`.

        Args:
            planned: N. `context.remaining` is M − N.
        """
        return planned

    @abstractmethod
    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        """Decide whether this observation branches. `granted` of the result is ignored."""

    def judged(self, candidates: Sequence[Candidate], context: BranchContext) -> list[BranchDecision]:
        """Return the decisions of `judge`.

        Raises:
            ConfigError: One is no `BranchDecision`.
        """
        decisions = [self.judge(candidate, context) for candidate in candidates]
        for decision in decisions:
            if not isinstance(decision, BranchDecision):
                raise ConfigError(
                    f"The branch rule {self.name!r} returned {decision!r} from `judge`; expected a BranchDecision."
                )
        return decisions

    def wants(self, candidate: Candidate, decision: BranchDecision, context: BranchContext) -> int:
        """Return how many branches the observation gets if `decision` fires and the budget suffices."""
        return self.branches_per_fork

    def decide(self, candidates: Sequence[Candidate], context: BranchContext) -> list[BranchDecision]:
        """Return one decision per candidate, with `granted` set. Their sum is at most `context.remaining`.

        The candidates are those that have reached `moment`, sorted by place in the tree. A rule that waits gets all
        observations of the tree each time. Its grants are added to the earlier grants of the node.
        """
        judged = self.judged(candidates, context)
        wanted = [self.wants(*pair, context) for pair in zip(candidates, judged, strict=True)]
        if wanted and not _are_whole(wanted, 0, math.inf):
            raise ConfigError(
                f"The branch rule {self.name!r} returned {wanted!r} from `wants`; expected whole numbers, at least 0."
            )
        return grant(judged, wanted, [decision.delta or 0.0 for decision in judged], context.remaining)

    def supply(self, live: Iterable[LivePath], context: BranchContext) -> int:
        """Return how many of the remaining leaves branches can still use. The sampler starts the others at the root.

        The sampler calls this after each decision. A path that can still get r results becomes at most (1 + Z)^r
        leaves, since every branch inherits the remaining results. A rule that waits has already granted all leaves
        that it wants.
        """
        if self.moment.waits:
            return 0
        total, each = 0, self.most_branches
        for path in live:
            if path.results > context.remaining:  # enough, as (1 + Z)^r − 1 ≥ r; avoids huge powers
                return context.remaining
            total += (1 + each) ** path.results - 1
            if total >= context.remaining:
                return context.remaining
        return total

    def lesson(self, trees: Sequence[RolloutTree], rewards: Sequence[float]) -> Any:
        """Return what the rule learns from one rank's trees of a training step, as plain data. Does not change the
        rule.

        Args:
            trees: The finished trees.
            rewards: One per leaf, tree by tree in leaf order; NaN where no reward function applies.
        """
        return None

    def learn(self, lessons: Sequence[Any]) -> None:
        """Learn from the lessons of all ranks. Every rank gets the same lessons, so the rule stays equal on all
        ranks."""
        return

    def metrics(self) -> Mapping[str, float]:
        """Return values to log under `arpo/`, by name; alarms can read them too."""
        return {}

    def state_dict(self) -> Any:
        """Return a copy of the learned values, as plain data for a checkpoint."""
        return None

    def load_state_dict(self, state: Any) -> None:
        """The inverse of `state_dict`."""
        return


@dataclass(slots=True, kw_only=True)
class Round:
    """The state of a group under `Rounds`: the number of paths that the last round starts at the root.

    Round(at_root=1, number=1)
    """

    at_root: int = 0
    number: int = 0
    """The number of rounds so far."""


@dataclass(frozen=True, kw_only=True)
class Rounds(BranchRule):
    """A rule that waits, and then adds the other M − N leaves in rounds, below the root or observations.

    The sizes of rounds differ by at most 1, the larger ones first. A round starts when all paths of the round before
    have ended. A subclass defines `pick`:

        @register_rule("at_the_root")
        @dataclass(frozen=True, kw_only=True)
        class AtTheRoot(Rounds):
            def pick(self, places: Sequence[Node], count: int, context: BranchContext) -> Sequence[int]:
                return [0] * count

        AtTheRoot(rounds=2)
    """

    moment: ClassVar[Moment] = Moment.PATHS_DONE
    sets_branches: ClassVar[bool] = True

    rounds: int = field(default=1, metadata=described("Rounds of branches.", at_least=1))

    def check(self, leaves: int, first_paths: int, results: int | None) -> None:
        super().check(leaves, first_paths, results)
        if first_paths < leaves < first_paths + self.rounds:
            raise ConfigError(
                f"rounds is {self.rounds}, but only {leaves - first_paths} leaves are left for branches (M − N = "
                f"{leaves} − {first_paths}). Lower rounds in branch_rule_kwargs, or initial_rollouts."
            )

    def most_leaves(self, leaves: int, first_paths: int, results: int) -> int:
        return leaves  # paths that start at the root are branches, too

    @abstractmethod
    def pick(self, places: Sequence[Node], count: int, context: BranchContext) -> Sequence[int]:
        """Return the starts of up to `count` paths, at least one: an index into `places` for each.

        Args:
            places: The root, then the observations that may branch, sorted by place in the tree.
        """

    def reason(self, place: Node, context: BranchContext) -> str:
        """Return the reason of this round's decision on the place, as text for users."""
        return ""

    def start(self, context: BranchContext) -> Round:
        return Round()

    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        return BranchDecision(fires=True)

    def decide(self, candidates: Sequence[Candidate], context: BranchContext) -> list[BranchDecision]:
        nodes = context.tree.nodes
        places = [context.tree.root, *(nodes[candidate.node] for candidate in candidates)]
        rounds_left = max(1, self.rounds - context.state.number)
        count = math.ceil(context.remaining / rounds_left)
        chosen = self.pick(places, count, context)
        if not _are_whole(chosen, 0, len(places) - 1) or len(chosen) > count:
            raise ConfigError(
                f"The branch rule {self.name!r} picked {chosen!r}; expected 1 to {count} indices from 0 to "
                f"{len(places) - 1}. Correct its `pick`."
            )
        picked = Counter(map(int, chosen))
        context.state.at_root = picked[0]
        context.state.number += 1
        decisions = []
        for i, place in enumerate(places[1:], 1):
            now = [f"round {context.state.number}: {picked[i]} of {picked.total()} paths", self.reason(place, context)]
            before = [] if place.decision is None else [place.decision.reason]
            reason = "; ".join([*before, ", ".join(filter(None, now))])
            decisions.append(BranchDecision(fires=picked[i] > 0, granted=picked[i], reason=reason))
        return decisions

    def supply(self, live: Iterable[LivePath], context: BranchContext) -> int:
        return context.remaining - int(context.state.at_root)


@dataclass(slots=True, kw_only=True)
class Plan:
    """The state of a group under `Planned`.

    Plan(children=[1, 3, 2], shares={(0,): 6})
    """

    children: Sequence[int]
    """The number of roots, then of children at each depth; 1 after the last."""
    shares: dict[Address, int]
    """The number of leaves that each path must still become, itself included. Paths without an entry do not branch."""


@dataclass(frozen=True, kw_only=True)
class Planned(BranchRule):
    """A rule that gives every path the same number of children at its m-th result, independent of its text.

    Each path has a share of the M leaves, which it splits evenly among its children. If a path ends before it has
    split its share, or has too few results left, new paths start at the root immediately to replace the missing
    leaves. They do not branch. So a tree has exactly M leaves. A subclass defines `plan`. If the plan needs several
    results of a path, `check` should compare it with the limit of calls.

        @register_rule("late")
        @dataclass(frozen=True, kw_only=True)
        class Late(Planned):
            def plan(self, leaves: int, planned: int, context: BranchContext) -> Sequence[int]:
                return [planned, 1, leaves]

        Late()
    """

    moment: ClassVar[Moment] = Moment.RESULT
    sets_branches: ClassVar[bool] = True

    def most_leaves(self, leaves: int, first_paths: int, results: int) -> int:
        return leaves  # `check` of the subclass compares its plan with M

    @abstractmethod
    def plan(self, leaves: int, planned: int, context: BranchContext) -> Sequence[int]:
        """Return the number of roots of a group, then the number of children at each depth, all at least 1.

        Args:
            leaves: M.
            planned: N.
        """

    def roots(self, planned: int, context: BranchContext) -> int:
        leaves = planned + context.remaining
        children = self.plan(leaves, planned, context)
        if not _are_whole(children, 1, math.inf):
            raise ConfigError(
                f"The branch rule {self.name!r} planned {children!r}; expected the number of roots, then of children "
                "at each depth, all whole numbers of at least 1. Correct its `plan`."
            )
        parts = split_evenly(leaves, min(children[0], leaves))
        context.state = Plan(children=children, shares={(i,): part for i, part in enumerate(parts)})
        return len(parts)

    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        plan: Plan = context.state
        width = plan.children[candidate.depth] if candidate.depth < len(plan.children) else 1
        share = plan.shares.get(candidate.address, 1)
        children = min(width, share)
        reason = f"planned width {width}, share of leaves {share}"
        return BranchDecision(fires=children > 1, granted=children - 1, reason=reason)

    def decide(self, candidates: Sequence[Candidate], context: BranchContext) -> list[BranchDecision]:
        decisions = self.judged(candidates, context)
        shares: dict[Address, int] = context.state.shares
        for candidate, decision in zip(candidates, decisions, strict=True):
            own, *others = split_evenly(shares.get(candidate.address, 1), decision.granted + 1)
            shares[candidate.address] = own
            shares |= {(*candidate.address, candidate.depth, j): part for j, part in enumerate(others)}
        return decisions

    def supply(self, live: Iterable[LivePath], context: BranchContext) -> int:
        plan: Plan = context.state
        total = 0
        for path in live:
            depth = sum(node.kind is NodeKind.OBSERVATION for node in context.tree.path(path.node))
            most = math.prod(plan.children[depth + 1 : depth + 1 + path.results])
            total += min(plan.shares.get(path.address, 1), most) - 1
        return total


def split_evenly(leaves: int, parts: int) -> list[int]:
    """`leaves` in `parts` numbers that differ by at most 1, the larger ones first."""
    even, rest = divmod(leaves, parts)
    return [even + (i < rest) for i in range(parts)]


def grant(
    decisions: Sequence[BranchDecision], wanted: Sequence[int], priorities: Sequence[float], remaining: int
) -> list[BranchDecision]:
    """Return the decisions with `granted` set. Decisions that fire get the branches that they want, highest priority
    first.

    The grants stop when `remaining` is used up. At equal priority, the earlier decision in the sequence comes first.
    """
    granted = list(decisions)
    for i in sorted(range(len(granted)), key=lambda i: -priorities[i]):
        if granted[i].fires:
            taken = min(wanted[i], remaining)
            remaining -= taken
            granted[i] = replace(granted[i], granted=taken)
    return granted


def _are_whole(numbers: Any, least: int, most: float) -> bool:
    """Whether `numbers` is a sequence of at least one whole number, each within the limits."""
    return (
        isinstance(numbers, Sequence)
        and len(numbers) > 0
        and all(isinstance(number, Integral) and least <= int(number) <= most for number in numbers)
    )


def unreachable(largest: float, limit: float, advice: str) -> str | None:
    """The result of `why_never` for a rule whose P is at most `largest` and has to exceed `limit`; None if it can."""
    return f"its P is at most {largest:g}, and must exceed {limit:g}. {advice}" if largest <= limit else None


def fire_rate_alarms(*, too_often: str, too_rarely: str) -> tuple[Alarm, Alarm]:
    """The alarms of a rule that fires on entropy, if at least 90 % or at most 10 % of the tool results fire it.

    Args:
        too_often, too_rarely: How to lower the share, and how to raise it. Each completes a sentence.
    """
    return (
        Alarm(
            metric="tree/fire_rate",
            limit=0.9,
            advice="{share} of the tool results fire the branch rule, so the budget and not the entropy determines "
            f"the branches. {too_often}, or use branch_rule ranked.",
            count=FIRE_RATE_COUNT,
            again=False,
        ),
        Alarm(
            metric="tree/fire_rate",
            limit=0.1,
            advice="Only {share} of the tool results fire the branch rule, so most of the branch budget goes to "
            f"top-ups at the root. {too_rarely}, or use branch_rule ranked.",
            below=True,
            count=FIRE_RATE_COUNT,
            again=False,
        ),
    )


def mean(values: Sequence[float]) -> float:
    """The mean; 0.0 for an empty sequence."""
    return math.fsum(values) / len(values) if values else 0.0


def rise(entropy: float, root: float, vocab_size: int) -> float:
    """ΔH of two means or sums of entropies in nats; in [−1, 1] for means."""
    return (entropy - root) / math.log(vocab_size)


def clipped(probability: float) -> float:
    """The value clipped to [0, 1]."""
    return min(max(probability, 0.0), 1.0)
