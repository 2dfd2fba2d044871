"""Sets up the transfer of weights to vLLM, and checks vLLM against the trainer before the first step."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.distributed import ProcessGroup
from transformers import PreTrainedTokenizerBase

from arpo_trl.common.files import write_whole
from arpo_trl.common.user_files import user_path
from arpo_trl.config import ARPOConfig
from arpo_trl.options import WeightSync
from arpo_trl.rollout.engines.base import SamplingParams
from arpo_trl.rollout.engines.compute_dtype import warn_of_other_dtype
from arpo_trl.rollout.engines.vllm.client import CANARY_TEXT, ServerClient, check_server
from arpo_trl.rollout.engines.vllm.colocate import ColocatedWeights
from arpo_trl.rollout.engines.vllm.merged import keep_base
from arpo_trl.rollout.engines.vllm.weights import DiskTransfer, NcclTransfer, ServedWeights, Transfer, from_main
from arpo_trl.trl_seam import VLLMGeneration
from arpo_trl.visible import get_rank_logger

logger = get_rank_logger(__name__)

SYNC_NAME = "_weight_sync"
"""The name of the file begins with _ so that transformers does not push it to the Hub."""


def colocated_weights(
    args: ARPOConfig,
    generation: VLLMGeneration,
    tokenizer: PreTrainedTokenizerBase,
    trained: Callable[[], Hashable],
    reference: Callable[[Sequence[int]], list[float]],
) -> ColocatedWeights:
    """The weights of the vLLM instance that TRL has started. Warns if its dtype differs from the trainer's."""
    dtype = str(generation.llm.llm_engine.model_config.dtype).removeprefix("torch.")
    way_out = "another dtype in the model's config.json, which vLLM uses unless it is float32"
    warn_of_other_dtype(generation.model, generation.accelerator, {"vLLM": dtype}, way_out)
    keep_base(generation)
    return ColocatedWeights(generation, trained, reference, _canary(tokenizer), args.weight_sync_tolerance)


def ranks_together(size: int) -> ProcessGroup | None:
    """The group of `size` ranks, this one included, that share a vLLM instance by tensor parallelism. None if `size`
    is 1.

    A collective.
    """
    if size == 1:
        return None
    ranks = torch.distributed.get_world_size()
    groups = [list(range(first, first + size)) for first in range(0, ranks, size)]
    group, _ = torch.distributed.new_subgroups_by_enumeration(groups, backend="gloo")
    return group


def served_weights(
    args: ARPOConfig,
    model: Any,
    accelerator: Accelerator,
    tokenizer: PreTrainedTokenizerBase,
    trained: Callable[[], tuple[int, int]],
    reference: Callable[[Sequence[int]], list[float]],
    check: Callable[[], None],
) -> ServedWeights:
    """The weights of the servers in the settings. Waits for the servers and checks that they fit the trainer.

    Raises:
        ConfigError: A server lacks a required feature, or serves another model than the trainer's.
        EngineError: A server does not start within `vllm_server_timeout`.
    """
    longest_s = max(args.vllm_request_timeout_s, args.vllm_server_timeout)
    if accelerator.num_processes > 1 and args.ddp_timeout < longest_s:
        logger.warning(
            f"ddp_timeout is {args.ddp_timeout} s, but in a rollout a rank can wait {longest_s:.0f} s for a server "
            "(vllm_request_timeout_s, vllm_server_timeout). The other ranks wait only for ddp_timeout; then the run "
            "ends, on GPUs without a message that names the server. Raise ddp_timeout above it."
        )
    clients = [ServerClient(url, timeout_s=args.vllm_request_timeout_s) for url in args.server_urls]
    for client in clients:
        client.wait(args.vllm_server_timeout)
    facts = [check_server(client, tokenizer, args.entropy_top_logprobs) for client in clients]
    dtypes = {client.url: fact.dtype for client, fact in zip(clients, facts, strict=True)}
    warn_of_other_dtype(model, accelerator, dtypes, "start the server with --dtype {dtype}")
    if args.weight_sync == WeightSync.NCCL:
        transfer: Transfer = NcclTransfer(
            model,
            accelerator,
            tokenizer,
            [client.url for client in clients],
            args.vllm_group_port,
            args.vllm_server_timeout,
        )
    else:
        folder = Path(args.output_dir) / "served_weights"
        if args.weight_sync_dir is not None:
            own = from_main(accelerator, _name_of_run(args.output_dir) if accelerator.is_main_process else None)
            folder = user_path(args.weight_sync_dir, "weight_sync_dir") / own
        transfer = DiskTransfer(model, accelerator, tokenizer, folder, facts)
    weights = ServedWeights(
        clients,
        facts,
        transfer,
        accelerator,
        trained,
        reference,
        _canary(tokenizer),
        args.weight_sync_tolerance,
        away_s=args.vllm_server_timeout,
        check=check,
    )
    weights.check_model()
    return weights


def _name_of_run(output_dir: str) -> str:
    """A name for the run's own folder in `weight_sync_dir`, which other runs may use too. A resumed run has the same
    one.

    The name depends on a random text in `output_dir`, since on another machine the same path can be another folder,
    and on the path, since the folder may be a copy.
    """
    place = Path(output_dir).resolve()
    file = place / SYNC_NAME
    if not file.exists():
        place.mkdir(parents=True, exist_ok=True)
        write_whole(file, secrets.token_hex(8))
    return f"{place.name}-{hashlib.sha256(f'{place} {file.read_text()}'.encode()).hexdigest()[:8]}"


def warn_of_other_distribution(settings: SamplingParams) -> None:
    """Warns if a setting makes vLLM's sampling distribution differ from the trained distribution."""
    narrowed = {
        "top_p": settings.top_p < 1.0,
        "top_k": settings.top_k > 0,
        "min_p": bool(settings.min_p),
        "repetition_penalty": settings.repetition_penalty != 1.0,
    }
    if names := [name for name, narrows in narrowed.items() if narrows]:
        logger.warning(
            f"{', '.join(names)} make vLLM's sampling distribution differ from the trained distribution. vLLM's "
            f"logprobs belong to the sampling distribution. The importance sampling correction accounts for the "
            f"difference, except for tokens that were excluded from sampling. The paper uses top_p 1 and none of the "
            f"other settings."
        )


def _canary(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return tokenizer.encode(CANARY_TEXT, add_special_tokens=False)
