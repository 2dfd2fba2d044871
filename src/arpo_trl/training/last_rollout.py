"""The last rollout of a trainer. The trainer's parts read it until the end of the step."""

from __future__ import annotations

from dataclasses import dataclass

from arpo_trl.rollout.batch import RolloutBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class LastRollout:
    """The last rollout, kept for the rest of its step."""

    name: str
    rollout: RolloutBatch
    first_group: int
    """The number of the first tree's group, counted over all ranks."""
