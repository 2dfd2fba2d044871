"""Checks and warnings at start-up, before the first step."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from importlib.util import find_spec
from operator import length_hint
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from transformers import AutoConfig, AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin
from trl import GRPOConfig, GRPOTrainer

from arpo_trl.common.pretrained import load_pretrained
from arpo_trl.config import ARPOConfig
from arpo_trl.data.layouts import why_rejected
from arpo_trl.data.loading import EMPTY, validate_rows
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.options import ProtocolKind, SharedPrefixForward
from arpo_trl.rewards.hierarchical import HierarchicalReward
from arpo_trl.rollout.batch import GroupRequest
from arpo_trl.rollout.credit.base import Credit
from arpo_trl.rollout.engines.base import Engine, EngineAhead
from arpo_trl.rollout.engines.compute_dtype import training_dtype
from arpo_trl.rollout.engines.visibility import evaluating
from arpo_trl.rollout.engines.vllm.cpu import prepare_cpu
from arpo_trl.rollout.protocols import ToolProtocol
from arpo_trl.rollout.protocols.generation_ends import eos_ids_of, saved_eos_ids
from arpo_trl.rollout.sampler import TreeSampler
from arpo_trl.runs.identity import dataset_identity
from arpo_trl.training.baselines import Baseline
from arpo_trl.training.prefix_sharing import rounding, share_prefixes, why_not_shared, why_packs_differ
from arpo_trl.trl_seam import get_config_model_id
from arpo_trl.visible import get_rank_logger

logger = get_rank_logger(__name__)


UNUSED_METHODS = ("_generate_single_turn", "_tokenize_prompts", "_get_tool_suffix_ids")
"""The methods of GRPOTrainer that sample, which ARPOTrainer does not call."""
_COMPARED_ROWS = 64
"""The number of rows, spread over a dataset, that ranks compare; with their remainder, up to twice as many."""


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
            "Quantization needs bitsandbytes, which is not installed. Install the extra: pip install '.[qlora]'."
        )
    from bitsandbytes.functional import has_avx512bf16

    if not torch.accelerator.is_available() and has_avx512bf16():
        # On such CPUs bitsandbytes repacks the weights for inference. They pass no gradient, so adapters would stay
        # zero.
        raise ConfigError(
            "The model is quantized, but there is no GPU, and bitsandbytes does not train on this CPU. Use a machine "
            "with a GPU, or do not quantize."
        )


def check_trainable(model: torch.nn.Module) -> None:
    """Raises ConfigError if all weights are frozen, since training would then run to its end without effect.

    Args:
        model: The model, perhaps with TRL's frozen copy "ref" of its adapter, which TRL may make trainable.
    """
    if any(weight.requires_grad for name, weight in model.named_parameters() if ".ref." not in name):
        return
    remedy = (
        "load it with PeftModel.from_pretrained(…, is_trainable=True)"
        if is_peft_model(model)
        else "call model.requires_grad_(), or pass a peft_config"
    )
    raise ConfigError(f"All weights of the model are frozen (requires_grad is False). To train it, {remedy}.")


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


def check_enough_prompts(train_dataset: Any, args: ARPOConfig) -> None:
    """Checks that the training data fills a generation batch. TRL drops incomplete ones, and would take no step.

    Reads the rows of one batch from a streamed dataset.

    Raises:
        DataError: It has too few rows.
    """
    size = args.generation_batch_size
    assert size is not None
    prompts = size // args.num_generations
    if isinstance(train_dataset, IterableDataset):
        rows = sum(1 for _ in train_dataset.take(prompts))
    else:
        rows = length_hint(train_dataset, prompts)  # torch's streams have no length
    if rows < prompts:
        raise DataError(
            f"The training dataset has {rows} rows, but a generation batch has {prompts} prompts: {size} completions "
            f"÷ num_generations {args.num_generations}. So no step would be taken. Add rows, or lower "
            "per_device_train_batch_size or steps_per_generation."
        )


def check_rows(datasets: Iterable[Any], reward_funcs: Collection[Any]) -> None:
    """Checks that all rows have a usable prompt and the columns for the reward functions. Skips None. Of a streamed
    dataset it only checks that there is a row; see `streams.checked_stream`.

    A reward function that needs a column has a method `check_dataset(dataset)`, which raises `DataError`.

    Raises:
        DataError: A row has no usable prompt, or lacks data that a reward function needs.
    """
    for dataset in datasets:
        if isinstance(dataset, IterableDataset) and next(iter(dataset.take(1)), None) is None:
            raise DataError(EMPTY)
        if not isinstance(dataset, Dataset):
            continue
        validate_rows(dataset)
        for function in reward_funcs:
            if (check := getattr(function, "check_dataset", None)) is not None:
                check(dataset)


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

    Args:
        engine: Replaces the engine that `args` select. If it is set, TRL does not start vLLM either.

    Raises:
        ConfigError: TRL has to start vLLM, and vLLM is not installed.
    """
    use_vllm = args.use_vllm
    args.use_vllm = use_vllm and args.vllm_mode == "colocate" and engine is None
    if args.use_vllm:
        if find_spec("vllm") is None:
            raise ConfigError("use_vllm is set, but vLLM is not installed. Install the extra: pip install '.[vllm]'.")
        prepare_cpu()
    try:
        yield
    finally:
        args.use_vllm = use_vllm


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
        ConfigError: The logprobs differ beyond rounding.
    """
    if is_peft_model(model) and model.active_peft_config.is_prompt_learning:
        return  # its logits have further positions
    device = model.get_input_embeddings().weight.device
    # Ids from the whole vocabulary: equal tokens would hide differences.
    ids = torch.arange(1, 25, device=device)[None] * 7919 % model.config.get_text_config().vocab_size
    rows = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with evaluating(model):
        logits = model(**rows, use_cache=False).logits[:, :-1].float()
        scored = model(**rows, labels=ids, fused_lm_head=True).log_probs.float()
    expected = (logits / temperature).log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    distance, limit = rounding(model, scored, expected)
    if not distance <= limit:
        raise ConfigError(
            f"Training cannot score a model of type {model.config.model_type!r}: its logprobs from TRL's fused head "
            f"are {distance:.2g} standard deviations away from those of its logits; expected at most {limit}. Train "
            "another model."
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
            revision=(args.model_init_kwargs or {}).get("revision"),
            truncation_side="left",
            padding_side="left",
            trust_remote_code=args.trust_remote_code,
        )
    if isinstance(processing_class, ProcessorMixin):
        raise ConfigError("The processing class is multimodal; ARPOTrainer trains text-only models.")
    return processing_class


def embedding_rows(model: str | PreTrainedModel, args: ARPOConfig) -> int:
    """The number of token ids for which the model has embeddings."""
    if not isinstance(model, str):
        return int(model.get_input_embeddings().num_embeddings)
    config = load_pretrained(
        "configuration",
        model,
        AutoConfig.from_pretrained,
        revision=(args.model_init_kwargs or {}).get("revision"),
        trust_remote_code=args.trust_remote_code,
    )
    return int(config.get_text_config().vocab_size)


def generation_ends(model: str | PreTrainedModel, args: ARPOConfig) -> tuple[int, ...]:
    """Return the EOS ids of the model's generation config. Does not load the model."""
    if not isinstance(model, str):
        return eos_ids_of(model.generation_config)
    revision = (args.model_init_kwargs or {}).get("revision")
    return saved_eos_ids(model, revision=revision, trust_remote_code=args.trust_remote_code)


Protocols = Callable[[Dataset], Iterable[ToolProtocol]]
"""Dataset → the protocol of each of its rows."""


def check_encoding(datasets: Sequence[Any], protocols: Protocols, embeddings: int) -> None:
    """Checks that the chat template accepts each prompt, and that the model has an embedding for each token of it.

    A chat template may reject roles, or their order. The check tries each sequence of roles once. It skips streamed
    datasets and None.

    Raises:
        DataError: A prompt cannot be used. Names the row.
    """
    for dataset in datasets:
        if isinstance(dataset, Dataset):
            _check_roles(dataset, protocols)
            _check_embeddings(dataset, protocols, embeddings)


Form = tuple[tuple[Any, ...], ...]


def _form(prompt: Any) -> Form:
    """The role, the type of the content, and the filled fields of each message, on which a template's own text
    depends. Empty for plain text."""
    messages = [] if isinstance(prompt, str) else prompt
    return tuple(
        (message["role"], type(message["content"]), *(field for field, value in message.items() if value))
        for message in messages
    )


def _check_roles(dataset: Dataset, protocols: Protocols) -> None:
    tried = set()
    for i, (prompt, protocol) in enumerate(zip(dataset["prompt"], protocols(dataset), strict=False)):
        form = _form(prompt)
        if form in tried:
            continue
        tried.add(form)
        try:
            protocol.encode_prompt(prompt)
        except ConfigError:
            raise
        except Exception as error:  # a template can raise anything
            raise DataError(f"Dataset row {i}: {why_rejected(prompt, error)}") from error


def _check_embeddings(dataset: Dataset, protocols: Protocols, embeddings: int) -> None:
    tokenizer = next(iter(protocols(dataset))).tokenizer
    names = {token_id: token for token, token_id in tokenizer.get_vocab().items() if token_id >= embeddings}
    for i, (prompt, protocol) in enumerate(zip(dataset["prompt"] if names else (), protocols(dataset), strict=False)):
        if without := [names[token_id] for token_id in protocol.encode_prompt(prompt) if token_id in names]:
            raise DataError(
                f"Dataset row {i}: its prompt contains the token {without[0]!r}, but the model has only {embeddings} "
                f"embeddings and the tokenizer has {len(protocol.tokenizer)} tokens. Call "
                "`model.resize_token_embeddings(len(tokenizer))` before training, or use the model's own tokenizer."
            )


def needs_tags(args: ARPOConfig, tools: Collection[str], rewards: Sequence[Any]) -> bool:
    """Whether the model must write tags: to call `tools`, or for an answer that the built-in reward reads."""
    return (args.tool_protocol == ProtocolKind.TAGS and bool(tools)) or any(
        isinstance(reward, HierarchicalReward) for reward in rewards
    )


def check_same_rows(datasets: Mapping[str, Any], accelerator: Accelerator) -> None:
    """Checks that all ranks have the same rows in the same order. A collective.

    Compares the lengths and up to `_COMPARED_ROWS` rows; of a streamed dataset, the first 4 rows.

    Args:
        datasets: Name for errors → dataset.

    Raises:
        ConfigError: They do not. A batch is dealt to the ranks by the rows' indices, so some rows would never be
            used, or be used twice. With other lengths, a rank would wait for the others forever.
    """
    if accelerator.num_processes == 1:
        return
    ranks = gather_object([{name: _rows_seen(dataset) for name, dataset in datasets.items()}])
    for name in dict.fromkeys(name for rank in ranks for name in rank):
        if all(rank.get(name) == ranks[0].get(name) for rank in ranks):
            continue
        if isinstance(datasets.get(name), IterableDataset):
            raise ConfigError(
                f"The processes read the streamed {name} in different orders, so that they would not share its rows, "
                "and a resumed run would read others. Give its `shuffle` a seed, as in dataset.shuffle(seed=42)."
            )
        raise ConfigError(
            f"The processes have different rows in {name}, so that they would not share its rows. All of them need "
            "all rows, in the same order. Give `shuffle` and `train_test_split` a seed, as in "
            "dataset.train_test_split(test_size=0.1, seed=42)."
        )


def _rows_seen(dataset: Any) -> Any:
    if isinstance(dataset, IterableDataset):
        return repr(list(dataset.take(4)))
    if not isinstance(dataset, Dataset):
        return length_hint(dataset, 0)
    rows = len(dataset)
    some = sorted({*range(0, rows, max(1, rows // _COMPARED_ROWS)), rows - 1}) if rows else []
    return rows, dataset_identity(dataset.select(some))


def check_requests(prompts: Sequence[Any], requests: Sequence[GroupRequest], context: int) -> None:
    """Checks that each prompt of a rollout fits the context, since `check_prompts` cannot check streamed rows.

    Raises:
        ConfigError: A prompt leaves no token for a completion.
    """
    for prompt, request in zip(prompts, requests, strict=True):
        if (length := len(request.prompt_ids)) >= context:
            raise ConfigError(
                f"A prompt has {length} tokens, but the context is {context}, which leaves no room for a completion. "
                f"Shorten or drop its row. It begins with {str(prompt)[:200]!r}."
            )


LONGER = ", or give vLLM a longer context (vllm_max_model_length, or a server's --max-model-len)"


def check_prompts(
    datasets: Sequence[Any], args: ARPOConfig, protocols: Protocols, context: int, tools: Collection[str]
) -> None:
    """Checks that each prompt fits the context. Warns if the training prompts do not explain the tools' tags.

    Args:
        datasets: The training dataset first, then the evaluation datasets. Streamed datasets and None are not checked.
        context: The maximum number of tokens of prompt and completion together.
        tools: The tools' names.

    Raises:
        ConfigError: A prompt leaves no token for a completion.
    """
    for dataset in datasets:
        if isinstance(dataset, Dataset):
            _check_prompts_fit(dataset, protocols, context, LONGER if args.use_vllm else "")
    if args.tool_protocol == ProtocolKind.TAGS:
        _warn_of_unexplained_tags(tools, datasets[0])


def _check_prompts_fit(dataset: Dataset, protocols: Protocols, context: int, advice: str) -> None:
    most = context - 1
    # The length of the shortest encoded prompt of a form: the template's own text has no more tokens.
    shortest: dict[tuple[ToolProtocol, Form], int] = {}
    for i, (prompt, protocol) in enumerate(zip(dataset["prompt"], protocols(dataset), strict=False)):
        alike = protocol, _form(prompt)
        parts = [prompt] if isinstance(prompt, str) else [str(message) for message in prompt]
        # A token covers at least one byte, so only prompts with that many bytes need tokenization.
        if alike in shortest and shortest[alike] + sum(len(part.encode()) for part in parts) <= most:
            continue
        length = len(protocol.encode_prompt(prompt))
        shortest[alike] = min(length, shortest.get(alike, length))
        if length > most:
            raise ConfigError(
                f"Dataset row {i}: its prompt has {length} tokens, but the context is {context}, which leaves no room "
                f"for a completion. Shorten or drop the row{advice}."
            )


def _warn_of_unexplained_tags(tools: Collection[str], dataset: Any) -> None:
    """Warns if the first prompt does not name all tools as tags. For a streamed dataset, it warns always."""
    prompt = str(dataset[0]["prompt"]) if isinstance(dataset, Dataset) else ""
    missing = [name for name in tools if f"<{name}>" not in prompt]
    if missing:
        logger.warning(
            f"tool_protocol is 'tags', which adds no tools to the prompt, and the first prompt does not name "
            f"{', '.join(f'<{name}>' for name in missing)}. The model must already know that it calls a tool with "
            f"<{missing[0]}>…</{missing[0]}> and reads the result in <result>…</result>: from demonstrations (sft.py) "
            "or from a system prompt. arpo_trl.tags_system_prompt(tools) writes one for these tools; "
            "pass it to load_arpo_dataset as system_prompt. For a model that was trained to call tools in its own "
            "format, set tool_protocol to 'chat_template'."
        )
