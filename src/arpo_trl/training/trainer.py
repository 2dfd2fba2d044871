"""`ARPOTrainer`: TRL's `GRPOTrainer` with tree sampling and credit for each token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl import GRPOTrainer

from arpo_trl.common.adapters import check_adapter, of_revision
from arpo_trl.common.pretrained import check_complete
from arpo_trl.common.run_files import TRAJECTORIES
from arpo_trl.common.spans import Spans
from arpo_trl.common.working_folder import kept_working_folder
from arpo_trl.config import ARPOConfig
from arpo_trl.data.loading import refuse_taken_columns
from arpo_trl.logs.alarms import Alarms
from arpo_trl.logs.metrics import Tally
from arpo_trl.logs.trajectories import TrajectoryLog
from arpo_trl.options import SharedPrefixForward
from arpo_trl.publishing.mixin import Publishing
from arpo_trl.rollout.batch import GroupRequest, Kit, RolloutBatch, TreeSettings
from arpo_trl.rollout.build import context_of
from arpo_trl.rollout.engines.base import Engine
from arpo_trl.rollout.engines.compute_dtype import warn_of_emulation, warn_of_lost_steps
from arpo_trl.rollout.protocols.base import with_guarded_parser
from arpo_trl.runs.interrupts import Interrupts
from arpo_trl.runs.output_folder import check_names
from arpo_trl.runs.resumable import readable
from arpo_trl.runs.whole_models import WholeModels
from arpo_trl.training.advantages import Advantages
from arpo_trl.training.answers import check_answers
from arpo_trl.training.arguments import check_arguments
from arpo_trl.training.baselines import make_baseline
from arpo_trl.training.best_metric import check_best_metric, refuse_loss
from arpo_trl.training.completions import completion_messages, reward_columns, tool_loop_output
from arpo_trl.training.dealing import LEAF, leaves_per_tree
from arpo_trl.training.environments import (
    NO_PROMPT,
    all_environments,
    begun,
    environments_for,
    of_leaves,
    owned_rewards,
    weighted,
    with_owned,
    with_prompts,
    without_impossible_branches,
    without_rows,
)
from arpo_trl.training.kits import Kits, all_tools, tool_sets
from arpo_trl.training.last_rollout import LastRollout
from arpo_trl.training.own_loss import OwnLoss
from arpo_trl.training.preflight import (
    check_ahead,
    check_bonus_tools,
    check_logprobs,
    check_optimizer,
    check_quantized_training,
    check_scores,
    check_trainable,
    check_writable,
    embedding_rows,
    generation_ends,
    listed_rewards,
    log_defaults,
    made_args,
    needs_tags,
    prepare_prefix_sharing,
    refuse_own_rollouts,
    tokenizer_for,
    warn_of_learning_rate,
    warn_of_other_reference,
    warn_of_unread,
    warn_of_version,
    without_trls_vllm_client,
)
from arpo_trl.training.preparation import check_evaluable, prepare_again
from arpo_trl.training.reporting import Reporting
from arpo_trl.training.resampling import Resampling, tally_discarded, with_new_trees
from arpo_trl.training.reward_guard import checked_reward, kept_torch_modes, named_apart, total_rewards
from arpo_trl.training.rollout_names import RolloutNames
from arpo_trl.training.row_checks import (
    check_encoding,
    check_enough_prompts,
    check_prompts,
    check_requests,
    check_rows,
    check_same_rows,
)
from arpo_trl.training.sampled_with import check_unchanged, sampled_with
from arpo_trl.training.samples_ahead import SamplesAhead
from arpo_trl.training.sharding import check_launch, model_for_generation
from arpo_trl.training.sources import (
    colocated_engine,
    logprobs_of,
    protocol_for,
    sampler_for,
    sampling_params,
    served_engine,
    toolbox_for,
    transformers_engine,
)
from arpo_trl.training.streams import WholeStream, checked_stream
from arpo_trl.trl_seam import checked_loading, pad
from arpo_trl.visible import get_rank_logger

logger = get_rank_logger(__name__)


class ARPOTrainer(OwnLoss, Resampling, SamplesAhead, Advantages, Reporting, Publishing, WholeModels, GRPOTrainer):
    """Agentic Reinforced Policy Optimization (arXiv 2507.19849) as a `GRPOTrainer`.

    Takes the arguments of `GRPOTrainer` except `rollout_func` (docs/from-grpo.md). Reward functions receive TRL's
    arguments, the dataset's columns, and four columns with one value per completion: `turns` (the model's text turn
    by turn, special tokens included), `turns_without_calls` (the same without the text inside calls of a chat
    template), `tool_calls` (the calls along the path, as dicts) and `stop_reason`.

    It changes the following parts of `GRPOTrainer`, and no others:

    - `_generate`: samples trees through TRL's `rollout_func`, so that TRL's metrics and decoding still apply.
      `_tool_call_loop` calls no tools: it returns the results of the calls that the rollout made.
    - vLLM: in colocate mode TRL starts it. In both modes an engine generates and moves the weights.
    - `environment_factory`: each path has an environment, and branches fork it (docs/environments.md).
    - `_generate_and_score_completions`: the group advantages (B,) become per-token advantages (B, T) if leaves share
      nodes. If no leaves share nodes, the batch equals TRL's bit for bit. `advantage_baseline` replaces the group's
      mean before that.
    - the update: see `SharedPrefixUpdate`. With `shared_prefix_forward="off"` TRL's update runs.
    - the loss, with some settings: see `OwnLoss`.
    - repeated rollouts of groups: see `Resampling`.
    - `log`: adds the `arpo/` metrics gathered since the last call. `evaluate`: checks `metric_for_best_model`.
    - `train`, and saving and loading checkpoints: see `Resumable`. Rollouts and rewards can be interrupted.
    - saved models under ZeRO-3 and FSDP: they are whole, see `WholeModels`.
    - With `rollouts_ahead`, the order in which rollouts and updates run: see `SamplesAhead`.
    - `create_model_card`, `push_to_hub` and the pushes during training: see `Publishing`.

    Raises:
        ConfigError, DataError, ToolSpecError: A setting, the data or a tool cannot work; raised before the first step.
        RewardError: During training, a reward function did not return one finite number, or None, per completion.
    """

    _tag_names: ClassVar = ["trl", "arpo"]
    _name = "ARPO"

    args: ARPOConfig
    reward_func_names: list[str]
    _buffered_inputs: list[dict[str, Any]] | None

    def __init__(
        self,
        model: str | PreTrainedModel,
        reward_funcs: Any = None,
        args: ARPOConfig | None = None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: Any = None,
        peft_config: Any = None,
        tools: Sequence[Callable[..., Any]] | None = None,
        rollout_func: None = None,
        environment_factory: Callable[[], Any] | dict[str, Callable[[], Any]] | None = None,
        *,
        engine: Engine | None = None,
    ):
        """Takes `GRPOTrainer`'s arguments; `engine` replaces the engine that `args` select (tests, scripted runs)."""
        refuse_own_rollouts(rollout_func, type(self))
        functions = listed_rewards(reward_funcs)
        check_arguments(
            functions,
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            reward_processing_classes=reward_processing_classes,
            callbacks=callbacks,
            optimizers=optimizers,
            tools=tools,
            engine=engine,
        )
        warn_of_version()
        args = made_args(args, model)
        refuse_loss(args, eval_dataset)
        check_writable(Path(args.output_dir))
        check_names(Path(args.output_dir))
        if quantization_config is not None and isinstance(model, str):  # TRL ignores it for a loaded model
            check_quantized_training(peft_config)
        if args.push_to_hub:
            self.prepare_repositories(args)  # before the model is loaded
        evaluated = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
        datasets = [train_dataset, *evaluated]
        self._environments = environments_for(args, environment_factory, functions, datasets)
        args = without_impossible_branches(args, self._environments)
        if self._environments is not None:
            datasets = with_prompts(datasets)
            train_dataset = without_rows(args) if train_dataset is None else train_dataset
        check_rows(datasets, functions)
        train_dataset = checked_stream(train_dataset, needs_prompt=self._environments is None)
        eval_dataset = checked_stream(eval_dataset, needs_prompt=self._environments is None)
        owned = owned_rewards(self._environments)
        sets = tool_sets(tools or (), self._environments)
        tools = all_tools(tools or (), self._environments)
        self._all_environments = all_environments(self._environments, tools, args.environment_concurrency)
        self.toolbox = toolbox_for(args, tools, self._environments)
        check_bonus_tools(functions, self.toolbox.names)
        tokenizer = tokenizer_for(model, processing_class, args)
        embeddings, ends = embedding_rows(model, args), generation_ends(model, args)
        self.protocol = protocol_for(args, tokenizer, self.toolbox.specs, ends)
        kits = {
            name: Kit(tools=tools, protocol=protocol_for(args, tokenizer, tools.specs, ends))
            for name, tools in sets.items()
        }
        self._kits = Kits(self.protocol, self._environments, kits)
        check_encoding(datasets, self._kits.protocols, embeddings)
        self._interrupts = Interrupts()
        with without_trls_vllm_client(args, engine), weighted(args, owned), checked_loading(check_complete):
            super().__init__(
                model=model,
                reward_funcs=[
                    checked_reward(function, self._interrupts, removes_columns=args.remove_unused_columns)
                    for function in [*functions, *owned]
                ],
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                reward_processing_classes=with_owned(reward_processing_classes, functions, owned),
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=of_revision(peft_config, args.revision),
            )
        self.reward_func_names = named_apart(self.reward_funcs, self.reward_func_names)
        check_best_metric(args, eval_dataset, self.reward_func_names, functions)
        self.tools = tools  # set here: TRL's __init__ would require a chat template with tools, which tags do not need
        self._finish_init(datasets, functions, engine)

    def _finish_init(self, datasets: Sequence[Any], rewards: Sequence[Any], engine: Engine | None) -> None:
        """The part of `__init__` after TRL's. `datasets`: the training dataset, then the evaluation datasets."""
        args = self.args
        log_defaults(args)
        warn_of_unread(args)
        check_launch(self.accelerator, gathers=args.ds3_gather_for_generation)
        check_adapter(self.model, self.accelerator)
        warn_of_emulation(self.model, self.accelerator)
        if self.optimizer is None:
            warn_of_lost_steps(self.model, self.accelerator, args)
        else:  # it has its own learning rate
            check_optimizer(self.optimizer, self.model)
        self._tokenizer = with_guarded_parser(self._tokenizer)
        self.use_vllm = args.use_vllm
        self.eos_token_ids: list[int] = list(self.protocol.eos_ids)  # TRL uses them to detect truncated completions
        self._credit = args.make_credit()
        self._prepare_loss()
        if self._credit.reads_answers:
            check_answers(datasets, args.advantage_attribution)
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled  # without all weights no trial is possible yet
        if not sharded:
            with self.accelerator.autocast():
                check_scores(self.accelerator.unwrap_model(self.model), args.temperature)
                if self.ref_model is not None:
                    warn_of_other_reference(self.model, self.accelerator.unwrap_model(self.ref_model))
        self._shares_prefixes = prepare_prefix_sharing(
            [self.accelerator.unwrap_model(model) for model in (self.model, self.ref_model) if model is not None],
            self.accelerator,
            SharedPrefixForward(args.shared_prefix_forward),
            aux_loss=self.aux_loss_enabled,
            noise=bool(args.neftune_noise_alpha),
            sharded=sharded,
        )
        engine = self._make_engine() if engine is None else engine
        self.tree_sampler = sampler_for(args, engine, self.toolbox, self.protocol, context_of(self.model))
        self._baseline = make_baseline(args)
        check_logprobs(args, self.tree_sampler, self._credit, self._baseline)
        check_ahead(args, self.tree_sampler.engine, self.train_dataset)
        self.rollout_func = self._rollout  # set after TRL's __init__, which warns about the argument
        check_prompts(datasets, args, self._kits.protocols, self.tree_sampler.settings.max_length, self.toolbox.names)
        self._trajectories = TrajectoryLog(
            Path(args.output_dir) / TRAJECTORIES, args.trajectory_log_rate, args.seed, self.accelerator.process_index
        )
        self._last: LastRollout | None = None
        self._last_rewards: torch.Tensor | None = None
        """(B,) rewards of the last rollout's leaves; NaN where no reward function applies."""
        self._rewards_of_all_ranks: torch.Tensor | None = None
        self._counted = Tally()
        """The counts of this rollout before `_log_rollout`."""
        self._scoring = ExitStack()
        """Keeps the `_loss_tokens` of a rollout open until its rows are scored."""
        self.alarms = Alarms(
            self.tree_sampler.settings.rule,
            self.toolbox.names,
            self._summed_functions,
            tags=needs_tags(args, self.toolbox.names, rewards),
        )
        self._names = RolloutNames()
        self._sampled_with = sampled_with(self)
        self.tree_sampler.between_events = self._interrupts.check
        self._spans = Spans()
        # On the instance, since a subclass may override the method, with or without calling ours.
        self._calculate_rewards = partial(self._remembered_rewards, self._calculate_rewards)  # type: ignore[method-assign]

    def train(self, *args: Any, **kwargs: Any) -> Any:
        check_trainable(self.model)
        prepare_again(self)
        return super().train(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, *args: Any, **kwargs: Any) -> Any:
        if self.lr_scheduler is None:
            warn_of_learning_rate(self.args, num_training_steps)
        return super().create_scheduler(num_training_steps, *args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        with self._mode_kept():
            return super().evaluate(*args, **kwargs)

    def predict(self, *args: Any, **kwargs: Any) -> Any:
        with self._mode_kept():
            return super().predict(*args, **kwargs)

    @contextmanager
    def _mode_kept(self) -> Iterator[None]:
        """A context after which the model is in training mode if it was before. By this mode, TRL's `log` chooses the
        metrics: after an evaluation it would drop those of the training steps since the last row."""
        training = self.model.training
        try:
            yield
        finally:
            self.model.train(training)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        check_evaluable(self)
        return super().evaluation_loop(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        before = {name: len(values) for name, values in self._metrics["eval"].items()}
        result = super().prediction_step(model, inputs, *args, **kwargs)
        # `log` takes the mean over the batches, and the last may be smaller. Here a batch's values count once per row,
        # so that it is the mean over the rows.
        for name, values in self._metrics["eval"].items():
            start = before.get(name, 0)
            values[start:] = values[start:] * len(inputs)
        return result

    def get_train_dataloader(self) -> Any:
        check_same_rows(self._datasets, self.accelerator)
        check_enough_prompts(self.train_dataset, self.args)
        return super().get_train_dataloader()

    @property
    def _datasets(self) -> dict[str, Any]:
        """Name, for errors → dataset."""
        evaluated = self.eval_dataset if isinstance(self.eval_dataset, dict) else {"": self.eval_dataset}
        named = {f"the evaluation dataset {name}".rstrip(): dataset for name, dataset in evaluated.items()}
        return {"the training dataset": self.train_dataset, **named}

    def _get_dataloader(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        rows = WholeStream(dataset) if isinstance(dataset, IterableDataset) else dataset
        return super()._get_dataloader(rows, *args, **kwargs)

    def _make_engine(self) -> Engine:
        """The engine that `args` select."""
        settings = sampling_params(self.args, self.protocol)
        if not self.args.use_vllm:
            return transformers_engine(
                self.args,
                settings,
                self.model,
                self._tokenizer,
                self._model_for_generation,
                sharded=self.is_deepspeed_enabled or self.is_fsdp_enabled,
                may_pad=self._may_pad,
                evaluates=self.eval_dataset is not None,
            )
        weights = (self._tokenizer, lambda: (self.state.global_step, self.loads), self._logprobs_of)
        if self.args.vllm_mode == "colocate":
            return colocated_engine(self.args, settings, self.model, self.vllm_generation, *weights)
        return served_engine(self.args, settings, self.model, self.accelerator, *weights, self._interrupts.check)

    # Generation ------------------------------------------------------------------------------------------------------

    def _model_for_generation(self) -> AbstractContextManager[PreTrainedModel]:
        return model_for_generation(self.model_wrapped, self.accelerator, self.args)

    def _logprobs_of(self, ids: Sequence[int]) -> list[float]:
        return logprobs_of(self.model, self._model_for_generation, ids)

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        # TRL then assumes that vLLM has the weights. The engine moves them when its session opens.
        self._last_loaded_step = self.state.global_step
        return super()._generate(prompts)

    def _tool_call_loop(
        self, prompts: list[Any], prompt_ids: Any, completion_ids: Any, completions: Any, logprobs: Any, *images: Any
    ) -> tuple[Any, ...]:
        """Returns the results of TRL's loop, for the tool calls that the rollout made."""
        assert self._last is not None
        leaves = self._last.rollout.leaves
        if isinstance(prompts[0], list):
            completions = completion_messages(prompt_ids, leaves, [self._kits.protocol(row) for row in self._rows])
        return tool_loop_output(leaves, completion_ids, completions, logprobs)

    def _rollout(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        """TRL's `rollout_func`. `prompts` repeats each prompt once per leaf of its group, group after group."""
        training = self.model.training
        first_group, size = self._places(prompts)
        requests = self._kits.requests(prompts[::size], self._rows[::size], first_group)
        settings = self.tree_sampler.settings
        check_requests(prompts[::size], requests, settings.max_length)
        settings = settings if training else settings.without_branching(size)
        if self._again is None:
            name = self._names.next("step" if training else "eval", self.state.global_step)
            rollout = self._sample(requests, name, settings)
        else:
            assert self._last is not None
            name, before, again = self._last.name, self._last.rollout, self._again
            tally_discarded([before.trees[i] for i in again.groups], self._counted)
            waited = max(gather_object(before.turns_in_sequence))
            new = self._sample([requests[i] for i in again.groups], f"{name} again {again.number}", settings)
            rollout = with_new_trees(before, new, again.groups, waited)
        leaves = rollout.leaves
        self._last = LastRollout(name=name, rollout=rollout, first_group=first_group)
        if self._environments is not None and not self.samples_ahead:
            self.environments = of_leaves(self._environments, rollout.trees, first_group)
        written = pad(
            [torch.tensor(leaf.mask) for leaf in leaves],
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
        self._scoring.enter_context(self._loss_tokens(written))  # for logprobs of the reference model and old weights
        masks = {} if self.tools else {"env_mask": [leaf.mask for leaf in leaves]}
        sampled = {
            "prompt_ids": rollout.prompt_ids,
            "completion_ids": [leaf.ids for leaf in leaves],
            # Like TRL, for vLLM only. Under top-k or top-p, the logprobs from transformers belong to another
            # distribution than the loss's, and `off_policy_mask_threshold` would treat the difference as policy drift.
            "logprobs": [leaf.logprobs for leaf in leaves] if self.use_vllm else None,
        }
        return sampled | masks | reward_columns(rollout.prompt_ids, leaves, self.protocol)

    def _sample(self, requests: Sequence[GroupRequest], name: str, settings: TreeSettings) -> RolloutBatch:
        """The trees of `requests`. In training with `rollouts_ahead`, these are the trees that were sampled ahead."""
        with self.interruptible():
            if self.samples_ahead:
                return self.rollout_ahead()
            return self.tree_sampler.sample(requests, seed=(self.args.seed, name), settings=settings)

    @property
    def has_environments(self) -> bool:
        """Whether each path has an environment, from `environment_factory`."""
        return self._environments is not None

    def _places(self, prompts: list[Any]) -> tuple[int, int]:
        """The number of this rank's first group, counted over all ranks, and the number of rows that form one tree."""
        size = self.num_generations if self.model.training else self.num_generations_eval
        size = leaves_per_tree(prompts, size, branches=self.model.training)
        return self.accelerator.process_index * (len(prompts) // size), size

    @contextmanager
    def _with_environments(self, rows: list[dict[str, Any]]) -> Iterator[list[dict[str, Any]]]:
        """A context in which paths have environments, which rewards can read. Yields the rows with the results of
        `reset`.

        Batches that are sampled ahead open their own environments. For others, this waits until no rollout runs ahead.
        """
        if self.samples_ahead:
            yield rows
            return
        self.pause_rollouts()  # they use the same engine and environments
        try:
            if self._environments is not None:
                first, size = self._places([row.get("prompt", NO_PROMPT) for row in rows])
                with self.interruptible():
                    rows = begun(self._environments, rows, size, first, self.toolbox, self._interrupts.check)
            yield rows
        finally:
            self.environments = None
            for environments in self._all_environments:
                environments.close_kept()

    # Credit ----------------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self._spans("generate_and_score"):
            inputs = [dict(row) for row in inputs]  # TRL adds our columns to these rows
            check_unchanged(self, self._sampled_with)
            refuse_taken_columns(inputs[0])  # environments may have rows without a prompt, which are not checked
            with (
                kept_working_folder(self.started_in),
                kept_torch_modes(),
                self._with_environments(inputs) as inputs,
                self._scoring,
            ):
                self._rows = inputs
                batch = super()._generate_and_score_completions(inputs)
            self._subtract_baseline(batch)
            advantages = batch["advantages"]
            self._attribute(batch)
            if self.model.training and self._micro_batches_dealt_together > 1:
                batch[LEAF] = torch.arange(len(advantages), device=advantages.device)
            self._log_rollout(advantages, [row.get("answer") for row in inputs])
        return batch

    def _remembered_rewards(
        self,
        calculate: Callable[..., torch.Tensor],
        inputs: list[Any],
        prompts: list[Any],
        completions: list[Any],
        completion_ids_list: list[Any],
    ) -> torch.Tensor:
        """(B, F) rewards of all ranks, which `calculate` returns, unless dynamic sampling already knows them.

        `calculate` is `_calculate_rewards` with the changes of a subclass. Baselines, credits, metrics and alarms read
        its results. So does TRL.
        """
        known, self._scores = self._scores, None
        if known is not None:
            return known
        with self._spans("reward"):
            rewards = calculate(inputs, prompts, completions, completion_ids_list)
            self.stop_together()  # an interrupted reward function returned placeholders
        first = self.accelerator.process_index * len(prompts)  # `rewards` has the rows of all ranks
        self._rewards_of_all_ranks = total_rewards(rewards, self.reward_weights).cpu()
        self._last_rewards = self._rewards_of_all_ranks[first : first + len(prompts)]
        return rewards

    # Update ----------------------------------------------------------------------------------------------------------

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._spans("update"):
            loss = super().training_step(*args, **kwargs)
        self._metrics["train"]["arpo/time/update_s"].append(self._spans.take("update"))
        return loss

    # Checkpoints -----------------------------------------------------------------------------------------------------

    @property
    def tools_parameters(self) -> dict[str, Any]:
        return {name: spec.undescribed_parameters for name, spec in self.toolbox.specs.items()}

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "rollouts_at": self._names.state_dict(),
            "baseline": None if self._baseline is None else self._baseline.state,
            "alarms": self.alarms.state_dict(),
            "branch_rule": self.tree_sampler.settings.rule.state_dict(),
            "evaluation": self.evaluation,
            "tool_cache": self.toolbox.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self._names.load_state_dict(state["rollouts_at"])
        if self._baseline is not None:
            self._baseline.state = state["baseline"]
        self.alarms.load_state_dict(state["alarms"])
        self.tree_sampler.settings.rule.load_state_dict(state["branch_rule"])
        self.evaluation = state["evaluation"]
        self.toolbox.load_state_dict(state["tool_cache"])

    def _save_rng_state(self, output_dir: str) -> None:
        rule = self.tree_sampler.settings.rule
        readable(rule.state_dict(), f"The state_dict of the branch rule {rule.name!r}")
        super()._save_rng_state(output_dir)

    def _forget_training(self) -> None:
        super()._forget_training()
        self._counted, self._spans = Tally(), Spans()

    def _begin_logs(self) -> None:
        self._trajectories.warn_of_earlier_run()

    def _forget_from(self, step: int, *, evaluated: bool) -> None:
        self._trajectories.forget_from(step, evaluated=evaluated)
