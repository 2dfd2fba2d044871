"""Builds the engine on a model in this process, and the sampler on any engine, for training, evaluation and the
quickstart."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arpo_trl.errors import ConfigError
from arpo_trl.options import RolloutSchedule, ShareCalls
from arpo_trl.rollout.batch import TreeSettings
from arpo_trl.rollout.engines.base import Engine, SamplingParams
from arpo_trl.rollout.engines.transformers import SMALLER, TransformersEngine
from arpo_trl.rollout.engines.visibility import exact_length
from arpo_trl.rollout.protocols import ToolProtocol
from arpo_trl.rollout.rules.base import BranchRule
from arpo_trl.rollout.rules.threshold import Threshold
from arpo_trl.rollout.sampler import TreeSampler
from arpo_trl.tools.toolbox import ToolBox
from arpo_trl.visible import get_rank_logger

logger = get_rank_logger(__name__)

UNLIMITED_CALLS = 1 << 30


def local_engine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    settings: SamplingParams,
    *,
    opened: Callable[[], AbstractContextManager[PreTrainedModel]] | None = None,
    sharded: bool = False,
    scored: bool = False,
    scored_padded: bool = False,
    generation_kwargs: Mapping[str, Any] | None = None,
    most_rows: int | None = None,
    smaller: str = SMALLER,
) -> TransformersEngine:
    """Create the engine that samples from `model` in this process. `TransformersEngine` documents the other settings.

    Args:
        opened: Opens the model for a session (`model_context` of `TransformersEngine`). None: the engine uses the
            model as it is.
        sharded: The full weights exist only within a session, so the first session compares the engine with a plain
            forward. Otherwise this function makes this comparison.
        scored: Plain forwards score the sampled tokens later.
        scored_padded: These forwards use left-padded batches.

    Raises:
        ConfigError: The engine cannot sample from this model.
    """
    exact = exact_length(model.config.get_text_config()) if scored else None
    engine = TransformersEngine(
        tokenizer,
        settings,
        opened or (lambda: contextlib.nullcontext(model)),
        max_length=shortest(context_of(model), exact),
        generation_kwargs=generation_kwargs,
        scored_padded=scored_padded,
        most_rows=most_rows,
        smaller=smaller,
    )
    if sharded:
        engine.refuse(model)
    else:
        engine.check()
    if exact is not None:
        logger.warning(
            f"Paths are limited to {exact} tokens. In a longer batch the model's rotary embedding changes the angles "
            "of all tokens, so training would not score the tokens with the sampled distribution."
            + (" In training, padding counts towards this limit: leave room for it." if scored_padded else "")
        )
    return engine


def build_sampler(
    engine: Engine,
    toolbox: ToolBox,
    protocol: ToolProtocol,
    *,
    context: int | None,
    max_completion_length: int | None,
    max_tool_calls: int | None,
    num_generations: int = 1,
    initial_rollouts: int | None = None,
    entropy_probe_tokens: int = 0,
    rule: BranchRule | None = None,
    schedule: RolloutSchedule = RolloutSchedule.OVERLAP,
    share_calls: ShareCalls = ShareCalls.OFF,
    max_calls_of: Mapping[str, int] | None = None,
) -> TreeSampler:
    """Create the sampler on an engine. `TreeSettings` documents the other settings.

    Args:
        context: The maximum number of tokens of prompt and path together, in addition to the engine's limit. None: no
            other limit.
        max_completion_length: None: the rest of the context.
        max_tool_calls: None: no limit.
        initial_rollouts: None: all of `num_generations`, so that nothing branches.

    Raises:
        ConfigError: Neither the engine nor `context` limits the length of a path, or the settings share the calls of a
            tool that is not declared shareable.
    """
    length = shortest(engine.max_length, context)
    if length is None:
        raise ConfigError(
            "The length of a path has no limit: the model's configuration has no max_position_embeddings and "
            f"{type(engine).__name__}.max_length is None. Set max_position_embeddings in the model's configuration."
        )
    return TreeSampler(
        engine,
        toolbox,
        protocol,
        TreeSettings(
            num_generations=num_generations,
            initial_rollouts=initial_rollouts or num_generations,
            max_completion_length=max_completion_length or length,
            max_length=length,
            max_tool_calls=UNLIMITED_CALLS if max_tool_calls is None else max_tool_calls,
            entropy_probe_tokens=entropy_probe_tokens,
            rule=rule or Threshold(),
            schedule=schedule,
            share_calls=share_calls,
            max_calls_of=max_calls_of or {},
        ),
    )


def context_of(model: PreTrainedModel) -> int | None:
    """The context in tokens according to the model's configuration; None if it has no such entry."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def shortest(*lengths: int | None) -> int | None:
    """The smallest length that is not None; None if all are."""
    return min((length for length in lengths if length is not None), default=None)
