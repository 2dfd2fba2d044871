"""What can be known to fail, or has to be said, before the first step."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.logging import get_logger
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import AutoConfig, AutoProcessor, PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin

from arpo_trl.config import ARPOConfig
from arpo_trl.data.loading import validate_rows
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.options import SharedPrefixForward
from arpo_trl.rollout.engines.base import Engine
from arpo_trl.rollout.engines.compute_dtype import training_dtype
from arpo_trl.rollout.engines.vllm.cpu import prepare_cpu
from arpo_trl.rollout.protocols import ToolProtocol
from arpo_trl.training.prefix_sharing import share_prefixes, why_not_shared, why_packs_differ
from arpo_trl.trl_seam import get_config_model_id

logger = get_logger(__name__)


def refuse_own_rollouts(**given: Any) -> None:
    """Fails where one of GRPOTrainer's arguments that replace its rollouts was given."""
    for name, value in given.items():
        if value is not None:
            raise ConfigError(f"{name} was given, but ARPOTrainer samples trees itself. Offer `tools` instead.")


def checked_args(args: Any, model: str | PreTrainedModel) -> ARPOConfig:
    """`args`; without any, the defaults, with the output folder named after the model as TRL does."""
    if args is None:
        name = model if isinstance(model, str) else get_config_model_id(model.config) or model.config.model_type
        args = ARPOConfig(f"{name.split('/')[-1]}-ARPO")
    if not isinstance(args, ARPOConfig):
        raise ConfigError(f"args is a {type(args).__name__}; expected an ARPOConfig, which adds ARPO's settings.")
    return args


def check_writable(folder: Path) -> None:
    """Fails now rather than at the first checkpoint."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):  # a name of its own: other ranks look at the same time
            pass
    except OSError as error:
        raise ConfigError(f"output_dir {folder} cannot be written ({error}). Choose another folder.") from error


def check_quantized_training(peft_config: Any) -> None:
    """Fails where quantized weights could not be trained, or would not be without a word."""
    if peft_config is None:
        raise ConfigError(
            "The model is to be quantized (load_in_4bit, load_in_8bit or quantization_config), which freezes its "
            "weights, and nothing else is there to train. Set use_peft: true, or give a peft_config."
        )
    if find_spec("bitsandbytes") is None:
        raise ConfigError(
            "The model is to be quantized, but bitsandbytes is not installed here. Install the extra: pip install "
            "'.[qlora]'."
        )
    from bitsandbytes.functional import has_avx512bf16

    if not torch.accelerator.is_available() and has_avx512bf16():
        # It packs the weights anew for inference, and the packed ones pass no gradient on: adapters would stay zero.
        raise ConfigError(
            "The model is to be quantized, but there is no GPU, and bitsandbytes does not train on this CPU. Use a "
            "machine with a GPU, or leave quantization out."
        )


def check_rows(dataset: Any, reward_funcs: Collection[Any]) -> None:
    """Fails where a row cannot be rolled out, or lacks what a reward needs; a streamed dataset is checked as it comes.

    A reward function that needs something of a row has a method `check_dataset`, which raises `DataError`.
    """
    if not isinstance(dataset, Dataset):
        return
    validate_rows(dataset)
    for function in reward_funcs:
        if (check := getattr(function, "check_dataset", None)) is not None:
            check(dataset)


@contextmanager
def without_trls_vllm_client(args: ARPOConfig, engine: Engine | None) -> Iterator[None]:
    """Stops TRL's `__init__` from opening its own vLLM client. In colocate mode TRL still starts vLLM.

    Args:
        engine: The engine that replaces the one that `args` would choose; with one, TRL starts nothing.

    Raises:
        ConfigError: vLLM is to be started, but is not installed.
    """
    use_vllm = args.use_vllm
    args.use_vllm = use_vllm and args.vllm_mode == "colocate" and engine is None
    if args.use_vllm:
        if find_spec("vllm") is None:
            raise ConfigError(
                "use_vllm is set, but vLLM is not installed here. Install the extra: pip install '.[vllm]'."
            )
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
    sharded: bool,
) -> bool:
    """Makes `models` take packs. Where packs are not wanted or not exact it leaves them as they are and returns False.

    Args:
        models: The trained model, perhaps with an adapter, and the reference model if there is one; unwrapped.
        aux_loss: Whether the loss has the router's auxiliary loss.
        sharded: Whether ranks hold parts of the weights, which are not in place yet.

    Raises:
        ConfigError: Packs must be taken ("on"), and are not exact.
    """
    if wanted is SharedPrefixForward.OFF:
        return False
    bases = [model.get_base_model() if is_peft_model(model) else model for model in models]
    reasons = _why_no_packs(models, bases, accelerator)
    if aux_loss:
        reasons.append("its router's auxiliary loss counts every row's tokens")
    if not reasons:
        before = [base.config._attn_implementation for base in bases]
        for base in bases:
            share_prefixes(base)
        # Sharded weights are not in place yet; there `forward_pack` sees to it that all layers take packs.
        if not sharded:
            with accelerator.autocast():
                reasons = [reason for model in models if (reason := why_packs_differ(model))]
        if not reasons:
            return True
        for base, attention in zip(bases, before, strict=True):
            base.set_attn_implementation(attention)
    told = f"Shared prefixes cannot be computed once for this model: {reasons[0]}."
    if wanted is SharedPrefixForward.ON:
        raise ConfigError(f"shared_prefix_forward is 'on'. {told} Set it to 'auto' or 'off'.")
    logger.warning(f"{told} The update takes TRL's padded batches, which compute them once per row.")
    return False


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
    """`processing_class`; without any, the tokenizer that TRL would load, here before the model itself is loaded."""
    if processing_class is None:
        processing_class = AutoProcessor.from_pretrained(
            model if isinstance(model, str) else get_config_model_id(model.config),
            revision=(args.model_init_kwargs or {}).get("revision"),
            truncation_side="left",
            padding_side="left",
            trust_remote_code=args.trust_remote_code,
        )
    if isinstance(processing_class, ProcessorMixin):
        raise ConfigError("The processing class is multimodal; ARPOTrainer trains text-only models.")
    return processing_class


def embedding_rows(model: str | PreTrainedModel, args: ARPOConfig) -> int:
    """How many token ids the model has embeddings for."""
    if not isinstance(model, str):
        return int(model.get_input_embeddings().num_embeddings)
    config = AutoConfig.from_pretrained(
        model, revision=(args.model_init_kwargs or {}).get("revision"), trust_remote_code=args.trust_remote_code
    )
    return int(config.get_text_config().vocab_size)


def check_prompts(dataset: Any, protocol: ToolProtocol, embeddings: int) -> None:
    """Fails where a prompt cannot be encoded, or holds tokens that the model has no embedding for.

    A chat template may refuse roles, or their order. It is tried on each sequence of roles in the dataset. A streamed
    dataset is checked as it comes.
    """
    if not isinstance(dataset, Dataset):
        return
    tried = set()
    for i, prompt in enumerate(dataset["prompt"]):
        messages = [] if isinstance(prompt, str) else prompt
        roles = tuple((message["role"], type(message["content"])) for message in messages)
        if roles in tried:
            continue
        tried.add(roles)
        try:
            protocol.encode_prompt(prompt)
        except ConfigError:
            raise
        except Exception as error:  # a template is a program of the model's authors
            raise DataError(
                f"Dataset row {i}: the chat template of the tokenizer refuses its messages, whose roles are "
                f"{[role for role, _ in roles]}: {error}. Give the rows roles that it takes (a system message may "
                "begin the first user message), or set `tokenizer.chat_template`."
            ) from error
    names = {token_id: token for token, token_id in protocol.tokenizer.get_vocab().items() if token_id >= embeddings}
    if not names:
        return
    for i, prompt in enumerate(dataset["prompt"]):
        if without := [names[token_id] for token_id in protocol.encode_prompt(prompt) if token_id in names]:
            raise DataError(
                f"Dataset row {i}: its prompt holds the token {without[0]!r}, but the model has only {embeddings} "
                f"embeddings and the tokenizer {len(protocol.tokenizer)} tokens. Call `model.resize_token_embeddings("
                "len(tokenizer))` before training, or use the model's own tokenizer."
            )


def check_prompts_fit(dataset: Any, protocol: ToolProtocol, context: int, advice: str) -> None:
    """Fails where a prompt leaves no room in a context of that many tokens; a streamed dataset is checked as it comes.

    Args:
        advice: What to do about it besides changing the row.
    """
    if not isinstance(dataset, Dataset):
        return
    room = context - 1
    template = len(protocol.encode_prompt(dataset[0]["prompt"]))
    for i, prompt in enumerate(dataset["prompt"]):
        parts = [prompt] if isinstance(prompt, str) else [str(message) for message in prompt]
        # A token covers at least one byte, so only texts this long need to be tokenised to know.
        longest = sum(len(part.encode()) + template for part in parts)
        if longest > room and (length := len(protocol.encode_prompt(prompt))) > room:
            raise ConfigError(
                f"Dataset row {i}: its prompt has {length} tokens, but the context is {context}, which leaves no room "
                f"for a completion. Shorten or drop the row{advice}."
            )


def untold_tags(tools: Collection[str], dataset: Any) -> str | None:
    """What the model must know already, where tags call the tools and the first prompt does not name them; else None.

    Of a streamed dataset nothing is known yet, so it is said.
    """
    prompt = str(dataset[0]["prompt"]) if isinstance(dataset, Dataset) else ""
    untold = [name for name in tools if f"<{name}>" not in prompt]
    if not untold:
        return None
    return (
        f"tool_protocol is 'tags', which puts no tool into a prompt, and the first prompt does not name "
        f"{', '.join(f'<{name}>' for name in untold)}. The model must have been taught to call a tool as "
        f"<{untold[0]}>…</{untold[0]}> and to read what it answers in <result>…</result>: by demonstrations (sft.py), "
        "or by a system prompt. arpo_trl.data.prompts.tags_system_prompt(tools) writes one for these tools; "
        "load_arpo_dataset takes it as system_prompt. A model that calls tools in its own way wants tool_protocol "
        "'chat_template' instead."
    )
