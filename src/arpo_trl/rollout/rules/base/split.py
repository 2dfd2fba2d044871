"""Rules that measure the first paths, and then divide the leaves between the root and branches."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from arpo_trl.common.settings import setting
from arpo_trl.errors import ConfigError
from arpo_trl.rollout.rules.base.context import BranchContext, Candidate, LivePath, mean, rise
from arpo_trl.rollout.rules.base.rule import BranchRule
from arpo_trl.rollout.tree import BranchDecision


@dataclass(slots=True, kw_only=True)
class Split:
    """The state of a group under `BudgetSplit`: the number of its first paths, and whether they are still measured.

    Split(first=1, measuring=True)
    """

    first: int
    measuring: bool = True


@dataclass(frozen=True, kw_only=True)
class BudgetSplit(BranchRule):
    """A rule whose N first paths (1 unless `initial_rollouts` is set) are only measured, and do not branch.

    When they have ended, more paths start at the root until there are m. At least one starts, since it has to supply
    the branches. In the metrics these paths count as top-ups. A subclass defines `judge`, and `paths_at_root` for m:

        @register_rule("half")
        @dataclass(frozen=True, kw_only=True)
        class Half(BudgetSplit):
            def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
                return BranchDecision(fires=True)

            def paths_at_root(self, share: float) -> int:
                return round(share)

        Half(split_weight=0.0)
    """

    split_weight: float = setting(0.5, "Weight of entropies in m.", at_least=0)

    @abstractmethod
    def paths_at_root(self, share: float) -> int:
        """Return m.

        Args:
            share: M·σ(`split_weight`·ΔH'), with ΔH' = (H_root − mean H_tool) / ln V of the first paths.
        """

    def first_paths(self, leaves: int) -> int:
        return 1

    def check(self, leaves: int, first_paths: int, results: int | None) -> None:
        super().check(leaves, first_paths, results)
        if leaves - first_paths == 1:
            lower = "Lower initial_rollouts, or raise" if first_paths > 1 else "Raise"
            raise ConfigError(
                f"The branch rule {self.name!r} starts at least one path after the N = {first_paths} first paths have "
                f"ended, so no leaf of M = {leaves} is left for branches. {lower} num_generations."
            )

    def most_leaves(self, leaves: int, first_paths: int, results: int) -> int:
        return leaves  # `supply` starts further paths

    def roots(self, planned: int, context: BranchContext) -> int:
        context.state = Split(first=planned)
        return planned

    def judged(self, candidates: Sequence[Candidate], context: BranchContext) -> list[BranchDecision]:
        measured = "a first path, which is only measured"
        return [
            replace(decision, fires=None, reason=measured) if candidate.address[0] < context.state.first else decision
            for candidate, decision in zip(candidates, super().judged(candidates, context), strict=True)
        ]

    def supply(self, live: Iterable[LivePath], context: BranchContext) -> int:
        split: Split = context.state
        if not split.measuring:
            return super().supply(live, context)
        if any(path.address[0] < split.first for path in live):
            return context.remaining
        split.measuring = False  # so far nothing has branched: the other leaves remain
        exponent = self.split_weight * self._difference(context)
        share = (split.first + context.remaining) * (1 + math.tanh(exponent / 2)) / 2  # M·σ, without an overflow
        more = self.paths_at_root(share) - split.first
        return context.remaining - min(max(1, more), context.remaining)

    def _difference(self, context: BranchContext) -> float:
        """ΔH' of the turns of the tree so far; 0 without a tool result."""
        tree = context.tree
        at_root = mean([mean(tree.nodes[turn].entropies) for turn in tree.root.children])
        after = [
            mean(tree.nodes[turn].entropies) for node in tree.observations() if node.calls for turn in node.children
        ]
        return rise(at_root, mean(after) if after else at_root, context.vocab_size)
