"""`SamplesAhead`: a trainer whose rollouts run while it updates (`rollouts_ahead`)."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from accelerate.utils import gather_object

from arpo_trl.common.spans import Spans
from arpo_trl.config import ARPOConfig
from arpo_trl.options import StaleTokens
from arpo_trl.rollout.batch import GroupRequest, RolloutBatch
from arpo_trl.rollout.engines.base import EngineAhead
from arpo_trl.rollout.protocols import ToolProtocol
from arpo_trl.rollout.sampler import TreeSampler
from arpo_trl.rollout.tree import NodeKind
from arpo_trl.runs.resumable import Resumable
from arpo_trl.tools.environments.state import Environments
from arpo_trl.tools.toolbox import ToolBox
from arpo_trl.training.ahead import Prepared, RolloutsAhead, Sampled
from arpo_trl.training.completions import completions_of, reward_columns
from arpo_trl.training.dealing import leaves_per_tree
from arpo_trl.training.environments import NO_PROMPT, begun, of_leaves
from arpo_trl.training.kits import Kits
from arpo_trl.training.loss_terms import loss_mask, recount
from arpo_trl.training.rewards_ahead import Scored, score
from arpo_trl.training.rows_ahead import Rows, RowsAhead, epochs_are_known, later_epochs
from arpo_trl.trl_seam import pad


class SamplesAhead(Resumable):
    """A `Resumable` trainer that samples the next `rollouts_ahead` generation batches during an update.

    With `rollouts_ahead` 0 it changes nothing. Otherwise it changes:

    - `get_batch_samples`: rows can be read ahead, also from later epochs. No row is lost or repeated: rows still reach
      the trainer in their order, and a checkpoint counts only the trained rows.
    - `_generate_and_score_completions`: in training it moves the weights, starts rollouts, and adds metrics. In
      evaluation a subclass calls `pause_rollouts` before.
    - `_calculate_rewards`: returns the rewards that were computed after the rollout.
    - `_run_epoch`: stops all rollouts after the last epoch, after one that a callback has ended, and on an error.
    """

    args: ARPOConfig
    protocol: ToolProtocol
    tree_sampler: TreeSampler
    _environments: Environments | None
    _all_environments: list[Environments]
    _kits: Kits
    reward_funcs: list[Any]
    _spans: Spans
    _coming: RowsAhead | None = None
    _skipped = 0
    _ahead: RolloutsAhead | None = None
    _sampled: Sampled | None = None

    # Data ------------------------------------------------------------------------------------------------------------

    @property
    def samples_ahead(self) -> bool:
        """Whether the trainer's next batch is sampled ahead. False in evaluation."""
        return bool(self.args.rollouts_ahead and self.model.training)

    @property
    def _every(self) -> int:
        """Micro-batches from one generation batch to the next."""
        return int(self.args.steps_per_generation * self.num_iterations)

    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        if not self.args.rollouts_ahead:
            return super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._coming is None:
            self._coming = RowsAhead(epoch_iterator, self._later_epochs(), skipped=self._skipped)
        self._coming.forget_trained()
        return super().get_batch_samples(self._coming, num_batches, device)

    def _later_epochs(self) -> Iterator[Rows]:
        if not epochs_are_known(self.train_dataset, self.accelerator):
            return iter(())
        size = self._train_batch_size * self.args.steps_per_generation
        ranks = self.accelerator.num_processes
        dataset = self._remove_unused_columns(self.train_dataset)  # as the data loader does
        return later_epochs(dataset, self._sampler, size, self.accelerator.process_index, ranks)

    def _run_epoch(self, **loop: Any) -> None:
        loop = self._in_pass(loop)
        is_first = loop["epoch"] == loop["epochs_trained"]
        self._skipped = loop["steps_trained_in_current_epoch"] if is_first else 0
        self._coming = None
        try:
            super()._run_epoch(**loop)
        except BaseException:
            self._end_rollouts()
            raise
        if self.control.should_training_stop or self.control.should_epoch_stop:  # then the next rows are others
            self._end_rollouts()

    def _end_training(self) -> None:
        super()._end_training()
        self._end_rollouts()

    def _end_rollouts(self) -> None:
        if self._ahead is not None:
            self._ahead.close()
            for environments in self._all_environments:
                environments.close_kept()
        self._ahead, self._coming = None, None

    # Rollouts --------------------------------------------------------------------------------------------------------

    def pause_rollouts(self) -> None:
        """Wait until no rollout runs ahead. The main thread calls this before it samples. A collective."""
        if self._ahead is not None:
            with self.interruptible():
                self._ahead.pause()

    def _generate_and_score_completions(self, inputs: Rows) -> dict[str, Any]:
        if not self.samples_ahead:
            return super()._generate_and_score_completions(inputs)
        asked_s = time.perf_counter()
        with self.interruptible():
            delayed = self._start_rollouts([dict(row) for row in inputs])
            assert self._ahead is not None
            with self._spans("wait"):
                inputs = self._ahead.prepared_rows(self._step // self._every)
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
        """Move the weights, and start this batch and the ones ahead, unless already started. Returns how many must
        wait."""
        engine = self.tree_sampler.engine
        assert isinstance(engine, EngineAhead)  # checked at start-up
        with self._spans("sync"):
            engine.sync()
        if self._ahead is None:
            # Not the functions that `_calculate_rewards` replaces them with.
            score_batch = partial(self._score, self.reward_funcs)
            self._ahead = RolloutsAhead(
                self.tree_sampler, score_batch, seed=(self.args.seed, "ahead"), check=self._interrupts.check
            )
        number = self._step // self._every
        if number not in self._ahead:
            self._start_rollout(number, rows)
        started = self._ahead.rows(number)
        assert [row.get("prompt") for row in started] == [row.get("prompt") for row in rows]
        delayed, epoch = 0.0, self._coming
        for coming in range(number + 1, number + 1 + self.args.rollouts_ahead):
            later = coming * self._every - self._step  # micro-batches
            rows_of_it = None if epoch is None else epoch.at(epoch.trained + later)
            if epoch is None or rows_of_it is None:
                break
            steps = epoch.steps_to(epoch.trained + later, self.args.gradient_accumulation_steps)
            if self.state.global_step + steps >= self.state.max_steps:
                break
            if self.args.stale_tokens == StaleTokens.WAIT and steps > (self.args.max_staleness or steps):
                delayed += 1
            elif coming not in self._ahead:
                self._start_rollout(coming, rows_of_it)
        return delayed

    def _start_rollout(self, number: int, rows: Rows) -> None:
        size = leaves_per_tree([row.get("prompt", NO_PROMPT) for row in rows], self.num_generations, branches=True)
        ranks, rank = self.accelerator.num_processes, self.accelerator.process_index
        first = (number * ranks + rank) * (len(rows) // size)

        def prepare(check: Callable[[], None]) -> Prepared:
            shown = rows
            if self._environments is not None:
                # The sampling thread polls the trainer's toolbox
                with ToolBox((), timeout_s=self.args.tool_timeout_s, concurrency=self.args.tool_concurrency) as box:
                    shown = begun(self._environments, rows, size, first, box, check)
            return shown, self._kits.requests([row["prompt"] for row in shown[::size]], rows[::size], first)

        assert self._ahead is not None
        self._ahead.start(number, rows, prepare, takes_time=self._environments is not None)

    def rollout_ahead(self) -> RolloutBatch:
        """The rollout of the current batch. Waits until it is finished."""
        assert self._ahead is not None
        with self._spans("wait"):
            self._sampled = self._ahead.wait(self._step // self._every)
        return self._sampled.rollout

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if self._ahead is not None and self._ahead.failed:
            self.stop_together()  # the other ranks do so in their `training_step`
            self._ahead.raise_error()
        loss = super().training_step(*args, **kwargs)
        if self._coming is not None:
            self._coming.trained += 1
        return loss

    # Rewards ---------------------------------------------------------------------------------------------------------

    def _score(self, functions: list[Any], rows: Rows, requests: list[GroupRequest], rollout: RolloutBatch) -> Scored:
        """Calls the reward functions, outside the main thread."""
        leaves, prompt_ids = rollout.leaves, rollout.prompt_ids
        ids, fields = [leaf.ids for leaf in leaves], reward_columns(prompt_ids, leaves, self.protocol)
        prompts = [row["prompt"] for row in rows]
        completions = completions_of(
            prompts,
            prompt_ids,
            leaves,
            [self._kits.protocol(row) for row in rows],
            self._tokenizer,
            tools=bool(self.tools),
        )
        loop = getattr(self, "async_loop", None)
        if self._environments is None:
            return score(functions, rows, completions, ids, fields, state=self.state, loop=loop)
        try:
            if (environments := of_leaves(self._environments, rollout.trees, requests[0].id)) is not None:
                fields["environments"] = environments
            return score(functions, rows, completions, ids, fields, state=self.state, loop=loop)
        finally:
            self._environments.close_groups({request.id for request in requests})

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not self.samples_ahead:
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
        """Removes tokens above `max_staleness` from the loss. Returns their share of the tokens in the loss."""
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
        sampled = loss_mask(batch).sum()
        batch["tool_mask"] = batch["tool_mask"] * fresh
        recount(batch, self.accelerator)
        return float((sampled - loss_mask(batch).sum()) / sampled.clamp(min=1))

    def _log_ahead(self, batch: dict[str, Any], rollout: RolloutBatch, metrics: dict[str, float]) -> None:
        """Logs means and maxima over ranks, as described in docs/metrics.md. A collective."""
        step = self.state.global_step
        stale = [step - version for tree in rollout.trees for node in tree.turns() for version in node.versions]
        metrics["staleness_mean"] = sum(stale) / max(1, len(stale))
        metrics["staleness_max"] = float(max(stale, default=0))
        metrics["sync_s"] = self._spans.take("sync")
        if (ratio := batch.get("importance_sampling_ratio")) is not None:
            metrics["ratio_clipped"] = self._share_clipped(ratio, loss_mask(batch))
        everyone = gather_object([metrics])
        for name in metrics:
            values = [of_rank[name] for of_rank in everyone]
            whole = max(values) if name == "staleness_max" else sum(values) / len(values)
            self._metrics["train"][f"arpo/ahead/{name}"].append(whole)

    def _share_clipped(self, ratio: torch.Tensor, mask: torch.Tensor) -> float:
        """The share of TRL's ratios that are at a limit or 0. Ratios are per token (B, T) in `mask` or per sequence
        (B, 1)."""
        if ratio.size(1) == mask.size(1):
            ratio = ratio[mask.bool()]
        clipped = (ratio == 0) | (ratio >= (self.vllm_importance_sampling_clip_max or torch.inf))
        if self.vllm_importance_sampling_clip_min is not None:
            clipped |= ratio <= self.vllm_importance_sampling_clip_min
        return float(clipped.float().mean()) if len(ratio) else 0.0
