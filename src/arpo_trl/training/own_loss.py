"""`OwnLoss`: TRL's loss with the terms of `LossTerms`."""

from __future__ import annotations

from typing import Any

import torch

from arpo_trl.options import ImportanceSamplingLevel
from arpo_trl.training.loss_terms import LossTerms, loss_mask
from arpo_trl.training.shared_update import SharedPrefixUpdate


class OwnLoss(SharedPrefixUpdate):
    """A `SharedPrefixUpdate` whose loss can use ratios per turn and AEPO's clip.

    A subclass calls `_prepare_loss`. Without these settings TRL's code runs unchanged. With one of them it changes:

    - `_compute_loss`: works on a copy of the micro-batch.
    - `_get_per_token_logps_and_entropies`: within the loss, applies the terms to that copy before TRL reads it.
    """

    _loss_terms: LossTerms
    _loss_batch: dict[str, Any] | None = None
    """The micro-batch that `_compute_loss` is processing, if there are terms."""

    def _prepare_loss(self) -> None:
        """Reads the settings, after TRL's `__init__` has read them."""
        per_turn = self.args.importance_sampling_level == ImportanceSamplingLevel.TURN
        if per_turn:  # TRL then uses each token's ratio, which the terms set to its turn's ratio
            self.importance_sampling_level = ImportanceSamplingLevel.TOKEN.value
        keeps_above = 1 + self.epsilon_high if self.args.clip_keeps_gradient else None
        self._loss_terms = LossTerms(per_turn=per_turn, keeps_above=keeps_above)

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        if not self._loss_terms:
            return super()._compute_loss(model, inputs)
        self._loss_batch = dict(inputs)  # later epochs use `inputs` again
        try:
            return super()._compute_loss(model, self._loss_batch)
        finally:
            self._loss_batch = None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> tuple[Any, Any, Any]:
        result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        if self._loss_batch is not None:
            self._count(self._loss_batch, self._loss_terms.apply(self._loss_batch, result[0]))
        return result

    def _count(self, batch: dict[str, Any], kept: torch.Tensor | None) -> None:
        """Logs the share of trained tokens, over all ranks, that have a gradient above the clip range."""
        if self._loss_terms.keeps_above is None or kept is None or not self.model.training:
            return
        tokens = loss_mask(batch).count_nonzero()
        kept_and_all = self.accelerator.reduce(torch.stack([kept.sum(), tokens]), reduction="sum")
        share = float(kept_and_all[0] / kept_and_all[1].clamp(min=1))
        self._metrics["train"]["arpo/update/kept_above_clip"].append(share)
