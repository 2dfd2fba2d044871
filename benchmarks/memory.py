"""Memory of training: the table of docs/distributed.md, computed by its formula.

python benchmarks/memory.py                                     # the table
python benchmarks/memory.py --gpus 16 --tokens 32768 --paths 32 --length 8192
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

GB = 1e9
LORA_RANK = 32


@dataclass(frozen=True, slots=True)
class Shape:
    """A dense decoder's sizes, as its config.json has them, and its parameters."""

    layers: int
    width: int  # hidden_size
    heads: int
    kv_heads: int
    head: int  # head_dim
    inner: int  # intermediate_size
    vocab: int
    tied: bool  # the LM head shares the weights of the embedding
    biases: bool = False  # of the query, key and value projections (Qwen2.5)
    head_norms: bool = False  # of queries and keys (Qwen3)

    @property
    def linear(self) -> list[tuple[int, int]]:
        """(in, out) of each of a layer's seven matrices."""
        d, q, kv, f = self.width, self.heads * self.head, self.kv_heads * self.head, self.inner
        return [(d, q), (d, kv), (d, kv), (q, d), (d, f), (d, f), (f, d)]

    @property
    def parameters(self) -> int:
        layer = sum(i * o for i, o in self.linear) + 2 * self.width
        layer += self.biases * (self.heads + 2 * self.kv_heads) * self.head + self.head_norms * 2 * self.head
        return self.layers * layer + self.width + (1 if self.tied else 2) * self.vocab * self.width

    def adapter(self, rank: int) -> int:
        """Parameters of a LoRA adapter on all seven matrices."""
        return self.layers * rank * sum(i + o for i, o in self.linear)

    def activations(self, tokens: int) -> int:
        """Bytes of a micro-batch with gradient checkpointing: all layers' inputs, and one layer's activations."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        inside = 6 * self.width + 2 * (q + 2 * kv) + q + 4 * self.inner
        return 2 * tokens * (self.layers * self.width + inside)

    def kv_cache(self, tokens: int) -> int:
        """Bytes of keys and values."""
        return 2 * 2 * tokens * self.layers * self.kv_heads * self.head


SHAPES = {
    "Qwen2.5-3B": Shape(36, 2048, 16, 2, 128, 11008, 151936, tied=True, biases=True),
    "Qwen2.5-7B": Shape(28, 3584, 28, 4, 128, 18944, 152064, tied=False, biases=True),
    "Qwen3-14B": Shape(40, 5120, 40, 8, 128, 17408, 151936, tied=False, head_norms=True),
}


def table(gpus: int = 8, tokens: int = 8192, paths: int = 16, length: int = 5632) -> list[str]:
    """A Markdown table in GB: the state of the whole run, each GPU's further memory, and its share of the state."""
    lines = [
        "| model | trained | weights | gradients | optimizer | activations | KV cache | DDP | ZeRO-2 | ZeRO-3, FSDP2 "
        "| … while sampling |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, shape in SHAPES.items():
        for what, trained in (("all", shape.parameters), (f"LoRA {LORA_RANK}", shape.adapter(LORA_RANK))):
            whole = shape.parameters + (0 if what == "all" else trained)
            weights, gradients, optimizer = 2 * whole, 2 * trained, 12 * trained
            state = weights + gradients + optimizer
            per_gpu = (
                state,
                weights + (gradients + optimizer) / gpus,
                state / gpus,
                state / gpus + weights,
            )
            sizes = (
                *(weights, gradients, optimizer, shape.activations(tokens), shape.kv_cache(paths * length)),
                *per_gpu,
            )
            lines.append(f"| {name} | {what} | " + " | ".join(f"{size / GB:.1f}" for size in sizes) + " |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=8, help="ranks (default: 8)")
    parser.add_argument("--tokens", type=int, default=8192, help="tokens of a micro-batch (default: 8192)")
    parser.add_argument(
        "--paths", type=int, default=16, help="paths that one rank decodes at the same time (default: 16)"
    )
    parser.add_argument("--length", type=int, default=5632, help="prompt and completion, tokens (default: 5632)")
    arguments = parser.parse_args()
    print("\n".join(table(**vars(arguments))))


if __name__ == "__main__":
    main()
