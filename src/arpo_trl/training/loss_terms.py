"""The tokens in the loss, and loss terms that TRL lacks: changes to the batch that TRL's loss reads.

TRL's `_compute_loss` first computes the policy's logprobs, and then reads the old ones from the batch. A token's ratio
is r = exp(logprob − old). So between these two steps:

- `importance_sampling_level: turn`: old' = sg(logprob) − (mean log-ratio of the turn). Each token of a turn then has
  the turn's ratio as its value and its own gradient, π/sg(π) · sg(exp(mean log-ratio)) (AT²PO, arXiv 2601.04767).
- `clip_keeps_gradient`: if r > 1 + ε_high and A > 0, old' = sg(logprob) − log(1 + ε_high). The token has the value of
  PPO's clip, and the gradient factor 1 + ε_high in place of 0 (AEPO, arXiv 2510.14545).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

INSIDE = 1e-4
"""The distance of a kept token's log-ratio below log(1 + ε_high): more than the rounding of a logprob in float32."""


def loss_mask(batch: dict[str, Any]) -> torch.Tensor:
    """(B, T): nonzero at the tokens in the loss of `batch`, with their weights."""
    return batch["completion_mask"] * batch.get("tool_mask", 1)


def recount(batch: dict[str, Any], accelerator: Accelerator) -> None:
    """Counts the tokens in the loss over all ranks again, after `loss_mask` has changed. A collective."""
    batch["num_items_in_batch"] = accelerator.gather(loss_mask(batch).sum()).sum()


@dataclass(frozen=True, slots=True, kw_only=True)
class LossTerms:
    """The terms that a run adds to TRL's loss. `keeps_above` is 1 + ε_high. None: PPO's clip.

    LossTerms(per_turn=True, keeps_above=None)
    """

    per_turn: bool
    keeps_above: float | None

    def __bool__(self) -> bool:
        """Whether there is any term."""
        return self.per_turn or self.keeps_above is not None

    def apply(self, batch: dict[str, Any], logprobs: torch.Tensor) -> torch.Tensor | None:
        """Replaces the old logprobs in `batch`, a copy of a micro-batch. Returns which tokens keep their gradient.

        Args:
            logprobs: (B, T), of the policy.

        Returns:
            (B, T) bool, the trained tokens above the clip range that have a gradient; None without old logprobs. In
            that case the policy has sampled the tokens itself, all ratios are 1, and nothing is clipped.
        """
        mask = loss_mask(batch)
        old = batch.get("old_per_token_logps")
        if old is None:
            return None
        log_ratios = logprobs.detach() - old
        if self.per_turn:
            log_ratios = mean_over_turns(log_ratios, mask != 0)
        kept = torch.zeros_like(log_ratios, dtype=torch.bool)
        if self.keeps_above is not None:
            advantages = batch["advantages"]
            positive = (advantages.unsqueeze(1) if advantages.dim() == 1 else advantages) > 0
            bound = math.log(self.keeps_above)
            kept = (log_ratios > bound) & positive & (mask != 0)
            log_ratios = log_ratios.masked_fill(kept, bound - INSIDE)
        # `off_policy_mask_threshold` measures the drift of the policy. Without this TRL would read it from `old'`.
        batch.setdefault("sampling_per_token_logps", old)
        changed = mask != 0 if self.per_turn else kept
        batch["old_per_token_logps"] = torch.where(changed, logprobs.detach() - log_ratios, old)
        return kept


def mean_over_turns(values: torch.Tensor, trained: torch.Tensor) -> torch.Tensor:
    """(B, T) values, averaged over each turn, a run of consecutive `trained` tokens. Other tokens keep their value.

    Turns of a path are separated by observations, which are not trained.
    """
    starts = trained & ~torch.nn.functional.pad(trained, (1, 0))[:, :-1]
    turn = starts.flatten().cumsum(0)[trained.flatten()] - 1  # the number of each trained token's turn in the batch
    own = values[trained]
    total = torch.zeros(int(starts.sum()), dtype=values.dtype, device=values.device).index_add(0, turn, own)
    result = values.clone()
    result[trained] = (total / torch.bincount(turn, minlength=len(total)))[turn]
    return result
