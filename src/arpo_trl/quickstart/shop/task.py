"""The shop as a task of the quickstart: its data, its settings, and the accuracy of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from arpo_trl.common.shipped import CONFIGS, shipped_file
from arpo_trl.options import RolloutSchedule
from arpo_trl.quickstart.model import build_tokenizer, save_cold_start_base, tags_of
from arpo_trl.quickstart.shop.demonstrations import make_demonstrations, tokenizer_texts
from arpo_trl.quickstart.shop.environment import Shop
from arpo_trl.quickstart.shop.orders import make_orders
from arpo_trl.quickstart.task import (
    N_HELDOUT,
    N_TRAIN,
    SFT_BATCH,
    Measured,
    Task,
    like_lengths_together,
    read_lines,
    write_inputs,
)
from arpo_trl.rollout.batch import GroupRequest
from arpo_trl.rollout.build import build_sampler, local_engine
from arpo_trl.rollout.engines.base import SamplingParams
from arpo_trl.rollout.protocols import TagProtocol
from arpo_trl.tools.environments.kind import environment_kind
from arpo_trl.tools.environments.state import Environments
from arpo_trl.tools.toolbox import ToolBox
from arpo_trl.training.environments import NO_PROMPT, of_leaves, with_text

SFT_STEPS = 600
MAX_COMPLETION_LENGTH = 128
MAX_TOOL_CALLS = 8
_TIMEOUT_S = 20.0


def prepare(folder: Path, seed: int) -> None:
    """Write the inputs of both stages: the orders, the demonstrations and an untrained model."""
    train, heldout = make_orders(seed, N_TRAIN, N_HELDOUT)
    demonstrations = like_lengths_together(make_demonstrations(train, seed, SFT_STEPS * SFT_BATCH), seed)
    write_inputs(folder, train, heldout, demonstrations)
    tokenizer = build_tokenizer(tokenizer_texts(), tags=tags_of("look", "add", "buy", "result", "answer"))
    save_cold_start_base(folder / "base", seed=0, tokenizer=tokenizer)


def measure(model: Path, data: Path, seed: int, *, temperature: float) -> Measured:
    """Sample one attempt of the model at each held-out order."""
    return try_orders(
        AutoModelForCausalLM.from_pretrained(model),
        AutoTokenizer.from_pretrained(model),
        read_lines(data / "heldout.jsonl"),
        temperature=temperature,
        seed=seed,
    )


def try_orders(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    *,
    temperature: float,
    seed: int,
) -> Measured:
    """Sample one path for each of `rows`, each in a separate shop. An order's score is 1 if it was fulfilled, else 0.

    A temperature of 0 is greedy decoding.
    """
    environments = Environments(environment_kind(Shop, _TIMEOUT_S), timeout_s=_TIMEOUT_S, keeps=True)
    with ToolBox(environments.tools, timeout_s=_TIMEOUT_S) as toolbox:
        protocol = TagProtocol(tokenizer, toolbox.specs)
        settings = SamplingParams(
            eos_ids=protocol.eos_ids, stop_strings=protocol.stop_strings, temperature=temperature
        )
        sampler = build_sampler(
            local_engine(model, tokenizer, settings),
            toolbox,
            protocol,
            context=None,
            max_completion_length=MAX_COMPLETION_LENGTH,
            max_tool_calls=MAX_TOOL_CALLS,
            entropy_probe_tokens=MAX_COMPLETION_LENGTH,
            schedule=RolloutSchedule.ROUNDS,
        )
        try:
            texts = environments.begin(dict(enumerate(rows)), toolbox, lambda: None)
            requests = [
                GroupRequest(id=i, prompt_ids=protocol.encode_prompt(with_text(NO_PROMPT, texts[i])))
                for i in range(len(rows))
            ]
            trees = sampler.sample(requests, seed=(seed, "evaluate")).trees
            rewards = [shop.get_reward() for shop in of_leaves(environments, trees, 0) or ()]
        finally:
            environments.close_kept()
    return Measured(trees=trees, scores=rewards)


SHOP = Task(
    prepare=prepare,
    measure=measure,
    tools=("look", "add"),
    cold_start=("--max_steps", str(SFT_STEPS)),
    script="arpo_trl.quickstart.shop.train",
    config=shipped_file(CONFIGS, "quickstart_shop"),
    accuracy="eval_reward",
)
