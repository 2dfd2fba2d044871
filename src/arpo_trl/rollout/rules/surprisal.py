"""AT²PO's rounds (arXiv 2601.04767): branch where the model's own tokens were least likely.

Reads the sampling logprobs of whole turns and the number of siblings, when no path is live. After the N first paths
have ended, L rounds of K = (M − N) / L branches start, one at each of the K best places. A place is the root or an
observation. If there are fewer than K places, the other paths of the round start at the root, too. A path that starts
at the root counts as a top-up in the metrics.

Bias: multiplicity, and look-ahead over a whole turn: the turn whose tokens determined the place is itself trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from arpo_trl.common.settings import setting
from arpo_trl.rollout.rules import register_rule
from arpo_trl.rollout.rules.base import BranchContext, Rounds, mean
from arpo_trl.rollout.tree import Node, RolloutTree


@register_rule("surprisal")
@dataclass(frozen=True, kw_only=True)
class Surprisal(Rounds):
    """Fires at the places with the highest −mean log π of a turn under them − `penalty` · (that turn's siblings).

    Of several turns under a place, only the most surprising one counts. `rounds` is L.

        Surprisal(rounds=2, penalty=0.05)
    """

    rounds: int = setting(2, "L: rounds of branches.", at_least=1)
    penalty: float = setting(0.05, "Penalty for each sibling.", at_least=0, unit="nats")

    @property
    def reads_logprobs(self) -> bool:
        return True

    def pick(self, places: Sequence[Node], count: int, context: BranchContext) -> Sequence[int]:
        scores = [self.score(place, context.tree) for place in places]
        return sorted(range(len(places)), key=lambda i: -scores[i])[:count]

    def reason(self, place: Node, context: BranchContext) -> str:
        return f"score {self.score(place, context.tree):.3f} nats"

    def score(self, place: Node, tree: RolloutTree) -> float:
        """In nats per token."""
        surprisals = [-mean(tree.nodes[turn].known_logprobs) for turn in place.children]
        return max(surprisals) - self.penalty * (len(surprisals) - 1)
