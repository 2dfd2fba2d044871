"""Evaluation with the sampler that trained the model: same protocol, same tools, no branching."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arpo_trl.options import RolloutSchedule
from arpo_trl.rewards import HierarchicalReward
from arpo_trl.rewards.hierarchical import HierarchicalScore
from arpo_trl.rollout.engines.base import SamplingSettings
from arpo_trl.rollout.engines.transformers import TransformersEngine
from arpo_trl.rollout.protocol import TagProtocol
from arpo_trl.rollout.sampler import GroupRequest, Rollout, SamplerSettings, TreeSampler
from arpo_trl.rollout.tree import Leaf
from arpo_trl.tools.box import ToolBox


@dataclass(frozen=True, slots=True)
class Sample:
    """One answer to one question."""

    row: dict[str, Any]
    leaf: Leaf
    score: HierarchicalScore


@dataclass(frozen=True, slots=True)
class Evaluation:
    """All samples, row by row, and the rollout they came from."""

    samples: list[Sample]
    rollout: Rollout

    @property
    def accuracy(self) -> float:
        """Mean accuracy; an answer in a bad format counts as wrong."""
        return sum(sample.score.accuracy or 0.0 for sample in self.samples) / len(self.samples)

    @property
    def calls_per_sample(self) -> float:
        return sum(len(sample.leaf.calls) for sample in self.samples) / len(self.samples)


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[dict[str, Any]],
    toolbox: ToolBox,
    *,
    temperature: float,
    top_p: float = 1.0,
    samples: int = 1,
    max_completion_length: int,
    max_tool_calls: int,
    max_tool_result_tokens: int | None = None,
    seed: int = 0,
    entropy_probe_tokens: int | None = None,
) -> Evaluation:
    """`samples` answers to each of `rows` {prompt, answer, task}, scored; temperature 0 is greedy.

    `entropy_probe_tokens` None records the entropy of every token.
    """
    protocol = TagProtocol(tokenizer, toolbox.specs, max_result_tokens=max_tool_result_tokens)
    eos_ids = (int(tokenizer.eos_token_id),)
    settings = SamplingSettings(eos_ids, protocol.stop_strings, temperature=temperature, top_p=top_p)
    engine = TransformersEngine(tokenizer, settings, lambda: contextlib.nullcontext(model))
    sampler = TreeSampler(
        engine,
        toolbox,
        protocol,
        SamplerSettings(
            num_generations=samples,
            initial_rollouts=samples,
            max_completion_length=max_completion_length,
            max_length=model.config.get_text_config().max_position_embeddings,
            max_tool_calls=max_tool_calls,
            entropy_probe_tokens=max_completion_length if entropy_probe_tokens is None else entropy_probe_tokens,
            schedule=RolloutSchedule.ROUNDS,
        ),
        eos_ids,
    )
    requests = [GroupRequest(i, protocol.encode_prompt(row["prompt"])) for i, row in enumerate(rows)]
    rollout = sampler.sample(requests, seed=(seed, "evaluate"))
    answered = [(row, leaf) for row, tree in zip(rows, rollout.trees, strict=True) for leaf in tree.leaves()]
    scores = HierarchicalReward().scores(
        turns=[leaf.turns for _, leaf in answered],
        tool_calls=[[call.as_row() for call in leaf.calls] for _, leaf in answered],
        stop_reason=[leaf.stop.value for _, leaf in answered],
        answer=[row["answer"] for row, _ in answered],
        task=[row["task"] for row, _ in answered],
    )
    scored = [Sample(row, leaf, score) for (row, leaf), score in zip(answered, scores, strict=True)]
    return Evaluation(scored, rollout)
