"""`Advantages`: a trainer mixin with other baselines than TRL's, and credit for each token."""

from __future__ import annotations

from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase
from trl import GRPOTrainer

from arpo_trl.config import ARPOConfig
from arpo_trl.logs.metrics import Tally
from arpo_trl.rollout.credit.base import Credit, attribute
from arpo_trl.training.answers import answer_probabilities, texts
from arpo_trl.training.baselines import Baseline, ScoredLeaves, advantages_of, tally_baseline
from arpo_trl.training.last_rollout import LastRollout
from arpo_trl.training.loss_terms import loss_mask, recount


class Advantages(GRPOTrainer):
    """A `GRPOTrainer` that replaces the advantages of a scored batch.

    A mixin. A subclass calls `_subtract_baseline` and `_attribute`, in this order, and sets the attributes below.
    """

    args: ARPOConfig
    _tokenizer: PreTrainedTokenizerBase
    _baseline: Baseline | None
    _credit: Credit
    _last: LastRollout | None
    _last_rewards: torch.Tensor | None
    """(B,) rewards of the last rollout's leaves; NaN where no reward function applies."""
    _rewards_of_all_ranks: torch.Tensor | None
    _counted: Tally
    _rows: list[dict[str, Any]]
    """The rows of the last rollout, one per leaf."""

    def _subtract_baseline(self, batch: dict[str, Any]) -> None:
        """In training, replaces `batch["advantages"]` (B,) by those of `advantage_baseline`, unless that is TRL's
        baseline."""
        if self._baseline is None or not self.model.training:
            return
        assert self._last is not None and self._last_rewards is not None and self._rewards_of_all_ranks is not None
        scored = ScoredLeaves(
            leaves=self._last.rollout.leaves,
            rewards=self._last_rewards,
            of_all_ranks=self._rewards_of_all_ranks,
            trained=batch["completion_mask"].any(dim=1).cpu(),  # as in `_attribute`
            size=self.num_generations,
        )
        baselines = self._baseline(scored)
        advantages = advantages_of(scored, baselines, self.scale_rewards)
        tally_baseline(scored, baselines, advantages, self._counted)
        batch["advantages"] = advantages.to(batch["advantages"].device)
        logged = self._logs["advantages"]  # TRL has appended its own advantages, of all ranks
        everyones = self.accelerator.gather(batch["advantages"]).tolist()
        kept = list(logged)[: -len(everyones)]
        logged.clear()
        logged.extend([*kept, *everyones])

    def _attribute(self, batch: dict[str, Any]) -> None:
        """Replaces `batch["advantages"]` (B,) by the credit's, which are (B, T) if leaves share nodes."""
        last, advantages, width = self._last, batch["advantages"], batch["completion_ids"].size(1)
        assert last is not None and self._last_rewards is not None
        rewards = self._last_rewards.to(advantages.device)
        self._credit.gathered = gather_object
        self._credit.trained = batch["completion_mask"].any(dim=1)  # TRL excludes truncated completions through it
        if self._credit.reads_answers:
            self._credit.answer_probabilities = self._answer_probabilities() if self.model.training else ()
        if self._credit.reads_entropies:
            self._credit.entropy_scores = self._entropy_scores(batch) if self.model.training else None
        batch["advantages"], weights = attribute(self._credit, last.rollout.trees, rewards, advantages, width)
        if weights is not None:
            batch["tool_mask"] = batch["tool_mask"] * weights
        if self._credit.weighs:  # on every rank, with or without weights: the count is a sum over all ranks
            recount(batch, self.accelerator)

    def _entropy_scores(self, batch: dict[str, Any]) -> torch.Tensor:
        """(B, T) z-scores of the policy's entropies over all ranks' trained tokens; 0 elsewhere. A collective."""
        assert self._last is not None
        mask = loss_mask(batch)
        ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
        visible = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
        width, size = mask.size(1), self.args.per_device_train_batch_size
        with torch.no_grad(), self._loss_tokens(mask):
            _, entropies, _ = self._get_per_token_logps_and_entropies(
                self.model, ids, visible, width, size, compute_entropy=True
            )
        longest = max(len(leaf.ids) for leaf in self._last.rollout.leaves)
        return z_scores(entropies[:, :longest].float(), mask[:, :longest] != 0, self.accelerator)

    def _answer_probabilities(self) -> list[dict[int, float]]:
        """The policy's probabilities of the reference answers in the trees of the last rollout. A collective."""
        assert self._last is not None
        trees = self._last.rollout.trees

        def score(ids: torch.Tensor, mask: torch.Tensor, answer: torch.Tensor, answer_mask: torch.Tensor) -> Any:
            device, size = self.accelerator.device, self.args.per_device_train_batch_size
            both = (torch.cat(pair, dim=1).to(device) for pair in ((ids, answer), (mask, answer_mask)))
            with torch.no_grad(), self._loss_tokens(answer_mask.to(device)):
                return self._get_per_token_logps_and_entropies(self.model, *both, answer.size(1), size)[0]

        rows = self._rows[:: self.num_generations]
        written = texts(self._credit.template, rows)
        return answer_probabilities(
            trees, written, self._tokenizer, score, lambda number: max(gather_object([number]))
        )


def z_scores(values: torch.Tensor, chosen: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Distances to the mean in sample standard deviations, over the `chosen` values of all ranks. A collective.

    Args:
        values: The values of this rank.
        chosen: bool, with the shape of `values`. Other values get 0. If the chosen values are all equal, up to
            rounding, they get 0 too.
    """

    def of_all_ranks(number: torch.Tensor) -> torch.Tensor:
        return accelerator.reduce(number, reduction="sum")

    count = of_all_ranks(chosen.sum().to(values))
    mean = of_all_ranks(values[chosen].sum()) / count
    variance = of_all_ranks(((values[chosen] - mean) ** 2).sum()) / (count - 1)
    varies = variance.sqrt() > 1e-5 * mean.abs()
    return torch.where(chosen & varies, (values - mean) / variance.sqrt(), 0.0)
