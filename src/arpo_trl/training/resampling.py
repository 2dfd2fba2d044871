"""`Resampling`: DAPO's dynamic sampling. Groups whose leaves all have the same reward are rolled out again.

With the group's mean as baseline, such a group has no gradient. DAPO (arXiv 2503.14476) replaces it by another prompt.
Here the same prompt is rolled out again with other random numbers, at most `dynamic_sampling_rounds` times. So dynamic
sampling does not change how often each row of the dataset is used, a resumed run needs no additional state, and the
cost is limited. A prompt that is far too easy or too hard stays in the batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from trl import GRPOTrainer

from arpo_trl.config import ARPOConfig
from arpo_trl.logs.metrics import Tally
from arpo_trl.rollout.batch import RolloutBatch
from arpo_trl.rollout.tree import RolloutTree
from arpo_trl.tools.calls import CallSource
from arpo_trl.training.baselines import are_equal
from arpo_trl.training.reward_guard import total_rewards
from arpo_trl.training.rewards_ahead import Scored, score


@dataclass(frozen=True, slots=True, kw_only=True)
class Again:
    """A further round of a rollout: its number, from 1, and the positions of this rank's groups to roll out.

    Again(number=1, groups=[0, 3])
    """

    number: int
    groups: list[int]


class Resampling(GRPOTrainer):
    """A `GRPOTrainer` that rolls out groups again, in training and if `dynamic_sampling_rounds` is above 0.

    A mixin, independent of the others. A subclass sets `_rows`. If `_again` is not None, the subclass's rollout
    function rolls out only the groups of `_again`. It adds its counts to `_counted`.

    It changes the following parts of `GRPOTrainer`, and no others:

    - `_generate`: scores its completions, and generates again. TRL's metrics are those of the last round.
    - `_calculate_rewards`: calls reward functions only for the new completions of a round. TRL's call must get
      `_scores`, the rewards of the last round: the subclass returns them, once, before it calls this method.
    """

    args: ARPOConfig
    reward_funcs: list[Any]
    _rows: list[dict[str, Any]]
    """The rows of the rollout, one per leaf."""
    _counted: Tally
    _again: Again | None = None
    _scored: Scored | None = None
    """The reward functions' results for this rank's completions."""
    _scores: torch.Tensor | None = None
    """The rewards of the last round: of all ranks, per function. None if TRL's call is to calculate them."""

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        rounds = self.args.dynamic_sampling_rounds if self.model.training else 0
        metrics = self._metrics["train"]
        before = {name: len(values) for name, values in metrics.items()}
        seen = self.state.num_input_tokens_seen
        made: tuple[Any, ...] = super()._generate(prompts)
        if not rounds:
            return made
        try:
            for number in range(1, rounds + 1):
                equal = self._equal_groups(prompts, made)
                if not equal.any():
                    break
                self._again = Again(number=number, groups=self._of_this_rank(equal))
                for name, values in metrics.items():
                    del values[before.get(name, 0) :]
                self.state.num_input_tokens_seen = seen
                made = super()._generate(prompts)
            else:
                equal = self._equal_groups(prompts, made)
        finally:
            self._again = self._scored = None
        for still in equal.tolist() if self.accelerator.is_main_process else ():
            self._counted.add("resampling/left", float(still))
        return made

    def _equal_groups(self, prompts: list[Any], made: tuple[Any, ...]) -> torch.Tensor:
        """(G,) bool: whether all leaves of a group have the same reward, for the groups of all ranks. If rewards are
        normalised function by function, this must hold for each function with a weight."""
        _, completion_ids, _, completions, _, extra, _, _ = made
        rows = [row | {name: values[i] for name, values in extra.items()} for i, row in enumerate(self._rows)]
        self._scores = None
        self._pending_metrics.clear()  # metrics that reward functions logged in an earlier round
        self._pending_extra_logs.clear()
        self._scores = self._calculate_rewards(rows, prompts, completions, completion_ids)
        if self.args.multi_objective_aggregation == "normalize_then_sum":
            columns = self._scores[:, self.reward_weights.to(self._scores.device) != 0].T
        else:
            columns = total_rewards(self._scores, self.reward_weights).unsqueeze(0)
        return equal_groups(columns, self.num_generations)

    def _of_this_rank(self, chosen: torch.Tensor) -> list[int]:
        """The positions of the `chosen` groups (G,) of all ranks among this rank's groups."""
        own = len(chosen) // self.accelerator.num_processes
        first = own * self.accelerator.process_index
        return [i for i, again in enumerate(chosen[first : first + own].tolist()) if again]

    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> torch.Tensor:
        if not self.model.training or not self.args.dynamic_sampling_rounds:
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        functions = self.reward_funcs
        self._scored = self._with_new_scores(inputs, completions, completion_ids_list)
        self.reward_funcs = self._scored.replaying(functions)
        try:
            return super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        finally:
            self.reward_funcs = functions

    def _with_new_scores(self, rows: list[Any], completions: list[Any], ids: list[Any]) -> Scored:
        """The reward functions' results for all completions. The functions are called only for this round's
        completions."""
        size, again, before = self.num_generations, self._again, self._scored
        groups = range(len(rows) // size) if again is None else again.groups
        places = [size * group + i for group in groups for i in range(size)]
        if not places:
            assert before is not None
            return before
        rows, completions, ids = ([given[i] for i in places] for given in (rows, completions, ids))
        loop = getattr(self, "async_loop", None)
        new = score(self.reward_funcs, rows, completions, ids, {}, state=self.state, loop=loop)
        return new if before is None else before.with_new(new, places)


def equal_groups(rewards: torch.Tensor, size: int) -> torch.Tensor:
    """(G,) bool: groups whose known rewards are all equal in each of the K rows of `rewards` (K, B). False without
    known rewards."""
    groups = rewards.reshape(len(rewards), -1, size)
    return ~groups.isnan().all(dim=2).all(dim=0) & are_equal(groups).all(dim=0)


def with_new_trees(before: RolloutBatch, new: RolloutBatch, groups: Sequence[int], waited: int) -> RolloutBatch:
    """`before` with the trees at the positions `groups` replaced by those of `new`, which were sampled after `waited`
    turns: the longest chain of `before` on any rank, since a further round needs the rewards of all groups."""
    replaced = list(before.groups)
    for i, group in zip(groups, new.groups, strict=True):
        replaced[i] = replace(group, turns_in_sequence=waited + group.turns_in_sequence)
    return RolloutBatch(groups=replaced, times=before.times + new.times)


def tally_discarded(trees: Sequence[RolloutTree], tally: Tally) -> None:
    """Counts the trees that a further round replaces, and their cost."""
    calls = [call for tree in trees for call in tree.calls()]
    tally.totals["resampling/groups"] += len(trees)
    tally.totals["resampling/calls_made"] += sum(call.source is not CallSource.REFUSED for call in calls)
    tally.totals["resampling/calls_executed"] += sum(call.source is CallSource.EXECUTED for call in calls)
    tally.totals["resampling/generated_tokens"] += sum(len(node.ids) for tree in trees for node in tree.turns())
