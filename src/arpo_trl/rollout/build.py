"""Builds the engine and the sampler, for training, evaluation and the quickstart.

The caller chooses the source to sample from: a `LocalModel`, a `LocalVLLM`, `VLLMServers` or a `CompletionsServer`.
`build_engine` creates its engine, and `build_sampler` the `TreeSampler` on that engine. A new engine needs a file
under `engines/`, and a record and a case in this module.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.distributed import ProcessGroup
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arpo_trl.errors import ConfigError
from arpo_trl.options import RolloutSchedule, ShareCalls
from arpo_trl.rollout.batch import TreeSettings
from arpo_trl.rollout.engines.base import Engine, SamplingParams
from arpo_trl.rollout.engines.completions import CompletionsEngine
from arpo_trl.rollout.engines.lockstep import LockstepEngine
from arpo_trl.rollout.engines.transformers import TransformersEngine
from arpo_trl.rollout.engines.visibility import exact_length
from arpo_trl.rollout.engines.vllm.colocate import VLLMColocateEngine
from arpo_trl.rollout.engines.weights import Weights
from arpo_trl.rollout.protocols import ToolProtocol
from arpo_trl.rollout.rules.base import BranchRule
from arpo_trl.rollout.rules.threshold import Threshold
from arpo_trl.rollout.sampler import TreeSampler
from arpo_trl.tools.toolbox import ToolBox
from arpo_trl.visible import get_rank_logger

if TYPE_CHECKING:
    from vllm import LLM

    from arpo_trl.rollout.engines.vllm.weights import ServedWeights

logger = get_rank_logger(__name__)

UNLIMITED_CALLS = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalModel:
    """A transformers model in this process.

    `opened` opens it for a session (`model_context` of `TransformersEngine`). None: the engine uses the model as it
    is. `sharded`: the full weights exist only within a session, so the first session compares the engine with a plain
    forward. Otherwise `build_engine` makes this comparison. `scored`: plain forwards score the sampled tokens later.
    `scored_padded`: these forwards use left-padded batches. `TransformersEngine` documents `most_rows` and `smaller`.

        LocalModel(model=model, scored=True, scored_padded=True)
    """

    model: PreTrainedModel
    opened: Callable[[], AbstractContextManager[PreTrainedModel]] | None = None
    sharded: bool = False
    scored: bool = False
    scored_padded: bool = False
    generation_kwargs: Mapping[str, Any] | None = None
    most_rows: int | None = None
    smaller: str = "Sample fewer turns at a time, or shorter ones."


@dataclass(frozen=True, slots=True, kw_only=True)
class LocalVLLM:
    """A vLLM instance in this process. With `group`, all its ranks share the instance by tensor parallelism.

    LocalVLLM(llm=llm, weights=FixedWeights(), vocab_size=151_936, top_logprobs=20)
    """

    llm: LLM
    weights: Weights
    vocab_size: int
    top_logprobs: int
    sleeps: bool = False
    group: ProcessGroup | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class VLLMServers:
    """Native vLLM servers that receive the trainer's weights. `VLLMServerEngine` documents `away_s` and `request_s`.

    VLLMServers(weights=weights, vocab_size=151_936, top_logprobs=20, away_s=240.0, request_s=1800.0)
    """

    weights: ServedWeights
    vocab_size: int
    top_logprobs: int
    away_s: float
    request_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CompletionsServer:
    """A server with OpenAI's completions API. `model` is the model's name on the server. None: the only one that it
    serves.

    CompletionsServer(url="http://localhost:8000/v1", model="Qwen/Qwen2.5-7B-Instruct")
    """

    url: str
    model: str | None = None


EngineSource = LocalModel | LocalVLLM | VLLMServers | CompletionsServer


def build_engine(source: EngineSource, tokenizer: PreTrainedTokenizerBase, settings: SamplingParams) -> Engine:
    """Create the engine that samples from `source`.

    Raises:
        ConfigError: The engine cannot sample from this model, or the server does not serve it.
        EngineError: A server does not answer.
    """
    match source:
        case LocalModel():
            return _local_engine(source, tokenizer, settings)
        case LocalVLLM():
            engine = VLLMColocateEngine(
                source.llm,
                tokenizer,
                settings,
                source.weights,
                vocab_size=source.vocab_size,
                top_logprobs=source.top_logprobs,
                sleeps=source.sleeps,
            )
            return engine if source.group is None else LockstepEngine(engine, source.group)
        case VLLMServers():
            from arpo_trl.rollout.engines.vllm.server import VLLMServerEngine  # imports vLLM if it is installed

            return VLLMServerEngine(
                tokenizer,
                settings,
                source.weights,
                vocab_size=source.vocab_size,
                top_logprobs=source.top_logprobs,
                away_s=source.away_s,
                request_s=source.request_s,
            )
        case CompletionsServer():
            return CompletionsEngine(source.url, source.model, tokenizer, settings)


def _local_engine(source: LocalModel, tokenizer: PreTrainedTokenizerBase, settings: SamplingParams) -> Engine:
    model, config = source.model, source.model.config.get_text_config()
    exact = exact_length(config) if source.scored else None
    engine = TransformersEngine(
        tokenizer,
        settings,
        source.opened or (lambda: contextlib.nullcontext(model)),
        max_length=shortest(context_of(model), exact),
        generation_kwargs=source.generation_kwargs,
        scored_padded=source.scored_padded,
        most_rows=source.most_rows,
        smaller=source.smaller,
    )
    if source.sharded:
        engine.refuse(model)
    else:
        engine.check()
    if exact is not None:
        logger.warning(
            f"Paths are limited to {exact} tokens. In a longer batch the model's rotary embedding changes the angles "
            "of all tokens, so training would not score the tokens with the sampled distribution."
            + (" In training, padding counts towards this limit: leave room for it." if source.scored_padded else "")
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
