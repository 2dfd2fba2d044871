"""What it is worth that nobody waits: one set of rollouts with slow tools, on one vLLM server, scheduled three ways.

    python benchmarks/overlap.py

64 paths make 3 calls each. A call's latency is drawn from a log-normal distribution with mean 0.5 s and a long tail
(σ = 1.2: half of the calls take less than 0.25 s, one in a hundred more than 4 s). A turn is 20 to 60 tokens, really
sampled by vLLM; its last tokens are then replaced by a call, so that every schedule does the same work.

    overlap     whatever has finished is taken in at once
    lockstep    all turns, then all calls at the same time, then all turns again (rollout_schedule rounds)
    one by one  the same with the calls one after another, as TRL's tool loop makes them

Idle: the share of the wall time in which a path could decode, its tool having answered, but no request was under way.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import tempfile
import time
from collections.abc import Hashable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from arpo_trl.quickstart.model import save_cold_start_base
from arpo_trl.rollout.engines.base import Probe, SamplingSettings, Turn, TurnRequest, TurnStop
from arpo_trl.rollout.engines.vllm_client import ServerClient
from arpo_trl.rollout.engines.vllm_server import VLLMServerEngine
from arpo_trl.rollout.protocol import TagProtocol
from arpo_trl.rollout.sampler import GroupRequest, RolloutSchedule, SamplerSettings, TreeSampler
from arpo_trl.tools.box import ToolBox
from serving import running

GROUPS, LEAVES, CALLS = 8, 8, 3
MEAN_S, SIGMA = 0.5, 1.2


class Standing:
    """Servers whose weights stay what they are."""

    def __init__(self, url: str):
        self.clients = [ServerClient(url, timeout_s=60.0)]
        self.facts = {url: self.clients[0].facts()}
        self.version = self.facts[url].weight_version

    def sync(self) -> None:
        pass

    def model(self, url: str) -> str:
        return self.facts[url].model

    def restore(self, client: ServerClient) -> None:
        raise RuntimeError("the server was restarted in the middle of a measurement")


def engine_on(url: str, tokenizer: Any, settings: SamplingSettings) -> VLLMServerEngine:
    version: Hashable = 0
    return VLLMServerEngine(
        tokenizer,
        settings,
        Standing(url),  # type: ignore[arg-type]
        lambda: version,
        vocab_size=len(tokenizer),
        top_logprobs=20,
        away_s=5.0,
        request_s=60.0,
    )


class Calling:
    """The engine, its turns cut to a length of their own and ended by a call, or by EOS after the last result."""

    def __init__(self, inner: VLLMServerEngine, tokenizer: Any):
        self.vocab_size = inner.vocab_size
        self.moments: list[tuple[float, str]] = []
        """When a path could decode ("ready"), was asked for ("submitted") and had its turn ("written")."""
        self._inner = inner
        self._tokenizer = tokenizer
        self._keys: dict[int, tuple[int, ...]] = {}

    @property
    def forward_s(self) -> float:
        return self._inner.forward_s

    @property
    def pending(self) -> int:
        return self._inner.pending

    def session(self) -> AbstractContextManager[None]:
        return self._inner.session()

    def submit(self, request: TurnRequest) -> None:
        self._keys[request.id] = request.key
        if request.key[-1] == 0:  # the first turn waits for no tool
            self.moments.append((time.perf_counter(), "ready"))
        self.moments.append((time.perf_counter(), "submitted"))
        self._inner.submit(replace(request, max_tokens=random.Random(request.seed).randint(20, 60)))

    def poll(self, timeout_s: float) -> list[Probe | Turn]:
        return [self._ended(event) if isinstance(event, Turn) else event for event in self._inner.poll(timeout_s)]

    def _ended(self, turn: Turn) -> Turn:
        self.moments.append((time.perf_counter(), "written"))
        key = self._keys.pop(turn.id)
        if key[-1] >= CALLS:
            return replace(turn, ids=[*turn.ids[:-1], int(self._tokenizer.eos_token_id)], stop=TurnStop.EOS)
        call = self._tokenizer.encode("<wait>" + " ".join(map(str, key)) + "</wait>", add_special_tokens=False)
        ids = [*turn.ids[: -len(call)], *call][-len(turn.ids) :]
        return replace(turn, ids=ids, stop=TurnStop.STOP_STRING)


def idle_share(moments: list[tuple[float, str]], wall_s: float) -> float:
    ready = flying = 0
    idle, last = 0.0, moments[0][0]
    for when, what in sorted(moments):
        if ready and not flying:
            idle += when - last
        last = when
        ready += {"ready": 1, "submitted": -1, "written": 0}[what]
        flying += {"ready": 0, "submitted": 1, "written": -1}[what]
    return idle / wall_s


def roll_out(url: str, tokenizer: Any, schedule: RolloutSchedule, concurrency: int) -> dict[str, float]:
    spent: list[float] = []
    engine: Calling

    async def wait(call: str) -> str:
        """Wait.

        Args:
            call: Whose call this is; decides how long it takes.
        """
        seconds = random.Random(call).lognormvariate(math.log(MEAN_S) - SIGMA**2 / 2, SIGMA)
        await asyncio.sleep(seconds)
        spent.append(seconds)
        engine.moments.append((time.perf_counter(), "ready"))
        return "done"

    with ToolBox([wait], timeout_s=120.0, concurrency=concurrency) as toolbox:
        protocol = TagProtocol(tokenizer, toolbox.specs)
        settings = SamplingSettings((), protocol.stop_strings)
        engine = Calling(engine_on(url, tokenizer, settings), tokenizer)
        sampler = TreeSampler(
            engine,
            toolbox,
            protocol,
            SamplerSettings(LEAVES, LEAVES, 600, 1000, CALLS, 8, schedule=schedule),
            (int(tokenizer.eos_token_id),),
        )
        prompt = protocol.encode_prompt([{"role": "user", "content": "Wait for it."}])
        start = time.perf_counter()
        rollout = sampler.sample([GroupRequest(i, prompt) for i in range(GROUPS)], seed=(0,))
        wall = time.perf_counter() - start
    leaves = [leaf for tree in rollout.trees for leaf in tree.leaves()]
    assert len(spent) == sum(len(leaf.calls) for leaf in leaves) == GROUPS * LEAVES * CALLS
    return {
        "wall_s": wall,
        "idle": idle_share(engine.moments, wall),
        "tokens": sum(len(node.ids) for tree in rollout.trees for node in tree.turns()),
        "tool_s": sum(spent),
        "longest_s": max(spent),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        save_cold_start_base(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        with running(folder, Path(folder) / "log") as server:
            ways = {
                "overlap": (RolloutSchedule.OVERLAP, GROUPS * LEAVES),
                "lockstep": (RolloutSchedule.ROUNDS, GROUPS * LEAVES),
                "one by one": (RolloutSchedule.ROUNDS, 1),
            }
            roll_out(server.url, tokenizer, *ways["overlap"])  # warms the server up
            print(f"{'':12} wall s  × overlap   idle  tokens  tool s  longest call s")
            fastest = math.inf
            for name, (schedule, concurrency) in ways.items():
                row = roll_out(server.url, tokenizer, schedule, concurrency)
                fastest = min(fastest, row["wall_s"])
                print(
                    f"{name:12} {row['wall_s']:6.1f}  {row['wall_s'] / fastest:9.2f}  {row['idle']:5.1%}  "
                    f"{row['tokens']:6.0f}  {row['tool_s']:6.1f}  {row['longest_s']:14.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
