"""The sampler of an evaluation: the engine from the settings, with the protocol and the tools of training."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, BinaryIO, NamedTuple

from transformers import GenerationConfig, PreTrainedTokenizerBase
from transformers.utils import find_adapter_config_file

from arpo_trl.common.adapters import adapted, base_revision, merged, refuse_adapted_base, tokenizer_of
from arpo_trl.common.pretrained import causal_config, causal_model, load_pretrained
from arpo_trl.common.settings import template_arguments
from arpo_trl.common.user_files import user_path
from arpo_trl.errors import ConfigError
from arpo_trl.evaluation.settings import EngineKind, EvalSettings
from arpo_trl.options import ProtocolKind
from arpo_trl.rollout.build import build_sampler, local_engine
from arpo_trl.rollout.engines.base import Engine, SamplingParams
from arpo_trl.rollout.engines.completions import CompletionsEngine
from arpo_trl.rollout.engines.generation_rules import refuse_rules
from arpo_trl.rollout.engines.vllm.colocate import VLLMColocateEngine
from arpo_trl.rollout.engines.weights import FixedWeights
from arpo_trl.rollout.protocols import PROTOCOLS
from arpo_trl.rollout.protocols.generation_ends import eos_ids_of, saved_generation_config
from arpo_trl.rollout.sampler import TreeSampler
from arpo_trl.tools.toolbox import ToolBox
from arpo_trl.visible import get_logger

logger = get_logger(__name__)

READ_BYTES, TENSOR_BYTES = 1 << 20, 1 << 12
HEADER_BYTES = 100_000_000
"""The longest header that safetensors accepts."""


def load_tokenizer(settings: EvalSettings) -> PreTrainedTokenizerBase:
    """Return the tokenizer of the adapter in the settings, or that of the model. Call it before the tools are created,
    because it detects a wrong model.

    Raises:
        ConfigError: The model, its tokenizer or its chat template is missing or cannot be used.
    """
    if settings.model is None:
        raise ConfigError(
            "model is missing. Set it to a folder or a Hub id; with base_url it is needed for its tokenizer."
        )
    base, revision, adapter = _weights(settings)
    tokenizer = tokenizer_of(adapter, base, revision, trust_remote_code=settings.trust_remote_code)
    if tokenizer.chat_template is None:
        raise ConfigError(
            f"The tokenizer of {tokenizer.name_or_path} has no chat template; expected one, to render questions as "
            "prompts. Set `tokenizer.chat_template = …` and save the tokenizer, or use the instruct version of the "
            "model."
        )
    return tokenizer


def make_sampler(settings: EvalSettings, toolbox: ToolBox, tokenizer: PreTrainedTokenizerBase) -> TreeSampler:
    """Return a sampler without branching for the model in the settings. `tokenizer` is the model's tokenizer.

    Raises:
        ConfigError: The model cannot be used, its generation config has a rule that the engine would ignore, or a
            limit is set for a tool that the sampler does not have.
        EngineError: A server does not respond.
    """
    weights = _weights(settings)
    saved = saved_generation_config(
        weights.base, revision=weights.revision, trust_remote_code=settings.trust_remote_code
    )
    _refuse_ignored_rules(settings, saved)
    protocol = PROTOCOLS[ProtocolKind(settings.tool_protocol)](
        tokenizer,
        toolbox.specs,
        max_result_tokens=settings.max_tool_result_tokens,
        chat_template_kwargs=template_arguments(settings.chat_template_kwargs),
        tool_parser=settings.tool_parser,
        eos_ids=eos_ids_of(saved),
    )
    sampling = SamplingParams(
        eos_ids=protocol.eos_ids,
        stop_strings=protocol.stop_strings,
        temperature=settings.temperature,
        top_p=settings.top_p,
    )
    return build_sampler(
        _engine(settings, weights, tokenizer, sampling),
        toolbox,
        protocol,
        context=settings.context,
        max_completion_length=settings.max_completion_length,
        max_tool_calls=settings.max_tool_calls,
        max_calls_of=settings.call_limits(),
    )


def fingerprint(settings: EvalSettings) -> str | None:
    """Return a hash of the files in the local folders of model and adapter; None for models on the Hub, and with
    base_url, because the server has the weights.

    It covers the name, the size, the beginning and the end of each file, and the beginning, the middle and the end of
    each tensor in safetensors: training may change few of them, such as those under a merged adapter.
    """
    if settings.base_url is not None:
        return None
    digest = hashlib.blake2b(digest_size=8)
    folders = [user_path(name, "model or adapter") for name in (settings.model, settings.adapter) if name]
    files = [file for folder in folders if folder.is_dir() for file in sorted(folder.iterdir())]
    files = [file for file in files if file.suffix in (".safetensors", ".bin", ".json", ".jinja")]
    for path in files:
        size = path.stat().st_size
        digest.update(f"{path.name} {size}\n".encode())
        with path.open("rb") as file:
            digest.update(file.read(READ_BYTES))
            file.seek(max(0, size - READ_BYTES))
            digest.update(file.read(READ_BYTES))
            for place in _places(file) if path.suffix == ".safetensors" else ():
                file.seek(place)
                digest.update(file.read(TENSOR_BYTES))
    return digest.hexdigest() if files else None


def _places(file: BinaryIO) -> Iterator[int]:
    """The positions of the beginning, the middle and the end of each tensor in a safetensors file; none if it cannot
    be read as one."""
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    try:
        tensors = json.loads(file.read(min(length, HEADER_BYTES)))
    except ValueError:
        return
    tensors.pop("__metadata__", None)
    for tensor in tensors.values():
        start, end = (8 + length + offset for offset in tensor["data_offsets"])
        last = max(start, end - TENSOR_BYTES)
        yield from (start, (start + last) // 2, last)


def _refuse_ignored_rules(settings: EvalSettings, saved: GenerationConfig | None) -> None:
    """Raises ConfigError if the engine would ignore a rule of the model's generation config, such as suppress_tokens.

    The transformers engine applies the rules or rejects them itself.
    """
    if settings.base_url is not None:
        refuse_rules(saved, None, "the server", "sample in this process (without base_url)")
    elif settings.engine == EngineKind.VLLM:
        refuse_rules(saved, None, "vLLM", "sample with transformers (engine: transformers)")


def _engine(
    settings: EvalSettings, weights: _Weights, tokenizer: PreTrainedTokenizerBase, sampling: SamplingParams
) -> Engine:
    if settings.base_url is not None:
        engine = CompletionsEngine(settings.base_url, settings.served_model, tokenizer, sampling)
        if settings.served_model is None and engine.model != settings.model:
            logger.warning(
                f"The server at base_url serves {engine.model!r}, but model is {settings.model!r}, of which only the "
                "tokenizer is used. The scores are those of the served model. If it is the right one, set "
                f"served_model to {engine.model!r}; otherwise correct base_url."
            )
        return engine
    if settings.engine == EngineKind.VLLM:
        return _vllm_engine(settings, weights, tokenizer, sampling)
    import torch

    return local_engine(
        _load_model(settings, weights).to("cuda" if torch.cuda.is_available() else "cpu"),
        tokenizer,
        sampling,
        most_rows=settings.concurrency,
        smaller=(
            f"Lower concurrency ({settings.concurrency}) or max_completion_length ({settings.max_completion_length}), "
            "or let vLLM sample (engine: vllm)."
        ),
    )


class _Weights(NamedTuple):
    base: str
    revision: str
    """The base model and its revision: that of the adapter's training, or main."""
    adapter: str | None


def _weights(settings: EvalSettings) -> _Weights:
    """What the model in the settings consists of. A model that is an adapter names its base model itself."""
    assert settings.model is not None
    base: str | None = settings.model
    adapter = settings.adapter
    if adapter is None:
        if load_pretrained("tokenizer", settings.model, find_adapter_config_file) is None:
            return _Weights(settings.model, "main", None)
        base, adapter = None, settings.model
    from peft import PeftConfig

    config: Any = load_pretrained("adapter", adapter, PeftConfig.from_pretrained)
    base = base or config.base_model_name_or_path
    if not base:
        raise ConfigError(
            f"{adapter} is an adapter that does not name its base model. Set model to the base model and adapter to "
            f"{adapter}."
        )
    refuse_adapted_base(adapter, base, f"set model to FOLDER and adapter to {adapter}")
    return _Weights(base, base_revision(config, base), adapter)


def _load_model(settings: EvalSettings, weights: _Weights, with_adapter: Callable[[Any, str], Any] = adapted) -> Any:
    """Load the model, with the adapter by `with_adapter(model, adapter)`."""
    base, revision, adapter = weights
    model = load_pretrained(
        "weights",
        base,
        causal_model,
        revision=revision,
        dtype=settings.dtype,
        trust_remote_code=settings.trust_remote_code,
    )
    if adapter is None:
        return model
    return load_pretrained("adapter", adapter, partial(with_adapter, model))


def _vllm_engine(
    settings: EvalSettings, weights: _Weights, tokenizer: PreTrainedTokenizerBase, sampling: SamplingParams
) -> VLLMColocateEngine:
    # Run vLLM's engine in this process, step by step, so that requests can join between steps. vLLM reads the variable
    # when it is imported.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        from vllm import LLM

        from arpo_trl.rollout.engines.vllm.cpu import prepare_cpu
    except ImportError as error:
        raise ConfigError(
            f"engine is 'vllm', but vLLM cannot be imported ({error}). Install it with pip install 'arpo-trl[vllm]', "
            "or start a server and set base_url to its address."
        ) from error
    prepare_cpu()
    base, revision, adapter = weights
    trusted = settings.trust_remote_code
    loaded = load_pretrained("configuration", base, causal_config, revision=revision, trust_remote_code=trusted)
    config = loaded.get_text_config()
    with tempfile.TemporaryDirectory() as folder:
        path = base
        if adapter is not None:
            path = folder
            way_out = "Evaluate with dtype: float32, or with engine: transformers, which does not merge."
            _load_model(settings, weights, partial(merged, way_out=way_out)).save_pretrained(folder)
            tokenizer.save_pretrained(folder)
        llm = load_pretrained(
            "weights",
            path,
            LLM,
            trust_remote_code=trusted,
            dtype=settings.dtype,
            max_model_len=min(settings.context, config.max_position_embeddings),
            max_num_seqs=settings.concurrency,
            seed=settings.seed,
        )
    return VLLMColocateEngine(llm, tokenizer, sampling, FixedWeights(), vocab_size=config.vocab_size, top_logprobs=0)
