"""Part c: training the quickstart's model on the harder task; each arm and seed is one process and one file.

Each seed has its own cold start, from which all its arms train. The tool cache is off and queries have many forms, so
that no call is saved because it repeats another one.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import yaml
from transformers import TrainerCallback

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.common.files import whole_folder
from arpo_trl.data.loading import load_arpo_dataset
from arpo_trl.errors import ConfigError
from arpo_trl.quickstart.report import summarise
from arpo_trl.quickstart.stages import RL_CONFIG, SEARCH, measure, prepare, train_format
from arpo_trl.quickstart.task import Task
from arpo_trl.rewards import HierarchicalReward
from arpo_trl.tools.builtin import ToolArguments, build_tools

from .arms import LEAVES, Arm, grpo
from .files import read, slug, write

N_TRAIN, N_HELDOUT = 2100, 1000
PROMPTS, STEPS = 16, 40
HARD = replace(SEARCH, prepare=partial(prepare, hard=True, n_train=N_TRAIN, n_heldout=N_HELDOUT))
_OF_FILES = {"model_name_or_path", "dataset", "eval_dataset", "search_index", "search_top_k", "tools"}
"""Keys of the quickstart's configuration that are not settings of `ARPOConfig`."""


def result_file(output: Path, seed: int, arm: Arm) -> Path:
    """The file with the result of an arm and seed, in the folder of all runs."""
    return output / f"seed{seed}" / "arms" / f"{slug(arm.name)}.json"


def cold_start(folder: Path, seed: int, task: Task = HARD) -> None:
    """Make `folder/data` and `folder/sft`, unless they exist: a quickstart's inputs and its model after stage 1."""
    if (folder / "sft").exists():
        return
    task.prepare(folder / "data", seed)
    with whole_folder(folder / "sft") as model:
        train_format(task, folder / "data", model, seed)


@contextmanager
def trainer_of(model: Path, data: Path, output: Path, arm: Arm, seed: int, **others: Any) -> Iterator[ARPOTrainer]:
    """A trainer with the quickstart's settings, those of the arm, and `others`, which override them."""
    quickstart = yaml.safe_load(RL_CONFIG.read_text("utf-8"))
    settings = {key: value for key, value in quickstart.items() if key not in _OF_FILES}
    settings |= {
        "output_dir": str(output),
        "seed": seed,
        "use_cpu": True,
        "disable_tqdm": True,
        "eval_strategy": "no",
        "tool_cache": False,
        "trajectory_log_rate": 0.0,
        "per_device_train_batch_size": PROMPTS * arm.leaves,
        "max_steps": STEPS,
    }
    tools = ToolArguments(search_index=str(data / "corpus.jsonl"), search_top_k=quickstart["search_top_k"])
    trainer = ARPOTrainer(
        str(model),
        HierarchicalReward("task"),
        ARPOConfig(**settings | arm.settings() | others),
        load_arpo_dataset(str(data / "train.jsonl"), "train"),
        tools=build_tools(tools),
    )
    with trainer.toolbox:
        yield trainer


def calls_of(logs: Mapping[str, float], kind: str) -> float:
    """The calls of a log line, "made" or "executed", with those of the trees that dynamic sampling discarded."""
    return sum(logs.get(f"arpo/{of}/calls_{kind}", 0.0) for of in ("tools", "resampling"))


@dataclass
class StopAtCalls(TrainerCallback):
    """Ends the training at a budget of executed calls, which is the number of another arm."""

    calls: float
    executed: float = 0.0

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        self.executed += calls_of(logs or {}, "executed")
        control.should_training_stop = control.should_training_stop or self.executed >= self.calls


def train(folder: Path, arm: Arm, seed: int, steps: int, calls: float | None = None) -> dict[str, Any]:
    """Train one arm from the seed's cold start and evaluate it on the held-out questions, sampled at temperature 1.

    Args:
        folder: Of the seed, after `cold_start`.
        calls: The call budget, which may end the training before `steps`. None: no budget.
    """
    start, data = time.perf_counter(), folder / "data"
    with (
        TemporaryDirectory() as output,
        trainer_of(folder / "sft", data, Path(output), arm, seed, max_steps=steps) as trainer,
    ):
        if calls is not None:
            trainer.add_callback(StopAtCalls(calls))
        trainer.train()
        trained = time.perf_counter()
        trainer.save_model(output)
        heldout = measure(Path(output), data, seed, temperature=1.0)
    steps_logged = [row for row in trainer.state.log_history if "reward" in row]
    return {
        **arm.as_row(),
        "seed": seed,
        "accuracy": heldout.accuracy,
        "answers": len(heldout.scores),
        **summarise(trainer.state.log_history),
        **{
            f"tool_calls_{kind}": round(sum(calls_of(row, kind) for row in trainer.state.log_history))
            for kind in ("made", "executed")
        },
        "rewards": [row["reward"] for row in steps_logged],
        "seconds_training": trained - start,
        "seconds": time.perf_counter() - start,
    }


def train_arm(output: Path, seed: int, arm: Arm, steps: int) -> None:
    """Train one arm and seed. Dynamic sampling has the call budget of the same arm without it."""
    calls = None
    if arm.dynamic:
        equal = read(result_file(output, seed, Arm(**grpo(LEAVES), baseline=arm.baseline)))
        if equal is None:
            raise ConfigError(f"{arm.name} trains for the calls of GRPO M = {LEAVES}, which has no result yet.")
        calls = equal["tool_calls_executed"]
    result = train(output / f"seed{seed}", arm, seed, steps, calls)
    write(result_file(output, seed, arm), result | {"planned_steps": steps})
