"""The settings of a run: TRL's `GRPOConfig` and ARPO's additional settings."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import TrainingArguments
from trl import GRPOConfig

from arpo_trl.common.build_locks import remove_left_build_locks
from arpo_trl.common.devices import has_accelerator
from arpo_trl.common.imports import is_import_path
from arpo_trl.common.settings import Range, ToolLimits, changed, check_fields, setting
from arpo_trl.common.trl_settings import NOT_SAMPLED_WITH
from arpo_trl.common.user_files import expect, read_json
from arpo_trl.common.waiting import is_first_rank
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.net.addresses import check_server_url, server_key
from arpo_trl.options import (
    VLLM_KEY_VARIABLE,
    AdvantageBaseline,
    ImportanceSamplingLevel,
    RolloutSchedule,
    ShareCalls,
    SharedPrefixForward,
    StaleTokens,
    WeightSync,
)
from arpo_trl.rollout.credit import SharedPrefixWeight, attributions, build_credit
from arpo_trl.rollout.engines.generation_rules import refuse_rules, rules_of
from arpo_trl.rollout.rules import RULES, BranchRule, build_rule
from arpo_trl.rollout.rules.base import are_whole
from arpo_trl.visible import get_logger

if TYPE_CHECKING:
    from arpo_trl.rollout.credit.base import Credit

logger = get_logger(__name__)

LOSS_TYPES = ("grpo", "dr_grpo", "dapo", "bnpo", "luspo", "cispo", "sapo", "vespo")
"""TRL's loss types. TRL detects an unknown one only in the first update."""

_OF_RULES = ("branch_probability", "entropy_weight", "branch_threshold", "branches_per_fork")
"""Settings that a branch rule receives if it has a field of that name. `branch_rule_kwargs` sets its other fields."""


INHERITED: dict[str, dict[str, Any]] = {
    **{name: {"range": Range(at_least=0)} for name in ("learning_rate", "weight_decay", "max_grad_norm", "beta")},
    **{name: {"range": Range(at_least=0)} for name in ("epsilon", "epsilon_high", "dataloader_num_workers")},
    **{name: {"range": Range(at_least=0, at_most=1)} for name in ("adam_beta1", "adam_beta2")},
    **{name: {"range": Range(at_least=1)} for name in ("gradient_accumulation_steps", "steps_per_generation")},
    "num_iterations": {"range": Range(at_least=1)},
    **{name: {"range": Range(at_least=0)} for name in ("warmup_steps", "eval_steps")},
    **{name: {"range": Range(at_least=0), "optional": True} for name in ("logging_steps", "save_steps")},
    **{name: {"range": Range(at_least=1)} for name in ("num_generations_eval", "ddp_timeout")},
    **{name: {"range": Range(above=0)} for name in ("num_train_epochs", "delta")},
    "max_steps": {"range": Range(at_least=-1)},
    "ref_model_mixup_alpha": {"range": Range(at_least=0, at_most=1)},
    "vllm_gpu_memory_utilization": {"range": Range(above=0, at_most=1)},
    "top_k": {"range": Range(at_least=0)},
    **{name: {"range": Range(at_least=0, at_most=1)} for name in ("min_p", "top_entropy_quantile")},
    "repetition_penalty": {"range": Range(above=0)},
    "seed": {"range": Range(at_least=0, at_most=2**32 - 1)},
    **{name: {"text": True} for name in ("output_dir", "run_name", "hub_model_id")},
    **{name: {"options": True} for name in ("model_init_kwargs", "generation_kwargs", "chat_template_kwargs")},
    **{name: {"options": True} for name in ("lr_scheduler_kwargs", "gradient_checkpointing_kwargs")},
    "report_to": {"nothing": "none"},
}
"""The accepted values of settings that TRL and transformers check late or never; see `check_fields`."""


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def refuse_token(args: TrainingArguments) -> None:
    """Checks that `args` contain no token.

    Raises:
        ConfigError: `hub_token`, or a token in `model_init_kwargs`, is set.
    """
    options = getattr(args, "model_init_kwargs", None)
    options = options if isinstance(options, dict) else {}
    given = {"hub_token": args.hub_token} | {
        f"the {name} of model_init_kwargs": options.get(name) for name in ("token", "use_auth_token")
    }
    for name, token in given.items():
        if token is not None and not isinstance(token, bool):  # True means the token of `hf auth login`
            raise ConfigError(
                f"{name} is set, but settings are logged and saved in files. Remove it, and set the environment "
                "variable HF_TOKEN or log in with `hf auth login`."
            )


def take_the_cpu_if_alone(args: TrainingArguments) -> None:
    """Sets `use_cpu` if there is no accelerator, with a warning. Call it before the `__post_init__` of `args`.

    transformers would also train on the CPU, but rejects bf16, TRL's default, unless `use_cpu` is set.
    """
    if args.use_cpu or has_accelerator():
        return
    args.use_cpu = True
    if is_first_rank():
        logger.warning("No accelerator was found: use_cpu is set to true, and training runs on the CPU.")


def refuse_missing_deepspeed_config(args: TrainingArguments) -> None:
    """Checks that `deepspeed` is not the path of a file that is missing or not JSON.

    transformers also rejects such a path, but does not name the setting, and leaves an incomplete object that breaks
    the next model it loads.

    Raises:
        ConfigError: The file does not exist, or is not a JSON object.
    """
    path = args.deepspeed
    if isinstance(path, str) and path.endswith(".json") and not os.path.exists(path):
        raise ConfigError(f"deepspeed is {path!r}, but there is no such file. Check the path of the DeepSpeed config.")
    if isinstance(path, str) and os.path.isfile(path):
        try:
            expect(read_json(Path(path)), dict, path)
        except DataError as error:
            raise ConfigError(f"deepspeed is {path!r}, which is no DeepSpeed config. {error}") from error


def refuse_broken_json(args: TrainingArguments) -> None:
    """Checks that each field of `args` that accepts JSON text contains an object or valid JSON text.

    Raises:
        ConfigError: A text is not valid JSON. transformers' own message does not name the setting.
    """
    for name in args._VALID_DICT_FIELDS:
        text = getattr(args, name)
        if isinstance(text, str) and text.startswith("{"):
            try:
                json.loads(text)
            except ValueError as error:
                raise ConfigError(
                    f'{name} is {text!r}; expected JSON such as {{"option": 1}}, but {error}. Correct the text.'
                ) from error


def refuse_best_without_evaluation(args: TrainingArguments) -> None:
    """Checks that there are evaluations if their results decide which checkpoint is saved or loaded.

    Raises:
        ConfigError: There are none. transformers would then save no checkpoint, or not load the best one.
    """
    wants = {
        "save_strategy: best": args.save_strategy == "best",
        "load_best_model_at_end": args.load_best_model_at_end,
    }
    for name, is_set in wants.items():
        if is_set and args.eval_strategy == "no":
            raise ConfigError(
                f"{name} is set, but eval_strategy is 'no', so no checkpoint is the best one. Set eval_strategy, "
                f"or unset {name}."
            )


@dataclass
class ARPOConfig(ToolLimits, GRPOConfig):
    """Configuration of [`ARPOTrainer`].

    It has all fields of `GRPOConfig` and of `ToolLimits`, and the fields below. These defaults differ from TRL's:
    `num_generations` 16, `loss_type` "grpo" and `max_tool_calling_iterations` 6 (equal or close to the paper's
    values), `per_device_train_batch_size` and `per_device_eval_batch_size` 16 (one group), and
    `vllm_importance_sampling_mode` "token_truncate". `use_cpu` becomes true if there is no accelerator.

    Raises:
        ConfigError: A setting, or a combination of settings, cannot work. This includes TRL's own checks. Raised
            before anything is loaded.
    """

    _VALID_DICT_FIELDS: ClassVar[list[str]] = [
        *GRPOConfig._VALID_DICT_FIELDS,
        "branch_rule_kwargs",
        "advantage_attribution_kwargs",
        "tool_concurrency_per_tool",
    ]  # these also accept JSON text

    # Parameters that control the tree
    num_generations: int = setting(
        16,
        "M: leaves per prompt, the size of a group. Divides this rank's generation batch "
        "(per_device_train_batch_size x steps_per_generation).",
        at_least=2,
    )
    initial_rollouts: int | None = setting(
        None,
        "N: paths started at the root, at most M; the other M - N leaves are branches. N = M is GRPO. "
        "None: M // 2, or the branch rule's own default.",
        at_least=1,
    )
    entropy_probe_tokens: int = setting(
        20, "k: number of tokens at the start of a turn whose mean entropy (nats) is measured.", at_least=1
    )
    branch_rule: str = setting(
        "threshold",
        "Rule that decides where paths branch: 'threshold' (the paper's), another rule of the table "
        "in docs/algorithm.md, or your own, by its import path, such as my_rules:Early, or a registered name.",
    )
    branch_rule_kwargs: dict[str, Any] | str | None = setting(
        None,
        "Options of branch_rule in addition to the four settings below, as in {option: value}; see docs/algorithm.md.",
    )
    branch_probability: float = setting(0.5, "alpha: P = alpha + beta * dH.", at_least=0, at_most=1)
    entropy_weight: float = setting(
        0.2, "beta: weight of dH = (H_turn - H_root) / ln V. Has no effect under 'threshold' when alpha = tau."
    )
    branch_threshold: float = setting(0.5, "tau: 'threshold' branches if P > tau.", at_least=0, at_most=1)
    branches_per_fork: int = setting(1, "Z: extra turns under a tool result that branches.", at_least=1)
    rollout_schedule: str = setting(
        RolloutSchedule.OVERLAP.value,
        "'overlap': process each result when it arrives. 'rounds': process tool results together when no turn is "
        "decoding; runs are then reproducible bit for bit, independent of the tools' timing.",
        choices=RolloutSchedule,
    )

    dynamic_sampling_rounds: int = setting(
        0,
        "Maximum number of times that a prompt is rolled out again because all its leaves have the same reward "
        "(DAPO's dynamic sampling, with the same prompt). 0: never.",
        at_least=0,
    )

    # Parameters that control the batch
    per_device_train_batch_size: int = setting(
        16,
        "Completions per device and forward pass. Its product with steps_per_generation must be a multiple of M.",
        at_least=1,
    )
    per_device_eval_batch_size: int = setting(
        16,
        "Completions per device in evaluation. Its product with the number of ranks must be a multiple of "
        "num_generations_eval or, if that is not set, of M.",
        at_least=1,
    )
    max_completion_length: int | None = setting(
        GRPOConfig.max_completion_length,
        "Length of a path after its prompt, tool results included.",
        at_least=1,
        unit="tokens",
    )

    # Parameters that control the tools, in addition to those of `ToolLimits`
    max_tool_calling_iterations: int | None = setting(
        6,
        "Maximum number of tool results per path. After them the model gets a notice and writes one last turn. "
        "None: only the length limits them.",
        at_least=0,
    )
    tool_concurrency_per_tool: dict[str, int] | str | None = setting(
        None,
        "Maximum number of calls of single tools that run at the same time, as in {search: 8}, in "
        "addition to tool_concurrency. Each >= 1.",
    )
    environment_concurrency: int | None = setting(
        None,
        "Maximum number of environments of environment_factory that exist at the same time, on this rank. None: "
        "as many as the paths need.",
        at_least=1,
    )
    tool_cache: bool = setting(
        False,
        "Whether an identical call reuses an earlier successful result. Only for tools that are all deterministic.",
    )

    share_calls: str = setting(
        ShareCalls.OFF.value,
        "'history': paths of a prompt with the same history of calls share one execution of the next identical "
        "call. Only for tools that are declared deterministic or depends_on_calls_only. 'off': they do not.",
        choices=ShareCalls,
    )

    # Parameters that control the credit
    loss_type: str = setting(
        "grpo", "TRL's loss type. The paper uses 'grpo' (mean per sequence, then over the group).", choices=LOSS_TYPES
    )
    importance_sampling_level: str = setting(
        ImportanceSamplingLevel.TOKEN.value,
        "Tokens that share one importance ratio: 'token' (none), 'turn' (the tokens of a turn, by their mean "
        "log-ratio) or 'sequence' (the tokens of a path). 'token' and 'sequence' are TRL's.",
        choices=ImportanceSamplingLevel,
    )
    clip_keeps_gradient: bool = setting(
        False,
        "Whether a token with a positive advantage and a ratio above 1 + epsilon_high keeps the gradient of the "
        "ratio 1 + epsilon_high, as in AEPO. Otherwise it has no gradient, as in PPO.",
    )
    advantage_baseline: str = setting(
        AdvantageBaseline.MEAN.value,
        "The baseline that is subtracted from a leaf's reward: 'mean' (of its group, TRL's), 'score_norm' (of "
        "its group, weighted by the squared score norms of the leaves), 'batch' (the mean of the batch), "
        "'running' (a moving average over earlier batches). scale_rewards sets the divisor of the difference.",
        choices=AdvantageBaseline,
    )
    score_norm_cap: float | None = setting(
        None,
        "Largest weight of a leaf under 'score_norm', as a multiple of the median of its group. None: no limit.",
        at_least=1,
    )
    running_baseline_decay: float = setting(
        0.9, "Share of the old value in each update under 'running'.", at_least=0, at_most=0.999
    )
    advantage_attribution: str = setting(
        "soft",
        "Advantage of each token: 'soft' (its leaf's), 'hard' (the mean of the leaves that share "
        "it), another credit of the table in docs/algorithm.md, or your own, by its import path, such as "
        "my_credits:OwnTurns, or a registered name.",
    )
    advantage_attribution_kwargs: dict[str, Any] | str | None = setting(
        None, "Options of advantage_attribution, as in {option: value}; docs/algorithm.md lists them."
    )
    shared_prefix_weight: str = setting(
        SharedPrefixWeight.PER_LEAF.value,
        "Leaves in which a shared token is trained: 'per_leaf' (each of them), 'once' (only the first, with their "
        "mean advantage).",
        choices=SharedPrefixWeight,
    )

    # Parameters that control vLLM (use_vllm, vllm_mode and the other vllm_… settings are TRL's)
    vllm_server_urls: list[str] | None = setting(
        None,
        "Base URLs of the servers in vllm_mode 'server'. All paths of a tree go to the same server. "
        "None: vllm_server_base_url or, if that is not set, vllm_server_host and vllm_server_port.",
    )
    vllm_request_timeout_s: float = setting(
        1800.0,
        "Timeout of one request to a server. (vllm_server_timeout limits how long a server may be unreachable.)",
        above=0,
        unit="seconds",
    )
    weight_sync: str = setting(
        WeightSync.NCCL.value,
        "Transfer of weights to the servers: 'nccl' (TRL's transfer from GPU to GPU) or 'disk' (through a shared "
        "folder; works on any hardware and after a server's restart).",
        choices=WeightSync,
    )
    weight_sync_dir: str | None = setting(
        None,
        "Folder for weight_sync 'disk', at the same path for trainer and servers. Each run has its own folder in it. "
        "None: <output_dir>/served_weights.",
    )
    weight_sync_tolerance: float = setting(
        0.05,
        "Largest mean |difference| between vLLM's and the trainer's logprobs of a fixed text after a sync. In "
        "nats, or in standard deviations of the logprobs if these exceed one nat. Above it the run stops.",
        above=0,
        unit="nats",
    )
    entropy_top_logprobs: int = setting(
        20,
        "Number of logprobs that vLLM returns for each of a turn's first k tokens. The entropy is estimated from "
        "them, including the tail.",
        at_least=1,
    )
    vllm_importance_sampling_mode: str = setting(
        "token_truncate",
        "TRL's correction for differences between vLLM's and the trainer's logprobs. The default is per token, "
        "since a ratio over a whole trajectory multiplies the noise of all its tokens.",
        choices=("token_truncate", "token_mask", "sequence_truncate", "sequence_mask"),
    )

    # Parameters that control rollouts during the update (docs/vllm.md)
    rollouts_ahead: int = setting(
        0,
        "Generation batches that the servers sample while the update of an earlier one runs. 0: none. Requires "
        "vllm_mode 'server'.",
        at_least=0,
    )
    max_staleness: int | None = setting(
        None,
        "Maximum number of optimizer steps between the weights that sampled a token and the step that first "
        "trains on it. Requires rollouts_ahead. None: no limit beyond that of rollouts_ahead.",
        at_least=1,
        unit="steps",
    )
    stale_tokens: str = setting(
        StaleTokens.WAIT.value,
        "Treatment of tokens that would be above max_staleness: 'wait' (rollouts start later, so that there are "
        "none), 'drop' (they are not trained).",
        choices=StaleTokens,
    )

    # Parameters that control the forward pass of the update
    shared_prefix_forward: str = setting(
        SharedPrefixForward.AUTO.value,
        "Whether tokens shared by rows of a micro-batch are computed only once: 'auto' (if this is exact and "
        "saves time; warns once if it is not exact), 'on' (always; an error if not exact), 'off' (TRL's padded "
        "batch).",
        choices=SharedPrefixForward,
    )

    # Parameters that control the trajectory log
    trajectory_log_rate: float = setting(
        0.05, "Share of the trees written to <output_dir>/trajectories as JSONL.", at_least=0, at_most=1
    )

    # Parameters that control the Hub (push_to_hub, hub_model_id, hub_strategy and the other hub_… settings are
    # transformers')
    hub_trajectories_id: str | None = setting(
        None,
        "Dataset on the Hub to which the logged trajectories are pushed at the end, one row per "
        "leaf. Requires push_to_hub. None: they are not pushed.",
    )

    def __post_init__(self) -> None:
        self._check_rewards()
        check_fields(self, INHERITED)
        for name in NOT_SAMPLED_WITH:  # before TRL, for which one of them sets another
            if getattr(self, name):
                raise ConfigError(f"{name} is set, but the tree sampler does not support it. Unset it.")
        self._check_paths()
        if self.generation_batch_size is None:  # otherwise the number of steps depends on the number of ranks
            self._check_groups_fit_rank(self.steps_per_generation or self.gradient_accumulation_steps)
        take_the_cpu_if_alone(self)
        refuse_missing_deepspeed_config(self)
        refuse_broken_json(self)
        remove_left_build_locks(self.deepspeed)
        try:
            super().__post_init__()
        except ValueError as error:
            raise ConfigError(str(error)) from error
        refuse_best_without_evaluation(self)
        assert self.steps_per_generation is not None
        self._check_groups_fit_rank(self.steps_per_generation)
        _ = self.tool_places  # raises
        self._check_branches()
        self.make_credit()  # raises
        self._check_supported()
        self._check_baseline()
        self._check_loss_terms()
        self._check_ahead()
        self._check_hub()

    def make_branch_rule(self) -> BranchRule:
        """The rule named by `branch_rule`, with its settings."""
        options = self._options("branch_rule_kwargs", "branch rule")
        return build_rule(self.branch_rule, {name: getattr(self, name) for name in _OF_RULES}, options)

    def make_credit(self) -> Credit:
        """The credit selected by `advantage_attribution` and `shared_prefix_weight`, with its options."""
        options = self._options("advantage_attribution_kwargs", "credit")
        return build_credit(self.advantage_attribution, options, SharedPrefixWeight(self.shared_prefix_weight))

    def _options(self, name: str, kind: str) -> dict[str, Any]:
        options = getattr(self, name)
        if options is not None and not isinstance(options, dict):
            raise ConfigError(f"{name} is {options!r}; expected options of the {kind}, such as {{option: value}}.")
        return options or {}

    @property
    def tool_places(self) -> dict[str, int]:
        """The checked `tool_concurrency_per_tool`: tool → maximum number of calls at the same time.

        Raises:
            ConfigError: It is not a mapping from tools to integers of at least 1.
        """
        places = self.tool_concurrency_per_tool or {}
        if not isinstance(places, dict) or not all(isinstance(n, int) and n >= 1 for n in places.values()):
            raise ConfigError(
                f"tool_concurrency_per_tool is {places!r}; expected a mapping of tools to integers of at least 1, "
                "such as {search: 8}."
            )
        return places

    @property
    def revision(self) -> str | None:
        """The revision of the model in `model_init_kwargs`; None if it names none."""
        return (self.model_init_kwargs or {}).get("revision")

    @property
    def server_urls(self) -> list[str]:
        """The vLLM servers of `vllm_mode` "server"."""
        one = self.vllm_server_base_url or f"http://{self.vllm_server_host}:{self.vllm_server_port}"
        return self.vllm_server_urls or [one]

    @property
    def unread(self) -> list[str]:
        """The changed settings of branch rules that `branch_rule` does not read."""
        rule = {field.name for field in fields(self.make_branch_rule())}
        return [name for name in changed(self) if name in _OF_RULES and name not in rule]

    def _check_paths(self) -> None:
        """Checks N against M, the names of branch rule and credit, and that there is an output_dir."""
        if self.output_dir is not None and not str(self.output_dir).strip():
            raise ConfigError("output_dir is empty; expected a folder for the run.")
        if self.initial_rollouts is not None and self.initial_rollouts > self.num_generations:
            raise ConfigError(
                f"initial_rollouts (N) is {self.initial_rollouts} but num_generations (M) is {self.num_generations}; "
                "expected an integer with 1 ≤ N ≤ M. N = M is plain GRPO."
            )
        for name, known in (("branch_rule", RULES.names), ("advantage_attribution", attributions())):
            if getattr(self, name) not in known and not is_import_path(getattr(self, name)):
                raise ConfigError(
                    f"{name} is {getattr(self, name)!r}; expected one of {known}, or the import path of a class of "
                    "yours, such as my_module:MyClass."
                )

    def _check_branches(self) -> None:
        """Sets the default of N and checks that the branch rule can spend the other leaves."""
        rule = self.make_branch_rule()
        if self.initial_rollouts is None:
            first = rule.first_paths(self.num_generations)
            if not are_whole([first], 1, math.inf):
                raise ConfigError(
                    f"The branch rule {self.branch_rule!r} returned {first!r} from `first_paths`; expected a whole "
                    "number of at least 1."
                )
            self.initial_rollouts = first
        rule.check(self.num_generations, self.initial_rollouts, self.max_tool_calling_iterations)
        paths = f"initial_rollouts (N) is {self.initial_rollouts} and num_generations (M) is {self.num_generations}"
        if self.initial_rollouts == self.num_generations and self.branch_rule_kwargs:
            raise ConfigError(
                f"branch_rule_kwargs is {self.branch_rule_kwargs}, but {paths}, so that nothing branches. Remove "
                f"branch_rule_kwargs, or set N < M."
            )
        if self.initial_rollouts < self.num_generations and self.max_tool_calling_iterations == 0:
            raise ConfigError(
                f"max_tool_calling_iterations is 0, but {paths}: paths branch only at tool results. Set "
                f"initial_rollouts: {self.num_generations}, which is GRPO, or raise max_tool_calling_iterations."
            )

    def _check_groups_fit_rank(self, steps_per_generation: int) -> None:
        """Checks that a rank's batch contains only whole groups: a tree cannot span ranks. TRL checks the global
        batch."""
        batch = self.per_device_train_batch_size * steps_per_generation
        if batch % self.num_generations:
            raise ConfigError(
                f"num_generations ({self.num_generations}) does not divide this rank's generation batch ({batch} = "
                f"per_device_train_batch_size {self.per_device_train_batch_size} × steps_per_generation "
                f"{steps_per_generation}); a tree cannot span ranks. Set the product to a multiple of "
                f"{self.num_generations}."
            )

    def _check_rewards(self) -> None:
        weights: Any = self.reward_weights
        numbers = isinstance(weights, Sequence) and not isinstance(weights, str)
        if weights is not None and not (numbers and all(_is_finite(weight) for weight in weights)):
            raise ConfigError(f"reward_weights is {weights!r}; expected a list of finite numbers, such as [0.5, 1.0].")
        if self.scale_rewards not in ("group", "batch", "none", True, False):
            raise ConfigError(f"scale_rewards is {self.scale_rewards!r}; expected 'group', 'batch' or 'none'.")

    def _check_baseline(self) -> None:
        if self.score_norm_cap is not None and self.advantage_baseline != AdvantageBaseline.SCORE_NORM:
            raise ConfigError(
                f"score_norm_cap is {self.score_norm_cap}, but advantage_baseline is {self.advantage_baseline!r}, "
                "which has no weights. Set advantage_baseline: score_norm, or unset score_norm_cap."
            )
        if "running_baseline_decay" in changed(self) and self.advantage_baseline != AdvantageBaseline.RUNNING:
            raise ConfigError(
                f"running_baseline_decay is {self.running_baseline_decay}, but advantage_baseline is "
                f"{self.advantage_baseline!r}, which is no moving average. Set advantage_baseline: running, or unset "
                "running_baseline_decay."
            )
        own = self.advantage_baseline != AdvantageBaseline.MEAN
        if own and self.multi_objective_aggregation != "sum_then_normalize":
            raise ConfigError(
                f"advantage_baseline is {self.advantage_baseline!r}, but multi_objective_aggregation is "
                f"{self.multi_objective_aggregation!r}, which normalises each reward by its group's mean. Set "
                "multi_objective_aggregation: sum_then_normalize, or advantage_baseline: mean."
            )

    def _check_loss_terms(self) -> None:
        if self.loss_type == "dr_grpo" and self.max_completion_length is None:
            raise ConfigError(
                "loss_type is 'dr_grpo', which divides the loss by max_completion_length, but max_completion_length "
                "is None. Set it to a number of tokens, or choose another loss_type."
            )
        level, clipped = self.importance_sampling_level, ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")
        if self.clip_keeps_gradient and (self.loss_type not in clipped or level == ImportanceSamplingLevel.SEQUENCE):
            raise ConfigError(
                f"clip_keeps_gradient is set, but loss_type is {self.loss_type!r} and importance_sampling_level "
                f"{level!r}; expected a loss that clips the ratio of tokens or turns: one of {list(clipped)}, with "
                "'token' or 'turn'."
            )
        if self.clip_keeps_gradient and self.beta and self.use_bias_correction_kl:
            raise ConfigError(
                f"clip_keeps_gradient is set and beta is {self.beta}, but use_bias_correction_kl multiplies the KL of "
                "a token by its ratio, which clip_keeps_gradient replaces by 1 + ε_high. Set use_bias_correction_kl: "
                "false, or beta: 0."
            )
        if level == ImportanceSamplingLevel.TURN and self.loss_type == "vespo":
            raise ConfigError(
                "importance_sampling_level is 'turn', but loss_type 'vespo' weights whole paths. Set "
                "importance_sampling_level: token, or another loss_type."
            )

    def _check_ahead(self) -> None:
        """Raises ConfigError for settings that contradict rollouts ahead."""
        if self.stale_tokens == StaleTokens.DROP and self.max_staleness is None:
            raise ConfigError(
                "stale_tokens is 'drop', but max_staleness is not set, so that no token is too stale. Set "
                "max_staleness, or unset stale_tokens."
            )
        if not self.rollouts_ahead:
            if self.max_staleness is not None:
                raise ConfigError(
                    "max_staleness is set, but rollouts_ahead is 0, so that no token is stale. Unset it."
                )
            return
        told = f"rollouts_ahead is {self.rollouts_ahead}"
        if not self.use_vllm or self.vllm_mode != "server":
            engine = "vLLM shares the device with the update" if self.use_vllm else "the updated model itself samples"
            raise ConfigError(
                f"{told}, but {engine}, so that a rollout cannot run during the update. Set use_vllm: true and "
                "vllm_mode: server, or rollouts_ahead: 0."
            )
        if self.rollout_schedule == RolloutSchedule.ROUNDS:
            raise ConfigError(
                f"{told}, but rollout_schedule is 'rounds', whose rollouts are reproducible bit for bit: new weights "
                f"can reach a rollout ahead at any time. Set rollout_schedule: overlap."
            )
        if self.dynamic_sampling_rounds:
            raise ConfigError(
                f"{told} and dynamic_sampling_rounds is {self.dynamic_sampling_rounds}, but a further round would "
                f"start only when the rollout is needed. Set one of them to 0."
            )
        assert self.steps_per_generation is not None
        every, step = self.steps_per_generation * self.num_iterations, self.gradient_accumulation_steps
        if every % step and step % every:
            raise ConfigError(
                f"{told}, but a rollout would start in the middle of an optimizer step: steps_per_generation "
                f"{self.steps_per_generation} × num_iterations {self.num_iterations} is neither a multiple nor a "
                f"divisor of gradient_accumulation_steps {step}. Change one of them."
            )
        if self.max_staleness is not None and self.max_staleness < every // step:
            raise ConfigError(
                f"{told} and max_staleness is {self.max_staleness}, but the next rollout is first trained "
                f"{every // step} steps later (steps_per_generation {self.steps_per_generation} × num_iterations "
                f"{self.num_iterations} / gradient_accumulation_steps {step}). Set max_staleness to at least that."
            )

    def _check_hub(self) -> None:
        refuse_token(self)
        if self.hub_trajectories_id is not None and not self.push_to_hub:
            raise ConfigError("hub_trajectories_id is set without push_to_hub. Set push_to_hub: true.")

    def _check_supported(self) -> None:
        """Raises ConfigError for settings that the tree sampler would silently ignore, or does not support."""
        if not 0 < self.temperature < math.inf:
            raise ConfigError(
                f"temperature is {self.temperature}; expected a finite number above 0: the greedy paths of a group "
                "are all equal. For greedy answers: arpo-trl eval --temperature 0."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; expected a number above 0 and at most 1.")
        if self.save_on_each_node:
            raise ConfigError(
                "save_on_each_node is set, but a checkpoint has files of every process, so output_dir must be one "
                "folder for all nodes. Unset it."
            )
        if self.use_vllm:
            refuse_rules(None, self.generation_kwargs, "vLLM")
        else:
            rules_of(None, self.generation_kwargs)
        if self.use_vllm and self.vllm_mode not in ("colocate", "server"):
            raise ConfigError(f"vllm_mode is {self.vllm_mode!r}; expected 'colocate' or 'server'.")
        per_token = self.vllm_importance_sampling_mode in ("token_truncate", "token_mask")
        if self.use_vllm and self.loss_type == "vespo" and self.vllm_importance_sampling_correction and not per_token:
            raise ConfigError(
                f"loss_type is 'vespo' but vllm_importance_sampling_mode is {self.vllm_importance_sampling_mode!r}; "
                "expected 'token_truncate' or 'token_mask'."
            )
        if self.weight_sync_dir is not None and self.weight_sync != WeightSync.DISK:
            raise ConfigError(
                f"weight_sync_dir is set, but weight_sync is {self.weight_sync!r}, which writes no files. Set "
                "weight_sync: disk, or unset weight_sync_dir."
            )
        for url in self.server_urls:
            check_server_url(url, "A vLLM server's address", VLLM_KEY_VARIABLE)
        served = self.use_vllm and self.vllm_mode == "server"
        if served and self.weight_sync == WeightSync.NCCL and server_key(VLLM_KEY_VARIABLE):
            raise ConfigError(
                f"weight_sync is 'nccl', but {VLLM_KEY_VARIABLE} is set, and TRL's NCCL transfer sends the servers no "
                f"key. Set weight_sync: disk, or unset {VLLM_KEY_VARIABLE} if the servers need no key."
            )
        urls = self.vllm_server_urls
        if urls is None:
            return
        if not served:
            raise ConfigError(
                "vllm_server_urls is set, but these servers are not used. Set use_vllm: true and vllm_mode: server."
            )
        if self.vllm_server_base_url is not None:
            raise ConfigError(
                "vllm_server_urls and vllm_server_base_url are both set. Put all URLs into vllm_server_urls."
            )
        if not urls or len({url.rstrip("/").removesuffix("/v1") for url in urls}) < len(urls):
            raise ConfigError(f"vllm_server_urls is {urls}; expected at least one URL, without duplicates.")
