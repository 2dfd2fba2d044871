"""The update with and without shared prefixes: forward and backward pass of TRL's fused logprobs.

    python benchmarks/update.py                      # one prompt and M for each model
    python benchmarks/update.py --grid               # every shape: hours on a CPU
    python benchmarks/update.py --grid --model '5 M' --prompt 300 1000 --leaves 4 8
    python benchmarks/update.py --device cuda --row 1000 16 half      # one row of gpu.sh

Each shape is M completions after one prompt. `forks` says what they share besides the prompt: nothing (plain GRPO),
their first half in pairs (half), or a quarter in fours and another quarter in pairs (deep). The token ratio
(padded ÷ packed) is the ideal speed-up if attention is cheap. For attention the ideal speed-up is the ratio of
query-key pairs. It is lower, because shared tokens come first and attend to few others. Tokens per second count all
tokens of the rows, packed and padded alike. Peak memory is the growth of a process that runs only one step; on CUDA it
is the allocator's peak. If the padded batch does not fit into memory, the script measures only the packed one. Packed
and padded steps alternate.

On a GPU one process measures all values of a row, in bfloat16. "first" is the first packed step, including kernel
selection and compilation. MFU is the FLOPs of the model ÷ (seconds × the GPU's peak in card.py). A step takes
6 · matrix parameters · tokens FLOPs, where the LM head counts only completion tokens, and 12 · layers · heads
· head size · query-key pairs for attention. Tokens and pairs are counted separately for packed and padded.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import random
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product
from statistics import median
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from trl.trainer.utils import add_fused_lm_head

from arpo_trl.training.prefix_sharing import forward_pack, pack_rows, share_prefixes
from card import GIB, device_name, peak_flops, shown

MODELS = {"5 M": (192, 6, 3, 3), "50 M": (576, 10, 9, 9)}
"""Hidden size, layers, heads, key-value heads. The vocabulary has 8,000 tokens."""
CARD_MODELS = {"200 M": (1024, 12, 16, 8), "tiny": (64, 2, 1, 1)}
"""The columns of `--row`."""
HEAD_SIZE = 64
VOCABULARY = 8000
COMPLETION = 500
REPEATS_S = 20.0
"""Most seconds for which a row repeats its steps on a GPU."""
FORKS = ("none", "half", "deep")
DEVICE = torch.device("cpu")
NO_MEMORY = 3
"""The exit status of a task that does not fit into memory."""
KEEP_MEMORY = {
    "MALLOC_MMAP_MAX_": "0",
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "MALLOC_TOP_PAD_": str(1 << 28),
}
"""Makes glibc keep freed memory. Otherwise each tensor above a certain size is mapped anew. In a virtual machine that
takes as long as computing it, and shows as a jump in every curve."""

Rows = tuple[torch.Tensor, torch.Tensor, int]
Shape = tuple[str, int, int, str]


def make_model(name: str) -> PreTrainedModel:
    hidden, layers, heads, kv_heads = (MODELS | CARD_MODELS)[name]
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=HEAD_SIZE,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
    )
    with DEVICE:  # a GPU draws 200 million numbers quickly
        model = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16 if DEVICE.type == "cuda" else torch.float32)
    add_fused_lm_head(model, 1.0, False, ("log_probs", "entropy"))
    share_prefixes(model)
    return model


def make_rows(prompt: int, leaves: int, forks: str, completion: int = COMPLETION) -> Rows:
    rng = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [rng.randrange(1, VOCABULARY) for _ in range(count)]

    half, quarter = completion // 2, completion // 4
    start = tokens(prompt)
    rows: list[list[int]] = []
    while len(rows) < leaves:
        if forks == "none":
            rows.append(start + tokens(completion))
        elif forks == "half":
            shared = start + tokens(half)
            rows += [shared + tokens(completion - half) for _ in range(2)]
        else:
            first = start + tokens(quarter)
            for second in (first + tokens(quarter) for _ in range(2)):
                rows += [second + tokens(completion - 2 * quarter) for _ in range(2)]
    ids = torch.tensor(rows[:leaves], device=DEVICE)
    return ids, torch.ones_like(ids), completion


def step(model: PreTrainedModel, rows: Rows, shared: bool) -> float:
    """The seconds of one forward and backward pass."""
    ids, mask, keep = rows
    begin = time.perf_counter()
    if shared:
        logprobs, _ = forward_pack(model, pack_rows(ids, mask, keep))
    else:
        labels = ids.clone()
        labels[:, :-keep] = -100
        logprobs = model(input_ids=ids, attention_mask=mask, labels=labels, fused_lm_head=True).log_probs[:, -keep:]
    logprobs.sum().backward()
    # As a trainer does. On a CPU the gradients stay, so that the growth of the process is that of the step.
    model.zero_grad(set_to_none=DEVICE.type == "cuda")
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def apart(task: str, *arguments: object) -> list[float]:
    """Runs a task in a separate process, which frees its memory at its end. Returns the numbers that it prints.

    Raises:
        MemoryError: The task does not fit into memory.
    """
    command = [sys.executable, __file__, "--device", DEVICE.type, "--task", json.dumps([task, *arguments])]
    environment = os.environ | (KEEP_MEMORY if task == "timed" else {})
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode == NO_MEMORY:
        raise MemoryError(f"{task} {arguments} does not fit into memory.")
    done.check_returncode()
    return [float(number) for number in done.stdout.split()]


def timed_apart(*shape: object, repeats: int, completion: int = COMPLETION, padded: bool = True) -> list[float]:
    """Run `timed` in a separate process; if the padded batch does not fit into memory, with the packed batch alone.

    Raises:
        MemoryError: The packed batch does not fit into memory either.
    """
    if padded:
        with contextlib.suppress(MemoryError):
            return apart("timed", *shape, repeats, completion, True)
    return apart("timed", *shape, repeats, completion, False)


def run_task(task: str, arguments: list[Any]) -> None:
    """Prints the numbers of a task. Out of memory, it exits with `NO_MEMORY` before the kernel kills a process."""
    if DEVICE.type == "cpu":
        free = psutil.virtual_memory().available
        resource.setrlimit(resource.RLIMIT_DATA, (free, free))
    tasks: dict[str, Callable[..., Any]] = {"timed": timed, "memory": memory}
    try:
        found = tasks[task](*arguments)
    except (MemoryError, RuntimeError) as error:  # torch has an own type for CUDA only
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            sys.exit(NO_MEMORY)
        raise
    print(*(found if isinstance(found, tuple) else (found,)))


def memory(name: str, prompt: int, leaves: int, forks: str, shared: bool) -> float:
    """MiB that one step adds to a process after a tiny warm-up step."""
    model = make_model(name)
    step(model, make_rows(8, 2, "none"), shared)  # creates gradients and threads
    rows = make_rows(prompt, leaves, forks)
    before = peak_bytes()
    step(model, rows, shared)
    return (peak_bytes() - before) / (1 << 20)


def peak_bytes() -> int:
    """The peak memory of this process so far; on CUDA that of the allocator."""
    if DEVICE.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def timed(
    name: str, prompt: int, leaves: int, forks: str, repeats: int, completion: int = COMPLETION, padded: bool = True
) -> tuple[float, float, float, int, int, float]:
    """Median seconds padded and shared, the median of their ratios, tokens padded and packed, and the pair ratio.

    If not `padded` (it may not fit into memory), its seconds and the ratio are NaN.
    """
    model, rows = make_model(name), make_rows(prompt, leaves, forks, completion)
    ways = (False, True) if padded else (True,)
    seconds: dict[bool, list[float]] = {way: [] for way in ways}
    for way in ways:
        step(model, rows, way)  # warm-up: selects and compiles kernels, allocates memory
    for repeat in range(repeats):
        for way in ways[:: -1 if repeat % 2 else 1]:
            seconds[way].append(step(model, rows, way))
    theirs, ours = seconds.get(False, [math.nan] * repeats), seconds[True]
    ratio = median(a / b for a, b in zip(theirs, ours, strict=True))
    (leaves, width), (distinct, pairs) = rows[0].shape, distinct_tokens(rows[0])
    return median(theirs), median(ours), ratio, leaves * width, distinct, all_pairs(rows[0]) / pairs


def all_pairs(ids: torch.Tensor) -> int:
    """The number of query-key pairs in causal attention over the rows."""
    leaves, width = ids.shape
    return int(leaves * width * (width + 1) // 2)


def distinct_tokens(ids: torch.Tensor) -> tuple[int, int]:
    """The number of tokens with different prefixes, and of their query-key pairs."""
    seen: set[int] = set()
    pairs = 0
    for row in ids.tolist():
        prefix = 0
        for position, token in enumerate(row):
            prefix = hash((prefix, token))
            if prefix not in seen:
                seen.add(prefix)
                pairs += position + 1
    return len(seen), pairs


def step_flops(name: str, tokens: int, completions: int, pairs: int) -> float:
    """The FLOPs of a forward and backward pass, by the formula above."""
    hidden, layers, heads, kv_heads = CARD_MODELS[name]
    matrices = layers * (2 * hidden * HEAD_SIZE * (heads + kv_heads) + 3 * hidden * 4 * hidden)
    return 6.0 * (matrices * tokens + hidden * VOCABULARY * completions) + 12.0 * layers * heads * HEAD_SIZE * pairs


CARD_COLUMNS = (
    "prompt | M | forks | first s | padded s | packed s | speed-up | token ratio | reached | padded tokens/s "
    "| packed tokens/s | padded GiB | packed GiB | padded MFU | packed MFU"
)


def card_row(name: str, prompt: int, leaves: int, forks: str, completion: int, repeats: int) -> str:
    """A row of the table with `CARD_COLUMNS`."""
    model, rows = make_model(name), make_rows(prompt, leaves, forks, completion)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    first, gib = math.nan, dict.fromkeys((True, False), math.nan)
    for way in (True, False):  # packed first, so that its first step is cold
        try:
            took = step(model, rows, way)
        except torch.OutOfMemoryError:
            if way:
                raise
            break  # the padded batch does not fit into memory
        first = took if way else first
        if DEVICE.type == "cuda":  # a process on a CPU can measure its growth only once
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        seconds[way].append(step(model, rows, way))
        if DEVICE.type == "cuda":
            gib[way] = (peak_bytes() - before) / GIB
    ways = [way for way in (False, True) if seconds[way]]
    begin = time.perf_counter()
    for repeat in range(repeats):
        if time.perf_counter() - begin > REPEATS_S:
            break
        for way in ways[:: -1 if repeat % 2 else 1]:
            seconds[way].append(step(model, rows, way))
    padded, packed = (median(seconds[way]) if seconds[way] else math.nan for way in (False, True))
    tokens, (distinct, pairs) = rows[0].numel(), distinct_tokens(rows[0])
    ratio, peak = tokens / distinct, peak_flops(DEVICE)
    utilisations = (
        step_flops(name, tokens, leaves * completion, all_pairs(rows[0])) / (padded * peak),
        step_flops(name, distinct, distinct - prompt, pairs) / (packed * peak),
    )
    cells = [f"{prompt:,}", str(leaves), forks, f"{first:.2f}"]
    cells += [shown(value, ".4f") for value in (padded, packed)]
    cells += [shown(value, ".2f") for value in (padded / packed, ratio, padded / packed / ratio)]
    cells += [shown(tokens / value, ",.0f") for value in (padded, packed)]
    cells += [shown(gib[way], ".2f") for way in (False, True)]
    cells += [shown(value, ".1%") for value in utilisations]
    return "| " + " | ".join(cells) + " |"


def show(shapes: list[Shape], repeats: int) -> None:
    print(
        "| model | prompt | M | forks | padded s | shared s | padded tokens/s | shared tokens/s | speed-up | token "
        "ratio | pair ratio | reached | memory |"
    )
    print("|---|---:|---:|---|" + "---:|" * 9)
    for shape in shapes:
        name, prompt, leaves, forks = shape
        label = f"| {name} | {prompt:,} | {leaves} | {forks} | "
        try:
            padded, shared, speedup, tokens, packed, pairs = timed_apart(*shape, repeats=repeats)
        except MemoryError:  # not even packed; the grid continues with the other shapes
            print(label + " | ".join(["no memory"] * 9) + " |", flush=True)
            continue
        try:
            peak = apart("memory", *shape, True)[0] / apart("memory", *shape, False)[0]
        except MemoryError:
            peak = math.nan
        ratio = tokens / packed
        cells = [f"{padded:.2f}", f"{shared:.2f}", f"{tokens / padded:,.0f}", f"{tokens / shared:,.0f}"]
        cells += [f"{value:.2f}" for value in (speedup, ratio, pairs, speedup / ratio, peak)]
        cells = ["no memory" if cell == "nan" else cell for cell in cells]
        print(label + " | ".join(cells) + " |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--grid", action="store_true", help="every model, prompt, M and forks")
    parser.add_argument("--model", choices=MODELS, help="only the shapes of this model")
    parser.add_argument("--prompt", type=int, nargs="+", default=[300, 1000, 4000], help="prompt tokens of the grid")
    parser.add_argument("--leaves", type=int, nargs="+", default=[4, 8, 16, 64], help="M of the grid")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="with cuda, in bfloat16")
    parser.add_argument("--row", nargs=3, metavar=("PROMPT", "M", "FORKS"), help="one row of the 200 M model")
    parser.add_argument("--header", action="store_true", help="with --row: print the head of the table before it")
    parser.add_argument("--tiny", action="store_true", help="with --row: a quick trial, tiny model and short rows")
    parser.add_argument("--task", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    global DEVICE
    DEVICE = torch.device(arguments.device)
    if arguments.task:
        task, *rest = json.loads(arguments.task)
        run_task(task, rest)
        return
    if arguments.row:
        prompt, leaves, forks = int(arguments.row[0]), int(arguments.row[1]), arguments.row[2]
        model, prompt, completion = ("tiny", prompt // 20, 24) if arguments.tiny else ("200 M", prompt, COMPLETION)
        if arguments.header:
            print(f"Model {model}, {completion} tokens a completion, on {device_name(DEVICE)}\n")
            print(f"| {CARD_COLUMNS} |\n|{'---:|' * (CARD_COLUMNS.count('|') + 1)}", flush=True)
        print(card_row(model, prompt, leaves, forks, completion, arguments.repeats), flush=True)
        return
    # The largest padded shapes without gradient checkpointing that fit into 24 GB with a margin.
    sizes = [("5 M", 1000, 16), ("50 M", 300, 8)]
    if arguments.grid:
        sizes = list(product(MODELS, arguments.prompt, arguments.leaves))
    chosen = [size for size in sizes if arguments.model in (None, size[0])]
    show([(*size, forks) for size, forks in product(chosen, FORKS)], arguments.repeats)


if __name__ == "__main__":
    main()
