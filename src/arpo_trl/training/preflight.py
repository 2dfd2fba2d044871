"""Checks of settings and models, and warnings about them, at start-up, before the first step."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import is_peft_model
from datasets import Dataset
from packaging.requirements import Requirement
from transformers import (
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainingArguments,
)
from trl import GRPOConfig, GRPOTrainer

from arpo_trl.common.pretrained import causal_config, load_pretrained
from arpo_trl.config import ARPOConfig
from arpo_trl.errors import ConfigError
from arpo_trl.options import ProtocolKind, SharedPrefixForward
from arpo_trl.rewards.hierarchical import HierarchicalReward
from arpo_trl.rollout.credit.base import Credit
from arpo_trl.rollout.engines.base import Engine, EngineAhead
from arpo_trl.rollout.engines.compute_dtype import training_dtype
from arpo_trl.rollout.engines.visibility import check_logits, evaluating, trial_ids
from arpo_trl.rollout.engines.vllm.cpu import prepare_cpu
from arpo_trl.rollout.protocols.generation_ends import eos_ids_of, saved_eos_ids
from arpo_trl.rollout.sampler import TreeSampler
from arpo_trl.training.baselines import Baseline
from arpo_trl.training.prefix_sharing import rounding, share_prefixes, why_not_shared, why_packs_differ
from arpo_trl.trl_seam import get_config_model_id
from arpo_trl.visible import get_rank_logger

logger = get_rank_logger(__name__)

LAUNCHER_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")

WITHOUT_WARMUP = ("constant", "reduce_lr_on_plateau", "greedy")
"""The values of `lr_scheduler_type` for which `warmup_steps` has no effect."""

UNUSED_METHODS = ("_generate_single_turn", "_tokenize_prompts", "_get_tool_suffix_ids")
"""The methods of GRPOTrainer that sample, which ARPOTrainer does not call."""


def refuse_own_rollouts(rollout_func: Any, kind: type[GRPOTrainer]) -> None:
    """Raises ConfigError if `rollout_func`, the GRPOTrainer argument that replaces its rollouts, is not None, or if
    `kind`, the class of the trainer, overrides one of `UNUSED_METHODS`."""
    if rollout_func is not None:
        raise ConfigError("rollout_func is set, but ARPOTrainer samples trees itself. Pass `tools` instead.")
    for name in UNUSED_METHODS:
        if getattr(kind, name) is not getattr(GRPOTrainer, name):
            raise ConfigError(
                f"{kind.__name__} overrides {name}, which would never be called: trees are sampled by an engine. "
                "Remove the method; to sample in another way, pass `engine`."
            )


def made_args(args: ARPOConfig | None, model: str | PreTrainedModel) -> ARPOConfig:
    """Returns `args`. For None, returns the defaults, with an output folder named after the model, as in TRL."""
    if args is not None:
        return args
    name = model if isinstance(model, str) else get_config_model_id(model.config) or model.config.model_type
    return ARPOConfig(f"{name.split('/')[-1]}-ARPO")


def warn_of_version() -> None:
    """Warns if the installed TRL is not one of the versions whose private methods this package overrides."""
    listed = map(Requirement, metadata.requires("arpo-trl") or ())
    required = next(each for each in listed if each.name == "trl" and each.marker is None)  # others are of extras
    found = metadata.version("trl")
    if not required.specifier.contains(found, prereleases=True):
        logger.warning(
            f"trl is {found}, but this package overrides private methods of {required}, so errors inside TRL are "
            f"likely. To install it: pip install '{required}'."
        )


def log_defaults(args: ARPOConfig) -> None:
    """Logs the TRL settings for which this package has a different default."""
    trls = {setting.name: setting.default for setting in fields(GRPOConfig)}
    changed = [
        f"{setting.name} {setting.default} (TRL's: {trls[setting.name]})"
        for setting in fields(args)
        if setting.name in trls
        and setting.default != trls[setting.name]
        and getattr(args, setting.name) == setting.default
    ]
    if changed:
        logger.info(f"Defaults that differ from TRL's (docs/from-grpo.md): {', '.join(changed)}.")


def warn_of_unread(args: ARPOConfig) -> None:
    """Warns of changed settings that the branch rule does not read. Without branches there is no warning."""
    branches = args.initial_rollouts != args.num_generations
    for setting in args.unread if branches else ():
        logger.warning(
            f"{setting} is {getattr(args, setting)}, but the branch rule {args.branch_rule!r} does not read it."
        )


def check_writable(folder: Path) -> None:
    """Raises ConfigError if `folder` is not writable. Otherwise the run would fail only at the first checkpoint."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # with a unique name, since other ranks check at the same time
            pass
    except OSError as error:
        raise ConfigError(f"output_dir {folder} cannot be written ({error}). Choose another folder.") from error


def check_quantized_training(peft_config: Any) -> None:
    """Raises ConfigError if training of a quantized model would fail, or would silently have no effect."""
    if peft_config is None:
        raise ConfigError(
            "Quantization (load_in_4bit, load_in_8bit or quantization_config) freezes the model's weights, and there "
            "is no adapter to train. Set use_peft: true, or pass a peft_config."
        )
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            "Quantization needs bitsandbytes, which is not installed. Install the extra: "
            "pip install 'arpo-trl[qlora]'."
        )
    from bitsandbytes.functional import has_avx512bf16

    if not torch.accelerator.is_available() and has_avx512bf16():
        # On such CPUs bitsandbytes repacks the weights for inference. They pass no gradient, so adapters would stay
        # zero.
        raise ConfigError(
            "The model is quantized, but there is no GPU, and bitsandbytes does not train on this CPU. Use a machine "
            "with a GPU, or do not quantize."
        )


def trained_weights(model: Any) -> dict[str, torch.nn.Parameter]:
    """The weights that an update changes, by name: those of adapters that are not active, such as TRL's frozen copy
    "ref", have no gradient, whatever their `requires_grad`."""
    idle = set(model.peft_config) - set(model.active_adapters) if is_peft_model(model) else set()
    return {
        name: weight
        for name, weight in model.named_parameters()
        if weight.requires_grad and not idle & set(name.split("."))
    }


def check_trainable(model: Any) -> None:
    """Checks that weights are trained, and warns if these are less than half of a model without an adapter.

    Raises:
        ConfigError: All weights are frozen, or belong to adapters that are not active. Training would run to its end
            without effect.
    """
    trained = trained_weights(model)
    has_adapter = is_peft_model(model) or getattr(model, "_hf_peft_config_loaded", False)
    if not trained:
        remedy = (
            "load it with PeftModel.from_pretrained(…, is_trainable=True), or activate (set_adapter) another adapter "
            f"than {model.active_adapters}"
            if is_peft_model(model)
            else "call model.requires_grad_(), or pass a peft_config"
        )
        raise ConfigError(f"All weights of the model are frozen (requires_grad is False). To train it, {remedy}.")
    share = _size(trained.values()) / max(1, _size(model.parameters()))
    if share < 0.5 and not has_adapter:
        logger.warning(
            f"Only {share:.1%} of the model's weights are trained, such as {next(iter(trained))}. The others are "
            "frozen (requires_grad is False), as merge_and_unload leaves them. To train all: model.requires_grad_()."
        )


def check_optimizer(optimizer: torch.optim.Optimizer, model: Any) -> None:
    """Checks that a given optimizer changes weights that are trained, and warns if these are only a part of them.

    Raises:
        ConfigError: It changes none of them.
    """
    trained = trained_weights(model).values()
    changed = {id(weight) for group in optimizer.param_groups for weight in group["params"]}
    missed = [weight for weight in trained if id(weight) not in changed]
    if trained and len(missed) == len(trained):
        raise ConfigError(
            "The optimizer in optimizers has none of the trained weights, so that they would not change: it was "
            "created for another model, or before peft_config added an adapter. Pass the model for whose parameters "
            "it was created, with its adapter (get_peft_model) and without a peft_config."
        )
    if missed:
        logger.warning(
            f"The optimizer in optimizers does not have {_size(missed) / max(1, _size(trained)):.1%} of the weights "
            "that require gradients, so that these do not change. Add them, or freeze them (requires_grad_(False))."
        )


def warn_of_learning_rate(args: TrainingArguments, steps: int) -> None:
    """Warns if the learning rate is 0, or its warm-up is not shorter than the run of `steps` optimizer steps."""
    warmup = args.get_warmup_steps(steps)
    if args.learning_rate == 0:
        logger.warning("learning_rate is 0, so that the weights do not change.")
    elif 0 < steps <= warmup and args.lr_scheduler_type not in WITHOUT_WARMUP:
        logger.warning(
            f"warmup_steps is {args.warmup_steps:g}, but the run has {steps} optimizer steps, so that its learning "
            f"rate rises to at most {(steps - 1) / warmup:.1%} of learning_rate. Lower warmup_steps; below 1 it is a "
            "share of the run."
        )


def _size(weights: Iterable[Any]) -> int:
    """The number of weights in tensors, which are empty under ZeRO-3."""
    return sum(getattr(weight, "ds_numel", weight.numel()) for weight in weights)


def listed_rewards(reward_funcs: Any) -> list[Any]:
    """The reward functions as a list.

    Raises:
        ConfigError: One is not a function, a model or the name of a model.
    """
    given = list(reward_funcs) if isinstance(reward_funcs, list | tuple) else [reward_funcs]
    functions = [] if reward_funcs is None else given
    for function in functions:
        if inspect.isclass(function):
            raise ConfigError(
                f"reward_funcs has the class {function.__name__}; expected a function or an instance, such as "
                f"{function.__name__}()."
            )
        is_model = isinstance(function, torch.nn.Module)
        if not (hasattr(function, "config") if is_model else isinstance(function, str) or callable(function)):
            raise ConfigError(
                f"reward_funcs has {function!r:.80}; expected functions, models of transformers or their names."
            )
    return functions


def check_bonus_tools(rewards: Sequence[Any], tools: Collection[str]) -> None:
    """Raises ConfigError if a hierarchical reward names a bonus tool that the run does not have."""
    for reward in rewards:
        if isinstance(reward, HierarchicalReward):
            reward.check_tools(tools)


def check_logprobs(args: ARPOConfig, sampler: TreeSampler, credit: Credit, baseline: Baseline | None) -> None:
    """Checks that the engine returns the sampling logprobs that the rule, the credit and the baseline read.

    Raises:
        ConfigError: One of them reads logprobs, and the engine has none.
    """
    branches = args.initial_rollouts != args.num_generations
    readers = {
        "advantage_baseline": baseline is not None and baseline.reads_logprobs,
        "branch_rule": branches and sampler.settings.rule.reads_logprobs,
        "advantage_attribution": branches and credit.reads_logprobs,
    }
    for setting, reads in readers.items():
        if reads and not sampler.engine.has_logprobs:
            raise ConfigError(
                f"{setting} {getattr(args, setting)!r} reads the sampling logprobs of tokens, but "
                f"{type(sampler.engine).__name__} returns none. Sample with transformers or vLLM, or change {setting}."
            )


def check_ahead(args: ARPOConfig, engine: Engine, dataset: Any) -> None:
    """Checks that rollouts can run ahead, if the settings require it.

    Raises:
        ConfigError: The engine cannot change its weights during a rollout, or an epoch has too few rows.
    """
    if not args.rollouts_ahead:
        return
    if not isinstance(engine, EngineAhead):
        raise ConfigError(
            f"rollouts_ahead is {args.rollouts_ahead}, but {type(engine).__name__} cannot update its weights during "
            f"sampling: it has no method `sync`. Set rollouts_ahead: 0, or use vLLM servers."
        )
    if not args.vllm_importance_sampling_correction:
        logger.warning(
            "rollouts_ahead is set without vllm_importance_sampling_correction: tokens sampled with older weights are "
            "trained as if they were sampled with the current weights."
        )
    prompts = args.generation_batch_size // args.num_generations
    if isinstance(dataset, Dataset) and len(dataset) // prompts < args.rollouts_ahead:
        raise ConfigError(
            f"rollouts_ahead is {args.rollouts_ahead}, but an epoch has only {len(dataset) // prompts} generation "
            f"batches ({len(dataset)} rows, {prompts} prompts per batch), so a row would be sampled twice ahead. "
            "Lower rollouts_ahead, or use more rows."
        )


@contextmanager
def without_trls_vllm_client(args: ARPOConfig, engine: Engine | None) -> Iterator[None]:
    """Stops TRL's `__init__` from opening its own vLLM client. In colocate mode TRL still starts vLLM.

    For vLLM, TRL sets the variables of a launcher. A process without a launcher loses them again: vLLM reads them only
    when it starts, and later trainings in this process or its children would count as launched, on a taken port.

    Args:
        engine: Replaces the engine that `args` select. If it is set, TRL does not start vLLM either.

    Raises:
        ConfigError: TRL has to start vLLM, and vLLM is not installed.
    """
    use_vllm = args.use_vllm
    args.use_vllm = use_vllm and args.vllm_mode == "colocate" and engine is None
    if args.use_vllm:
        if find_spec("vllm") is None:
            raise ConfigError(
                "use_vllm is set, but vLLM is not installed. Install the extra: pip install 'arpo-trl[vllm]'."
            )
        prepare_cpu()
    unset = [name for name in LAUNCHER_VARIABLES if name not in os.environ] if args.world_size == 1 else []
    try:
        yield
    finally:
        args.use_vllm = use_vllm
        for name in unset:
            os.environ.pop(name, None)


def prepare_prefix_sharing(
    models: Sequence[Any],
    accelerator: Accelerator,
    wanted: SharedPrefixForward,
    *,
    aux_loss: bool,
    noise: bool,
    sharded: bool,
) -> bool:
    """Makes `models` accept packs and returns True. If packs are not used, returns False and does not change `models`.

    Args:
        models: The unwrapped trained model, perhaps with an adapter, and the reference model if there is one.
        wanted: OFF: packs are not used. AUTO: not used, with a warning, if they are not exact.
        aux_loss: Whether the loss includes the router's auxiliary loss.
        noise: Whether noise is added to embeddings (NEFTune).
        sharded: Whether each rank has only a part of the weights. Then a trial forward is not yet possible.

    Raises:
        ConfigError: `wanted` is ON, and packs are not exact.
    """
    if wanted is SharedPrefixForward.OFF:
        return False
    bases = [model.get_base_model() if is_peft_model(model) else model for model in models]
    reasons = _why_no_packs(models, bases, accelerator)
    if aux_loss:
        reasons.append("its router's auxiliary loss counts every row's tokens")
    if noise:
        reasons.append("neftune_noise_alpha is set, and all rows would share the noise of a shared token")
    if not reasons:
        for base in bases:
            share_prefixes(base)
        # A model with sharded weights cannot run a trial forward yet. Later `forward_pack` checks that all layers used
        # the pack.
        if not sharded:
            with accelerator.autocast():
                reasons = [reason for model in models if (reason := why_packs_differ(model))]
        if not reasons:
            return True
    told = f"This model cannot compute shared prefixes once: {reasons[0]}."
    if wanted is SharedPrefixForward.ON:
        raise ConfigError(f"shared_prefix_forward is 'on'. {told} Set it to 'auto' or 'off'.")
    logger.warning(f"{told} The update uses TRL's padded batches, which compute shared prefixes once per row.")
    return False


@torch.no_grad()
def check_scores(model: PreTrainedModel, temperature: float) -> None:
    """Checks on a few tokens that the logprobs that training computes are those of the model's logits.

    TRL's fused head applies only the model's last layer, so it skips other layers of a head. `model` has that head,
    and all weights on this rank. Call it under the autocast of training.

    Raises:
        ConfigError: The logprobs differ beyond rounding, or the logits are not finite.
    """
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        return  # its logits have further positions
    ids = trial_ids(model, 24)[None]
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with evaluating(model):
        logits = model(**rows, use_cache=False).logits[:, :-1].float()
        check_logits(model, logits)
        scored = model(**rows, labels=ids, fused_lm_head=True).log_probs.float()
    expected = (logits / temperature).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    distance, limit = rounding(model, scored, expected)
    if not distance <= limit:
        raise ConfigError(
            f"Training cannot score a model of type {model.config.model_type!r}: its logprobs from TRL's fused head "
            f"are {distance:.2g} standard deviations away from those of its logits; expected at most {limit}. Train "
            "another model."
        )


@torch.no_grad()
def warn_of_other_reference(model: PreTrainedModel, reference: PreTrainedModel) -> None:
    """Warns if the reference model is not the model at its start, which `model` is.

    TRL loads the reference model from the path or id in the model's configuration. Both models have all weights on
    this rank. Call it under the autocast of training.
    """
    ids = trial_ids(reference, 24)[None]
    size = min(each.get_input_embeddings().num_embeddings for each in (model, reference))  # one may have new tokens
    logits = []
    for each in (model, reference):
        with evaluating(each):
            found = each(input_ids=ids.to(each.get_input_embeddings().weight.device) % size, use_cache=False).logits
        logits.append(found[..., :size].float().to(ids.device))
    distance, limit = rounding(model, *logits)
    if not distance <= limit:
        logger.warning(
            f"The reference model of beta, loaded from {get_config_model_id(model.config)!r}, is another model than "
            f"the one that is trained: their logits differ by {distance:.2g} standard deviations; expected at most "
            f"{limit}. The KL term trains towards it. To start at the reference, save the model and pass its path."
        )


def _why_no_packs(models: Sequence[Any], bases: Sequence[Any], accelerator: Accelerator) -> list[str]:
    dtypes = [getattr(torch, training_dtype(base, accelerator)) for base in bases]
    reasons = [
        reason
        for base, dtype in zip(bases, dtypes, strict=True)
        if (reason := why_not_shared(base, accelerator.device, dtype))
    ]
    if is_peft_model(models[0]) and models[0].active_peft_config.is_prompt_learning:
        reasons.append("its adapter puts virtual tokens before each row")
    return reasons


def tokenizer_for(model: str | PreTrainedModel, processing_class: Any, args: ARPOConfig) -> PreTrainedTokenizerBase:
    """Returns `processing_class`, or the tokenizer that TRL would load. Does not load the model.

    Raises:
        ConfigError: No tokenizer can be loaded, or the processing class is multimodal.
    """
    if processing_class is None:
        processing_class = load_pretrained(
            "tokenizer",
            model if isinstance(model, str) else get_config_model_id(model.config),
            AutoProcessor.from_pretrained,
            revision=args.revision,
            truncation_side="left",
            padding_side="left",
            trust_remote_code=args.trust_remote_code,
        )
    if isinstance(processing_class, ProcessorMixin):
        raise ConfigError("The processing class is multimodal; ARPOTrainer trains text-only models.")
    return processing_class


def embedding_rows(model: str | PreTrainedModel, args: ARPOConfig) -> int:
    """The number of token ids for which the model has embeddings.

    Raises:
        ConfigError: The model is not a causal language model.
    """
    if not isinstance(model, str):
        return int(model.get_input_embeddings().num_embeddings)
    config = load_pretrained(
        "configuration",
        model,
        causal_config,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
    )
    return int(config.get_text_config().vocab_size)


def generation_ends(model: str | PreTrainedModel, args: ARPOConfig) -> tuple[int, ...]:
    """Return the EOS ids of the model's generation config. Does not load the model."""
    if not isinstance(model, str):
        return eos_ids_of(model.generation_config)
    return saved_eos_ids(model, revision=args.revision, trust_remote_code=args.trust_remote_code)


def needs_tags(args: ARPOConfig, tools: Collection[str], rewards: Sequence[Any]) -> bool:
    """Whether the model must write tags: to call `tools`, or for an answer that the built-in reward reads."""
    return (args.tool_protocol == ProtocolKind.TAGS and bool(tools)) or any(
        isinstance(reward, HierarchicalReward) for reward in rewards
    )
