"""`SharedPrefixUpdate`: an update that computes each token only once if rows of a micro-batch share it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from math import nan
from typing import Any

import torch
from trl import GRPOTrainer

from arpo_trl.common.spans import Spans
from arpo_trl.config import ARPOConfig
from arpo_trl.options import SharedPrefixForward
from arpo_trl.rollout.engines.visibility import exact_length
from arpo_trl.training.dealing import LEAF, deal_trees, micro_batches_of_one_step
from arpo_trl.training.loss_terms import loss_mask
from arpo_trl.training.prefix_sharing import Pack, forward_packs, pack_batches, sharing_ratio


class SharedPrefixUpdate(GRPOTrainer):
    """A `GRPOTrainer` that computes shared tokens of a micro-batch only once, depending on `shared_prefix_forward`.

    A mixin, independent of the others. A subclass sets `_shares_prefixes` and `_spans`. It numbers the rows of a
    rollout in `batch[LEAF]` if `_micro_batches_dealt_together` is above 1, and computes the logprobs of rollouts
    within `_loss_tokens`.

    It changes the following parts of `GRPOTrainer`, and no others:

    - `_get_per_token_logps_and_entropies`: computes packs instead of padded rows, if packs save time.
    - `_compute_loss`: sets which tokens the loss uses, and leaves micro-batches without any out of the metrics.
    - `_prepare_inputs`: regroups the rows of one optimizer step into its micro-batches, so that trees stay together.
    """

    args: ARPOConfig
    _buffered_inputs: list[dict[str, Any]] | None
    _spans: Spans
    _shares_prefixes: bool
    """Whether the model accepts packs."""
    _loss_mask: torch.Tensor | None = None
    _in_loss = False
    """Whether `_compute_loss` runs."""

    @property
    def _may_pad(self) -> bool:
        """Whether the update may compute a micro-batch padded: packs are not exact, or a pack may not save time."""
        config = self.model.config.get_text_config()
        # The results of some models depend on the length (`exact_length`), and padding adds to it. They always use
        # packs.
        chosen = self.args.shared_prefix_forward == SharedPrefixForward.AUTO and exact_length(config) is None
        return chosen or not self._shares_prefixes

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        with nullcontext() if self._in_loss else self._spans("logprobs"):
            packs = self._packs(input_ids, attention_mask, logits_to_keep, batch_size or len(input_ids))
            if packs:
                with self.accelerator.autocast():
                    logprobs, entropies = forward_packs(model, packs)
                result = logprobs, entropies if compute_entropy else None, None
            else:
                logprobs, *others = super()._get_per_token_logps_and_entropies(
                    model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs
                )
                if self._shares_prefixes and self._loss_mask is not None:
                    # As in packs. The loss compares logprobs of packs with padded ones. On a token outside of it, the
                    # difference may be so large that its exponential is infinite, and the gradient NaN.
                    logprobs = logprobs.masked_fill(self._loss_mask.to(logprobs.device) == 0, 0.0)
                result = (logprobs, *others)
        if torch.is_grad_enabled() and self._shares_prefixes:
            self._metrics["train"]["arpo/update/packed"].append(float(bool(packs)))
            if packs:
                self._metrics["train"]["arpo/update/sharing_ratio"].append(sharing_ratio(packs))
        return result

    def _packs(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, size: int
    ) -> list[Pack]:
        """The rows as packs; an empty list if they are computed padded."""
        if not self._shares_prefixes or self._loss_mask is None:  # None: called outside of an update, for all tokens
            return []
        return pack_batches(
            input_ids,
            attention_mask,
            logits_to_keep,
            self._loss_mask,
            size=size,
            multiple_of=self.pad_to_multiple_of or 1,
            must_pay_at=self.model.config.get_text_config().hidden_size if self._may_pad else None,
        )

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        mask, before = loss_mask(inputs), {name: len(values) for name, values in self._metrics["train"].items()}
        self._in_loss = True
        try:
            with self._loss_tokens(mask):
                loss = super()._compute_loss(model, inputs)
        finally:
            self._in_loss = False
        deals = self.model.training and self._micro_batches_dealt_together > 1
        if deals and not self.accelerator.reduce(mask.sum(), reduction="sum"):
            # TRL's means over no token are 0, and `log` would average them in. Dealt trees make this frequent: one
            # micro-batch has a whole group whose paths are all truncated. `log` leaves out NaN.
            for name, values in self._metrics["train"].items():
                if len(values) > before.get(name, 0) and not name.startswith("arpo/"):
                    values[-1] = nan
        return loss

    @contextmanager
    def _loss_tokens(self, mask: torch.Tensor) -> Iterator[None]:
        """A context in which logprobs are computed only of the tokens in the loss, where `mask` (B, T) is nonzero. The
        others are 0."""
        before, self._loss_mask = self._loss_mask, mask
        try:
            yield
        finally:
            self._loss_mask = before

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """Returns TRL's micro-batch after regrouping the rows of each optimizer step, so that trees stay together."""
        inputs = super()._prepare_inputs(generation_batch)
        batches = self._buffered_inputs
        if not self.model.training or batches is None or LEAF not in inputs:
            return inputs
        self._buffered_inputs = deal_trees(batches, self._micro_batches_dealt_together, self.num_generations)
        return self._buffered_inputs[self._step % len(batches)]

    @property
    def _micro_batches_dealt_together(self) -> int:
        """The number of micro-batches that may swap rows; 1 if a row's loss depends on the rest of its micro-batch."""
        by_batch = self.args.loss_type == "bnpo" or self.top_entropy_quantile < 1.0 or self._entropy_bonus_enabled
        if by_batch or not self._shares_prefixes:
            return 1
        return micro_batches_of_one_step(self.args.steps_per_generation, self.args.gradient_accumulation_steps)
