"""Creates a trainer's toolbox, engine and sampler from its settings."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arpo_trl.config import ARPOConfig
from arpo_trl.options import ProtocolKind, RolloutSchedule, ShareCalls
from arpo_trl.rollout.build import build_sampler, local_engine
from arpo_trl.rollout.engines.base import Engine, SamplingParams
from arpo_trl.rollout.engines.generation_rules import refuse_rules
from arpo_trl.rollout.engines.lockstep import LockstepEngine
from arpo_trl.rollout.engines.visibility import evaluating
from arpo_trl.rollout.engines.vllm.colocate import VLLMColocateEngine
from arpo_trl.rollout.protocols import PROTOCOLS, ToolProtocol
from arpo_trl.rollout.sampler import TreeSampler
from arpo_trl.tools.environments.state import Environments
from arpo_trl.tools.spec import ToolSpec
from arpo_trl.tools.toolbox import ToolBox
from arpo_trl.training.vllm_setup import (
    colocated_weights,
    ranks_together,
    served_weights,
    warn_of_other_distribution,
)
from arpo_trl.trl_seam import VLLMGeneration


def toolbox_for(
    args: ARPOConfig, tools: Sequence[Callable[..., Any]], environments: Environments | None = None
) -> ToolBox:
    """The toolbox of `tools`, with the limits in `args`. Each path has one of `environments`, if there are any."""
    return ToolBox(
        tools,
        timeout_s=args.tool_timeout_s,
        concurrency=args.tool_concurrency,
        per_tool=args.tool_places,
        cache=args.tool_cache,
        path_state=environments,
    )


def protocol_for(
    args: ARPOConfig,
    tokenizer: PreTrainedTokenizerBase,
    tools: Mapping[str, ToolSpec],
    generation_ends: Sequence[int],
) -> ToolProtocol:
    """The protocol that `args` select, for `tools` by name.

    Args:
        generation_ends: The EOS ids of the model's generation config.
    """
    return PROTOCOLS[ProtocolKind(args.tool_protocol)](
        tokenizer,
        tools,
        max_result_tokens=args.max_tool_result_tokens,
        chat_template_kwargs=args.chat_template_kwargs,
        tool_parser=args.tool_parser,
        eos_ids=generation_ends,
    )


def sampling_params(args: ARPOConfig, protocol: ToolProtocol) -> SamplingParams:
    """The sampling distribution of the engine, and the conditions that end a turn."""
    return SamplingParams(
        eos_ids=protocol.eos_ids,
        stop_strings=protocol.stop_strings,
        temperature=args.temperature,
        top_p=args.top_p,
        top_k=args.top_k,
        min_p=args.min_p,
        repetition_penalty=args.repetition_penalty,
    )


def sampler_for(
    args: ARPOConfig,
    engine: Engine,
    toolbox: ToolBox,
    protocol: ToolProtocol,
    context: int | None,
) -> TreeSampler:
    """The tree sampler on `engine`, with the tree settings in `args`. `context` is the model's context in tokens."""
    return build_sampler(
        engine,
        toolbox,
        protocol,
        context=context,
        num_generations=args.num_generations,
        initial_rollouts=args.initial_rollouts,
        max_completion_length=args.max_completion_length,
        max_tool_calls=args.max_tool_calling_iterations,
        entropy_probe_tokens=args.entropy_probe_tokens,
        rule=args.make_branch_rule(),
        schedule=RolloutSchedule(args.rollout_schedule),
        share_calls=ShareCalls(args.share_calls),
    )


def transformers_engine(
    args: ARPOConfig,
    settings: SamplingParams,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    opened: Callable[[], AbstractContextManager[PreTrainedModel]],
    *,
    sharded: bool,
    may_pad: bool,
    evaluates: bool,
) -> Engine:
    """The engine on the trained model, which later scores the sampled tokens.

    Args:
        opened: Opens the model for a session.
        sharded: Whether each rank has only a part of the weights.
        may_pad: Whether the model may score a padded batch.
        evaluates: Whether there is an evaluation dataset.

    Raises:
        ConfigError: The engine cannot sample from the model.
    """
    rows = args.per_device_train_batch_size * args.steps_per_generation
    return local_engine(
        model,
        tokenizer,
        settings,
        opened=opened,
        sharded=sharded,
        scored=True,
        scored_padded=may_pad,
        generation_kwargs=args.generation_kwargs,
        most_rows=max(rows, args.per_device_eval_batch_size if evaluates else 0),
        smaller=(
            f"Lower per_device_train_batch_size × steps_per_generation ({args.per_device_train_batch_size} × "
            f"{args.steps_per_generation} completions are sampled at once), per_device_eval_batch_size "
            f"({args.per_device_eval_batch_size}) or max_completion_length ({args.max_completion_length}), or let "
            "vLLM sample (use_vllm)."
        ),
    )


def colocated_engine(
    args: ARPOConfig,
    settings: SamplingParams,
    model: Any,
    generation: VLLMGeneration,
    tokenizer: PreTrainedTokenizerBase,
    trained: Callable[[], Hashable],
    reference: Callable[[Sequence[int]], list[float]],
) -> Engine:
    """The engine on the vLLM instance that TRL has started in this process.

    Args:
        generation: TRL's object, which started vLLM.
        trained: Returns another value once the trained weights have changed.
        reference: The trained model's logprob of each id but the first. A collective.

    Raises:
        ConfigError: vLLM does not apply a rule of the model's generation config.
    """
    _check_distribution(model, settings)
    engine = VLLMColocateEngine(
        generation.llm,
        tokenizer,
        settings,
        colocated_weights(args, generation, tokenizer, trained, reference),
        vocab_size=model.config.get_text_config().vocab_size,
        top_logprobs=args.entropy_top_logprobs,
        sleeps=generation.enable_sleep_mode,
    )
    group = ranks_together(args.vllm_tensor_parallel_size)
    return engine if group is None else LockstepEngine(engine, group)


def served_engine(
    args: ARPOConfig,
    settings: SamplingParams,
    model: Any,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    trained: Callable[[], tuple[int, int]],
    reference: Callable[[Sequence[int]], list[float]],
    check: Callable[[], None],
) -> Engine:
    """The engine on the vLLM servers in the settings. Waits until they are up, and checks that they serve the trained
    model.

    Args:
        trained: Returns another value once the trained weights have changed.
        reference: The trained model's logprob of each id but the first. A collective.
        check: Called during a transfer of weights. An exception from it stops the transfer.

    Raises:
        ConfigError: vLLM does not apply a rule of the model's generation config, or a server serves another model.
        EngineError: A server does not come up.
    """
    from arpo_trl.rollout.engines.vllm.server import VLLMServerEngine  # imports vLLM if it is installed

    _check_distribution(model, settings)
    return VLLMServerEngine(
        tokenizer,
        settings,
        served_weights(args, model, accelerator, tokenizer, trained, reference, check),
        vocab_size=model.config.get_text_config().vocab_size,
        top_logprobs=args.entropy_top_logprobs,
        away_s=args.vllm_server_timeout,
        request_s=args.vllm_request_timeout_s,
    )


def _check_distribution(model: Any, settings: SamplingParams) -> None:
    refuse_rules(model.generation_config, None, "vLLM")
    warn_of_other_distribution(settings)


def logprobs_of(
    model: PreTrainedModel,
    opened: Callable[[], AbstractContextManager[PreTrainedModel]],
    ids: Sequence[int],
) -> list[float]:
    """The logprob of each id except the first, given the ids before it. A collective.

    Args:
        model: The trained model. It is in evaluation mode during the call, so that an adapter's dropout is off.
        opened: Opens the model for a forward on this rank alone.
    """
    with evaluating(model), torch.no_grad(), opened() as whole:
        row = torch.tensor([list(ids)], device=next(whole.parameters()).device)
        logits = whole(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0, :-1]
    return logits.float().log_softmax(dim=-1).gather(1, row[0, 1:].unsqueeze(1)).squeeze(1).tolist()
