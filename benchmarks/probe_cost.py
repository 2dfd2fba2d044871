"""The cost of entropy probing: tokens per second of one vLLM server with and without it.

    python benchmarks/probe_cost.py

Two random models write 64 concurrent turns of `--tokens` tokens each. For the model of the quickstart's size the
server's overhead per request and token dominates; for the larger one it matters less. With probing a turn takes two
requests, the first of which asks for 20 logprobs at each of its 20 tokens. Without probing it takes one request.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from statistics import median

from transformers import AutoConfig, AutoTokenizer, Qwen3ForCausalLM

from arpo_trl.quickstart.model import save_cold_start_base
from arpo_trl.rollout.engines.base import Engine, SamplingParams, Turn, TurnRequest
from arpo_trl.rollout.engines.vllm.server import VLLMServerEngine
from overlap import engine_on
from serving import running

TURNS, PROBE = 64, 20
SIZES = {"0.6 M": (), "50 M": (768, 6)}
"""Hidden size and number of layers; an empty tuple is the quickstart's model."""


def save_model(folder: str, size: tuple[int, ...]) -> None:
    save_cold_start_base(folder)
    if size:
        hidden, layers = size
        config = AutoConfig.from_pretrained(folder)
        config.update(
            {
                "hidden_size": hidden,
                "intermediate_size": 4 * hidden,
                "num_hidden_layers": layers,
                "layer_types": ["full_attention"] * layers,
                "max_window_layers": layers,
                "num_attention_heads": hidden // 64,
                "num_key_value_heads": 2,
                "head_dim": 64,
            }
        )
        Qwen3ForCausalLM(config).save_pretrained(folder)


def tokens_per_s(engine: Engine, prompt: list[int], turns: int, tokens: int, probe: int, seed: int) -> float:
    """Tokens per second of `turns` concurrent turns after one prompt, each probed for its first `probe` tokens."""
    written = 0
    with engine.session():
        start = time.perf_counter()
        for i in range(turns):
            engine.submit(
                TurnRequest(id=i, ids=prompt, max_tokens=tokens, probe_tokens=probe, seed=seed * turns + i, key=(i, 0))
            )
        finished = 0
        while finished < turns:
            done = [event for event in engine.poll(0.05) if isinstance(event, Turn)]
            finished += len(done)
            written += sum(len(turn.ids) for turn in done)
        seconds = time.perf_counter() - start
    assert written == turns * tokens
    return written / seconds


def measure(name: str, engine: VLLMServerEngine, prompt: list[int], tokens: int, repeats: int) -> None:
    rates: dict[int, list[float]] = {0: [], PROBE: []}
    for repeat in range(repeats):
        for probe, measured in rates.items():  # alternating, so that other load affects both alike
            measured.append(tokens_per_s(engine, prompt, TURNS, tokens, probe, repeat))
    without, probing = median(rates[0]), median(rates[PROBE])
    ratios = sorted(a / b for a, b in zip(rates[PROBE], rates[0], strict=True))
    print(
        f"{name}, {tokens} tokens a turn: {without:,.0f} tokens/s without, {probing:,.0f} with probing, ratio "
        f"{median(ratios):.2f} ({ratios[0]:.2f} – {ratios[-1]:.2f} in {len(ratios)} pairs)",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--tokens", type=int, nargs="+", default=[100, 400])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    for name in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            save_model(folder, SIZES[name])
            tokenizer = AutoTokenizer.from_pretrained(folder)
            with running(folder, Path(folder) / "log") as server:
                engine = engine_on(server.url, tokenizer, SamplingParams(eos_ids=()))
                prompt = tokenizer.encode("the melting point of iron is what? " * 10)
                tokens_per_s(engine, prompt, TURNS, 100, PROBE, 0)  # warm-up
                for tokens in arguments.tokens:
                    measure(name, engine, prompt, tokens, arguments.repeats)


if __name__ == "__main__":
    main()
