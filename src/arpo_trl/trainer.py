"""`ARPOTrainer`: TRL's `GRPOTrainer` with the tree sampler in place of generation and per-token credit."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object, is_peft_model
from datasets import Dataset, IterableDataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import get_config_model_id, pad, split_tensor_dict

from arpo_trl.advantages import (
    AdvantageAttribution,
    SharedPrefixWeight,
    first_copies,
    mean_over_leaves,
)
from arpo_trl.completions import completion_messages
from arpo_trl.compute_dtype import training_dtype, warn_of_emulation
from arpo_trl.config import ARPOConfig
from arpo_trl.data import refuse_rollout_columns
from arpo_trl.errors import ConfigError
from arpo_trl.interrupts import Interrupts
from arpo_trl.metrics import AlarmBell, Tally, tally_rollout
from arpo_trl.options import ProtocolKind, RolloutSchedule, SharedPrefixForward
from arpo_trl.prefix_sharing import (
    Pack,
    forward_pack,
    pack_rows,
    pays,
    share_prefixes,
    why_not_shared,
    why_packs_differ,
)
from arpo_trl.resumable import ResumableTrainer
from arpo_trl.rewards.checked import checked_reward
from arpo_trl.rollout.engines.base import Engine, SamplingSettings
from arpo_trl.rollout.engines.generation_rules import refuse_rules
from arpo_trl.rollout.engines.transformers import TransformersEngine
from arpo_trl.rollout.engines.visibility import exact_length
from arpo_trl.rollout.engines.vllm_cpu import prepare_cpu
from arpo_trl.rollout.engines.vllm_setup import colocate_engine, server_engine
from arpo_trl.rollout.protocol import PROTOCOLS
from arpo_trl.rollout.sampler import GroupRequest, Rollout, SamplerSettings, TreeSampler
from arpo_trl.rollout.tree import Leaf
from arpo_trl.sharding import at_its_own_pace, check_launch
from arpo_trl.startup import check_prompts_fit, check_quantized_training, check_rows, check_writable, untold_tags
from arpo_trl.tools.box import ToolBox
from arpo_trl.trajectories import LoggedTree, TrajectoryLog

logger = get_logger(__name__)

UNLIMITED_CALLS = 1 << 30
LONGER = ", or give vLLM a longer context (vllm_max_model_length, or a server's --max-model-len)"


@dataclass(slots=True)
class _LastRollout:
    """What a rollout leaves for the rest of its step: gone when the next one starts."""

    name: str
    rollout: Rollout
    leaves: list[Leaf]
    first_group: int
    token_nodes: list[list[int]]
    rewards: torch.Tensor | None = None


class ARPOTrainer(ResumableTrainer):
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
    - `train`, and what saves and loads checkpoints: as `ResumableTrainer` has it. Rollouts and rewards can be
      interrupted.
    - `create_model_card`, `push_to_hub` and the pushes while training: ours, as `PublishingTrainer` has them.

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
        for name, given in (("rollout_func", rollout_func), ("environment_factory", environment_factory)):
            if given is not None:
                raise ConfigError(f"{name} was given, but ARPOTrainer samples trees itself. Offer `tools` instead.")
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config) or model.config.model_type
            args = ARPOConfig(f"{name.split('/')[-1]}-ARPO")
        if not isinstance(args, ARPOConfig):
            raise ConfigError(f"args is a {type(args).__name__}; expected an ARPOConfig, which adds ARPO's settings.")
        check_writable(Path(args.output_dir))
        if quantization_config is not None:
            check_quantized_training(peft_config)
        if args.push_to_hub:
            self.prepare_repositories(args)  # before the model is loaded
        if reward_funcs is None:
            reward_funcs = []
        functions = reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
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
        self._interrupts = Interrupts()
        with _vllm_left_to_us(args, engine):
            super().__init__(
                model=model,
                reward_funcs=[checked_reward(function, self._interrupts) for function in functions],
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
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
        if self._is_vlm:
            raise ConfigError("The processing class is multimodal; ARPOTrainer trains text-only models.")
        self.protocol = PROTOCOLS[ProtocolKind(args.tool_protocol)](
            self._tokenizer,
            self.toolbox.specs,
            max_result_tokens=args.max_tool_result_tokens,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        self._shares_prefixes = self._prepare_prefix_sharing()
        self.sampler = self._make_sampler(engine)
        self.rollout_func = self._rollout  # set after TRL's __init__, which warns of the argument
        for dataset in (train_dataset, *evaluated):
            check_prompts_fit(
                dataset, self.protocol, self.sampler.settings.max_length, LONGER if args.use_vllm else ""
            )
        if args.tool_protocol == ProtocolKind.TAGS and (said := untold_tags(self.toolbox.names, train_dataset)):
            logger.warning(said)
        self._trajectories = TrajectoryLog(
            Path(args.output_dir) / "trajectories", args.trajectory_log_rate, args.seed, self.accelerator.process_index
        )
        self._last: _LastRollout | None = None
        self._loss_mask: torch.Tensor | None = None
        """(B, T), nonzero on the tokens whose logprobs the loss will use, of the rows that are being computed."""
        self._bell = AlarmBell(args.branch_policy.rule)
        self._rollouts_at: dict[str, tuple[int, int]] = {}
        self.sampler.between_events = self._interrupts.check
        self._timed: dict[str, float] = defaultdict(float)

    def _make_sampler(self, engine: Engine | None) -> TreeSampler:
        args, eos_ids = self.args, tuple(self.eos_token_ids)
        settings = SamplingSettings(
            eos_ids,
            self.protocol.stop_strings,
            self.temperature,
            self.top_p,
            self.top_k,
            self.min_p,
            self.repetition_penalty,
        )
        lengths = [getattr(self.model.config.get_text_config(), "max_position_embeddings", None)]
        if engine is None and args.use_vllm:
            refuse_rules(self.model.generation_config, None, "vLLM")
            engine, longest = self._vllm_engine(settings)
            lengths.append(longest)
        elif engine is None:
            engine = self._transformers_engine(settings)
            lengths.append(exact_length(self.model.config.get_text_config()))
        context = min((length for length in lengths if length is not None), default=None)
        if context is None:
            raise ConfigError(
                f"The configuration of this model of type {self.model.config.model_type!r} has no "
                "max_position_embeddings, so nothing says how long a path may become. Set it on the configuration."
            )
        return TreeSampler(
            engine,
            self.toolbox,
            self.protocol,
            SamplerSettings(
                num_generations=self.num_generations,
                initial_rollouts=args.initial_rollouts or self.num_generations,
                max_completion_length=self.max_completion_length or context,
                max_length=context,
                max_tool_calls=(
                    UNLIMITED_CALLS if args.max_tool_calling_iterations is None else args.max_tool_calling_iterations
                ),
                entropy_probe_tokens=args.entropy_probe_tokens,
                policy=args.branch_policy,
                schedule=RolloutSchedule(args.rollout_schedule),
            ),
            eos_ids,
        )

    def _transformers_engine(self, settings: SamplingSettings) -> Engine:
        """The engine on the trained model, known to sample what training scores."""
        args = self.args
        rows = args.per_device_train_batch_size * args.steps_per_generation
        evaluated = args.per_device_eval_batch_size if self.eval_dataset is not None else 0
        engine = TransformersEngine(
            self._tokenizer,
            settings,
            self._model_for_generation,
            generation_kwargs=args.generation_kwargs,
            scored_padded=self._may_pad,
            most_rows=max(rows, evaluated),
            smaller=(
                f"Lower per_device_train_batch_size × steps_per_generation ({args.per_device_train_batch_size} × "
                f"{args.steps_per_generation} completions are sampled at once), per_device_eval_batch_size "
                f"({args.per_device_eval_batch_size}) or max_completion_length ({args.max_completion_length}), or let "
                "vLLM sample (use_vllm)."
            ),
        )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            engine.refuse(self.model)  # the weights are not in place before the first session, which compares
        else:
            engine.check()
        if (longest := exact_length(self.model.config.get_text_config())) is not None:
            logger.warning(
                f"Paths may become {longest} tokens long at most: beyond that the model's rotary embedding (longrope) "
                "turns all tokens differently, and what was sampled before is not what would be trained."
                + (" Rows are padded here, and their padding counts: leave room for it." if self._may_pad else "")
            )
        return engine

    def _vllm_engine(self, settings: SamplingSettings) -> tuple[Engine, int]:
        """The engine that `vllm_mode` names, and its context in tokens."""
        vocab_size = self.model.config.get_text_config().vocab_size
        common = (self._tokenizer, settings, lambda: self.state.global_step, self._logprobs_of, vocab_size)
        if self.args.vllm_mode == "colocate":
            return colocate_engine(self.args, self.vllm_generation, *common)
        return server_engine(self.args, self.model, self.accelerator, *common)

    # Generation ------------------------------------------------------------------------------------------------------

    @contextmanager
    def _model_for_generation(self) -> Iterator[PreTrainedModel]:
        """The unwrapped model with its weights gathered: TRL's own way in, entered once per rollout.

        Under the training forward's autocast, so that sampling and training speak of the same distribution.
        """
        with (
            unwrap_model_for_generation(
                self.model_wrapped,
                self.accelerator,
                gather_deepspeed3_params=self.args.ds3_gather_for_generation,
                gradient_checkpointing_kwargs=self.args.gradient_checkpointing_kwargs,
            ) as model,
            at_its_own_pace(self.model_wrapped, model),
            self.accelerator.autocast(),
        ):
            yield model

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

    def _leaves_per_tree(self, prompts: list[Any]) -> int:
        """How many of the rows that this rank was dealt make one tree.

        Evaluation does not branch, so a group may lie on several ranks there: each row is a tree of its own then.
        """
        training = self.model.training
        size = self.num_generations if training else self.num_generations_eval
        if len(prompts) % size == 0 and all(prompts[i] == prompts[i - i % size] for i in range(len(prompts))):
            return size
        if not training:
            return 1
        raise ConfigError(
            f"This rank was dealt {len(prompts)} rows that are no whole groups of {size}; a tree cannot span ranks. "
            f"Set per_device_train_batch_size × steps_per_generation to a multiple of {size}, and leave "
            "accelerator_config.split_batches false."
        )

    def _rollout(self, prompts: list[Any], trainer: GRPOTrainer) -> dict[str, Any]:
        """TRL's `rollout_func`: rows come prompt-major, each prompt as often as its group has leaves."""
        training = self.model.training
        name = self._rollout_name("step" if training else "eval")
        size = self._leaves_per_tree(prompts)
        groups = [prompts[i] for i in range(0, len(prompts), size)]
        first_group = self.accelerator.process_index * len(groups)
        requests = [
            GroupRequest(first_group + i, self.protocol.encode_prompt(prompt)) for i, prompt in enumerate(groups)
        ]
        settings = self.sampler.settings
        with self.interruptible():
            rollout = self.sampler.sample(
                requests,
                seed=(self.args.seed, name),
                settings=settings if training else settings.without_branching(size),
            )
        leaves = [leaf for tree in rollout.trees for leaf in tree.leaves()]
        # A node's number is unique in its tree only; the trees of a batch are laid end to end.
        offsets, offset = [], 0
        for tree in rollout.trees:
            offsets += [offset] * size
            offset += len(tree.nodes)
        token_nodes = [
            [offset + node for node in leaf.token_nodes] for leaf, offset in zip(leaves, offsets, strict=True)
        ]
        self._last = _LastRollout(name, rollout, leaves, first_group, token_nodes)
        self._loss_mask = pad(
            [torch.tensor(leaf.mask) for leaf in leaves],
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
        )
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
        start = time.perf_counter()
        inputs = [dict(row) for row in inputs]  # TRL adds our columns to the rows it was given
        refuse_rollout_columns(inputs[0])  # of a streamed dataset they are known only now
        batch = super()._generate_and_score_completions(inputs)
        assert self._last is not None
        advantages = batch["advantages"]
        self._attribute(batch)
        if self.model.training and self._micro_batches_dealt_together > 1:
            batch["leaf"] = torch.arange(len(advantages), device=advantages.device)
        self._log_rollout(advantages)
        self._timed["generate_and_score"] += time.perf_counter() - start
        return batch

    def _attribute(self, batch: dict[str, Any]) -> None:
        """Turns `batch["advantages"]` (B,) into (B, T) where leaves share nodes and the settings make a difference."""
        assert self._last is not None
        once = self.args.shared_prefix_weight == SharedPrefixWeight.ONCE
        hard = self.args.advantage_attribution == AdvantageAttribution.HARD
        if not (once or hard):
            return
        token_nodes = pad(
            [torch.tensor(nodes) for nodes in self._last.token_nodes],
            padding_value=-1,
            padding_side="right",
            pad_to_multiple_of=self.pad_to_multiple_of,
        ).to(batch["completion_ids"].device)
        first = first_copies(token_nodes)
        if not torch.equal(first, token_nodes >= 0):  # some node stands in several rows; else this is plain GRPO
            batch["advantages"] = mean_over_leaves(batch["advantages"], token_nodes)
            if once:
                batch["tool_mask"] = batch["tool_mask"] * first
        if once:  # every rank, shared nodes or not: the token count is a sum over all of them
            trained = (batch["completion_mask"] * batch["tool_mask"]).sum()
            batch["num_items_in_batch"] = self.accelerator.gather(trained).sum()

    def _calculate_rewards(
        self, inputs: list[Any], prompts: list[Any], completions: list[Any], completion_ids_list: list[Any]
    ) -> torch.Tensor:
        start = time.perf_counter()
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.stop_together()  # rewards of an interrupted function are none
        self._timed["reward"] += time.perf_counter() - start
        if self._last is not None:
            local = slice(self.accelerator.process_index * len(prompts), None)
            weighted = rewards * self.reward_weights.to(rewards.device)
            total = weighted.nansum(dim=1).masked_fill(rewards.isnan().all(dim=1), math.nan)
            self._last.rewards = total[local][: len(prompts)].cpu()
        return rewards

    # Update ----------------------------------------------------------------------------------------------------------

    def _prepare_prefix_sharing(self) -> bool:
        """Makes the models take packs; False where they must not or cannot."""
        wanted = SharedPrefixForward(self.args.shared_prefix_forward)
        if wanted is SharedPrefixForward.OFF:
            return False
        models = [self.accelerator.unwrap_model(model) for model in (self.model, self.ref_model) if model is not None]
        bases = [model.get_base_model() if is_peft_model(model) else model for model in models]
        dtypes = [getattr(torch, training_dtype(base, self.accelerator)) for base in bases]
        reasons = [
            reason
            for base, dtype in zip(bases, dtypes, strict=True)
            if (reason := why_not_shared(base, self.accelerator.device, dtype))
        ]
        if is_peft_model(models[0]) and models[0].active_peft_config.is_prompt_learning:
            reasons.append("its adapter puts virtual tokens before each row")
        if self.aux_loss_enabled:
            reasons.append("its router's auxiliary loss counts every row's tokens")
        if not reasons:
            before = [base.config._attn_implementation for base in bases]
            for base in bases:
                share_prefixes(base)
            # Sharded weights are not in place yet; there `forward_pack` sees to it that all layers take packs.
            if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
                with self.accelerator.autocast():
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
        start = time.perf_counter()
        packs: list[Pack] = []
        if self._shares_prefixes:
            # As many forward passes as TRL would take, so that ranks agree on their number whatever their rows share.
            size = batch_size or len(input_ids)
            assert self._loss_mask is not None
            rows = zip(*(torch.split(of, size) for of in (input_ids, attention_mask, self._loss_mask)), strict=True)
            multiple = self.pad_to_multiple_of or 1
            packs = [pack_rows(ids, mask, logits_to_keep, wanted, multiple_of=multiple) for ids, mask, wanted in rows]
            hidden_size = self.model.config.get_text_config().hidden_size
            if self._may_pad and not all(pays(pack, hidden_size) for pack in packs):
                packs = []
            if torch.is_grad_enabled():
                self._metrics["train"]["arpo/update/packed"].append(float(bool(packs)))
        if packs:
            with self.accelerator.autocast():
                values = [forward_pack(model, pack) for pack in packs]
            logprobs = torch.cat([logprobs for logprobs, _ in values])
            entropies = [entropies for _, entropies in values if entropies is not None]
            result = logprobs, torch.cat(entropies) if compute_entropy else None, None
            if torch.is_grad_enabled():
                ratio = sum(pack.leaf_tokens for pack in packs) / sum(map(len, packs))
                self._metrics["train"]["arpo/update/sharing_ratio"].append(ratio)
        else:
            result = super()._get_per_token_logps_and_entropies(
                model, input_ids, attention_mask, logits_to_keep, batch_size, compute_entropy, **kwargs
            )
        if not torch.is_grad_enabled():
            self._timed["logprobs"] += time.perf_counter() - start
        return result

    def _compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any]) -> torch.Tensor:
        self._loss_mask = inputs["completion_mask"] * inputs["tool_mask"]
        return super()._compute_loss(model, inputs)

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's shuffled micro-batches; the rows of one optimizer step dealt anew, so that trees stand together.

        A tree's rows come in address order, so that where one does not fit, what branched off together stays together.
        The loss of a step is a sum over its rows, whichever micro-batch they stand in.
        """
        inputs = super()._prepare_inputs(generation_batch)
        batches = self._buffered_inputs
        if not self.model.training or batches is None or "leaf" not in inputs:
            return inputs
        size = self._micro_batches_dealt_together
        dealt = [self._dealt(batches[i : i + size]) for i in range(0, len(batches), size)]
        self._buffered_inputs = [batch for together in dealt for batch in together]
        return self._buffered_inputs[self._step % len(batches)]

    @property
    def _micro_batches_dealt_together(self) -> int:
        """How many micro-batches in a row surely belong to one optimizer step; 1 where the loss depends on who is in.

        Optimizer steps end at multiples of `gradient_accumulation_steps`, generation batches at multiples of
        `steps_per_generation`; blocks of their greatest common divisor lie across neither.
        """
        by_batch = self.args.loss_type == "bnpo" or self.top_entropy_quantile < 1.0 or self._entropy_bonus_enabled
        if by_batch or not self._shares_prefixes:
            return 1
        return math.gcd(self.args.steps_per_generation, self.args.gradient_accumulation_steps)

    def _dealt(self, batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
        rows = {
            name: torch.cat([batch[name] for batch in batches]) if torch.is_tensor(value) and value.dim() else value
            for name, value in batches[0].items()
        }
        leaves = rows.pop("leaf").tolist()
        trees = [leaf // self.num_generations for leaf in leaves]
        place = {tree: i for i, tree in enumerate(dict.fromkeys(trees))}
        order = torch.tensor(sorted(range(len(leaves)), key=lambda row: (place[trees[row]], leaves[row])))
        dealt = {
            name: value[order.to(value.device)] if torch.is_tensor(value) and value.dim() else value
            for name, value in rows.items()
        }
        return split_tensor_dict(dealt, len(batches))

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        start, before = time.perf_counter(), self._timed["generate_and_score"]
        loss = super().training_step(*args, **kwargs)
        spent = time.perf_counter() - start - (self._timed["generate_and_score"] - before)
        self._metrics["train"]["arpo/time/update_s"].append(spent)
        return loss

    # Checkpoints -----------------------------------------------------------------------------------------------------

    @property
    def tool_names(self) -> list[str]:
        return list(self.toolbox.names)

    def _memory(self) -> dict[str, Any]:
        return super()._memory() | {
            "rollouts_at": dict(self._rollouts_at),
            "bell": self._bell.state(),
            "evaluation": self.evaluation,
            "tool_cache": self.toolbox.cached(),
        }

    def _recall(self, memory: dict[str, Any]) -> None:
        super()._recall(memory)
        self._rollouts_at = dict(memory["rollouts_at"])
        self._bell.restore(memory["bell"])
        self.evaluation = memory["evaluation"]
        self.toolbox.fill_cache(memory["tool_cache"])

    def _forget_from(self, step: int, *, evaluated: bool) -> None:
        self._trajectories.forget_from(step, evaluated=evaluated)

    # Logs ------------------------------------------------------------------------------------------------------------

    def _log_rollout(self, advantages: torch.Tensor) -> None:
        """Metrics over all ranks, alarms, and this rank's trees."""
        last = self._last
        assert last is not None and last.rewards is not None
        mode = "train" if self.model.training else "eval"
        tally = Tally()
        tally_rollout(last.rollout, tally)
        tally.add("time/reward_s", self._timed.pop("reward", 0.0))
        tally.add("time/logprobs_s", self._timed.pop("logprobs", 0.0))
        size = len(last.leaves) // max(1, len(last.rollout.trees))
        for i in range(0, len(last.leaves), size):
            group = last.rewards[i : i + size]
            if size > 1:
                tally.add("alarm/zero_variance_groups", float(bool((group == group[0]).all())))
        merged = Tally()
        for plain in gather_object([tally.plain()]):
            merged.merge(plain)
        for name, value in merged.values().items():
            self._metrics[mode][f"arpo/{name}"].append(value)
        self._trajectories.write(last.name, self._logged_trees(advantages))
        if mode == "train":
            for message in self._bell.hear(merged):
                logger.warning(f"Step {self.state.global_step}: {message}")

    def _logged_trees(self, advantages: torch.Tensor) -> list[LoggedTree]:
        last = self._last
        assert last is not None and last.rewards is not None
        trees, start = [], 0
        for i, tree in enumerate(last.rollout.trees):
            rows = slice(start, start + len(tree.leaves()))
            rewards = [None if math.isnan(reward) else reward for reward in last.rewards[rows].tolist()]
            prompt = self._tokenizer.decode(tree.root.ids, skip_special_tokens=False)
            trees.append(
                LoggedTree(
                    self.state.global_step, last.first_group + i, prompt, tree, rewards, advantages[rows].tolist()
                )
            )
            start = rows.stop
        return trees


@contextmanager
def _vllm_left_to_us(args: ARPOConfig, engine: Engine | None) -> Iterator[None]:
    """Keeps TRL from connecting to vLLM where it need not, or from a CPU cannot; colocated, it does start vLLM."""
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
