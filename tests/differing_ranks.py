"""What `test_differing_ranks.py` checks, in one start: `… differing_ranks.py MODEL FOLDER`.

Each rank writes FOLDER/rank<i>.json.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from arpo_trl.errors import ConfigError
from arpo_trl.runs import shared_folder
from resuming import ROWS, make_trainer

SETTINGS: dict[str, Any] = {"per_device_train_batch_size": 4, "save_strategy": "no", "logging_strategy": "no"}


class Decides(TrainerCallback):
    """Decides on one rank what all ranks then do, and notes what this rank does."""

    def __init__(self, rank: int):
        self.is_other = rank == 1
        self.seen: list[tuple[str, int]] = []

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen.append(("epoch", state.global_step))

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log |= self.is_other and state.global_step == 1
        control.should_evaluate |= self.is_other and state.global_step == 2
        control.should_epoch_stop |= self.is_other and state.global_step == 3

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen.append(("evaluate", state.global_step))
        control.should_save |= not self.is_other

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_log |= self.is_other

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
        if "loss" in logs:
            self.seen.append(("log", state.global_step))
            control.should_training_stop |= not self.is_other and state.global_step == 8

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.seen.append(("save", state.global_step))


def decided(model: str, folder: Path) -> dict[str, Any]:
    evaluates = {"eval_strategy": "steps", "eval_steps": 100, "per_device_eval_batch_size": 4}
    made = make_trainer(model, folder, max_steps=100, **SETTINGS, **evaluates)
    decides = Decides(dist.get_rank())
    made.add_callback(decides)
    made.train()
    made.toolbox.close()
    return {"seen": decides.seen, "steps": made.state.global_step}


def refused(model: str, folder: Path, *, resume: str | bool = False, **settings: Any) -> str:
    """The error at the start of a training."""
    made = make_trainer(model, folder, max_steps=1, **{**SETTINGS, **settings})
    try:
        made.train(resume_from_checkpoint=resume)
    except ConfigError as error:
        return str(error)
    finally:
        made.toolbox.close()
    return "none"


def rows_refused(model: str, folder: Path) -> dict[str, str]:
    """The errors for rows that differ between the ranks: in order, in number, and of an evaluation."""
    is_other = dist.get_rank() == 1
    shuffled, fewer = ROWS.shuffle(seed=dist.get_rank()), ROWS.select(range(4 if is_other else 8))
    evaluates = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    return {
        "order": refused(model, folder, train_dataset=shuffled),
        "number": refused(model, folder, train_dataset=fewer),
        "evaluation": refused(model, folder, eval_dataset={"held out": fewer}, **evaluates),
        # The same rows, in memory and selected.
        "equal": refused(model, folder, train_dataset=ROWS if is_other else ROWS.select(list(range(10)))),
    }


def folders_refused(model: str, folder: Path, decided: Path) -> dict[str, str]:
    """The errors for folders that differ between the ranks. `decided` contains a checkpoint."""
    own = folder / f"node{dist.get_rank()}"
    shared_folder.SEEN_WITHIN_S = 0.5
    if dist.get_rank() == 0:
        shutil.copytree(decided / "checkpoint-2", own / "checkpoint-2")
    return {
        "output": refused(model, own, resume=True),
        "checkpoint": refused(model, folder / "run", resume=str(own / "checkpoint-2")),
        "left": str([path.name for path in own.iterdir()] if own.exists() else []),
    }


def main(model: str, folder: Path) -> None:
    said = {
        "decided": decided(model, folder / "decided"),
        "rows": rows_refused(model, folder / "rows"),
        "folders": folders_refused(model, folder / "folders", folder / "decided"),
    }
    (folder / f"rank{dist.get_rank()}.json").write_text(json.dumps(said), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
