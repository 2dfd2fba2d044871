"""Moves the trainer's weights to vLLM servers and compares logprobs after each sync.

A server may answer 200 and still have its old weights, or corrupt ones. So after each sync the servers compute the
logprobs of a fixed prompt. These must equal the trainer's within a tolerance, and must change if the trainer's change.
Then the server gets a mark: the version of the weights and a random suffix. No mark is used twice, and a restart of
the server resets it. Before its weights change, the server gets a mark that no answer can have. So an answer was
sampled from the weights of a mark if the server had this mark before the request and after the answer, even if another
job changed the weights meanwhile.
"""

from __future__ import annotations

import re
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import nullcontext, suppress
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, is_peft_model
from safetensors import SafetensorError
from safetensors.torch import save_file

from arpo_trl.common.files import whole_folder
from arpo_trl.errors import ArpoError, ConfigError, EngineError, Interrupted
from arpo_trl.rollout.engines.vllm.client import ATTEMPTS, FRESH, ServerClient, ServerFacts, ServerLost
from arpo_trl.rollout.engines.vllm.merged import keep_base
from arpo_trl.rollout.engines.weights import mean_difference
from arpo_trl.trl_seam import VLLMGeneration
from arpo_trl.visible import get_logger

logger = get_logger(__name__)  # not accelerate's: any rank may restore a server's weights

CHECK_S = 0.2
"""Seconds between two calls of `check` while servers load weights."""
WAITING = "waiting"
"""What the main rank broadcasts while servers still work."""
WAITING_S = 5.0
"""Seconds between two of these broadcasts. It must be shorter than the timeout of a collective, `ddp_timeout`."""
RESTORED_S = 30.0
"""How long a rank that could not restore a server waits for another rank to do it."""
SHARD_BYTES = 4 << 30
"""The maximum number of bytes of a model that are in memory at once while it is written to disk."""


class CannotRestore(EngineError):
    """A transfer cannot send the weights to a restarted server."""


class Transfer(Protocol):
    """A way to move weights to servers."""

    def prepare(self, version: str) -> None:
        """Do the part of the transfer that needs every rank. A collective."""

    def deliver(self, client: ServerClient, version: str) -> None:
        """Make one server serve the prepared version. Called on one rank only, for several servers in parallel."""

    def restore(self, client: ServerClient, version: str) -> None:
        """Send the version again to a server that may have been restarted. Any rank can call this alone.

        Raises:
            CannotRestore: This transfer cannot restore weights.
        """

    def discard(self, client: ServerClient, version: str) -> None:
        """Remove an old version from a server that serves a newer one."""

    def served_as(self, facts: ServerFacts, version: str) -> str:
        """The model name in requests to that server."""


class ServedWeights:
    """The weights of a set of servers.

    Args:
        trained: Returns the trainer's step and the number of times that it loaded other weights: one of them changes
            whenever the weights change.
        reference: Returns the trainer's logprobs of all ids except the first; a collective.
        canary: The ids whose logprobs are compared.
        tolerance: The largest allowed `mean_difference` of logprobs between trainer and server.
        away_s: The seconds for which a server may be unreachable during a transfer.
        check: Called during a transfer. An exception from it stops the transfer.
    """

    def __init__(
        self,
        clients: Sequence[ServerClient],
        facts: Sequence[ServerFacts],
        transfer: Transfer,
        accelerator: Accelerator,
        trained: Callable[[], tuple[int, int]],
        reference: Callable[[Sequence[int]], list[float]],
        canary: Sequence[int],
        tolerance: float,
        *,
        away_s: float = 0.0,
        check: Callable[[], None] = lambda: None,
    ):
        self.clients = list(clients)
        self.facts = dict(zip((client.url for client in clients), facts, strict=True))
        self.version = FRESH
        self._transfer = transfer
        self._accelerator = accelerator
        self._trained = trained
        self._synced: tuple[int, int] | None = None
        """The value of `trained` at the last sync; None before the first sync, and during a transfer."""
        self.lock = threading.Lock()
        """The lock of the thread that changes a server's weights: the trainer's thread, or one that restores a
        server."""
        self._reference = reference
        self._canary = list(canary)
        self._tolerance = tolerance
        self._away_s = away_s
        self.check = check
        self._run = f"arpo-{from_main(accelerator, secrets.token_hex(4))}-"
        self._syncs = 0
        self._ours: list[float] = []
        self._last_move: dict[str, tuple[list[float], list[float]]] = {}
        """For each server, its logprobs when they last changed, and the trainer's logprobs at that time."""

    def model(self, url: str) -> str:
        """The model name in requests to the server."""
        return self._transfer.served_as(self.facts[url], self.version)

    def check_model(self) -> None:
        """Check, before the first sync, that servers with their initial weights serve the trainer's model.

        A collective. Weights of another model would crash the server when it loads them.

        Raises:
            ConfigError: A server's logprobs differ from the trainer's.
        """
        ours = self._reference(self._canary)

        def compare(client: ServerClient) -> None:
            facts = self.facts[client.url]
            if facts.weight_version != FRESH:
                return
            difference = mean_difference(ours, client.logprobs(self._canary, facts.model))
            if not difference <= self._tolerance:
                raise ConfigError(
                    f"{client.url} serves {facts.model!r}, which is not the trainer's model: the logprobs of "
                    f"a text differ by {difference:.3g} on average; expected at most weight_sync_tolerance "
                    f"{self._tolerance}. Start it with --model set to the trainer's model_name_or_path."
                )

        self._on_main(compare)

    def sync(self) -> None:
        """Move the weights to every server and compare logprobs, if the weights have changed. A collective.

        Waits for a server that is down, or that is killed during the transfer.

        Raises:
            ConfigError: A server was restarted with other settings.
            EngineError: A server stays unreachable, could not load the weights, does not serve the trainer's weights,
                or serves another client.
        """
        if self.is_current:
            return
        trained = self._trained()
        self._synced = None  # in case the transfer fails
        self._move()
        self._synced = trained

    @property
    def is_current(self) -> bool:
        """Whether the servers have the trainer's weights, so that `sync` has nothing to do."""
        return self._trained() == self._synced

    @property
    def step(self) -> int | None:
        """The step of the trainer whose weights the servers have; None before the first sync, and during a
        transfer."""
        return None if self._synced is None else self._synced[0]

    def wait_for_ranks(self) -> None:
        """Wait until every rank has reached this point."""
        self._accelerator.wait_for_everyone()

    def _move(self) -> None:
        previous, self._syncs = self.version, self._syncs + 1
        version = f"{self._run}{self._syncs}"

        def claim(client: ServerClient) -> None:
            with suppress(ServerLost):  # `update` waits for it
                self._reset(client, 1)  # refuses a server that works for another job while it still has its weights
                self._mark_loading(client, version)

        self._on_main(claim)  # before `prepare`, which may already change the servers' weights
        self._transfer.prepare(version)
        self._ours = self._reference(self._canary)

        def update(client: ServerClient) -> None:
            give = self._transfer.deliver
            for attempt in range(1, ATTEMPTS + 1):
                try:
                    self._mark_loading(client, version)
                    self._serve(client, version, give)
                    if previous != FRESH:
                        self._transfer.discard(client, previous)
                    return
                except ServerLost as error:
                    if attempt == ATTEMPTS:
                        raise
                    logger.warning(
                        f"{error} The server did not get the new weights. It will get them when it is back."
                    )
                client.wait(self._away_s, self.check)
                give = self._transfer.restore

        self._on_main(update)
        self.version = version

    def _check_owner(self, client: ServerClient, mark: str) -> None:
        """Check that no other job has marked the server since the start of this run."""
        if mark not in (FRESH, self.facts[client.url].weight_version) and not mark.startswith(self._run):
            raise EngineError(
                f"Another job has sent its weights to {client.url} ({mark}; those of this run start with "
                f"{self._run}). A server used for training must not serve other clients. Stop them and resume."
            )

    def _mark_loading(self, client: ServerClient, version: str) -> None:
        """Mark a server that gets the version, so that no answer counts until it has all of it. Keeps the mark of a
        rank that has restored it.

        Raises:
            ConfigError: The server was restarted with other settings than at the start.
            EngineError: Another job uses it.
        """
        mark = client.weight_version()
        if not mark.startswith(self._run):
            facts, before = client.facts(), self.facts[client.url]
            mark = facts.weight_version
            self._check_owner(client, mark)
            changed = [
                f"{name} is {now!r}, but was {then!r}"
                for name, now in asdict(facts).items()
                if name != "weight_version" and now != (then := getattr(before, name))
            ]
            if changed:
                raise ConfigError(
                    f"{client.url} was restarted with other settings: its {', '.join(changed)}. Restart it with the "
                    "flags that it had, and resume from the last checkpoint."
                )
        if mark != _loading(version) and not _has(mark, version):
            client.set_weight_version(_loading(version))

    def _serve(
        self, client: ServerClient, version: str, give: Callable[[ServerClient, str], None], resets: int = 1
    ) -> str:
        """Give the server the version, compare logprobs, and return the server's mark.

        If another rank has restored the server meanwhile, its mark stays: with another one the ranks would discard
        the answers of turns that run there again.

        Args:
            resets: The attempts to reset the prefix cache.
        """
        give(client, version)
        if _has(mark := client.weight_version(), version):
            return mark
        self._reset(client, resets)  # again, because a request may have come while the weights changed
        self._compare(client, version)
        if _has(mark := client.weight_version(), version):
            return mark
        if mark != _loading(version):
            self._check_owner(client, mark)  # it loads the weights of another job, maybe over the compared ones
            raise ServerLost(f"{client.url} was restarted while it got weights.")
        mark = f"{version}.{secrets.token_hex(4)}"
        client.set_weight_version(mark)
        return mark

    def _reset(self, client: ServerClient, attempts: int) -> None:
        """Reset the prefix cache, which has states from other weights. Aborts the requests that use it between two
        attempts."""
        for attempt in range(attempts):
            if attempt:
                client.abort()
                time.sleep(CHECK_S)
            if client.reset_prefix_cache():
                return
        raise EngineError(
            f"{client.url} could not reset its prefix cache, because other requests use it. A server used for "
            "training must not serve other clients. Stop them and resume."
        )

    def restore(self, client: ServerClient) -> str:
        """Send the current weights to the server if it was restarted, and return its mark. Any rank can call this.

        Raises:
            ServerLost: The server is down.
            CannotRestore: It was restarted, and the transfer cannot send it the weights.
            ConfigError: It was restarted with other settings, or refuses access.
            EngineError: It does not serve the trainer's weights, or another job uses it.
        """
        with self.lock:
            if _has(mark := client.weight_version(), self.version):
                return mark
            self._mark_loading(client, self.version)
            logger.warning(f"{client.url} was restarted. It now gets the current weights.")
            try:
                # Requests that reached the server before a rank noticed the restart use the prefix cache.
                return self._serve(client, self.version, self._transfer.restore, resets=ATTEMPTS)
            except (ServerLost, CannotRestore):
                raise
            except (EngineError, ConfigError):
                # Several ranks may restore the server at the same time. It refuses some of their requests.
                deadline = time.monotonic() + RESTORED_S
                while not _has(mark := client.weight_version(), self.version):
                    if time.monotonic() > deadline:
                        raise
                    time.sleep(CHECK_S)
                return mark

    def _compare(self, client: ServerClient, version: str) -> None:
        ours, url = self._ours, client.url
        theirs = client.logprobs(self._canary, self._transfer.served_as(self.facts[url], version))
        difference = mean_difference(ours, theirs)
        if not difference <= self._tolerance:
            raise EngineError(
                f"{url} does not serve the trainer's weights, although it reported that it loaded them: logprobs "
                f"of a text differ by {difference:.3g} on average; expected at most {self._tolerance}. Restart it "
                "with the trainer's model and precision, or raise weight_sync_tolerance if its precision is lower."
            )
        before, ours_then = self._last_move.get(url, ([], ours))
        if theirs != before:
            self._last_move[url] = (theirs, ours)
        elif (moved := mean_difference(ours, ours_then)) > self._tolerance / 10:
            raise EngineError(
                f"{url} still serves old weights, although it reported that it loaded new ones: the trainer's "
                f"logprobs of a text have changed by {moved:.3g} on average, but the server's have not. On a CPU, "
                "arpo-trl must be installed in the server's environment."
            )

    def _on_main(self, work: Callable[[ServerClient], None]) -> None:
        """Run `work` for every server on the main rank, and raise its error, or `check`'s, on all ranks.

        The wait for a server can be longer than `ddp_timeout`. So the other ranks wait in many short broadcasts: at
        the timeout of a single long one, the run would end without this error.
        """
        problem: ArpoError | Interrupted | str | None = None
        if self._accelerator.is_main_process:
            pool = ThreadPoolExecutor(len(self.clients))
            try:
                self.check()
                running = [pool.submit(work, client) for client in self.clients]
                told = time.monotonic()
                while wait(running, CHECK_S).not_done:
                    self.check()
                    if time.monotonic() - told > WAITING_S:
                        from_main(self._accelerator, WAITING)
                        told = time.monotonic()
                for done in running:
                    done.result()
            except (ArpoError, Interrupted) as error:
                problem = error
            finally:
                pool.shutdown(wait=False)  # an interrupted request may last as long as vllm_request_timeout_s
        problem = from_main(self._accelerator, problem)
        while problem == WAITING:  # on the other ranks
            problem = from_main(self._accelerator, None)
        if isinstance(problem, BaseException):
            raise problem


def _has(mark: str, version: str) -> bool:
    """Whether a server with this mark has the version."""
    return mark.rpartition(".")[0] == version


def _loading(version: str) -> str:
    """The mark of a server that gets the version. No version has it."""
    return f"{version}-loading"


def from_main(accelerator: Accelerator, value: Any) -> Any:
    """Broadcast the main process's value to every rank."""
    values = [value]
    if accelerator.num_processes > 1:
        broadcast_object_list(values, from_process=0)
    return values[0]


class _Parameters(VLLMGeneration):
    """TRL's iteration over a model's full parameters, for any sharding, with vLLM's parameter names.

    Overrides `_init_vllm`, which would require a GPU and open an NCCL group with one server.
    """

    def _init_vllm(self) -> None:
        pass

    def named(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Iterate over the names and full parameters, with LoRA adapters merged. A collective."""
        yield from self._iter_named_params()

    def gathered(self, parameters: list[torch.nn.Parameter]) -> Any:
        """A context in which every rank has the full `parameters`. A collective."""
        return self._dist.gather_params(parameters) if not self._dist.is_fsdp else nullcontext()

    @property
    def sharded_by_fsdp(self) -> bool:
        return bool(self._dist.is_fsdp)


class DiskTransfer:
    """Moves weights through a folder that trainer and servers share. Needs no GPU. The run survives a server's
    restart.

    If every server loads the model's adapter as it is (`is_plain_adapter`), only the adapter is written. Otherwise the
    whole model is written, with adapters merged.
    """

    def __init__(
        self, model: Any, accelerator: Accelerator, tokenizer: Any, folder: Path, facts: Sequence[ServerFacts]
    ):
        self._parameters = _Parameters(model, accelerator, tokenizer, mode="server")
        keep_base(self._parameters)
        self._model = model
        self._accelerator = accelerator
        self._folder = folder.resolve()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"weight_sync_dir {folder} cannot be created ({error}). Choose another folder."
            ) from error
        self._dtype = getattr(torch, facts[0].dtype)
        self.sends_adapter = not self._parameters.sharded_by_fsdp and is_plain_adapter(model, facts)

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
            for _ in named:  # joins the remaining collectives if this rank does not write, or failed
                pass
        problem = from_main(self._accelerator, problem)
        if problem is not None:
            raise EngineError(
                f"The weights cannot be written to weight_sync_dir {self._folder} ({problem}). Free disk space, or "
                "choose another folder, and resume from the last checkpoint."
            )

    def _write(self, version: str, write: Callable[[Path], None]) -> str | None:
        """Write the version atomically and remove older ones, on the main rank. Returns the error as text, or None."""
        if not self._accelerator.is_main_process:
            return None
        self._remove(r"arpo-[0-9a-f]+-\d+\.partial-[0-9a-f]+")  # of killed runs, which would take the space
        try:
            with whole_folder(self._folder / version) as partial:
                write(partial)
        except (OSError, SafetensorError) as error:  # sent to all ranks, which would otherwise wait for this one
            return f"{type(error).__name__}: {error}"
        self._remove(rf"(?!{re.escape(version)}$)arpo-[0-9a-f]+-\d+")
        return None

    def _remove(self, names: str) -> None:
        """Remove the folders whose names match `names`, a regular expression."""
        for old in self._folder.glob("arpo-*"):
            if re.fullmatch(names, old.name):
                shutil.rmtree(old, ignore_errors=True)

    def deliver(self, client: ServerClient, version: str) -> None:
        folder = self._folder / version
        if self.sends_adapter:
            (name,) = self._model.peft_config
            # PEFT saves an adapter of another name than its usual one in a subfolder.
            client.load_adapter(version, str(folder if name == "default" else folder / name))
        else:
            client.load_weights(str(folder))

    def restore(self, client: ServerClient, version: str) -> None:
        # vLLM rejects an adapter that it already has: after a lost answer, or from another rank, whose turns may use
        # it. No other weights have this name.
        if not (self.sends_adapter and client.has_adapter(version)):
            self.deliver(client, version)

    def discard(self, client: ServerClient, version: str) -> None:
        if self.sends_adapter:
            client.unload_adapter(version)

    def served_as(self, facts: ServerFacts, version: str) -> str:
        return version if self.sends_adapter and version != FRESH else facts.model


class NcclTransfer:
    """TRL's GPU-to-GPU transfer to servers that were started with `--weight-transfer-config '{"backend": "nccl"}'`.

    Each server has one NCCL group, on consecutive ports from `group_port`. A restarted server loses its group.
    """

    def __init__(
        self, model: Any, accelerator: Accelerator, tokenizer: Any, urls: Sequence[str], group_port: int, away_s: float
    ):
        if accelerator.device.type != "cuda":
            raise ConfigError(
                f"weight_sync is 'nccl', which needs a GPU, but the trainer runs on "
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
        for group in self._groups:
            keep_base(group)

    def prepare(self, version: str) -> None:
        for group in self._groups:
            group.sync_weights()

    def deliver(self, client: ServerClient, version: str) -> None:
        """Do nothing: `prepare` has moved the weights."""

    def restore(self, client: ServerClient, version: str) -> None:
        raise CannotRestore(
            f"{client.url} was restarted and has lost its weights and its NCCL group. Resume from the last "
            "checkpoint. With weight_sync: disk a run continues after a server's restart."
        )

    def discard(self, client: ServerClient, version: str) -> None:
        """Do nothing: the new weights overwrite the old ones."""

    def served_as(self, facts: ServerFacts, version: str) -> str:
        return facts.model


def write_shards(folder: Path, named: Iterable[tuple[str, torch.Tensor]], dtype: torch.dtype) -> None:
    """Write the tensors to safetensors files in `folder`, floating-point tensors as `dtype`."""
    shard: dict[str, torch.Tensor] = {}
    size = count = 0

    def flush() -> None:
        nonlocal shard, size, count
        save_file(shard, folder / f"model-{count:05d}.safetensors")
        shard, size, count = {}, 0, count + 1

    for name, tensor in named:
        kind = dtype if tensor.is_floating_point() else tensor.dtype
        # Always a copy, because a later step, such as unmerging an adapter, may change the tensor.
        shard[name] = tensor.detach().to("cpu", kind, copy=True).contiguous()
        size += shard[name].nbytes
        if size >= SHARD_BYTES:
            flush()
    if shard:
        flush()


_SERVED = frozenset(
    "r lora_alpha lora_dropout use_rslora target_modules exclude_modules layers_to_transform layers_pattern task_type "
    "inference_mode base_model_name_or_path revision auto_mapping peft_type peft_version fan_in_fan_out".split()
)
"""The settings of a LoRA adapter that may have any value: vLLM reads them, or they do not change the result."""


def is_plain_adapter(model: Any, facts: Sequence[ServerFacts]) -> bool:
    """Whether the model is one LoRA adapter that all servers load as it is, on an unchanged base.

    vLLM applies one rank and one scaling to all modules.
    """
    if not is_peft_model(model) or len(model.peft_config) != 1:
        return False
    config = next(iter(model.peft_config.values()))
    keeps_base = config.peft_type == "LORA" and config.init_lora_weights in (True, False, "gaussian")
    if not keeps_base:
        return False
    usual = type(config)()
    others = [field.name for field in fields(config) if field.name not in _SERVED | {"init_lora_weights"}]
    if any(getattr(config, name) not in (getattr(usual, name), None, {}) for name in others):
        return False
    if any(parameter.requires_grad and "lora_" not in name for name, parameter in model.named_parameters()):
        return False
    return all(fact.max_lora_rank is not None and config.r <= fact.max_lora_rank for fact in facts)
