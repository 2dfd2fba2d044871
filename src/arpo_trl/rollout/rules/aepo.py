"""AEPO's budget split and penalty for consecutive branches (arXiv 2510.14545).

Reads the entropies of the first k tokens of turns, and the decisions above, after the k tokens under an observation.
The N first paths (1 unless `initial_rollouts` is set) are only measured and do not branch. When they have ended, more
paths start at the root until there are m. At least one starts, since it has to supply the branches. In the metrics
these paths count as top-ups.

Approximations: H_root and H_tool come from these few paths and from the first k tokens of turns, and are divided by
ln V. Both forms count consecutive branches along the path. The released code counts rounds of the whole prompt, so its
decisions depend on the order in which paths finish.

Bias: multiplicity, look-ahead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from typing import ClassVar

from arpo_trl.common.alarm import Alarm
from arpo_trl.common.settings import described
from arpo_trl.errors import ConfigError
from arpo_trl.rollout.rules import register_rule
from arpo_trl.rollout.rules.base import (
    BranchContext,
    BranchRule,
    Candidate,
    LivePath,
    clipped,
    fire_rate_alarms,
    mean,
    rise,
    unreachable,
)
from arpo_trl.rollout.tree import BranchDecision


@dataclass(slots=True)
class _Split:
    """The number of a group's first paths, and whether they are still being measured."""

    first: int
    measuring: bool = True


@register_rule("aepo")
@dataclass(frozen=True, kw_only=True)
class AEPO(BranchRule):
    """With l consecutive branchings above, s = max(0, 1 − c·l), γ `entropy_weight`, τ `branch_threshold` and c
    `penalty`:

        form     fires if                      roots m, with ΔH' = (H_root − mean H_tool) / ln V
        paper    (α + γ·ΔH)·s > τ              round(M·σ(`split_weight`·ΔH'))
        coded    (u + γ·ΔH)·s ≥ τ              ⌊M·σ(`split_weight`·ΔH')⌋ + 1

    u is uniform in [0, 1) and α is `branch_probability`, which "coded" does not use. By default c is γ in the paper's
    form, and 0.05 as coded.

        AEPO(form="paper", split_weight=0.5, penalty=0.05)
    """

    alarms: ClassVar[Sequence[Alarm]] = fire_rate_alarms(
        too_often="Raise branch_threshold", too_rarely="Lower branch_threshold"
    )

    branch_probability: float = 0.5
    entropy_weight: float = 0.2
    branch_threshold: float = 0.5
    form: str = field(default="paper", metadata=described("Which formulas.", choices=("paper", "coded")))
    split_weight: float = field(default=0.5, metadata=described("Weight of entropies in m.", at_least=0))
    penalty: float | None = field(
        default=None,
        metadata=described(
            "Penalty for each consecutive branching. None: entropy_weight in the form 'paper', 0.05 in 'coded'.",
            at_least=0,
        ),
    )

    def first_paths(self, leaves: int) -> int:
        return 1

    def why_never(self) -> str | None:
        largest, raised = (self.branch_probability, "branch_probability or ") if self.form == "paper" else (1.0, "")
        advice = f"Lower branch_threshold, or raise {raised}entropy_weight"
        return unreachable(largest + abs(self.entropy_weight), self.branch_threshold, advice)

    def check(self, leaves: int, first_paths: int, results: int | None) -> None:
        super().check(leaves, first_paths, results)
        if leaves - first_paths == 1:
            lower = "Lower initial_rollouts, or raise" if first_paths > 1 else "Raise"
            raise ConfigError(
                f"The branch rule 'aepo' starts at least one path after the N = {first_paths} first paths have ended, "
                f"so no leaf of M = {leaves} is left for branches. {lower} num_generations."
            )

    def most_leaves(self, leaves: int, first_paths: int, results: int) -> int:
        return leaves  # `split` starts further paths

    def roots(self, planned: int, context: BranchContext) -> int:
        context.state = _Split(planned)
        return planned

    def judge(self, candidate: Candidate, context: BranchContext) -> BranchDecision:
        entropy, delta = context.measured(candidate)
        consecutive = len(list(takewhile(lambda above: above.granted, context.decisions_above(candidate))))
        left = max(0.0, 1 - self._penalty * consecutive)
        change = self.entropy_weight * delta
        reason = f"{consecutive} consecutive branches above"
        if self.form == "paper":
            probability = (self.branch_probability + change) * left
            fires = probability > self.branch_threshold
        else:
            probability = clipped(1 + change - self.branch_threshold / left) if left else 0.0
            coin = context.coin(candidate)
            fires = (coin + change) * left >= self.branch_threshold
            reason += f", drew {coin:.3f}"
        if candidate.address[0] < context.state.first:
            fires, reason = False, "a first path, which is only measured"
        return BranchDecision(entropy_nats=entropy, delta=delta, probability=probability, fires=fires, reason=reason)

    @property
    def _penalty(self) -> float:
        of_form = self.entropy_weight if self.form == "paper" else 0.05
        return of_form if self.penalty is None else self.penalty

    def supply(self, live: Iterable[LivePath], context: BranchContext) -> int:
        split: _Split = context.state
        if not split.measuring:
            return super().supply(live, context)
        if any(path.address[0] < split.first for path in live):
            return context.remaining
        split.measuring = False  # so far nothing has branched: the other leaves remain
        more = self.split(split.first + context.remaining, context) - split.first
        return context.remaining - min(max(1, more), context.remaining)

    def split(self, leaves: int, context: BranchContext) -> int:
        """Return m for M = `leaves`, from the turns of the tree so far."""
        tree = context.tree
        at_root = mean([mean(tree.nodes[turn].entropies) for turn in tree.root.children])
        after = [
            mean(tree.nodes[turn].entropies) for node in tree.observations() if node.calls for turn in node.children
        ]
        difference = rise(at_root, mean(after) if after else at_root, context.vocab_size)
        share = leaves * (1 + math.tanh(self.split_weight * difference / 2)) / 2  # M·σ, without an overflow
        return round(share) if self.form == "paper" else int(share) + 1
