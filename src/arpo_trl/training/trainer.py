"""`ARPOTrainer`: TRL's `GRPOTrainer` with the tree sampler in place of generation and per-token credit."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl import GRPOTrainer

from arpo_trl.common.spans import Spans
from arpo_trl.config import ARPOConfig
from arpo_trl.data.loading import refuse_taken_columns
from arpo_trl.logs.alarms import Alarms
from arpo_trl.logs.metrics import Tally, tally_rewards, tally_rollout
from arpo_trl.logs.trajectories import TrajectoryLog, logged_trees
from arpo_trl.options import ProtocolKind, RolloutSchedule, SharedPrefixForward
from arpo_trl.publishing.mixin import Publishing
from arpo_trl.rollout.build import LocalModel, LocalVLLM, VLLMServers, build_engine, build_sampler, context_of
from arpo_trl.rollout.credit.base import attribute
from arpo_trl.rollout.engines.base import Engine, SamplingParams
from arpo_trl.rollout.engines.compute_dtype import warn_of_emulation
from arpo_trl.rollout.engines.generation_rules import refuse_rules
from arpo_trl.rollout.engines.visibility import exact_length
from arpo_trl.rollout.protocols import PROTOCOLS
from arpo_trl.rollout.sampler import GroupRequest, RolloutBatch, TreeSampler
from arpo_trl.rollout.tree import Leaf
from arpo_trl.runs.interrupts import Interrupts
from arpo_trl.runs.resumable import Resumable
from arpo_trl.tools.toolbox import ToolBox
from arpo_trl.training.completions import completion_messages
from arpo_trl.training.dealing import LEAF, deal_trees, leaves_per_tree, micro_batches_of_one_step
from arpo_trl.training.prefix_sharing import Pack, forward_packs, pack_batches, pays, sharing_ratio
from arpo_trl.training.preflight import (
    check_prompts,
    check_prompts_fit,
    check_quantized_training,
    check_rows,
    check_writable,
    checked_args,
    embedding_rows,
    prepare_prefix_sharing,
    refuse_own_rollouts,
    tokenizer_for,
    untold_tags,
    without_trls_vllm_client,
)
from arpo_trl.training.reward_guard import checked_reward, total_rewards
from arpo_trl.training.sharding import check_launch, model_for_generation
from arpo_trl.training.vllm_setup import (
    colocated_weights,
    ranks_together,
    served_weights,
    warn_of_other_distribution,
)
from arpo_trl.trl_seam import pad, print_prompt_completions_sample
from arpo_trl.visible import visible, visible_data

logger = get_logger(__name__)

LONGER = ", or give vLLM a longer context (vllm_max_model_length, or a server's --max-model-len)"


@dataclass(frozen=True, slots=True)
class _LastRollout:
    """What a rollout leaves for the rest of its step, until the next one."""

    name: str
    rollout: RolloutBatch
    leaves: list[Leaf]
    first_group: int


class ARPOTrainer(Resumable, Publishing, GRPOTrainer):
    """Agentic Reinforced Policy Optimization (arXiv 2507.19849) as a `GRPOTrainer`.

    Takes what `GRPOTrainer` takes, less `rollout_func` and `environment_factory` (docs/from-grpo.md). Rewards receive,
    besides TRL's arguments and the dataset's columns, one value per completion of: `turns` (what the model wrote, turn
    by turn, special tokens included), `tool_calls` (the calls along the path, as dicts) and `stop_reason`.

    What it changes in `GRPOTrainer`, and nothing else:

    - `_generate`: prompts are rolled out as trees. TRL's own hook for custom rollouts carries them, so its metrics and
      its decoding stay; `_tool_call_loop` has no tools left to call, and returns what came of them.
    - vLLM: TRL starts it when colocated; its generation and its moment of moving weights are replaced by an engine's.
    - `_generate_and_score_completions`: the group advantages (B,) become per-token ones (B, T) where leaves share
      nodes. Where none do, the batch is TRL's, bit for bit.
    - `_get_per_token_logps_and_entropies`: tokens that rows of a micro-batch share are computed once, and so
      `_prepare_inputs` keeps the rows of a tree together. `shared_prefix_forward="off"` leaves both to TRL.
    - `log`: adds the `arpo/` metrics gathered since the last one.
    - `train`, and what saves and loads checkpoints: as `Resumable` has it. Rollouts and rewards can be interrupted.
    - `create_model_card`, `push_to_hub` and the pushes while training: ours, as `Publishing` has them.

    Raises:
        ConfigError, DataError, ToolSpecError: Something cannot work; found before the first step.
        RewardError: While training, a reward function returned something else than one finite number, or None, per
            completion.
    """

    _tag_names: ClassVar = ["trl", "arpo"]
    _name = "ARPO"

    args: ARPOConfig
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
        environment_factory: None = None,
        *,
        engine: Engine | None = None,
    ):
        """As `GRPOTrainer`; `engine` replaces the one that `args` would choose (tests, scripted runs)."""
        refuse_own_rollouts(rollout_func=rollout_func, environment_factory=environment_factory)
        args = checked_args(args, model)
        check_writable(Path(args.output_dir))
        if quantization_config is not None:
            check_quantized_training(peft_config)
        if args.push_to_hub:
            self.prepare_repositories(args)  # before the model is loaded
        functions = reward_funcs if isinstance(reward_funcs, list) else [] if reward_funcs is None else [reward_funcs]
        evaluated = list(eval_dataset.values()) if isinstance(eval_dataset, dict) else [eval_dataset]
        for dataset in (train_dataset, *evaluated):
            check_rows(dataset, functions)
        tools = list(tools or ())
        self.toolbox = ToolBox(
            tools,
            timeout_s=args.tool_timeout_s,
            concurrency=args.tool_concurrency,
            per_tool=args.tool_places,
            cache=args.tool_cache,
        )
        tokenizer = tokenizer_for(model, processing_class, args)
        self.protocol = PROTOCOLS[ProtocolKind(args.tool_protocol)](
            tokenizer,
            self.toolbox.specs,
            max_result_tokens=args.max_tool_result_tokens,
            chat_template_kwargs=args.chat_template_kwargs,
        )
        embeddings = embedding_rows(model, args)
        for dataset in (train_dataset, *evaluated):
            check_prompts(dataset, self.protocol, embeddings)
        self._interrupts = Interrupts()
        with without_trls_vllm_client(args, engine):
            super().__init__(
                model=model,
                reward_funcs=[checked_reward(function, self._interrupts) for function in functions],
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=tokenizer,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
            )
        self.tools = tools  # TRL's __init__ would want a template that shows them, which tags do not need
        check_launch(self.accelerator, gathers=args.ds3_gather_for_generation)
        warn_of_emulation(self.model, self.accelerator)
        self.use_vllm = args.use_vllm
        self._credit = args.make_credit()
        self._shares_prefixes = prepare_prefix_sharing(
            [self.accelerator.unwrap_model(model) for model in (self.model, self.ref_model) if model is not None],
            self.accelerator,
            SharedPrefixForward(args.shared_prefix_forward),
            aux_loss=self.aux_loss_enabled,
            sharded=self.is_deepspeed_enabled or self.is_fsdp_enabled,
        )
        self.tree_sampler = self._make_sampler(engine)
        self.rollout_func = self._rollout  # set after TRL's __init__, which warns of the argument
        for dataset in (train_dataset, *evaluated):
            check_prompts_fit(
                dataset, self.protocol, self.tree_sampler.settings.max_length, LONGER if args.use_vllm else ""
            )
        if args.tool_protocol == ProtocolKind.TAGS and (said := untold_tags(self.toolbox.names, train_dataset)):
            logger.warning(said)
        self._trajectories = TrajectoryLog(
            Path(args.output_dir) / "trajectories", args.trajectory_log_rate, args.seed, self.accelerator.process_index
        )
        self._last: _LastRollout | None = None
        self._last_rewards: torch.Tensor | None = None
        """(B,) of the last rollout's leaves, NaN where no reward function applies."""
        self._loss_mask: torch.Tensor | None = None
        self._scoring = ExitStack()
        """Holds the `_loss_tokens` of a rollout until its rows are scored."""
        self.alarms = Alarms(self.tree_sampler.settings.rule)
        self._rollouts_at: dict[str, tuple[int, int]] = {}
        self.tree_sampler.between_events = self._interrupts.check
        self._spans = Spans()

    def _make_sampler(self, engine: Engine | None) -> TreeSampler:
        args, eos_ids = self.args, tuple(self.eos_token_ids)
        settings = SamplingParams(
            eos_ids=eos_ids,
            stop_strings=self.protocol.stop_strings,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
        )
        if engine is None:
            source = self._vllm_source(settings) if args.use_vllm else self._transformers_source()
            engine = build_engine(source, self._tokenizer, settings)
        return build_sampler(
            engine,
            self.toolbox,
            self.protocol,
            eos_ids,
            context=context_of(self.model),
            num_generations=self.num_generations,
            initial_rollouts=args.initial_rollouts,
            max_completion_length=self.max_completion_length,
            max_tool_calls=args.max_tool_calling_iterations,
            entropy_probe_tokens=args.entropy_probe_tokens,
            rule=args.make_branch_rule(),
            schedule=RolloutSchedule(args.rollout_schedule),
        )

    def _transformers_source(self) -> LocalModel:
        """The trained model, which later scores what it has sampled."""
        args = self.args
        rows = args.per_device_train_batch_size * args.steps_per_generation
        evaluated = args.per_device_eval_batch_size if self.eval_dataset is not None else 0
        return LocalModel(
            model=self.model,
            opened=self._model_for_generation,
            sharded=self.is_deepspeed_enabled or self.is_fsdp_enabled,
            scored=True,
            scored_padded=self._may_pad,
            generation_kwargs=args.generation_kwargs,
            most_rows=max(rows, evaluated),
            smaller=(
                f"Lower per_device_train_batch_size × steps_per_generation ({args.per_device_train_batch_size} × "
                f"{args.steps_per_generation} completions are sampled at once), per_device_eval_batch_size "
                f"({args.per_device_eval_batch_size}) or max_completion_length ({args.max_completion_length}), or let "
                "vLLM sample (use_vllm)."
            ),
        )

    def _vllm_source(self, settings: SamplingParams) -> LocalVLLM | VLLMServers:
        """The vLLM that `vllm_mode` names, checked against the trained model."""
        args = self.args
        refuse_rules(self.model.generation_config, None, "vLLM")
        warn_of_other_distribution(settings)
        vocab_size = self.model.config.get_text_config().vocab_size
        weights = (self._tokenizer, lambda: self.state.global_step, self._logprobs_of)
        if args.vllm_mode == "colocate":
            return LocalVLLM(
                llm=self.vllm_generation.llm,
                weights=colocated_weights(args, self.vllm_generation, *weights),
                vocab_size=vocab_size,
                top_logprobs=args.entropy_top_logprobs,
                sleeps=self.vllm_generation.enable_sleep_mode,
                group=ranks_together(args.vllm_tensor_parallel_size),
            )
        return VLLMServers(
            weights=served_weights(args, self.model, self.accelerator, *weights),
            vocab_size=vocab_size,
            top_logprobs=args.entropy_top_logprobs,
            away_s=args.vllm_server_timeout,
            request_s=args.vllm_request_timeout_s,
        )

    # Generation ------------------------------------------------------------------------------------------------------

    def _model_for_generation(self) -> AbstractContextManager[PreTrainedModel]:
        return model_for_generation(self.model_wrapped, self.accelerator, self.args)

    def _logprobs_of(self, ids: Sequence[int]) -> list[float]:
        """The model's logprob of each id but the first, given those before it; a collective."""
        training = self.model.training
        self.model.eval()  # without an adapter's dropout
        try:
            with torch.no_grad(), self._model_for_generation() as model:
                row = torch.tensor([list(ids)], device=next(model.parameters()).device)
                logits = model(input_ids=row, attention_mask=torch.ones_like(row), use_cache=False).logits[0, :-1]
        finally:
            self.model.train(training)
        return logits.float().log_softmax(dim=-1).gather(1, row[0, 1:].unsqueeze(1)).squeeze(1).tolist()

    def _generate(self, prompts: list[Any]) -> tuple[Any, ...]:
        self._last_loaded_step = self.state.global_step  # the engine moves the weights when its session opens
        return super()._generate(prompts)

    def _tool_call_loop(
        self,
        prompts: list[Any],
        prompt_ids: list[list[int]],
        completion_ids: list[list[int]],
        completions: list[Any],
        logprobs: list[list[float]] | None,
        *images: Any,
    ) -> tuple[Any, ...]:
        """What TRL's loop returns, of tools that were called while the trees grew."""
        assert self._last is not None
        leaves = self._last.leaves
        if isinstance(prompts[0], list):
            completions = [
                completion_messages(ids, leaf, self.protocol) for ids, leaf in zip(prompt_ids, leaves, strict=True)
            ]
        calls = [call for leaf in leaves for call in leaf.calls]
        failures = sum(not call.ok for call in calls)
        masks = [leaf.mask for leaf in leaves]
        return masks, completions, completion_ids, logprobs, len(calls), failures, [[] for _ in leaves]

    def _rollout(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        """TRL's `rollout_func`: rows come prompt-major, each prompt as often as its group has leaves."""
        training = self.model.training
        name = self._rollout_name("step" if training else "eval")
        size = self.num_generations if training else self.num_generations_eval
        size = leaves_per_tree(prompts, size, branches=training)
        groups = [prompts[i] for i in range(0, len(prompts), size)]
        first_group = self.accelerator.process_index * len(groups)
        requests = [
            GroupRequest(id=first_group + i, prompt_ids=self.protocol.encode_prompt(prompt))
            for i, prompt in enumerate(groups)
        ]
        settings = self.tree_sampler.settings
        with self.interruptible():
            rollout = self.tree_sampler.sample(
                requests,
                seed=(self.args.seed, name),
                settings=settings if training else settings.without_branching(size),
            )
        leaves = [leaf for tree in rollout.trees for leaf in tree.leaves()]
        self._last = _LastRollout(name, rollout, leaves, first_group)
        written = pad(
            [torch.tensor(leaf.mask) for leaf in leaves],
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
        self._scoring.enter_context(self._loss_tokens(written))  # of the reference model and of old weights
        # As TRL, which knows of no sampling logprobs but vLLM's: those of transformers under top-k or top-p are of
        # another distribution than the loss's, and masking by `off_policy_mask_threshold` would take that for drift.
        masks = {} if self.tools else {"env_mask": [leaf.mask for leaf in leaves]}
        return masks | {
            "prompt_ids": [request.prompt_ids for request in requests for _ in range(size)],
            "completion_ids": [leaf.ids for leaf in leaves],
            "logprobs": [leaf.logprobs for leaf in leaves] if self.use_vllm else None,
            "turns": [leaf.turns for leaf in leaves],
            "tool_calls": [[call.as_row() for call in leaf.calls] for leaf in leaves],
            "stop_reason": [leaf.stop.value for leaf in leaves],
        }

    def _rollout_name(self, kind: str) -> str:
        """Names a rollout, and so seeds it: by the optimizer step, which a resumed run knows, and a count in it."""
        step = self.state.global_step
        last, count = self._rollouts_at.get(kind, (-1, 0))
        count = count + 1 if last == step else 0
        self._rollouts_at[kind] = (step, count)
        return f"{kind}-{step:06d}" + (f".{count}" if count else "")

    # Credit ----------------------------------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        with self._spans("generate_and_score"):
            inputs = [dict(row) for row in inputs]  # TRL adds our columns to the rows it was given
            refuse_taken_columns(inputs[0])  # of a streamed dataset they are known only now
            with self._scoring:
                batch = super()._generate_and_score_completions(inputs)
            advantages = batch["advantages"]
            self._attribute(batch)
            if self.model.training and self._micro_batches_dealt_together > 1:
                batch[LEAF] = torch.arange(len(advantages), device=advantages.device)
            self._log_rollout(advantages)
        return batch

    def _attribute(self, batch: dict[str, Any]) -> None:
        """Turns `batch["advantages"]` (B,) into what the credit makes of them, (B, T) where leaves share nodes."""
        last, advantages, width = self._last, batch["advantages"], batch["completion_ids"].size(1)
        assert last is not None and self._last_rewards is not None
        rewards = self._last_rewards.to(advantages.device)
        batch["advantages"], weights = attribute(self._credit, last.rollout.trees, rewards, advantages, width)
        if weights is not None:
            batch["tool_mask"] = batch["tool_mask"] * weights
        if self._credit.weighs:  # every rank, weights or not: the token count is a sum over all of them
            trained = (batch["completion_mask"] * batch["tool_mask"]).sum()
            batch["num_items_in_batch"] = self.accelerator.gather(trained).sum()

    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> torch.Tensor:
        with self._spans("reward"):
            rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
            self.stop_together()  # rewards of an interrupted function are none
        first = self.accelerator.process_index * len(prompts)  # of all ranks' rows
        self._last_rewards = total_rewards(rewards, self.reward_weights)[first : first + len(prompts)].cpu()
        return rewards

    # Update ----------------------------------------------------------------------------------------------------------

    @property
    def _may_pad(self) -> bool:
        """Whether some micro-batch may be computed padded: packs are not exact, or do not pay everywhere."""
        config = self.model.config.get_text_config()
        # Padding counts as length where length changes what a model computes; a pack has none.
        chosen = self.args.shared_prefix_forward == SharedPrefixForward.AUTO and exact_length(config) is None
        return chosen or not self._shares_prefixes

    def _get_per_token_logps_and_entropies(
        self,
        model: torch.nn.Module,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        updates = torch.is_grad_enabled()
        with nullcontext() if updates else self._spans("logprobs"):
            packs = self._packs(input_ids, attention_mask, logits_to_keep, batch_size or len(input_ids))
            if packs:
                with self.accelerator.autocast():
                    logprobs, entropies = forward_packs(model, packs)
                result = logprobs, entropies if compute_entropy else None, None
            else:
                result = super()._get_per_token_logps_and_entropies(
                    model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs
                )
        if updates and self._shares_prefixes:
            self._metrics["train"]["arpo/update/packed"].append(float(bool(packs)))
            if packs:
                self._metrics["train"]["arpo/update/sharing_ratio"].append(sharing_ratio(packs))
        return result

    def _packs(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, logits_to_keep: int, size: int
    ) -> list[Pack]:
        """The rows as packs; none where they are to be computed padded."""
        if not self._shares_prefixes:
            return []
        assert self._loss_mask is not None
        packs = pack_batches(
            input_ids,
            attention_mask,
            logits_to_keep,
            self._loss_mask,
            size=size,
            multiple_of=self.pad_to_multiple_of or 1,
        )
        hidden_size = self.model.config.get_text_config().hidden_size
        return [] if self._may_pad and not all(pays(pack, hidden_size) for pack in packs) else packs

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        with self._loss_tokens(inputs["completion_mask"] * inputs["tool_mask"]):
            return super()._compute_loss(model, inputs)

    @contextmanager
    def _loss_tokens(self, mask: torch.Tensor) -> Iterator[None]:
        """Says while it is open which tokens' logprobs the loss of these rows uses: where `mask` (B, T) is nonzero."""
        before, self._loss_mask = self._loss_mask, mask
        try:
            yield
        finally:
            self._loss_mask = before

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's shuffled micro-batches; the rows of one optimizer step dealt anew, so that trees stand together."""
        inputs = super()._prepare_inputs(generation_batch)
        batches = self._buffered_inputs
        if not self.model.training or batches is None or LEAF not in inputs:
            return inputs
        self._buffered_inputs = deal_trees(batches, self._micro_batches_dealt_together, self.num_generations)
        return self._buffered_inputs[self._step % len(batches)]

    @property
    def _micro_batches_dealt_together(self) -> int:
        """How many micro-batches may swap rows; 1 where the loss of a row depends on those it stands with."""
        by_batch = self.args.loss_type == "bnpo" or self.top_entropy_quantile < 1.0 or self._entropy_bonus_enabled
        if by_batch or not self._shares_prefixes:
            return 1
        return micro_batches_of_one_step(self.args.steps_per_generation, self.args.gradient_accumulation_steps)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        with self._spans("update"):
            loss = super().training_step(*args, **kwargs)
        self._metrics["train"]["arpo/time/update_s"].append(self._spans.take("update"))
        return loss

    # Checkpoints -----------------------------------------------------------------------------------------------------

    @property
    def tool_names(self) -> list[str]:
        return list(self.toolbox.names)

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {
            "rollouts_at": dict(self._rollouts_at),
            "bell": self.alarms.state_dict(),
            "evaluation": self.evaluation,
            "tool_cache": self.toolbox.state_dict(),
        }

    def load_state_dict(self, memory: dict[str, Any]) -> None:
        super().load_state_dict(memory)
        self._rollouts_at = dict(memory["rollouts_at"])
        self.alarms.load_state_dict(memory["bell"])
        self.evaluation = memory["evaluation"]
        self.toolbox.load_state_dict(memory["tool_cache"])

    def _forget_from(self, step: int, *, evaluated: bool) -> None:
        self._trajectories.forget_from(step, evaluated=evaluated)

    # Logs ------------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """As TRL's, but what `log_completions` prints of prompts and completions steers no terminal."""
        number = self.args.num_completions_to_print
        self.num_completions_to_print = 0  # TRL prints none
        try:
            super().log(logs, start_time)
        finally:
            self.num_completions_to_print = number
        if self.accelerator.is_main_process and self.log_completions and self._logs["prompt"]:
            print_prompt_completions_sample(
                *(visible_data(list(self._logs[name])) for name in ("prompt", "completion")),
                *(self._logs["rewards"], self._logs["advantages"], self.state.global_step, number),
                extra={visible(name): visible_data(list(column)) for name, column in self._logs["extra"].items()},
            )

    def _log_rollout(self, advantages: torch.Tensor) -> None:
        """Metrics over all ranks, alarms, and this rank's trees."""
        last, rewards = self._last, self._last_rewards
        assert last is not None and rewards is not None
        mode = "train" if self.model.training else "eval"
        tally = Tally()
        tally_rollout(last.rollout, tally)
        tally.add("time/reward_s", self._spans.take("reward"))
        tally.add("time/logprobs_s", self._spans.take("logprobs"))
        tally_rewards([group.tolist() for group in rewards.split(len(rewards) // len(last.rollout.trees))], tally)
        merged = Tally.merged(gather_object([tally.plain()]))
        for name, value in merged.values().items():
            self._metrics[mode][f"arpo/{name}"].append(value)
        trees = logged_trees(
            last.rollout.trees,
            rewards.tolist(),
            advantages.tolist(),
            step=self.state.global_step,
            first_group=last.first_group,
            decode=lambda ids: self._tokenizer.decode(ids, skip_special_tokens=False),
        )
        self._trajectories.write(last.name, trees)
        if mode == "train":
            for message in self.alarms.check(merged):
                logger.warning(f"Step {self.state.global_step}: {message}")
