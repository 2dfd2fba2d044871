"""Runs two ranks that share one engine: `torchrun --nproc_per_node 2 lockstep_ranks.py FOLDER`. Each writes its
results."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from arpo_trl.errors import Interrupted
from arpo_trl.rollout.batch import GroupRequest, TreeSettings
from arpo_trl.rollout.engines.base import SamplingParams, TurnRequest
from arpo_trl.rollout.engines.lockstep import LockstepEngine
from arpo_trl.rollout.engines.scripted import ScriptedEngine, ScriptedTurn
from arpo_trl.rollout.protocols import TagProtocol
from arpo_trl.rollout.sampler import TreeSampler
from arpo_trl.tools.toolbox import ToolBox
from support import tokenizer

GROUPS = {"uneven": [0, 3], "waits": [1, 1], "diverges": [1, 1], "fails": [1, 1], "interrupted": [1, 1]}
"""For each case how many prompts each rank rolls out."""
LEAVES = 4
WAIT_S = 15.0
"""Less than the deadline of a call."""


def roll_out(case: str, rank: int) -> dict[str, Any]:
    def search(query: str) -> str:
        """Search.

        Args:
            query: What to look for.
        """
        end = time.monotonic() + WAIT_S
        while case == "waits" and rank == 0 and asked_by_the_other() < LEAVES and time.monotonic() < end:
            time.sleep(0.01)
        return f"facts about {query}"

    def asked_by_the_other() -> int:
        """How many answers of the second rank's group the engine has been asked for in this session."""
        return sum(request.key[0] == 3 and request.key[-1] == 1 for request in list(inner.requests))

    def script(request: TurnRequest, context: str) -> ScriptedTurn:
        if case == "interrupted":
            return ScriptedTurn(text="never done", polls=10**6)
        if case == "diverges" and rank == 1:
            return ScriptedTurn(text="something else")
        if request.key[-1] < (1 + request.key[0] % 3):
            return ScriptedTurn(
                text=f"<search>iron {request.key[0]}</search>", entropies=[0.1 * request.key[-1]], polls=3
            )
        return ScriptedTurn(text=f"<answer>\\boxed{{{request.key[0]}}}</answer>", entropies=[1.0], polls=2)

    toolbox = ToolBox([search])
    protocol = TagProtocol(tokenizer(), toolbox.specs)
    eos = (int(tokenizer().eos_token_id),)
    inner = ScriptedEngine(tokenizer(), SamplingParams(eos_ids=eos, stop_strings=protocol.stop_strings), script)
    engine = LockstepEngine(inner, dist.new_group(backend="gloo"))
    sampler = TreeSampler(
        engine,
        toolbox,
        protocol,
        TreeSettings(
            num_generations=LEAVES,
            initial_rollouts=2,
            max_completion_length=400,
            max_length=1000,
            max_tool_calls=3,
            entropy_probe_tokens=4,
        ),
    )
    prompt = protocol.encode_prompt("what is the answer")
    requests = [GroupRequest(id=3 * rank + i, prompt_ids=prompt) for i in range(GROUPS[case][rank])]
    said: dict[str, Any] = {"sessions": []}
    try:
        with toolbox:
            for _ in range(2):
                inner.requests.clear()
                if case == "fails" and rank == 1:
                    with engine.session():
                        raise RuntimeError("broken here")
                if case == "interrupted" and rank == 1:
                    with engine.session():
                        raise Interrupted(signal.SIGTERM)
                if case == "interrupted":  # this rank hears of the signal later
                    sampler.between_events = told_later()
                rollout = sampler.sample(requests, seed=(0,))
                said["sessions"].append([list(request.key) for request in inner.requests])
        said["leaves"] = [[leaf.turns[-1] for leaf in tree.leaves()] for tree in rollout.trees]
    except (Exception, Interrupted) as error:
        said["error"] = f"{type(error).__name__}: {error}"
    return said


def told_later() -> Callable[[], None]:
    at = time.monotonic() + 1.0

    def check() -> None:
        if time.monotonic() > at:
            raise Interrupted(signal.SIGTERM)

    return check


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    said = {case: roll_out(case, rank) for case in GROUPS}
    (folder / f"rank{rank}.json").write_text(json.dumps(said), "utf-8")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
