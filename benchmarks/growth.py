"""Scaling of the cost with M, with the length of paths and with the number of calls: exponents and a plot.

    python benchmarks/growth.py --output runs/bench/growth.png

The update is the forward and backward pass of a model with 5 M parameters. Pairs of rows share the first half of their
completions. The script varies M, with prompts of 1,000 and of 4,000 tokens, and the path length. It measures both
shared prefixes and padding. (With the long prompt 64 padded rows do not fit into memory, so there is no padding.)
It also measures the sampler's overhead for a group of 16 paths over the number of calls per path, with scripted turns
and tools that return at once. An exponent is the least-squares slope of log seconds over log x. The exponent of the
token count is printed next to it: asymptotically no implementation can be below it.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from transformers import AutoTokenizer

from arpo_trl.rollout.batch import GroupRequest, TreeSettings
from arpo_trl.rollout.engines.base import SamplingParams, TurnRequest
from arpo_trl.rollout.engines.scripted import ScriptedEngine
from arpo_trl.rollout.protocols import TagProtocol
from arpo_trl.rollout.sampler import TreeSampler
from arpo_trl.tools.toolbox import ToolBox
from update import timed_apart

LEAVES, TURN, RESULT = 16, "a thought of some tokens " * 4, "a result of some words " * 8


@dataclass(frozen=True)
class Sweep:
    """Points of (x, {curve: y}) along one axis."""

    axis: str
    unit: str
    points: list[tuple[int, dict[str, float]]]

    @property
    def curves(self) -> list[str]:
        return list(self.points[0][1])

    def exponent(self, curve: str) -> float:
        """Slope of log y over log x, least squares."""
        xs, ys = [math.log(x) for x, _ in self.points], [math.log(y[curve]) for _, y in self.points]
        x_mean, y_mean = sum(xs) / len(xs), sum(ys) / len(ys)
        return sum((x - x_mean) * (y - y_mean) for x, y in zip(xs, ys, strict=True)) / sum(
            (x - x_mean) ** 2 for x in xs
        )


def update(
    axis: str,
    values: Iterable[int],
    shape: Callable[[int], tuple[int, int, int]],
    repeats: int,
    *,
    padded: bool = True,
) -> Sweep:
    """The update along one axis; `shape` gives prompt tokens, leaves and completion tokens for a value."""
    points = []
    for x in values:
        prompt, leaves, completion = shape(x)
        theirs, ours, _, _, packed, _ = timed_apart(
            "5 M", prompt, leaves, "half", repeats=repeats, completion=completion, padded=padded
        )
        curves = {"shared prefixes": ours, "padded": theirs, "tokens in the pack": packed}
        points.append((x, {name: y for name, y in curves.items() if not math.isnan(y)}))
        print(f"{axis} {x}: shared {ours:.2f} s, padded {theirs:.2f} s, {packed:,.0f} tokens", flush=True)
    return Sweep(axis, "update, seconds", points)


def search(query: str) -> str:
    """Answers at once.

    Args:
        query: What to look for.
    """
    return f"{query}: {RESULT}"


def sampling(model: Path, values: Iterable[int], repeats: int) -> Sweep:
    """The sampler's overhead in seconds for one group, over the number of calls per path."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    eos = (int(tokenizer.eos_token_id),)
    points = []
    with ToolBox([search]) as toolbox:
        protocol = TagProtocol(tokenizer, toolbox.specs)
        for calls in values:

            def script(request: TurnRequest, context: str, calls: int = calls) -> str:
                path = f"{TURN} {request.key}"
                return f"{path}<search>{path}</search>" if request.key[-1] < calls else f"{path}<answer>1</answer>"

            seconds = []
            for _ in range(repeats + 1):
                engine = ScriptedEngine(
                    tokenizer, SamplingParams(eos_ids=eos, stop_strings=protocol.stop_strings), script
                )
                settings = TreeSettings(
                    num_generations=LEAVES,
                    initial_rollouts=LEAVES,
                    max_completion_length=1 << 20,
                    max_length=1 << 21,
                    max_tool_calls=calls,
                )
                sampler = TreeSampler(engine, toolbox, protocol, settings)
                seconds.append(sampler.sample([GroupRequest(id=0, prompt_ids=[1] * 100)], seed=(0,)).times.total_s)
            points.append((calls, {"one group of 16": median(seconds[1:])}))
            print(f"calls {calls}: {points[-1][1]['one group of 16']:.3f} s", flush=True)
    return Sweep("tool calls on each path", "sampler and tools, seconds", points)


def draw(sweeps: list[Sweep], output: Path) -> None:
    figure, panels = plt.subplots(1, len(sweeps), figsize=(3.6 * len(sweeps), 3.6), layout="constrained")
    for sweep, panel in zip(sweeps, panels, strict=True):
        for curve in sweep.curves:
            if curve != "tokens in the pack":
                xs, ys = zip(*((x, y[curve]) for x, y in sweep.points), strict=True)
                panel.loglog(xs, ys, marker="o", label=f"{curve}: exponent {sweep.exponent(curve):.2f}")
        panel.set(xlabel=sweep.axis, ylabel=sweep.unit)
        panel.set_xticks(xs, [f"{x:,}" for x in xs], minor=False)
        panel.set_xticks([], minor=True)
        panel.grid(alpha=0.3)
        panel.legend(fontsize="small")
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, default=Path("runs/quickstart/sft"), help="model whose tokenizer is used"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("runs/bench/growth.png"))
    arguments = parser.parse_args()
    sweeps = [
        update("M, prompt 1,000", (4, 8, 16, 32, 64), lambda m: (1000, m, 500), arguments.repeats),
        update("M, prompt 4,000", (4, 8, 16, 32, 64), lambda m: (4000, m, 500), arguments.repeats, padded=False),
        update("tokens of a completion", (128, 256, 512, 1024, 2048), lambda t: (300, 8, t), arguments.repeats),
        sampling(arguments.model, (1, 2, 4, 8, 16, 32), arguments.repeats),
    ]
    print("\n| along | " + " | ".join(["from", "to", "curve", "first", "last", "exponent"]) + " |")
    print("|---|---:|---:|---|---:|---:|---:|")
    for sweep in sweeps:
        (x_first, first), (x_last, last) = sweep.points[0], sweep.points[-1]
        for curve in sweep.curves:
            values = " | ".join(f"{y:,.0f}" if y > 100 else f"{y:.3g}" for y in (first[curve], last[curve]))
            print(f"| {sweep.axis} | {x_first} | {x_last} | {curve} | {values} | {sweep.exponent(curve):.2f} |")
    draw(sweeps, arguments.output)
    print(f"\nPicture: {arguments.output}")


if __name__ == "__main__":
    main()
