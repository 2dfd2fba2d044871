"""Dynamic sampling on ranks of which one has more to roll out again: `python resampling_ranks.py MODEL OUTPUT`.

The rewards of prompts with an odd number are equal in the first round of their rollout. Each rank writes its
observations.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from datasets import Dataset

from arpo_trl import ARPOConfig, ARPOTrainer
from support import ON_CPU, search

ROWS = Dataset.from_list([{"prompt": f"what is {i}", "number": i} for i in range(4)])


def main(model: str, output: Path) -> None:
    scored: list[int] = []

    def reward(completions: list[Any], number: list[int], **_: Any) -> list[float]:
        earlier = set(scored)
        scored.extend(number)
        return [0.0 if n % 2 and n not in earlier else float(i % 2) for i, n in enumerate(number)]

    args = ARPOConfig(
        str(output),
        num_generations=2,
        per_device_train_batch_size=2,
        max_completion_length=8,
        max_steps=2,
        dynamic_sampling_rounds=3,
        advantage_baseline="running",
        save_strategy="no",
        **ON_CPU,
    )
    made = ARPOTrainer(model, reward, args, ROWS, tools=[search])
    made.train()
    (log, *_) = [row for row in made.state.log_history if "loss" in row]
    rank = made.accelerator.process_index
    seen = {"scored": scored, "baseline": made._baseline.state if made._baseline else None, "log": log}
    (output / f"seen-{rank}.json").write_text(json.dumps(seen), "utf-8")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
