"""The gain from overlapping turns and tool calls: the same rollouts on one vLLM server under three schedules.

    python benchmarks/overlap.py

64 paths make 3 calls each. Latencies are drawn from a log-normal distribution with mean 0.5 s and a long tail
(σ = 1.2: half of the calls take less than 0.25 s, one in a hundred more than 4 s). A turn has 20 to 60 tokens, all
sampled by vLLM. A call then replaces the last tokens, so that every schedule does the same work.

    overlap     each finished turn or call continues at once
    lockstep    all turns, then all calls at the same time, then all turns again (rollout_schedule rounds)
    TRL's loop  the loop of GRPOTrainer, on the same server through the same client: all turns, then each call in turn

"Idle" is the share of the wall time in which no request was running although the tool of some path had returned.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer
from trl import GRPOConfig

from against_trl import TagGRPOTrainer, trl_trainer
from arpo_trl.options import RolloutSchedule
from arpo_trl.quickstart.model import save_cold_start_base
from arpo_trl.rollout.batch import GroupRequest, TreeSettings
from arpo_trl.rollout.engines.base import Probe, SamplingParams, Turn, TurnRequest, TurnStop
from arpo_trl.rollout.engines.vllm.client import ServerClient
from arpo_trl.rollout.engines.vllm.server import VLLMServerEngine
from arpo_trl.rollout.protocols import TagProtocol
from arpo_trl.rollout.sampler import TreeSampler
from arpo_trl.tools.toolbox import ToolBox
from serving import running

GROUPS, LEAVES, CALLS = 8, 8, 3
MEAN_S, SIGMA = 0.5, 1.2
PROMPT = [{"role": "user", "content": "Wait for it."}]


class Standing:
    """Served weights that never change."""

    def __init__(self, url: str):
        self.clients = [ServerClient(url, timeout_s=60.0)]
        self.facts = {url: self.clients[0].facts()}
        self.version = self.facts[url].weight_version
        self.step: int | None = None
        self.is_current = True

    def sync(self) -> None:
        pass

    def model(self, url: str) -> str:
        return self.facts[url].model

    def restore(self, client: ServerClient) -> str:
        return client.weight_version()


def engine_on(url: str, tokenizer: Any, settings: SamplingParams) -> VLLMServerEngine:
    return VLLMServerEngine(
        tokenizer,
        settings,
        Standing(url),  # type: ignore[arg-type]
        vocab_size=len(tokenizer),
        top_logprobs=20,
        away_s=5.0,
        request_s=60.0,
    )


class Calling:
    """An engine whose turns have drawn lengths and end with a call; the turn after the last result ends with EOS."""

    def __init__(self, inner: VLLMServerEngine, tokenizer: Any):
        self.vocab_size, self.max_length, self.has_logprobs = inner.vocab_size, inner.max_length, inner.has_logprobs
        self.moments: list[tuple[float, str]] = []
        """Times at which a path could decode ("ready"), was submitted ("submitted") and had its turn ("written")."""
        self._inner = inner
        self._tokenizer = tokenizer
        self._keys: dict[int, tuple[int, ...]] = {}

    @property
    def forward_s(self) -> float:
        return self._inner.forward_s

    def session(self) -> AbstractContextManager[None]:
        return self._inner.session()

    def submit(self, request: TurnRequest) -> None:
        self._keys[request.id] = request.key
        if request.key[-1] == 0:  # no tool precedes the first turn
            self.moments.append((time.perf_counter(), "ready"))
        self.moments.append((time.perf_counter(), "submitted"))
        self._inner.submit(replace(request, max_tokens=random.Random(repr(request.key)).randint(20, 60)))

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


class TRLLoop(TagGRPOTrainer):
    """TRL's trainer and tool loop on the same engine as the other schedules."""

    engine: Calling
    depth = 0

    def _generate_single_turn(self, prompt_ids: list[list[int]], *_: Any, **__: Any) -> tuple[Any, Any]:
        assert len(prompt_ids) == GROUPS * LEAVES  # all paths have the same number of calls
        with self.engine.session():
            for i, ids in enumerate(prompt_ids):
                key = (i // LEAVES, i % LEAVES, self.depth)
                self.engine.submit(
                    TurnRequest(
                        id=self.depth * len(prompt_ids) + i, ids=ids, max_tokens=60, probe_tokens=0, seed=i, key=key
                    )
                )
            turns: dict[int, Turn] = {}
            while len(turns) < len(prompt_ids):
                turns.update({event.id: event for event in self.engine.poll(1.0) if isinstance(event, Turn)})
        self.depth += 1
        in_order = [turns[id] for id in sorted(turns)]
        return [turn.ids for turn in in_order], [turn.logprobs for turn in in_order]


class Wait:
    """The slow tool, with the seconds of its calls."""

    def __init__(self) -> None:
        self.spent: list[float] = []
        self.engine: Calling | None = None

    def tool(self) -> Callable[[str], Any]:
        async def wait(call: str) -> str:
            """Wait.

            Args:
                call: The identity of the call, which determines its latency.
            """
            seconds = random.Random(call).lognormvariate(math.log(MEAN_S) - SIGMA**2 / 2, SIGMA)
            await asyncio.sleep(seconds)
            self.spent.append(seconds)
            assert self.engine is not None
            self.engine.moments.append((time.perf_counter(), "ready"))
            return "done"

        return wait


def by_us(url: str, model: Path, schedule: RolloutSchedule, waiting: Wait) -> tuple[float, int]:
    """The seconds of the rollout, and the number of tokens that the model wrote."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    with ToolBox([waiting.tool()], timeout_s=120.0, concurrency=GROUPS * LEAVES) as toolbox:
        protocol = TagProtocol(tokenizer, toolbox.specs)
        settings = SamplingParams(eos_ids=(), stop_strings=protocol.stop_strings)
        waiting.engine = engine = Calling(engine_on(url, tokenizer, settings), tokenizer)
        sampler = TreeSampler(
            engine,
            toolbox,
            protocol,
            TreeSettings(
                num_generations=LEAVES,
                initial_rollouts=LEAVES,
                max_completion_length=600,
                max_length=1000,
                max_tool_calls=CALLS,
                entropy_probe_tokens=8,
                schedule=schedule,
            ),
        )
        prompt = protocol.encode_prompt(PROMPT)
        start = time.perf_counter()
        rollout = sampler.sample([GroupRequest(id=i, prompt_ids=prompt) for i in range(GROUPS)], seed=(0,))
        wall = time.perf_counter() - start
    return wall, sum(len(node.ids) for tree in rollout.trees for node in tree.turns())


def by_trl(url: str, model: Path, waiting: Wait) -> tuple[float, int]:
    """The same for TRL's loop."""
    paths = GROUPS * LEAVES
    config = GRPOConfig(
        str(model / "trl"),
        num_generations=LEAVES,
        per_device_train_batch_size=paths,
        max_completion_length=600,
        max_tool_calling_iterations=CALLS,
        report_to="none",
        use_cpu=True,
    )
    dataset = Dataset.from_list([{"prompt": PROMPT}] * GROUPS)
    trainer = trl_trainer(model, lambda completions, **_: [0.0] * paths, config, dataset, [waiting.tool()], TRLLoop)
    assert isinstance(trainer, TRLLoop)
    settings = SamplingParams(eos_ids=(), stop_strings=trainer.protocol.stop_strings)
    waiting.engine = trainer.engine = Calling(engine_on(url, trainer._tokenizer, settings), trainer._tokenizer)
    trainer.model.train()
    trainer._sync_tool_dicts = [{}] * paths  # TRL's _generate_and_score_completions sets it
    trainer._async_tool_dicts = [{"wait": trainer.tools[0]}] * paths
    start = time.perf_counter()
    _, completion_ids, tool_mask, *_ = trainer._generate([PROMPT] * paths)
    wall = time.perf_counter() - start
    assert [len(ids) for ids in completion_ids] == [len(mask) for mask in tool_mask]
    return wall, sum(map(sum, tool_mask))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        save_cold_start_base(model)
        with running(folder, model / "log") as server:
            ways: dict[str, Callable[[Wait], tuple[float, int]]] = {
                "overlap": lambda waiting: by_us(server.url, model, RolloutSchedule.OVERLAP, waiting),
                "lockstep": lambda waiting: by_us(server.url, model, RolloutSchedule.ROUNDS, waiting),
                "TRL's loop": lambda waiting: by_trl(server.url, model, waiting),
            }
            ways["overlap"](Wait())  # warm-up
            print(f"{'':12} wall s  × overlap   idle  tokens  tool s  longest call s")
            fastest = math.inf
            for name, roll_out in ways.items():
                waiting = Wait()
                wall, tokens = roll_out(waiting)
                assert len(waiting.spent) == GROUPS * LEAVES * CALLS
                assert waiting.engine is not None
                idle = idle_share(waiting.engine.moments, wall)
                fastest = min(fastest, wall)
                print(
                    f"{name:12} {wall:6.1f}  {wall / fastest:9.2f}  {idle:5.1%}  {tokens:6.0f}  "
                    f"{sum(waiting.spent):6.1f}  {max(waiting.spent):14.1f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
