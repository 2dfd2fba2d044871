"""Training with environments on several ranks: `… environment_ranks.py FOLDER` writes FOLDER/environments<i>.json.

Each rank has two groups a step, one of a class that is copied and one whose branches replay. On the second rank one
path has no environment, and one call misses its deadline.
"""

from __future__ import annotations

import itertools
import json
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import torch.distributed as dist
from datasets import Dataset

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.quickstart.model import build_model, build_tokenizer
from arpo_trl.rollout.engines.base import SamplingParams, TurnRequest
from arpo_trl.rollout.engines.scripted import ScriptedTurn
from support import EXACT, ON_CPU
from uneven_ranks import DictatedEngine

LEAVES, STEPS, TIMEOUT_S = 4, 2, 2.0
OPENED: list[Any] = []
CLOSED: Counter[int] = Counter()
RELEASED = threading.Event()


class Cart:
    """What was put into it, after the rank."""

    resets = itertools.count()

    def __init__(self) -> None:
        OPENED.append(self)

    def reset(self, **row: Any) -> str:
        if is_second() and next(Cart.resets) == 2:  # of a path after the two that the prompts come from
            raise OSError("sold out")
        self.items = [str(dist.get_rank())]
        return " in a shop"

    def put(self, item: str) -> str:
        """Put an item into the cart.

        Args:
            item: Which.
        """
        if item == "late":
            RELEASED.wait(10 * TIMEOUT_S)
        self.items.append(item)
        return " ".join(self.items)

    def close(self) -> None:
        CLOSED[id(self)] += 1


class CopiedCart(Cart):
    copyable = True

    def __deepcopy__(self, memo: Any) -> CopiedCart:
        made = CopiedCart()
        made.items = list(self.items)
        return made


def is_second() -> bool:
    return dist.get_rank() == 1


def buys(request: TurnRequest, context: str) -> ScriptedTurn:
    """Each path puts its rank and address twice and answers; entropy rises after the first call."""
    group, *address, depth = request.key
    item = f"{dist.get_rank()}/{group}/" + "/".join(map(str, address))
    late = is_second() and depth == 1 and group % 2 and address == [0] and not RELEASED.is_set()
    text = "so" if depth == 2 else f"<put>{'late' if late else item}</put>"
    return ScriptedTurn(text=text, entropies=[[0.5, 1.0, 0.1][depth]])


def train(folder: Path) -> dict[str, Any]:
    """Trains and returns this rank's observations. An assertion fails if two paths share a state."""
    tokenizer = build_tokenizer(["what is the answer in a shop", "so"] * 3)
    engine = DictatedEngine(
        tokenizer, SamplingParams(eos_ids=(int(tokenizer.eos_token_id),), stop_strings=("</put>",)), buys
    )
    checked = Counter[str]()

    def different(environments: Any, tool_calls: Any) -> list[float]:
        assert len({id(each) for each in environments}) == len(environments)
        for environment, calls in zip(environments, tool_calls, strict=True):
            made = [call["arguments"]["item"] for call in calls if call["failure"] is None]
            checked["late"] += len(made) < len(calls)
            checked["equal"] += environment.items == [str(dist.get_rank()), *made]
            assert not CLOSED[id(environment)]
        return [float(len(set(environment.items))) + i % 2 for i, environment in enumerate(environments)]

    rows = [{"prompt": [{"role": "user", "content": f"what is {i}"}], "environment": "ab"[i % 2]} for i in range(8)]
    trainer = ARPOTrainer(
        model=build_model(tokenizer, seed=0),
        reward_funcs=different,
        args=ARPOConfig(
            **{
                "output_dir": str(folder),
                "num_generations": LEAVES,
                "initial_rollouts": LEAVES // 2,
                "per_device_train_batch_size": 2 * LEAVES,
                "max_completion_length": 200,
                "tool_timeout_s": TIMEOUT_S,
                "environment_concurrency": 2 * LEAVES,
                "max_steps": STEPS,
                "shuffle_dataset": False,
                "save_strategy": "no",
                **ON_CPU,
                **EXACT,
            }
        ),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        environment_factory={"a": Cart, "b": CopiedCart},
        engine=engine,
    )
    engine.model_context = trainer._model_for_generation
    OPENED.clear()  # without those that were looked at
    CLOSED.clear()
    Cart.resets = itertools.count()
    trainer.train()
    trainer.toolbox.close()
    RELEASED.set()
    assert trainer._environments is not None
    logged = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "losses": [row["loss"] for row in logged],
        "checked": dict(checked),
        "live": trainer._environments.instances.live,
        "each closed once": Counter(map(id, OPENED)) == CLOSED,
        "metrics": {
            name: [row[f"arpo/environments/{name}"] for row in logged]
            for name in ("resets", "forks", "replays", "failed", "refused_forks", "live_max")
        },
    }


if __name__ == "__main__":
    seen = train(Path(sys.argv[1]) / "environments")
    (Path(sys.argv[1]) / f"environments{dist.get_rank()}.json").write_text(json.dumps(seen), "utf-8")
