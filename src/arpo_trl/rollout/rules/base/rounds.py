"""Rules that branch in rounds, when no path is live."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from arpo_trl.common.settings import setting
from arpo_trl.errors import ConfigError
from arpo_trl.rollout.rules.base.context import BranchContext, Candidate, LivePath, Moment
from arpo_trl.rollout.rules.base.rule import BranchRule, are_whole
from arpo_trl.rollout.tree import BranchDecision, Node


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
    have ended. Paths of a round for which no start is picked start at the root. A subclass defines `pick`:

        @register_rule("at_the_root")
        @dataclass(frozen=True, kw_only=True)
        class AtTheRoot(Rounds):
            def pick(self, places: Sequence[Node], count: int, context: BranchContext) -> Sequence[int]:
                return [0] * count

        AtTheRoot(rounds=2)
    """

    moment: ClassVar[Moment] = Moment.PATHS_DONE
    sets_branches: ClassVar[bool] = True

    rounds: int = setting(1, "Rounds of branches.", at_least=1)

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
        count = math.ceil(context.remaining / (self.rounds - context.state.number))
        chosen = self.pick(places, count, context)
        if not are_whole(chosen, 0, len(places) - 1) or len(chosen) > count:
            raise ConfigError(
                f"The branch rule {self.name!r} picked {chosen!r}; expected 1 to {count} indices from 0 to "
                f"{len(places) - 1}. Correct its `pick`."
            )
        picked = Counter(map(int, chosen))
        picked[0] += count - len(chosen)  # a round for the rest would not be one of L
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
