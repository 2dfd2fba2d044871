"""A run whose branch rule learns: `accelerate launch learning_ranks.py FOLDER`. Each rank writes its learned
values."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset

from arpo_trl.config import ARPOConfig
from arpo_trl.rollout.engines.base import SamplingParams, TurnRequest
from arpo_trl.rollout.engines.scripted import ScriptedEngine, ScriptedTurn
from arpo_trl.training.trainer import ARPOTrainer
from support import ANSWER, ON_CPU, save_tiny_model, search, tokenizer


def script(request: TurnRequest, context: str) -> ScriptedTurn:
    """Two of three paths search once."""
    calls = request.key[-1] == 0 and request.seed % 3
    return ScriptedTurn(text=f"<search>iron {request.seed}</search>" if calls else f"{request.seed % 1000} {ANSWER}")


def reward(completions: list[Any], turns: list[list[str]], **_: Any) -> list[float]:
    return [float(len("".join(texts)) % 3) for texts in turns]


def trainer(
    model: str,
    folder: Path,
    *,
    rewards: Any = reward,
    tools: Sequence[Any] = (search,),
    script: Callable[[TurnRequest, str], ScriptedTurn] = script,
    peft_config: Any = None,
    **settings: Any,
) -> ARPOTrainer:
    eos = (int(tokenizer().eos_token_id),)
    return ARPOTrainer(
        model,
        rewards,
        ARPOConfig(
            **{
                "output_dir": str(folder),
                "num_generations": 4,
                "per_device_train_batch_size": 4,
                "max_completion_length": 120,
                "max_steps": 3,
                "branch_rule": "schedule",
                "save_strategy": "no",
                **ON_CPU,
                **settings,
            }
        ),
        Dataset.from_list([{"prompt": [{"role": "user", "content": f"what is {i}"}]} for i in range(8)]),
        tools=list(tools),
        peft_config=peft_config,
        engine=ScriptedEngine(tokenizer(), SamplingParams(eos_ids=eos, stop_strings=("</search>",)), script),
    )


if __name__ == "__main__":
    place = Path(sys.argv[1])
    made = trainer(save_tiny_model(place / f"model{os.environ['RANK']}"), place / "run")
    made.train()
    known = made.tree_sampler.settings.rule.state_dict()
    (place / f"rank{os.environ['RANK']}.json").write_text(json.dumps(known), "utf-8")
