"""The trainer's weights in vLLM servers: moved there, named, and compared with the trainer's own after each move.

A server may answer 200 and go on with its old weights, or with broken ones. So after each sync it is asked for the
logprobs of a fixed prompt: they must be the trainer's within a tolerance, and must have moved if the trainer's have.
Each sync also gives the server's weights a version, which a server that was restarted does not know.
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, is_peft_model
from safetensors import SafetensorError
from safetensors.torch import save_file

from arpo_trl.common.files import whole_folder
from arpo_trl.errors import ArpoError, ConfigError, EngineError
from arpo_trl.rollout.engines.vllm.client import FRESH, ServerClient, ServerFacts
from arpo_trl.rollout.engines.weights import mean_difference
from arpo_trl.trl_seam import VLLMGeneration

SHARD_BYTES = 4 << 30
"""Most of a model that is held in memory at once while it is written."""


class Transfer(Protocol):
    """A way for weights to travel."""

    def prepare(self, version: str) -> None:
        """A collective: what has to happen on every rank."""

    def deliver(self, client: ServerClient, version: str) -> None:
        """Has one server serve the prepared version. On one rank only, in any number of servers at the same time."""

    def restore(self, client: ServerClient, version: str) -> None:
        """Gives a restarted server the version again, from any rank alone; EngineError where that is not possible."""

    def discard(self, client: ServerClient, version: str) -> None:
        """Takes back what a delivery left behind in a server, once it serves a newer version."""

    def served_as(self, facts: ServerFacts, version: str) -> str:
        """The model's name to ask that server for."""


class ServedWeights:
    """The weights that a set of servers serves.

    Args:
        trained: What changes when the trainer's weights do.
        reference: The trainer's logprobs of ids, each but the first; a collective.
        canary: The ids that logprobs are compared on.
        tolerance: Most `mean_difference` of logprobs between trainer and server.
    """

    def __init__(
        self,
        clients: Sequence[ServerClient],
        facts: Sequence[ServerFacts],
        transfer: Transfer,
        accelerator: Accelerator,
        trained: Callable[[], Hashable],
        reference: Callable[[Sequence[int]], list[float]],
        canary: Sequence[int],
        tolerance: float,
    ):
        self.clients = list(clients)
        self.facts = dict(zip((client.url for client in clients), facts, strict=True))
        self.version = FRESH
        self._transfer = transfer
        self._accelerator = accelerator
        self._trained = trained
        self._synced: Hashable = None
        """What `trained` returned when the servers last got the weights."""
        self._reference = reference
        self._canary = list(canary)
        self._tolerance = tolerance
        self._run = _from_main(accelerator, secrets.token_hex(4))
        self._syncs = 0
        self._ours: list[float] = []
        self._last_move: dict[str, tuple[list[float], list[float]]] = {}
        """For each server its logprobs when they last changed, and the trainer's at that time."""

    def model(self, url: str) -> str:
        """What to ask the server for."""
        return self._transfer.served_as(self.facts[url], self.version)

    def check_model(self) -> None:
        """Compares servers that still serve what they were started with to the trainer, before anything is sent.

        A collective. Weights of another model would not load, and take the server down.
        """
        ours = self._reference(self._canary)

        def compare(client: ServerClient) -> None:
            facts = self.facts[client.url]
            if facts.weight_version != FRESH:
                return
            difference = mean_difference(ours, client.logprobs(self._canary, facts.model))
            if not difference <= self._tolerance:
                raise ConfigError(
                    f"{client.url} serves {facts.model!r}, which is another model than the trainer's: logprobs of one "
                    f"text differ by {difference:.3g} on average (weight_sync_tolerance {self._tolerance}). Start it "
                    "with --model set to what model_name_or_path is."
                )

        self._on_main(compare)

    def sync(self) -> None:
        """A collective: the trainer's weights to every server, and a comparison of logprobs, if the weights changed.

        Raises:
            EngineError: A server was lost, could not load, or serves something else than the trainer's weights.
        """
        if (trained := self._trained()) == self._synced:
            return
        self._synced = None  # should the move fail
        self._move()
        self._synced = trained

    def _move(self) -> None:
        previous, self._syncs = self.version, self._syncs + 1
        version = f"arpo-{self._run}-{self._syncs}"
        self._transfer.prepare(version)
        self._ours = self._reference(self._canary)

        def update(client: ServerClient) -> None:
            self._transfer.deliver(client, version)
            client.mark(version)
            self._compare(client, version)
            if previous != FRESH:
                self._transfer.discard(client, previous)

        self._on_main(update)
        self.version = version

    def restore(self, client: ServerClient) -> None:
        """Gives a restarted server the current weights; by any rank, alone."""
        self._transfer.restore(client, self.version)
        client.mark(self.version)
        self._compare(client, self.version)

    def _compare(self, client: ServerClient, version: str) -> None:
        ours, url = self._ours, client.url
        theirs = client.logprobs(self._canary, self._transfer.served_as(self.facts[url], version))
        difference = mean_difference(ours, theirs)
        if not difference <= self._tolerance:
            raise EngineError(
                f"{url} does not serve the trainer's weights, though it said that it loaded them: logprobs of one "
                f"text differ by {difference:.3g} on average, at most {self._tolerance} is expected. Restart it with "
                "the model and precision that are trained, or raise weight_sync_tolerance if its precision is lower."
            )
        before, ours_then = self._last_move.get(url, ([], ours))
        if theirs != before:
            self._last_move[url] = (theirs, ours)
        elif (moved := mean_difference(ours, ours_then)) > self._tolerance / 10:
            raise EngineError(
                f"{url} still serves old weights, though it said that it loaded new ones: the trainer's logprobs of a "
                f"text have moved by {moved:.3g} on average, the server's not at all. On a CPU, the server's "
                "environment must have arpo-trl installed."
            )

    def _on_main(self, work: Callable[[ServerClient], None]) -> None:
        """Does the work for every server from one rank; its error is raised on all."""
        problem: ArpoError | None = None
        if self._accelerator.is_main_process:
            with ThreadPoolExecutor(len(self.clients)) as pool:
                try:
                    list(pool.map(work, self.clients))
                except ArpoError as error:
                    problem = error
        problem = _from_main(self._accelerator, problem)
        if problem is not None:
            raise problem


def _from_main(accelerator: Accelerator, value: Any) -> Any:
    """The main process's value, on every rank."""
    values = [value]
    if accelerator.num_processes > 1:
        broadcast_object_list(values, from_process=0)
    return values[0]


class _Parameters(VLLMGeneration):
    """TRL's walk over a model's full parameters, whatever shards them, under the names that vLLM knows.

    TRL's object without TRL's connection: `_init_vllm` would ask for a GPU and one server's NCCL group.
    """

    def _init_vllm(self) -> None:
        pass

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """A collective; LoRA adapters are merged meanwhile."""
        yield from self._iter_named_params()

    def gathered(self, parameters: list[torch.nn.Parameter]) -> Any:
        """A collective: those parameters in full, on every rank, while the context is open."""
        return self._dist.gather_params(parameters) if not self._dist.is_fsdp else nullcontext()

    @property
    def sharded_by_fsdp(self) -> bool:
        return bool(self._dist.is_fsdp)


class DiskTransfer:
    """Weights by way of a folder that trainer and servers share. Needs no GPU, and survives a server's restart.

    Where the model is a LoRA adapter on a frozen base and every server can hold adapters of its rank, only the adapter
    travels. Otherwise the whole model does, adapters merged.
    """

    def __init__(
        self, model: Any, accelerator: Accelerator, tokenizer: Any, folder: Path, facts: Sequence[ServerFacts]
    ):
        self._parameters = _Parameters(model, accelerator, tokenizer, mode="server")
        self._model = model
        self._accelerator = accelerator
        self._folder = folder.resolve()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"weight_sync_dir {folder} cannot be made ({error}). Choose another folder.") from error
        self._dtype = getattr(torch, facts[0].dtype)
        self.sends_adapter = not self._parameters.sharded_by_fsdp and _is_plain_adapter(model, facts)

    def prepare(self, version: str) -> None:
        if self.sends_adapter:
            trained = [parameter for name, parameter in self._model.named_parameters() if "lora_" in name]
            with self._parameters.gathered(trained):
                problem = self._write(
                    version, lambda folder: self._model.save_pretrained(folder, save_embedding_layers=False)
                )
        else:
            named = self._parameters.named()
            problem = self._write(version, lambda folder: write_shards(folder, named, self._dtype))
            for _ in named:  # takes part in gathering what is not written here, or could not be
                pass
        problem = _from_main(self._accelerator, problem)
        if problem is not None:
            raise EngineError(
                f"The weights cannot be written to weight_sync_dir {self._folder} ({problem}). Make room, or choose "
                "another folder, and resume from the last checkpoint."
            )

    def _write(self, version: str, write: Callable[[Path], None]) -> str | None:
        """Writes the version, whole or not at all, and removes older ones; on one rank. Returns what failed."""
        if not self._accelerator.is_main_process:
            return None
        try:
            with whole_folder(self._folder / version) as partial:
                write(partial)
        except (OSError, SafetensorError) as error:  # told to all ranks, which would wait for this one
            return f"{type(error).__name__}: {error}"
        for old in self._folder.glob("arpo-*"):
            if old.name != version:
                shutil.rmtree(old, ignore_errors=True)
        return None

    def deliver(self, client: ServerClient, version: str) -> None:
        folder = str(self._folder / version)
        if self.sends_adapter:
            client.load_adapter(version, folder)
        else:
            client.load_weights(folder)

    def restore(self, client: ServerClient, version: str) -> None:
        self.deliver(client, version)

    def discard(self, client: ServerClient, version: str) -> None:
        if self.sends_adapter:
            client.unload_adapter(version)

    def served_as(self, facts: ServerFacts, version: str) -> str:
        return version if self.sends_adapter and version != FRESH else facts.model


class NcclTransfer:
    """TRL's own transfer, GPU to GPU, to servers started with `--weight-transfer-config '{"backend": "nccl"}'`.

    One NCCL group for each server, on ports from `group_port` on. A group does not outlive its server.
    """

    def __init__(
        self, model: Any, accelerator: Accelerator, tokenizer: Any, urls: Sequence[str], group_port: int, away_s: float
    ):
        if accelerator.device.type != "cuda":
            raise ConfigError(
                f"weight_sync is 'nccl', which moves weights from a GPU, but the trainer runs on "
                f"{accelerator.device.type!r}. Set weight_sync: disk."
            )
        self._groups = [
            VLLMGeneration(
                model,
                accelerator,
                tokenizer,
                mode="server",
                server_base_url=url,
                server_timeout=away_s,
                group_port=group_port + i,
            )
            for i, url in enumerate(urls)
        ]

    def prepare(self, version: str) -> None:
        for group in self._groups:
            group.sync_weights()

    def deliver(self, client: ServerClient, version: str) -> None:
        """Nothing is left to do."""

    def restore(self, client: ServerClient, version: str) -> None:
        raise EngineError(
            f"{client.url} was restarted and has lost its weights and its NCCL group. Resume from the last "
            "checkpoint; with weight_sync: disk a run survives this."
        )

    def discard(self, client: ServerClient, version: str) -> None:
        """Weights are overwritten in place."""

    def served_as(self, facts: ServerFacts, version: str) -> str:
        return facts.model


def write_shards(folder: Path, named: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> None:
    """Writes the tensors to safetensors files in `folder`, floating-point ones as `dtype`."""
    shard: dict[str, torch.Tensor] = {}
    size = count = 0

    def flush() -> None:
        nonlocal shard, size, count
        save_file(shard, folder / f"model-{count:05d}.safetensors")
        shard, size, count = {}, 0, count + 1

    for name, tensor in named:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        # A copy in any case: what comes next may change the tensor, as unmerging an adapter does.
        shard[name] = tensor.detach().to("cpu", kind, copy=True).contiguous()
        size += shard[name].nbytes
        if size >= SHARD_BYTES:
            flush()
    if shard:
        flush()


def _is_plain_adapter(model: Any, facts: Sequence[ServerFacts]) -> bool:
    """Whether the model is one LoRA adapter, of a kind that vLLM serves, on a base that stays as it is."""
    if not is_peft_model(model) or len(model.peft_config) != 1:
        return False
    config = next(iter(model.peft_config.values()))
    plain = (
        str(config.peft_type).endswith("LORA")
        and not getattr(config, "use_dora", False)
        and not getattr(config, "modules_to_save", None)
        and getattr(config, "bias", "none") == "none"
    )
    rank = max([getattr(config, "r", 0), *getattr(config, "rank_pattern", {}).values()])
    return plain and all(fact.max_lora_rank is not None and rank <= fact.max_lora_rank for fact in facts)
