"""`SamplesAhead`: a trainer whose rollouts run while it updates (`rollouts_ahead`)."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object

from arpo_trl.common.spans import Spans
from arpo_trl.config import ARPOConfig
from arpo_trl.options import StaleTokens
from arpo_trl.rollout.engines.base import EngineAhead
from arpo_trl.rollout.protocols import ToolProtocol
from arpo_trl.rollout.sampler import GroupRequest, RolloutBatch, TreeSampler
from arpo_trl.rollout.tree import NodeKind
from arpo_trl.runs.resumable import Resumable
from arpo_trl.training.ahead import RolloutsAhead, Rows, Sampled
from arpo_trl.training.completions import completions_of, rollout_output
from arpo_trl.training.dealing import leaves_per_tree
from arpo_trl.training.rewards_ahead import Scored, score
from arpo_trl.trl_seam import pad


class RowsAhead:
    """An iterator over an epoch's micro-batches of rows that can look at later ones.

    Args:
        source: The iterator of the data loader. It is read on demand.
    """

    def __init__(self, source: Iterator[Rows]):
        self.source = source
        self.trained = 0
        """How many of the micro-batches were trained on: the number of the current one."""
        self._next = self._read = 0
        self._rows: dict[int, Rows] = {}

    def __iter__(self) -> RowsAhead:
        return self

    def __next__(self) -> Rows:
        rows = self.at(self._next)
        if rows is None:
            raise StopIteration
        self._next += 1
        return rows

    def at(self, position: int) -> Rows | None:
        """The micro-batch with that number, counted from 0; None if the epoch ends before it."""
        while self._read <= position:
            rows = next(self.source, None)
            if rows is None:
                return None
            self._rows[self._read] = rows
            self._read += 1
        return self._rows[position]

    def forget_trained(self) -> None:
        """Drop the micro-batches before the current one."""
        for old in [number for number in self._rows if number < self.trained]:
            del self._rows[old]


class SamplesAhead(Resumable):
    """A `Resumable` trainer that samples the next `rollouts_ahead` generation batches during an update.

    With `rollouts_ahead` 0 it changes nothing. Otherwise it changes:

    - `get_batch_samples`: the rows of an epoch can be read ahead. None is lost or repeated: they still reach the
      trainer in their order, and a checkpoint counts those that were trained.
    - `_generate_and_score_completions`: moves the weights, starts rollouts, and adds metrics. In evaluation it first
      waits until no rollout runs.
    - `_calculate_rewards`: takes the rewards that were computed after the rollout.
    - `_run_epoch`: ends with all rollouts ended. They do not cross epochs.
    """

    args: ARPOConfig
    tree_sampler: TreeSampler
    protocol: ToolProtocol
    reward_funcs: list[Any]
    _spans: Spans
    _coming: RowsAhead | None = None
    _ahead: RolloutsAhead | None = None
    _sampled: Sampled | None = None

    # Data ------------------------------------------------------------------------------------------------------------

    @property
    def _every(self) -> int:
        """Micro-batches from one generation batch to the next."""
        return int(self.args.steps_per_generation * self.num_iterations)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        if not self.args.rollouts_ahead:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._coming is None or self._coming.source is not epoch_iterator:
            self._coming = RowsAhead(epoch_iterator)
        self._coming.forget_trained()
        return super().get_batch_samples(self._coming, num_batches, device)

    def _run_epoch(self, **loop: Any) -> None:
        try:
            super()._run_epoch(**loop)
        finally:
            if self._ahead is not None:
                self._ahead.close()
            self._ahead, self._coming = None, None

    # Rollouts --------------------------------------------------------------------------------------------------------

    def pause_rollouts(self) -> None:
        """Wait until no rollout runs ahead. The main thread calls it before it samples. A collective."""
        if self._ahead is not None:
            with self.interruptible():
                self._ahead.pause()

    def _generate_and_score_completions(self, inputs: Rows) -> dict[str, Any]:
        if not self.args.rollouts_ahead or not self.model.training:
            self.pause_rollouts()
            return super()._generate_and_score_completions(inputs)
        asked_s = time.perf_counter()
        with self.interruptible():
            delayed = self._start_rollouts([dict(row) for row in inputs])
        metrics = {"delayed": delayed}
        batch = super()._generate_and_score_completions(inputs)
        sampled = self._sampled
        assert sampled is not None
        metrics["update_waited_s"] = self._spans.take("wait")
        metrics["rollout_waited_s"] = max(0.0, asked_s - sampled.ready_s)
        metrics["dropped"] = self._drop_stale(batch, sampled.rollout)
        self._log_ahead(batch, sampled.rollout, metrics)
        return batch

    def _start_rollouts(self, rows: Rows) -> float:
        """Move the weights, and start this batch, unless it was, and those ahead. Returns how many have to wait."""
        engine = self.tree_sampler.engine
        assert isinstance(engine, EngineAhead)  # checked at start-up
        with self._spans("sync"):
            engine.sync()
        if self._ahead is None:
            score_batch = partial(self._score, self.reward_funcs)  # not those that `_calculate_rewards` puts there
            self._ahead = RolloutsAhead(
                self.tree_sampler, score_batch, seed=(self.args.seed, "ahead"), check=self._interrupts.check
            )
        number = self._step // self._every
        if number not in self._ahead:
            self._start_rollout(number, rows)
        started = self._ahead.rows(number)
        assert [row["prompt"] for row in started] == [row["prompt"] for row in rows]
        delayed, epoch = 0.0, self._coming
        for coming in range(number + 1, number + 1 + self.args.rollouts_ahead):
            later = coming * self._every - self._step  # micro-batches
            rows_of_it = None if epoch is None else epoch.at(epoch.trained + later)
            accumulated = 0 if epoch is None else epoch.trained % self.args.gradient_accumulation_steps
            steps = (accumulated + later) // self.args.gradient_accumulation_steps
            if rows_of_it is None or self.state.global_step + steps >= self.state.max_steps:
                break
            if self.args.stale_tokens == StaleTokens.WAIT and steps > (self.args.max_staleness or steps):
                delayed += 1
            elif coming not in self._ahead:
                self._start_rollout(coming, rows_of_it)
        return delayed

    def _start_rollout(self, number: int, rows: Rows) -> None:
        prompts = [row["prompt"] for row in rows]
        size = leaves_per_tree(prompts, self.num_generations, branches=True)
        groups = prompts[::size]
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        first = (number * ranks + rank) * len(groups)
        assert self._ahead is not None
        self._ahead.start(
            number,
            rows,
            [
                GroupRequest(id=first + i, prompt_ids=self.protocol.encode_prompt(prompt))
                for i, prompt in enumerate(groups)
            ],
        )

    def rollout_ahead(self) -> RolloutBatch:
        """The rollout of the current batch, once it is finished."""
        assert self._ahead is not None
        with self._spans("wait"):
            self._sampled = self._ahead.wait(self._step // self._every)
        return self._sampled.rollout

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._ahead is not None:
            self._ahead.raise_error()
        loss = super().training_step(*args, **kwargs)
        if self._coming is not None:
            self._coming.trained += 1
        return loss

    # Rewards ---------------------------------------------------------------------------------------------------------

    def _score(self, functions: list[Any], rows: Rows, requests: list[GroupRequest], rollout: RolloutBatch) -> Scored:
        """Calls the reward functions, outside the main thread."""
        leaves = [leaf for tree in rollout.trees for leaf in tree.leaves()]
        fields = rollout_output(requests, leaves, logprobs=False)
        prompt_ids, ids = fields.pop("prompt_ids"), fields.pop("completion_ids")
        del fields["logprobs"]
        prompts = [row["prompt"] for row in rows]
        completions = completions_of(
            prompts, prompt_ids, leaves, self.protocol, self._tokenizer, tools=bool(self.tools)
        )
        loop = getattr(self, "async_loop", None)
        return score(functions, rows, completions, ids, fields, state=self.state, loop=loop)

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.args.rollouts_ahead or not self.model.training:
            return super()._calculate_rewards(*args, **kwargs)
        assert self._sampled is not None
        functions, scored = self.reward_funcs, self._sampled.scored
        self.reward_funcs = scored.replaying(functions)
        try:
            rewards = super()._calculate_rewards(*args, **kwargs)
        finally:
            self.reward_funcs = functions
        self._spans.add("reward", scored.seconds)
        return rewards

    # Staleness -------------------------------------------------------------------------------------------------------

    def _drop_stale(self, batch: dict[str, Any], rollout: RolloutBatch) -> float:
        """Takes tokens above `max_staleness` out of the loss. Returns their share of the rank's sampled tokens."""
        limit = self.args.max_staleness
        if limit is None or self.args.stale_tokens != StaleTokens.DROP:
            return 0.0
        oldest = self.state.global_step - limit
        fresh = pad(
            [
                torch.tensor(
                    [
                        int(node.kind is not NodeKind.TURN or version >= oldest)
                        for node in leaf.nodes
                        for version in (node.versions or [oldest] * len(node.ids))
                    ]
                )
                for tree in rollout.trees
                for leaf in tree.leaves()
            ],
            padding_value=1,
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
        ).to(batch["tool_mask"].device)
        sampled = (batch["completion_mask"] * batch["tool_mask"]).sum()
        batch["tool_mask"] = batch["tool_mask"] * fresh
        trained = (batch["completion_mask"] * batch["tool_mask"]).sum()
        batch["num_items_in_batch"] = self.accelerator.gather(trained).sum()
        return float(1 - trained / sampled)

    def _log_ahead(self, batch: dict[str, Any], rollout: RolloutBatch, metrics: dict[str, float]) -> None:
        """Logs means and maxima over ranks, as docs/metrics.md says. A collective."""
        step = self.state.global_step
        stale = [step - version for tree in rollout.trees for node in tree.turns() for version in node.versions]
        metrics["staleness_mean"] = sum(stale) / max(1, len(stale))
        metrics["staleness_max"] = float(max(stale, default=0))
        metrics["sync_s"] = self._spans.take("sync")
        if (ratio := batch.get("importance_sampling_ratio")) is not None:
            metrics["ratio_clipped"] = self._share_clipped(ratio, batch["completion_mask"] * batch["tool_mask"])
        everyone = gather_object([metrics])
        for name in metrics:
            values = [of_rank[name] for of_rank in everyone]
            whole = max(values) if name == "staleness_max" else sum(values) / len(values)
            self._metrics["train"][f"arpo/ahead/{name}"].append(whole)

    def _share_clipped(self, ratio: torch.Tensor, mask: torch.Tensor) -> float:
        """The share of TRL's ratios, of tokens (B, T) in `mask` or of sequences (B, 1), that are at a limit or 0."""
        if ratio.size(1) == mask.size(1):
            ratio = ratio[mask.bool()]
        clipped = (ratio == 0) | (ratio >= (self.vllm_importance_sampling_clip_max or torch.inf))
        if self.vllm_importance_sampling_clip_min is not None:
            clipped |= ratio <= self.vllm_importance_sampling_clip_min
        return float(clipped.float().mean()) if len(ratio) else 0.0
