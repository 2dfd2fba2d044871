"""Part b: how well one batch of each arm estimates the policy gradient of a frozen policy.

The policies are the cold start of the first seed and two later points of its training by GRPO. The reference is the
mean gradient of many batches of GRPO with neither the standard deviation of a group nor the length of a path in it,
which is unbiased up to scale. Each arm's batches are as training has them. Weights never change: no step is taken. So
arms that sample in the same way, and differ in credit or baseline, share their rollouts.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from pathlib import Path
from statistics import mean
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import TrainerCallback

from arpo_trl import ARPOTrainer
from arpo_trl.common.files import whole_file, whole_folder
from arpo_trl.rollout.batch import GroupRequest, RolloutBatch

from .arms import LEAVES, Arm, grpo
from .files import interval, slug, write
from .training import trainer_of

CHECKPOINTS = (0, 10, 20)
"""Steps of training after the cold start."""
BATCHES, PROMPTS = 40, 2
"""The batches of an arm, and the prompts in each."""
REFERENCE_BATCHES, REFERENCE_PROMPTS = 30, 16
TOGETHER = 48
"""The prompts that are sampled together."""
_REFERENCE_SEED = 10_000


def result_file(output: Path, step: int, arm: Arm) -> Path:
    """The file with the result of an arm at a checkpoint, in the folder of all runs."""
    return output / "b" / str(step) / f"{slug(arm.name)}.json"


def reference_file(output: Path, step: int, half: int) -> Path:
    """The file with a half of the reference gradient at a checkpoint, in the folder of all runs."""
    return output / "b" / str(step) / f"reference{half}.pt"


def models_folder(output: Path) -> Path:
    """The folder with the models of all checkpoints, in the folder of all runs."""
    return output / "b" / "models"


def _of_checkpoint(output: Path, step: int) -> tuple[Path, Path]:
    """The model of a checkpoint, and its data."""
    return models_folder(output) / str(step), output / "seed0" / "data"


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


def sample(trainer: ARPOTrainer, batches: int) -> list[RolloutBatch]:
    """The rollouts of the trainer's first batches.

    Many batches are sampled together, which halves the time: this small model's forwards of few rows are mostly
    overhead.
    """
    settings = trainer.tree_sampler.settings
    rows = list(chain.from_iterable(islice(trainer.get_train_dataloader(), batches)))[:: settings.num_generations]
    requests = [
        GroupRequest(id=number, prompt_ids=trainer.protocol.encode_prompt(row["prompt"]))
        for number, row in enumerate(rows)
    ]
    each, found = len(requests) // batches, list[RolloutBatch]()
    together = max(TOGETHER // each, 1) * each
    for start in range(0, len(requests), together):
        asked = requests[start : start + together]
        made = trainer.tree_sampler.sample(asked, seed=(trainer.args.seed, start))
        # Each with the times of all of them.
        found += [replace(made, groups=made.groups[at : at + each]) for at in range(0, len(asked), each)]
    return found


def replay(trainer: ARPOTrainer, rollouts: Sequence[RolloutBatch]) -> None:
    """Let `trainer` train on these rollouts, one a step, in place of its own."""
    left = iter(rollouts)

    def next_of(requests: Sequence[GroupRequest], **_: Any) -> RolloutBatch:
        found = next(left)
        if [list(request.prompt_ids) for request in requests] != [tree.root.ids for tree in found.trees]:
            raise ValueError("The rollouts have other prompts than the batch of the trainer.")
        return found

    # The trainer builds its sampler itself, and calls this method once for each batch.
    trainer.tree_sampler.sample = next_of  # type: ignore[method-assign]


def make_checkpoints(seed_folder: Path, folder: Path) -> None:
    """Save the policies to `folder/0`, `folder/10`, …. The tokenizer is that of the cold start."""
    arm = Arm(**grpo(LEAVES))
    with (
        whole_folder(folder) as partial,
        TemporaryDirectory() as output,
        trainer_of(
            seed_folder / "sft", seed_folder / "data", Path(output), arm, 0, max_steps=max(CHECKPOINTS)
        ) as trainer,
    ):
        trainer.model.save_pretrained(partial / "0")
        trainer.add_callback(_SaveAt(partial))
        trainer.train()
        for step in CHECKPOINTS:
            trainer.processing_class.save_pretrained(partial / str(step))


def gradients(
    model: Path,
    data: Path,
    arm: Arm,
    rollouts: list[RolloutBatch],
    *,
    seed: int,
    batches: int,
    prompts: int,
    **others: Any,
) -> _Gradients:
    """The gradients of `batches` batches of an arm, at the weights of `model`.

    Args:
        rollouts: Of these batches. If empty, they are sampled and added to it.
    """
    collected = _Gradients()
    settings = {"max_steps": batches, "learning_rate": 0.0, "max_grad_norm": 0.0, **others}
    settings["per_device_train_batch_size"] = prompts * arm.leaves
    with TemporaryDirectory() as output, trainer_of(model, data, Path(output), arm, seed, **settings) as trainer:
        if not rollouts:
            rollouts += sample(trainer, batches)
        replay(trainer, rollouts)
        trainer.add_callback(collected)
        trainer.train()
    return collected


def reference(model: Path, data: Path, half: int) -> torch.Tensor:
    """One half, 0 or 1, of the reference gradient."""
    collected = gradients(
        model,
        data,
        Arm(**grpo(LEAVES)),
        [],
        seed=_REFERENCE_SEED + half,
        batches=REFERENCE_BATCHES // 2,
        prompts=REFERENCE_PROMPTS,
        scale_rewards="none",
        loss_type="dr_grpo",
    )
    return torch.stack(collected.found).mean(dim=0)


def write_reference(output: Path, step: int, half: int) -> None:
    """Measure a half of the reference gradient at a checkpoint."""
    path = reference_file(output, step, half)
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as partial:
        torch.save(reference(*_of_checkpoint(output, step), half), partial)


def measure(model: Path, data: Path, arm: Arm, rollouts: list[RolloutBatch], target: torch.Tensor) -> dict[str, Any]:
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


def write_arms(output: Path, step: int, arms: Sequence[Arm]) -> None:
    """Measure arms that sample in the same way at a checkpoint."""
    target = torch.stack([torch.load(reference_file(output, step, half)) for half in (0, 1)]).mean(dim=0)
    rollouts: list[RolloutBatch] = []
    for arm in arms:
        found = measure(*_of_checkpoint(output, step), arm, rollouts, target)
        write(result_file(output, step, arm), found | {"step": step})


def cosine(first: torch.Tensor, second: torch.Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(first, second, dim=0))
