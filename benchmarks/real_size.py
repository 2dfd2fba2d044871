"""A training step of a 0.6 B model compared with TRL's GRPOTrainer, both on colocated vLLM, and the cost of probing.

    python benchmarks/real_size.py trl          # or full (ours, N = M), half (ours, N = M/2), probing
    python benchmarks/real_size.py half --device cpu --tiny

The model has the shape and the vocabulary (151,936) of Qwen3-0.6B with random weights. Settings are the defaults:
float32 weights, bfloat16 autocast, gradient checkpointing. vLLM is in sleep mode while the trainer computes. A step
has 4 groups of 16 completions of 512 tokens after prompts of 1,000 tokens. Each group is a micro-batch, and there is
one optimizer step per generation. TRL and N = M have no tools, so that TRL's slow tool loop does not count. With
N = M/2 the first turn of a path ends half-way with a call of a tool that returns at once, and the path branches there:
all leaves share the prompt, and pairs of leaves share half of the completion.

Each variant runs in a separate process. Phases are wall times with a synchronized GPU: "generate" is TRL's `_generate`
without "sync", which moves weights, wakes vLLM and puts it to sleep; "logprobs" are the forward passes without
gradient; "update" is the rest of the step. The table has the medians over the steps after the first that fit into
`--budget`. If none fits ("steps" is 0), it has the values of the first step.
"""

from __future__ import annotations

import argparse
import functools
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.quickstart.model import build_tokenizer, quickstart_texts
from arpo_trl.rollout.engines.base import Event, SamplingParams, Turn, TurnRequest, TurnStop
from arpo_trl.rollout.engines.vllm.colocate import VLLMColocateEngine
from arpo_trl.rollout.engines.vllm.cpu import prepare_cpu
from arpo_trl.training.vllm_setup import colocated_weights
from card import PeakMemory, device_name, own_stdout, process_s, start_vllm_uncompiled
from probe_cost import PROBE, tokens_per_s

NAMES = {"trl": "TRL GRPOTrainer", "full": "ours, N = M", "half": "ours, N = M/2"}
STEP_COLUMNS = (
    " | first step s | step s | generate s | logprobs s | update s | sync s | tokens sampled | peak GiB | steps"
)
PROBE_COLUMNS = "turns | prompt | tokens a turn | tokens/s without | with probing | ratio | pairs"
PHASES = ("generate", "logprobs", "update", "sync")


@dataclass(frozen=True, slots=True)
class Size:
    """The shapes of the model and of the batch."""

    model: dict[str, int]
    prompt: int
    completion: int
    groups: int
    leaves: int


REAL = Size(
    {
        "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    },
    prompt=1000, completion=512, groups=4, leaves=16,
)  # fmt: skip
TINY = Size(
    {
        "vocab_size": 2000, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32,
    },
    prompt=60, completion=64, groups=2, leaves=4,
)  # fmt: skip


def save_model(folder: str, size: Size, device: torch.device) -> PreTrainedTokenizerFast:
    """Saves the model and a tokenizer that encodes any text. As in real models, some ids have no token."""
    tokenizer = build_tokenizer(quickstart_texts())
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = Qwen3Config(**size.model, **ends, max_position_embeddings=4096, tie_word_embeddings=True)
    with device:  # a GPU draws 0.6 billion numbers quickly
        model = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16 if device.type == "cuda" else torch.float32).save_pretrained(folder)
    if device.type == "cuda":
        del model
        torch.cuda.empty_cache()  # vLLM measures the free memory
    return tokenizer


def prompts(size: Size, count: int) -> list[str]:
    """Texts of exactly `size.prompt` tokens. They are digits, each of which is one token."""
    rng = random.Random(0)
    return ["".join(rng.choice("0123456789") for _ in range(size.prompt)) for _ in range(count)]


def length_reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """A cheap reward that differs between the leaves of a group."""
    return [float(sum(ids) % 7) for ids in completion_ids]


def note(text: str) -> str:
    """Note something.

    Args:
        text: What.
    """
    return text


class HalfWay:
    """An engine that cuts the first turn of each path to `tokens` tokens and ends it with a tool call."""

    def __init__(self, inner: Any, tokens: int, call: list[int]):
        self._inner, self._tokens, self._call = inner, tokens, call
        self._calling: set[int] = set()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._inner, name)

    def submit(self, request: TurnRequest) -> None:
        if request.key[-1] == 0:
            self._calling.add(request.id)
            request = replace(request, max_tokens=self._tokens)
        self._inner.submit(request)

    def poll(self, timeout_s: float) -> list[Event]:
        return [self._ended(event) for event in self._inner.poll(timeout_s)]

    def _ended(self, event: Event) -> Event:
        if not isinstance(event, Turn) or event.id not in self._calling:
            return event
        self._calling.discard(event.id)  # ids start again with the next rollout
        if event.stop is not TurnStop.LENGTH:
            return event
        ids = [*event.ids[: -len(self._call)], *self._call]
        return replace(event, ids=ids, stop=TurnStop.STOP_STRING)


class Stopwatch(TrainerCallback):
    """Measures the seconds of each step by phase. Ends the training before a step that would exceed the budget."""

    def __init__(self, device: torch.device, budget_s: float):
        self.steps: list[dict[str, float]] = []
        self._spent: dict[str, float] = defaultdict(float)
        self._within: list[float] = []
        """For each running phase, the seconds of its nested phases so far."""
        self._device, self._budget_s = device, budget_s
        self._begin = 0.0

    def watch(self, owner: Any, method: str, phase: str, when: Callable[[], bool] = lambda: True) -> None:
        """Adds the duration of the method to a phase, without the watched methods that it calls."""
        original = getattr(owner, method)

        @functools.wraps(original)
        def watched(*args: Any, **kwargs: Any) -> Any:
            if not when():
                return original(*args, **kwargs)
            begin = self._now()
            self._within.append(0.0)
            try:
                return original(*args, **kwargs)
            finally:
                took = self._now() - begin
                self._spent[phase] += took - self._within.pop()
                if self._within:
                    self._within[-1] += took

        setattr(owner, method, watched)

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._spent.clear()
        self._begin = self._now()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        took = self._now() - self._begin
        phases = {phase: self._spent[phase] for phase in PHASES}
        phases["update"] = took - sum(phases.values())
        self.steps.append({"step": took, **phases})
        if process_s() + took > self._budget_s:
            control.should_training_stop = True

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def make_trainer(variant: str, folder: Path, size: Size, device: torch.device, steps: int) -> GRPOTrainer:
    on_card = device.type == "cuda"
    tokenizer = save_model(str(folder / "model"), size, device)
    settings: dict[str, Any] = {
        "output_dir": str(folder / "out"),
        "num_generations": size.leaves,
        "per_device_train_batch_size": size.leaves,
        "gradient_accumulation_steps": size.groups,
        "max_completion_length": size.completion,
        "max_steps": steps,
        "loss_type": "grpo",
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_enable_sleep_mode": on_card,  # vLLM has no sleep mode on a CPU
        "vllm_max_model_length": size.prompt + size.completion + 64,
        "vllm_gpu_memory_utilization": 0.3,
        "use_cpu": not on_card,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    rows = Dataset.from_list([{"prompt": text} for text in prompts(size, size.groups * (steps + 1))])
    model = str(folder / "model")
    if not on_card:
        prepare_cpu()  # TRL does not do it
    if variant == "trl":
        return GRPOTrainer(model, length_reward, GRPOConfig(**settings), rows)
    settings |= {"trajectory_log_rate": 0.0, "initial_rollouts": size.leaves}
    if variant != "half":
        return ARPOTrainer(model, length_reward, ARPOConfig(**settings), add_golds(rows))
    settings |= {
        "initial_rollouts": size.leaves // 2,
        "branch_rule": "random",
        "branch_probability": 1.0,  # branch at every result until the budget is spent
        "max_tool_calling_iterations": 1,
    }
    trainer = ARPOTrainer(model, length_reward, ARPOConfig(**settings), add_golds(rows), tools=[note])
    call = tokenizer.encode("<note>half of it is written</note>", add_special_tokens=False)
    trainer.tree_sampler.engine = HalfWay(trainer.tree_sampler.engine, size.completion // 2, call)
    return trainer


def add_golds(rows: Dataset) -> Dataset:
    """Adds the columns that ARPOTrainer requires besides the prompt."""
    return rows.add_column("answer", ["0"] * len(rows)).add_column("task", ["math"] * len(rows))


def train(variant: str, trainer: GRPOTrainer, device: torch.device, budget_s: float) -> str:
    """Trains; a row of the table with `STEP_COLUMNS`."""
    watch = Stopwatch(device, budget_s)
    sampled: list[int] = []
    watch.watch(trainer.vllm_generation, "sync_weights", "sync")
    for method in ("wake_up", "sleep"):
        watch.watch(trainer.vllm_generation.llm, method, "sync")
    watch.watch(trainer, "_generate", "generate")
    watch.watch(trainer, "_get_per_token_logps_and_entropies", "logprobs", lambda: not torch.is_grad_enabled())
    generate = trainer._generate

    def counted(prompts: list[Any]) -> Any:
        result = generate(prompts)
        if isinstance(trainer, ARPOTrainer):
            assert trainer._last is not None
            sampled.append(sum(len(node.ids) for tree in trainer._last.rollout.trees for node in tree.turns()))
        else:
            sampled.append(sum(map(len, result[1])))
        return result

    trainer._generate = counted
    trainer.add_callback(watch)
    with PeakMemory(device) as peak:
        trainer.train()
    later = watch.steps[1:] or watch.steps
    cells = [NAMES[variant], f"{watch.steps[0]['step']:.2f}"]
    cells += [f"{median(step[name] for step in later):.2f}" for name in ("step", *PHASES)]
    cells += [f"{median(sampled):,.0f}", f"{peak.gib:.1f}", str(len(watch.steps) - 1)]
    return "| " + " | ".join(cells) + " |"


def probing(trainer: GRPOTrainer, size: Size, budget_s: float) -> str:
    """Measures probing; a row of the table with `PROBE_COLUMNS`."""
    assert isinstance(trainer, ARPOTrainer)
    engine = VLLMColocateEngine(
        trainer.vllm_generation.llm,
        trainer._tokenizer,
        SamplingParams(eos_ids=()),  # so that every turn has its full length
        colocated_weights(trainer.args, trainer.vllm_generation, trainer._tokenizer, lambda: 0, trainer._logprobs_of),
        vocab_size=size.model["vocab_size"],
        top_logprobs=trainer.args.entropy_top_logprobs,
        sleeps=trainer.vllm_generation.enable_sleep_mode,
    )
    turns = size.groups * size.leaves
    prompt = trainer._tokenizer.encode(prompts(size, 1)[0], add_special_tokens=False)
    assert len(prompt) == size.prompt
    tokens_per_s(engine, prompt, turns, 2 * PROBE, PROBE, 0)  # warm-up
    rates: dict[int, list[float]] = {0: [], PROBE: []}
    took = 0.0
    while process_s() + took < budget_s or not rates[0]:
        begin = time.perf_counter()
        for probe, measured in rates.items():  # alternating, so that other load affects both alike
            measured.append(tokens_per_s(engine, prompt, turns, size.completion, probe, len(measured) + 1))
        took = time.perf_counter() - begin
    ratio = median(a / b for a, b in zip(rates[PROBE], rates[0], strict=True))
    cells = [str(turns), f"{size.prompt:,}", str(size.completion), f"{median(rates[0]):,.0f}"]
    cells += [f"{median(rates[PROBE]):,.0f}", f"{ratio:.3f}", str(len(rates[0]))]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*NAMES, "probing"])
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"])
    parser.add_argument("--tiny", action="store_true", help="a quick trial: a tiny model and short paths")
    parser.add_argument(
        "--steps", type=int, default=6, help="maximum number of steps, including the first (default: 6)"
    )
    parser.add_argument(
        "--budget", type=float, default=50.0, help="time limit of the process in seconds (default: 50)"
    )
    parser.add_argument("--header", action="store_true", help="print the head of the table before the row")
    arguments = parser.parse_args()
    out = own_stdout()
    device, size = torch.device(arguments.device), TINY if arguments.tiny else REAL
    if arguments.header:
        columns = PROBE_COLUMNS if arguments.what == "probing" else STEP_COLUMNS
        print(
            f"Qwen3 of {size.model['num_hidden_layers']} layers, vocabulary {size.model['vocab_size']:,}, "
            f"{size.groups} groups × {size.leaves} × {size.completion} tokens after {size.prompt:,}, on "
            f"{device_name(device)}\n",
            file=out,
        )
        print(f"| {columns} |\n|{'---:|' * (columns.count('|') + 1)}", file=out)
    start_vllm_uncompiled(device)
    with tempfile.TemporaryDirectory() as folder:
        variant = "full" if arguments.what == "probing" else arguments.what
        trainer = make_trainer(variant, Path(folder), size, device, arguments.steps)
        if arguments.what == "probing":
            row = probing(trainer, size, arguments.budget)
        else:
            row = train(variant, trainer, device, arguments.budget)
        print(row, file=out)


if __name__ == "__main__":
    main()
