"""Part b: how well one batch of each arm estimates the policy gradient of a frozen policy.

The policies are the cold start of the first seed and two later points of its training by GRPO. The reference is the
mean gradient of many batches of GRPO with neither the standard deviation of a group nor the length of a path in it,
which is unbiased up to scale. Each arm's batches are as training has them. Weights never change: no step is taken. So
arms that sample in the same way, and differ in credit or baseline, share their rollouts.
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import TrainerCallback

from arpo_trl import ARPOTrainer
from arpo_trl.rollout.batch import GroupRequest, RolloutBatch

from .arms import LEAVES, Arm, grpo
from .files import interval
from .training import trainer_of

CHECKPOINTS = (0, 10, 20)
"""Steps of training after the cold start."""
BATCHES, PROMPTS = 40, 3
"""The batches of an arm, and the prompts in each."""
REFERENCE_BATCHES, REFERENCE_PROMPTS = 30, 16
_REFERENCE_SEED = 10_000


@dataclass
class _SaveAt(TrainerCallback):
    folder: Path

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        if state.global_step in CHECKPOINTS:
            model.save_pretrained(self.folder / str(state.global_step))


@dataclass
class _Gradients(TrainerCallback):
    """Collects each step's gradient, all parameters in one vector, and the calls executed for it."""

    found: list[torch.Tensor] = field(default_factory=list)
    calls: list[float] = field(default_factory=list)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        self.found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if (executed := (logs or {}).get("arpo/tools/calls_executed")) is not None:
            self.calls.append(executed)


@dataclass
class Rollouts:
    """The rollouts of one way of sampling, by the number of the batch. The first trainer samples them."""

    made: list[RolloutBatch] = field(default_factory=list)

    def share_with(self, trainer: ARPOTrainer) -> None:
        """Give `trainer` these rollouts where they exist, and keep those that it samples."""
        sampler, numbers = trainer.tree_sampler, itertools.count()
        sample = sampler.sample

        def shared(requests: Sequence[GroupRequest], **others: Any) -> RolloutBatch:
            number = next(numbers)
            if number == len(self.made):
                self.made.append(sample(requests, **others))
            found = self.made[number]
            asked = [list(request.prompt_ids) for request in requests]
            if asked != [tree.root.ids for tree in found.trees]:
                raise ValueError(f"Batch {number} has other prompts than the trainer before had.")
            return found

        # The trainer builds its sampler itself, and calls this method once for each batch.
        sampler.sample = shared  # type: ignore[method-assign]


def make_checkpoints(seed_folder: Path, folder: Path) -> None:
    """Save the policies to `folder/0`, `folder/10`, …, once. The tokenizer is that of the cold start."""
    if all((folder / str(step) / "config.json").exists() for step in CHECKPOINTS):
        return
    arm = Arm(**grpo(LEAVES))
    with (
        TemporaryDirectory() as output,
        trainer_of(
            seed_folder / "sft", seed_folder / "data", Path(output), arm, 0, max_steps=max(CHECKPOINTS)
        ) as trainer,
    ):
        trainer.model.save_pretrained(folder / "0")
        trainer.add_callback(_SaveAt(folder))
        trainer.train()
        for step in CHECKPOINTS:
            trainer.processing_class.save_pretrained(folder / str(step))


def gradients(
    model: Path, data: Path, arm: Arm, rollouts: Rollouts, *, seed: int, batches: int, prompts: int, **others: Any
) -> _Gradients:
    """The gradients of `batches` batches of an arm, at the weights of `model`."""
    collected = _Gradients()
    settings = {"max_steps": batches, "learning_rate": 0.0, "max_grad_norm": 0.0, **others}
    settings["per_device_train_batch_size"] = prompts * arm.leaves
    with TemporaryDirectory() as output, trainer_of(model, data, Path(output), arm, seed, **settings) as trainer:
        rollouts.share_with(trainer)
        trainer.add_callback(collected)
        trainer.train()
    return collected


def reference(model: Path, data: Path, half: int) -> torch.Tensor:
    """One half, 0 or 1, of the reference gradient."""
    collected = gradients(
        model,
        data,
        Arm(**grpo(LEAVES)),
        Rollouts(),
        seed=_REFERENCE_SEED + half,
        batches=REFERENCE_BATCHES // 2,
        prompts=REFERENCE_PROMPTS,
        scale_rewards="none",
        loss_type="dr_grpo",
    )
    return torch.stack(collected.found).mean(dim=0)


def measure(model: Path, data: Path, arm: Arm, rollouts: Rollouts, target: torch.Tensor) -> dict[str, Any]:
    """The cosines of an arm's batches with `target`, and the calls that a batch costs.

    `signal_per_call` is cos² / (1 − cos²) per executed call. Averaging n independent batches without bias multiplies
    cos² / (1 − cos²) by n, so this is what a call buys at any size of a batch.
    """
    start = time.perf_counter()
    collected = gradients(model, data, arm, rollouts, seed=0, batches=BATCHES, prompts=PROMPTS)
    cosines = [cosine(gradient, target) for gradient in collected.found]  # 0 where no group has different rewards
    found = interval(cosines)
    calls = mean(collected.calls)
    signal = found.mean**2 / max(1.0 - found.mean**2, 1e-9)
    return {
        **arm.as_row(),
        "cosine": found.mean,
        "half_width": None if math.isnan(found.half) else found.half,
        "cosines": cosines,
        "calls": calls,
        "signal_per_call": signal / calls if calls else None,
        "seconds": time.perf_counter() - start,
    }


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(first, second, dim=0))
