"""The checkpoints of an output folder: each is complete or absent, and only the run that wrote it can resume from it.

A checkpoint is written to `<output_dir>/.unfinished`. When all ranks have finished, rank 0 lists the files and their
sizes in `arpo_state.json`, flushes everything to disk and renames the folder to its final name. So a folder named
`checkpoint-…` was complete when it got that name. If a file is lost or truncated later, the sizes reveal it.

`arpo_state.json` also identifies the run: the settings that affect the results of a step, the model's shape and frozen
weights, the dataset's content, the tools and rewards. A run that differs in one of them cannot resume from the
checkpoint.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from transformers import TrainingArguments

from arpo_trl.common.user_files import expect, read_json
from arpo_trl.config import ARPOConfig
from arpo_trl.errors import CheckpointError, ConfigError, DataError
from arpo_trl.runs.identity import differences_between
from arpo_trl.runs.output_folder import wants_to_resume
from arpo_trl.visible import get_rank_logger

logger = get_rank_logger(__name__)

STATE_FILE = "arpo_state.json"
UNFINISHED = ".unfinished"
VERSIONS = ("arpo-trl", "trl", "transformers", "torch")

_NAME = re.compile(r"checkpoint-(\d+)")
_HASHED_ROWS = 1000
_MAY_BE_MISSING = "training_args.bin"
"""A pickle that resuming does not read. Pushes to the Hub omit it."""
_HASHED_VALUES = 64

_DECIDING_TRAINING_ARGUMENTS = frozenset(
    """learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1
    adam_beta2 adam_epsilon optim_target_modules max_grad_norm bf16 fp16 neftune_noise_alpha seed data_seed
    per_device_train_batch_size gradient_accumulation_steps""".split()
)
"""The settings of transformers that affect the results of a step. The others control logging, saving or placement."""
_FREE_SETTINGS = frozenset(
    """num_generations_eval ds3_gather_for_generation cache_implementation use_vllm vllm_mode vllm_model_impl
    vllm_enable_sleep_mode vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_group_port
    vllm_gpu_memory_utilization vllm_max_model_length vllm_tensor_parallel_size model_init_kwargs trust_remote_code
    log_completions log_multimodal num_completions_to_print log_unique_prompts log_completions_hub_repo
    use_transformers_continuous_batching transformers_continuous_batching_config use_transformers_paged
    tool_timeout_s tool_concurrency tool_concurrency_per_tool environment_concurrency tool_cache vllm_server_urls
    vllm_request_timeout_s weight_sync weight_sync_dir weight_sync_tolerance shared_prefix_forward
    trajectory_log_rate hub_trajectories_id""".split()
)
"""The settings of TRL and of this package that may change: they affect only placement, speed or rounding."""
_BATCH_SETTINGS = frozenset({"per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation"})
"""The settings that must change with the number of processes to keep the global batches the same."""


def deciding_settings(args: ARPOConfig) -> dict[str, Any]:
    """The settings that affect the results of a step, as JSON values."""
    of_transformers = {each.name for each in fields(TrainingArguments)}
    all_values = args.to_dict()
    return _plain(
        {
            each.name: all_values.get(each.name)
            for each in fields(args)
            if each.name in _DECIDING_TRAINING_ARGUMENTS
            or (each.name not in of_transformers and each.name not in _FREE_SETTINGS)
        }
    )


def dataset_identity(dataset: Any) -> dict[str, Any] | None:
    """The number of rows and a digest of their content in order; None for a streamed dataset."""
    if not isinstance(dataset, Dataset):
        return None
    digest = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(_HASHED_ROWS):
        table = batch.combine_chunks().replace_schema_metadata(None)
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as stream:
            stream.write_table(table)
        digest.update(sink.getvalue())
    return {"rows": len(dataset), "content": digest.hexdigest()[:16]}


def model_identity(model: Any) -> dict[str, Any]:
    """The model's class, its number of parameters, and a digest of their names, shapes, dtypes and `requires_grad`."""
    digest, count = hashlib.sha256(), 0
    for name, parameter in model.named_parameters():
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO-3 `shape` is empty
        count += math.prod(shape)
        digest.update(f"{name} {shape} {parameter.dtype} {parameter.requires_grad}\n".encode())
    return {"type": type(model).__name__, "parameters": count, "shapes": digest.hexdigest()[:16]}


def frozen_weights(model: Any) -> str | None:
    """A digest of a reference model, or of the model under an adapter: a run uses these weights, and no checkpoint
    contains them. Reads the first values of each weight, except of quantized and sharded ones.

    None if it read none, or if the adapter changes the weights under it when it is created, as PiSSA does.
    """
    adapters = model.peft_config.values() if is_peft_model(model) else ()
    if any(isinstance(getattr(adapter, "init_lora_weights", None), str) for adapter in adapters):
        return None
    digest, is_empty = hashlib.sha256(), True
    for name, weight in model.named_parameters():
        is_whole = (
            type(weight) is torch.nn.Parameter and weight.is_floating_point() and not hasattr(weight, "ds_shape")
        )
        # Not what is trained, TRL's copy of the adapter, and what a trained copy of a module replaces.
        of_adapter = adapters and (weight.requires_grad or ".ref." in name or ".original_module." in name)
        if is_whole and not of_adapter:
            digest.update(weight.detach().flatten()[:_HASHED_VALUES].float().cpu().numpy().tobytes())
            is_empty = False
    return None if is_empty else digest.hexdigest()[:16]


@dataclass(frozen=True, slots=True, kw_only=True)
class RunIdentity:
    """The properties that must be equal in a run and a checkpoint for the run to resume from it.

    RunIdentity(settings=deciding_settings(args), model=model_identity(model), dataset=dataset_identity(rows),
                tools=["search"], tools_parameters={"search": {…}}, rewards=["accuracy"], processes=2, sharding=None)
    """

    settings: dict[str, Any]
    model: dict[str, Any]
    dataset: dict[str, Any] | None
    tools: list[str]
    tools_parameters: dict[str, Any]
    """`Resumable.tools_parameters`."""
    rewards: list[str]
    processes: int
    sharding: str | None
    """The library that shards the optimizer over the processes, such as DeepSpeed; None if there is none.

    Only the same number of processes can load the files of a sharded optimizer.
    """
    frozen_weights: str | None = None
    """The digest `frozen_weights`. Compared only if both sides have one."""
    reward_settings: dict[str, Any] = field(default_factory=dict)
    """Name of a reward → the settings that affect its values, for rewards that have such settings."""

    def as_dict(self) -> dict[str, Any]:
        return {each.name: _plain(getattr(self, each.name)) for each in fields(self)}


_STATE = {
    "step": int, "written": float, "between_generations": bool, "owes_evaluation": bool, "identity": dict,
    "versions": dict, "files": dict, "passes?": int, "steps_in_pass?": int,
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class SavedState:
    """The content of a checkpoint's `arpo_state.json`.

    state = SavedState.of(Path("output/checkpoint-20"))
    state.step, state.files["model.safetensors"]        # 20, 988097824
    """

    folder: Path
    step: int
    written: float
    """Seconds since the epoch."""
    between_generations: bool
    """Whether all rows of the generation batch have been trained."""
    owes_evaluation: bool
    """Whether it was written during an evaluation at its step. Then the evaluation must be repeated."""
    identity: dict[str, Any]
    versions: dict[str, str]
    files: dict[str, int]
    """Path in the folder → size in bytes."""
    passes: int = 0
    """The number of passes over the training rows that have ended."""
    steps_in_pass: int | None = None
    """The steps in the current pass; None in older checkpoints."""

    @classmethod
    def of(cls, folder: Path) -> SavedState:
        """Reads `arpo_state.json` in `folder`.

        Raises:
            CheckpointError: The file is missing, or this module did not write it.
        """
        file = folder / STATE_FILE
        try:
            if not file.exists():
                raise CheckpointError(
                    f"{folder} has no {STATE_FILE}: it is not a checkpoint of ARPOTrainer, or it is incomplete."
                )
            values = read_json(file)
            expect(values, _STATE, str(file))
        except DataError as error:
            raise CheckpointError(f"{file} cannot be read: {error}") from error
        return cls(
            folder=folder, **{name: values[name] for key in _STATE if (name := key.removesuffix("?")) in values}
        )

    def check_files(self) -> None:
        """Raises CheckpointError if a file is missing that resuming reads, or its size is not the recorded one."""
        for name, size in self.files.items():
            if Path(name).name == _MAY_BE_MISSING:
                continue
            try:
                found = (self.folder / name).stat().st_size
            except OSError as error:
                raise CheckpointError(f"{self.folder / name} is missing ({error.strerror}).") from error
            if found != size:
                raise CheckpointError(f"{self.folder / name} has {found:,} bytes; it was written with {size:,}.")

    def check_same_run(self, now: RunIdentity) -> None:
        """Raises ConfigError if another run wrote the checkpoint; names the differences."""
        then = dict(self.identity)
        here = {name: value for name, value in now.as_dict().items() if name in then}  # older checkpoints have fewer
        if None in (then.get("frozen_weights"), here.get("frozen_weights")):
            for identity in (then, here):
                identity.pop("frozen_weights", None)
        if then["processes"] != here["processes"]:
            self._check_can_spread(then, here)
            then["processes"] = here["processes"]
            for identity in (then, here):
                identity["settings"] = {k: v for k, v in identity["settings"].items() if k not in _BATCH_SETTINGS}
        differences = [difference.removeprefix("settings.") for difference in differences_between(then, here)]
        if differences:
            more = f" (and {len(differences) - 3} more)" if len(differences) > 3 else ""
            raise ConfigError(
                f"{self.folder} was written by another run: {'; '.join(differences[:3])}{more}. To resume, restore "
                f"the old value. To start a new run from its weights, set model_name_or_path to {self.folder} and "
                "choose another output_dir."
            )

    def _check_can_spread(self, then: dict[str, Any], here: dict[str, Any]) -> None:
        told = f"{self.folder} was written by {then['processes']} processes, but this run has {here['processes']}"
        way_out = f"Start {then['processes']} processes"
        if then["sharding"] is not None or here["sharding"] is not None:
            raise ConfigError(
                f"{told}; {then['sharding'] or here['sharding']} saves one part of the optimizer per process. "
                f"{way_out}."
            )
        if not self.between_generations:
            raise ConfigError(
                f"{told}; it contains the untrained rest of a generation batch, one part per process. {way_out}, or "
                "resume from a checkpoint at a multiple of the steps per generation batch."
            )


class Checkpoints:
    """The checkpoints under `folder`, an output_dir."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.unfinished = folder / UNFINISHED

    def place(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def all(self) -> list[Path]:
        """Folders named like checkpoints, lowest step first."""
        steps = [int(match[1]) for path in self.folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
        return [self.place(step) for step in sorted(steps)]

    def last(self) -> tuple[SavedState | None, list[str]]:
        """The complete checkpoint that was written last, and the faults of the incomplete ones."""
        whole, faults = [], []
        for path in self.all():
            try:
                state = SavedState.of(path)
                state.check_files()
            except CheckpointError as error:
                faults.append(str(error))
            else:
                whole.append(state)
        return max(whole, key=lambda state: (state.written, state.step), default=None), faults

    def _times(self) -> Iterator[float]:
        """When each readable checkpoint was written."""
        for path in self.all():
            with suppress(CheckpointError):
                yield SavedState.of(path).written

    def find(self, wanted: str | PathLike[str] | bool | None) -> SavedState | None:
        """The checkpoint to resume from; None to start a new run.

        Args:
            wanted: True: the last complete checkpoint, if there is one. A path: that checkpoint. None or False: none.
                Each value may also be text, as on a command line.

        Raises:
            CheckpointError: The checkpoint at the path, or every checkpoint in the folder, is incomplete.
            ConfigError: The path does not exist, `wanted` is something else, or it is None or False and the folder
                contains checkpoints.
        """
        wanted = wants_to_resume(wanted)
        if not wanted:
            if there := self.all():
                raise ConfigError(
                    f"{self.folder} contains {there[-1].name} of an earlier run. A new run would mix with it. To "
                    "continue the earlier run, set resume_from_checkpoint to true. To start a new one, choose another "
                    "output_dir or delete this folder."
                )
            return None
        last, faults = self.last()
        if wanted is True:
            if last is None and faults:
                raise CheckpointError(
                    f"No checkpoint in {self.folder} is complete. {faults[-1]} Delete them to start a new run."
                )
            for fault in faults:
                logger.warning(f"A checkpoint is not used: {fault}", main_process_only=True)
            return last
        state = None
        try:
            if not os.path.isdir(wanted):  # unlike Path.is_dir, false for a name that the system refuses
                raise ConfigError(f"resume_from_checkpoint is {wanted}; expected a folder, true or false.")
            state = SavedState.of(Path(wanted))
            state.check_files()
        except (CheckpointError, ConfigError) as error:
            way_out = (
                f"The last complete checkpoint is {last.folder}."
                if last
                else f"{self.folder} contains no complete checkpoint."
            )
            raise type(error)(f"{error} {way_out}") from error
        return state

    def clear(self) -> None:
        """Removes the incomplete checkpoints of a killed run. Renames complete ones to their final names."""
        for path in self.unfinished.glob("checkpoint-*"):
            try:
                SavedState.of(path).check_files()
            except CheckpointError:
                continue
            if not (self.folder / path.name).exists():
                path.rename(self.folder / path.name)
        shutil.rmtree(self.unfinished, ignore_errors=True)

    def finish(
        self,
        step: int,
        *,
        identity: RunIdentity,
        between_generations: bool,
        owes_evaluation: bool,
        passes: int,
        steps_in_pass: int,
    ) -> Path:
        """Completes the unfinished checkpoint of that step, moves it to its final path and returns that path."""
        folder, place = self.unfinished / f"checkpoint-{step}", self.place(step)
        written = max([time.time(), *(before + 1 for before in self._times())])  # also if the clock was set back
        state = {
            "step": step,
            "written": written,
            "between_generations": between_generations,
            "owes_evaluation": owes_evaluation,
            "passes": passes,
            "steps_in_pass": steps_in_pass,
            "identity": identity.as_dict(),
            "versions": {name: _version(name) for name in VERSIONS},
            "files": {str(path.relative_to(folder)): path.stat().st_size for path in _files(folder)},
        }
        (folder / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", "utf-8")
        for path in [*folder.rglob("*"), folder]:
            _flush_to_disk(path)
        replaced = self.unfinished / f"replaced-{step}"
        if place.exists():
            place.rename(replaced)
        folder.rename(place)
        os.utime(place, (written, written))  # `rotate_checkpoints` reads it
        _flush_to_disk(self.folder)
        shutil.rmtree(self.unfinished, ignore_errors=True)
        return place


def changed_versions(then: Mapping[str, str]) -> list[str]:
    """The packages whose installed version differs from `then`, each as "name old → new"."""
    return [
        f"{name} {then[name]} → {_version(name)}" for name in VERSIONS if name in then and then[name] != _version(name)
    ]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def _flush_to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value, default=str))
