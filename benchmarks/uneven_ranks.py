"""Trains with different amounts of work on each rank, for many steps, to show that ranks do not deadlock.

    OMP_NUM_THREADS=1 accelerate launch --config_file accelerate_configs/zero3.yaml --num_processes 2 \
        --mixed_precision no benchmarks/uneven_ranks.py runs/uneven --steps 200

The turns are scripted for each rank and step, but the engine also runs a forward pass of the real model at each poll.
A forward pass that needs another rank would hang here. The steps cycle through four cases: one rank calls no tool and
the other one as many as allowed; the reverse; all tools of one rank hang until their timeout; one rank writes one word
and the other one the maximum length. Each rank writes <rank>.json. The first rank also prints it.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.quickstart.model import build_model, build_tokenizer
from arpo_trl.rollout.engines.base import Probe, SamplingParams, Turn, TurnRequest
from arpo_trl.rollout.engines.scripted import Script, ScriptedEngine, ScriptedTurn

LEAVES, MAX_CALLS, MAX_TOKENS, TIMEOUT_S = 4, 3, 200, 1.0
ANSWER = "<answer>\\boxed{1}</answer>"
QUESTION = [{"role": "user", "content": "what is the answer"}]
STEPS = ("no calls and all", "all calls and none", "tools that hang", "one word and all that fits")
ROWS = [
    {"prompt": [{"role": "user", "content": f"what is {i}"}], "answer": [str(i)], "task": "math"} for i in range(8)
]


class DictatedEngine(ScriptedEngine):
    """A scripted engine that runs a forward pass of the model at each poll with running turns."""

    model_context: Callable[[], AbstractContextManager[PreTrainedModel]]
    forwards = 0

    @contextmanager
    def session(self) -> Iterator[None]:
        with super().session(), self.model_context() as model, torch.no_grad():
            self._model = model
            yield

    def poll(self, timeout_s: float = 0.0) -> list[Probe | Turn]:
        if self._running:
            self.forwards += 1
            self._model(input_ids=torch.tensor([[1, 2, 3]]))
        return super().poll(timeout_s)


async def search(query: str) -> str:
    """Search.

    Args:
        query: What to look for.
    """
    await asyncio.sleep(60 * TIMEOUT_S if "hang" in query else 0)
    return f"facts about {query}"


def dictate(step: int, rank: int) -> Callable[[TurnRequest], ScriptedTurn]:
    """The script of a rank's turns in a step."""
    kind, first = STEPS[step % len(STEPS)], rank == 0

    def turn(request: TurnRequest) -> ScriptedTurn:
        entropies = [0.1 + 0.1 * request.key[-1]]
        call = ScriptedTurn(text=f"<search>iron {request.key[1:]}</search>", entropies=entropies, polls=2)
        answer = ScriptedTurn(text=ANSWER, entropies=entropies)
        match kind:
            case "no calls and all":
                return answer if first else call  # the call in the last turn is refused
            case "all calls and none":
                return call if first else answer
            case "tools that hang":
                calls = request.key[-1] == 0
                return ScriptedTurn(text=f"<search>{'iron' if first else 'hang'}</search>") if calls else answer
            case _:
                return answer if first else ScriptedTurn(text=f"iron {request.key[1:]} " * (MAX_TOKENS // 5), polls=4)

    return turn


def train(folder: Path, steps: int, **settings: Any) -> dict[str, Any]:
    """Trains for `steps` steps. Returns the measurements of this rank."""
    tokenizer = build_tokenizer(["the melting point of iron is", "what is the answer", ANSWER] * 3)
    trainer: ARPOTrainer | None = None

    def script(request: TurnRequest, context: str) -> ScriptedTurn:
        assert trainer is not None
        return dictate(trainer.state.global_step, trainer.accelerator.process_index)(request)

    engine = make_engine(tokenizer, script)
    args = ARPOConfig(
        **{
            "output_dir": str(folder),
            "num_generations": LEAVES,
            "per_device_train_batch_size": LEAVES,
            "max_completion_length": MAX_TOKENS,
            "max_tool_calling_iterations": MAX_CALLS,
            "tool_timeout_s": TIMEOUT_S,
            "max_steps": steps,
            "learning_rate": 1e-4,
            "logging_steps": 1,
            "trajectory_log_rate": 0.0,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **settings,
        }
    )
    trainer = ARPOTrainer(
        model=build_model(tokenizer, seed=0),
        reward_funcs=lambda completions, **_: [float(i % 2) for i in range(len(completions))],
        args=args,
        train_dataset=Dataset.from_list([{"prompt": QUESTION, "answer": ["1"], "task": "math"}] * 8),
        processing_class=tokenizer,
        tools=[search],
        engine=engine,
    )
    engine.model_context = trainer._model_for_generation
    shapes: list[dict[str, Any]] = []
    rollout = trainer._rollout

    def watched(*args: Any) -> dict[str, list[Any]]:
        made = rollout(*args)
        calls = [call for calls in made["tool_calls"] for call in calls if call["source"] != "refused"]
        shapes.append(
            {
                "calls": max(map(len, made["tool_calls"])),
                "timeouts": sum(call["failure"] == "timeout" for call in calls),
                "tokens": [min(map(len, made["completion_ids"])), max(map(len, made["completion_ids"]))],
            }
        )
        return made

    trainer.rollout_func = watched  # type: ignore[assignment]
    start = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - start
    losses = [row for row in trainer.state.log_history if "loss" in row]
    return {
        "steps": trainer.state.global_step,
        "seconds": round(seconds, 1),
        "forwards": engine.forwards,
        "shapes": shapes[: len(STEPS)],
        "last": losses[-1] if losses else {},
    }


def make_engine(tokenizer: PreTrainedTokenizerBase, script: Script) -> DictatedEngine:
    return DictatedEngine(
        tokenizer, SamplingParams(eos_ids=(int(tokenizer.eos_token_id),), stop_strings=("</search>",)), script
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    saw = train(arguments.folder, arguments.steps)
    rank = torch.distributed.get_rank()
    (arguments.folder / f"{rank}.json").write_text(json.dumps(saw, indent=2) + "\n", "utf-8")
    if rank == 0:
        print(json.dumps(saw, indent=2))


if __name__ == "__main__":
    main()
