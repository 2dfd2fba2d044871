"""The sampler's share of a rollout (time outside model forwards and tools) by the size of the model.

    python benchmarks/sampler_share.py --model runs/quickstart/sft --data runs/quickstart/data

The first row is the quickstart's cold-started model with its tools and 8 leaves per prompt. The other rows are random
models. They would call no tools, so each turn replays a turn of the first row token by token. The sampler and the
tools do the same work in every row; only the forward pass and the size of the KV cache differ. The random models use
grouped-query attention, as current models do. N = M, because branches would depend on the entropies.
"""

from __future__ import annotations

import argparse
import contextlib
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from arpo_trl.options import RolloutSchedule
from arpo_trl.quickstart.task import read_lines
from arpo_trl.rollout.batch import GroupRequest, RolloutBatch, TreeSettings
from arpo_trl.rollout.engines import transformers as engine_module
from arpo_trl.rollout.engines.base import SamplingParams
from arpo_trl.rollout.engines.transformers import TransformersEngine
from arpo_trl.rollout.protocols import TagProtocol
from arpo_trl.rollout.sampler import TreeSampler
from arpo_trl.tools.builtin import ToolArguments, build_tools
from arpo_trl.tools.toolbox import ToolBox

SIZES = {"11 M": (384, 5), "51 M": (768, 6)}
KEY_VALUE_HEADS = 2  # as in Qwen2.5 up to 3B


class Replay:
    """Replaces the engine's sampling: returns the tokens of a recorded rollout and ignores the logits."""

    def __init__(self, recorded: RolloutBatch, groups: int):
        self.tokens: dict[tuple[int, ...], list[int]] = {}
        for group, tree in zip(range(groups), recorded.trees, strict=True):
            for leaf in tree.leaves():
                turns = [node for node in leaf.nodes if node.logprobs]
                for depth, node in enumerate(turns):
                    self.tokens[(group, *leaf.address, depth)] = node.ids

    def __call__(self, engine: TransformersEngine) -> Any:
        def sample(probs: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
            del uniform
            probs.cumsum(dim=-1)  # the same work as sampling
            rows = zip(engine._rows, engine._state.written.tolist(), strict=False)
            return torch.tensor([self.tokens[request.key][written] for request, written in rows])

        return sample


def roll(
    model: PreTrainedModel, tokenizer: Any, rows: list[Any], toolbox: ToolBox, replay: Replay | None
) -> RolloutBatch:
    protocol = TagProtocol(tokenizer, toolbox.specs)
    eos = (int(tokenizer.eos_token_id),)
    settings = SamplingParams(eos_ids=eos, stop_strings=protocol.stop_strings)
    engine = TransformersEngine(tokenizer, settings, lambda: contextlib.nullcontext(model))
    sampler = TreeSampler(
        engine,
        toolbox,
        protocol,
        TreeSettings(
            num_generations=8,
            initial_rollouts=8,
            max_completion_length=208,
            max_length=1024,
            max_tool_calls=5,
            entropy_probe_tokens=8,
            schedule=RolloutSchedule.ROUNDS,
        ),
    )
    original = engine_module.sample
    if replay is not None:
        engine_module.sample = replay(engine)
    try:
        requests = [GroupRequest(id=i, prompt_ids=protocol.encode_prompt(row["prompt"])) for i, row in enumerate(rows)]
        return sampler.sample(requests, seed=(0,))
    finally:
        engine_module.sample = original


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart/sft"))
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart/data"))
    parser.add_argument("--prompts", type=int, default=64, help="8 paths each (default: 64)")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    rows = read_lines(arguments.data / "train.jsonl")[: arguments.prompts]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    tools = build_tools(ToolArguments(search_index=str(arguments.data / "corpus.jsonl"), search_top_k=2))
    print("| model | rollout s | forward s | tool wait s | own s | own share | own ms per turn |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    with ToolBox(tools, cache=True) as toolbox:
        small = AutoModelForCausalLM.from_pretrained(arguments.model)
        recorded = roll(small, tokenizer, rows, toolbox, None)
        models: dict[str, PreTrainedModel] = {"0.6 M": small}
        for name, (hidden, layers) in SIZES.items():
            config = Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=hidden,
                intermediate_size=4 * hidden,
                num_hidden_layers=layers,
                num_attention_heads=hidden // 64,
                num_key_value_heads=KEY_VALUE_HEADS,
                head_dim=64,
                max_position_embeddings=1024,
                tie_word_embeddings=True,
            )
            models[name] = Qwen3ForCausalLM(config)
        for name, model in models.items():
            replay = None if model is small else Replay(recorded, len(rows))
            times, turns = [], 0
            for _ in range(arguments.repeats):
                rollout = roll(model, tokenizer, rows, toolbox, replay)
                times.append(rollout.times)
                turns = sum(1 for tree in rollout.trees for _ in tree.turns())
            total, forward, wait, own = (
                median(getattr(t, field) for t in times) for field in ("total_s", "forward_s", "tool_wait_s", "own_s")
            )
            print(
                f"| {name} | {total:.2f} | {forward:.2f} | {wait:.2f} | {own:.2f} | {own / total:.1%} | "
                f"{1000 * own / turns:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
