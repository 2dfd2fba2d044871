"""Trains with an engine that can sample ahead, without a server. `python ahead_run.py MODEL OUTPUT` is one run.

The run resumes if there is a checkpoint. It prints the number of each step at its start. Several ranks can run it; all
ranks except the first are slow.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import TrainerCallback

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.command_line import report_errors
from arpo_trl.rollout.engines.base import Probe, SamplingParams, Turn
from arpo_trl.rollout.engines.scripted import Script, ScriptedEngine, ScriptedTurn
from arpo_trl.runs.interrupts import follow_launcher
from support import ON_CPU, search, tokenizer

ROWS = Dataset.from_list([{"prompt": f"what is {i}", "answer": [str(i)], "task": "math"} for i in range(24)])
STOPS = ("</search>", "</put>")
STEPS = 12
"""Of a run as a program: an epoch, or two with two ranks."""


class EngineWithVersions(ScriptedEngine):
    """A scripted engine that can sample ahead: `step` is the trainer's step, `version` that of the last sync."""

    def __init__(self, script: Script):
        settings = SamplingParams(eos_ids=(int(tokenizer().eos_token_id),), stop_strings=STOPS)
        super().__init__(tokenizer(), settings, script)
        self.step = lambda: 0
        self.version = 0
        self.syncs: list[int] = []
        self.holds = lambda request: False
        """Whether the turn is not to end yet."""

    def sync(self) -> None:
        self.version = self.step()
        self.syncs.append(self.version)

    def poll(self, timeout_s: float = 0.0) -> list[Probe | Turn]:
        held = [running for running in self._running if self.holds(running.request)]
        self._running = [running for running in self._running if running not in held]
        events = super().poll(timeout_s)
        self._running += held
        for event in events:
            if isinstance(event, Turn):
                event.versions.extend([self.version] * len(event.ids))
        time.sleep(0.001)
        return events


def searching(request: Any, context: str) -> str:
    """Each path searches once and then answers."""
    return "<search>iron</search>" if request.key[-1] == 0 else f"it is {request.key[1]}"


def slowly(request: Any, context: str) -> ScriptedTurn:
    return ScriptedTurn(text=searching(request, context), polls=40)


def by_length(completions: list[Any], **_: Any) -> list[float]:
    return [float(i % 3) for i in range(len(completions))]


def make_trainer(model: Any, output: Path, script: Script = searching, **settings: Any) -> ARPOTrainer:
    """A trainer of 2 prompts × 4 leaves a step: 12 steps an epoch."""
    engine = EngineWithVersions(script)
    names = ("reward_funcs", "eval_dataset", "train_dataset", "environment_factory", "tools")
    others = {name: settings.pop(name) for name in names if name in settings}
    made = ARPOTrainer(
        model=model,
        args=ARPOConfig(
            **{
                "output_dir": str(output),
                "use_vllm": True,
                "vllm_mode": "server",
                "rollouts_ahead": 1,
                "num_generations": 4,
                "per_device_train_batch_size": 8,
                "max_completion_length": 60,
                "max_steps": 4,
                "learning_rate": 1e-3,
                "save_strategy": "no",
                "trajectory_log_rate": 1.0,
                **ON_CPU,
                **settings,
            }
        ),
        engine=engine,
        **{"reward_funcs": by_length, "train_dataset": ROWS, "tools": [search], **others},
    )
    engine.step = lambda: made.state.global_step
    return made


class Tell(TrainerCallback):
    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.is_world_process_zero:
            print("step", state.global_step, flush=True)


@report_errors
def main() -> None:
    follow_launcher()
    model, output = sys.argv[1:]
    script = searching if os.environ.get("RANK", "0") == "0" else slowly
    saved = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2}
    made = make_trainer(model, Path(output), script, rollouts_ahead=2, max_steps=STEPS, **saved)
    made.add_callback(Tell())
    made.train(resume_from_checkpoint=True)
    if made.accelerator.is_main_process:
        print("done", flush=True)


if __name__ == "__main__":
    main()
