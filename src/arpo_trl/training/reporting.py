"""`Reporting`: a trainer that logs metrics, trees and alarms of its rollouts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import partial
from io import BytesIO
from typing import Any

import pandas as pd
import torch
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase
from trl import GRPOTrainer

from arpo_trl.common.full_disk import full_disk_message, is_full_disk
from arpo_trl.common.spans import Spans
from arpo_trl.config import ARPOConfig
from arpo_trl.errors import ConfigError
from arpo_trl.logs.alarms import Alarms
from arpo_trl.logs.metrics import Tally, tally_functions, tally_step
from arpo_trl.logs.traces import send_traces
from arpo_trl.logs.trajectories import TrajectoryLog, logged_trees
from arpo_trl.rollout.sampler import TreeSampler
from arpo_trl.rollout.text import decode_exactly
from arpo_trl.rollout.tree import RolloutTree
from arpo_trl.tools.environments.state import Environments
from arpo_trl.training.best_metric import check_evaluated
from arpo_trl.training.environments import tally_environments
from arpo_trl.training.last_rollout import LastRollout
from arpo_trl.trl_seam import print_prompt_completions_sample
from arpo_trl.visible import get_rank_logger, visible, visible_data

logger = get_rank_logger(__name__)


class Reporting(GRPOTrainer):
    """A `GRPOTrainer` that logs its rollouts, over all ranks.

    A mixin. A subclass calls `_log_rollout` once per scored rollout, and sets the attributes below.
    """

    args: ARPOConfig
    tree_sampler: TreeSampler
    alarms: Alarms
    _tokenizer: PreTrainedTokenizerBase
    _all_environments: list[Environments]
    _last: LastRollout | None
    _last_rewards: torch.Tensor | None
    _spans: Spans
    _trajectories: TrajectoryLog
    _logs: dict[str, Any]
    _counted: Tally
    """The counts of the rollout before `_log_rollout`."""

    @property
    def _summed_functions(self) -> list[str]:
        """The names of the reward functions with a weight above 0 if there are several. The alarm about groups with
        one reward is enough for a single one."""
        weighted = zip(self.reward_func_names, self.reward_weights.tolist(), strict=True)
        names = [name for name, weight in weighted if weight > 0]
        return names if len(names) > 1 else []

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Like TRL's, but the output of `log_completions` contains no terminal control sequences, and its table can
        be saved whatever the model wrote: see `as_table`."""
        number, completions = self.args.num_completions_to_print, self._logs
        self.num_completions_to_print = 0  # TRL prints none
        if self.accelerator.is_main_process and self.log_completions:
            self._logs = as_table(completions, for_wandb="wandb" in self.args.report_to)
        try:
            super().log(logs, start_time)
        except Exception as error:  # pyarrow and trackers raise different errors for a full disk
            if not is_full_disk(error):
                raise
            logger.warning(f"{full_disk_message(error)} Logs of this step are incomplete. Training continues.")
        finally:
            self.num_completions_to_print, self._logs = number, completions
        if self.accelerator.is_main_process and self.log_completions and self._logs["prompt"]:
            print_prompt_completions_sample(
                *(visible_data(list(self._logs[name])) for name in ("prompt", "completion")),
                *(self._logs["rewards"], self._logs["advantages"], self.state.global_step, number),
                extra={visible(name): visible_data(list(column)) for name, column in self._logs["extra"].items()},
            )

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """Like transformers', with an error that lists the metrics if `metric_for_best_model` is none of them."""
        check_evaluated(self.args, metrics)
        return bool(super()._determine_best_metric(metrics, trial))

    def _learn(self, trees: Sequence[RolloutTree], rewards: Sequence[float], tally: Tally) -> None:
        """Lets the branch rule learn from the trees of all ranks, and counts its metrics. Without branches (N = M) it
        is not used."""
        settings = self.tree_sampler.settings
        if settings.initial_rollouts == settings.num_generations:
            return
        rule = settings.rule
        if rule.learns:
            rule.learn(gather_object([rule.lesson(trees, rewards)]))
        metrics: Any = rule.metrics()
        if not isinstance(metrics, Mapping) or not all(isinstance(name, str) for name in metrics):
            raise ConfigError(
                f"The branch rule {rule.name!r} returned {metrics!r} from `metrics`; expected numbers by name."
            )
        for name, value in metrics.items():
            if name in tally.sums or name in tally.totals:
                raise ConfigError(
                    f"The branch rule {rule.name!r} has a metric {name!r}, which is one of the package's."
                )
            try:
                tally.add(name, value)
            except (TypeError, ValueError) as error:
                raise ConfigError(
                    f"The metric {name!r} of the branch rule {rule.name!r} is {value!r}; expected a number."
                ) from error

    def _log_rollout(self, advantages: torch.Tensor, answers: Sequence[Any]) -> None:
        """Logs metrics over all ranks, this rank's trees and, in training, alarms. `answers` are the rows' reference
        answers."""
        last, rewards = self._last, self._last_rewards
        assert last is not None and rewards is not None
        mode = "train" if self.model.training else "eval"
        seconds = {name: self._spans.take(name) for name in ("reward", "logprobs")}
        tally = tally_step(last.rollout, rewards.tolist(), seconds)
        tally.merge(self._counted.plain())
        self._counted = Tally()
        tally_environments(self._all_environments, tally)
        merged = Tally.merged(gather_object([tally.plain()]))
        if mode == "train":
            self._learn(last.rollout.trees, rewards.tolist(), merged)
            # TRL has already logged the rewards of all ranks, and keeps those of one rollout.
            tally_functions({name: self._logs["rewards"][name] for name in self._summed_functions}, merged)
        for name, value in merged.values().items():
            self._metrics[mode][f"arpo/{name}"].append(value)
        trees = logged_trees(
            last.rollout.trees,
            rewards.tolist(),
            advantages.tolist(),
            step=self.state.global_step,
            first_group=last.first_group,
            decode=partial(decode_exactly, self._tokenizer),
            rule=self.tree_sampler.settings.rule,
            answers=answers[:: len(answers) // len(last.rollout.trees)],
            spans=last.rollout.spans,
        )
        self._trajectories.write(last.name, trees)
        if mode == "train":
            if self.accelerator.is_main_process and "trackio" in self.args.report_to:
                send_traces(self._trajectories.sample(last.name, trees))
            for message in self.alarms.check(merged):
                logger.warning(f"Step {self.state.global_step}: {message}")


def as_table(logs: Mapping[str, Any], *, for_wandb: bool) -> dict[str, Any]:
    """TRL's `_logs` with columns that parquet and wandb's tables can hold. Changes none of the values given.

    The arguments of calls in `prompt` and `completion` are JSON text: models give one argument different types, and a
    tool without parameters has none. So is each value of a column whose values still differ in type, as those of
    `log_extra` may. A column of `log_extra` that lacks the first rows has None there.
    """
    messages = {name: [_with_written_calls(each) for each in logs[name]] for name in ("prompt", "completion")}
    rows = len(messages["prompt"])
    extra = {name: [None] * (rows - len(column)) + list(column)[-rows:] for name, column in logs["extra"].items()}
    return {
        **logs,
        **{name: _storable(column, for_wandb) for name, column in messages.items()},
        "extra": {name: _storable(column, for_wandb) for name, column in extra.items()},
    }


def _with_written_calls(messages: Any) -> Any:
    """Messages whose calls have their arguments as JSON text. Text stays as it is."""
    if isinstance(messages, str):
        return messages
    return [
        {**message, "tool_calls": [_written(call) for call in calls]}
        if isinstance(calls := message.get("tool_calls"), list)
        else message
        for message in messages
    ]


def _written(call: Any) -> Any:
    if not isinstance(call, Mapping):
        return call
    return {
        key: json.dumps(value, ensure_ascii=False, default=str)
        if key == "arguments" and not isinstance(value, str)
        else _written(value)
        for key, value in call.items()
    }


def _storable(column: list[Any], for_wandb: bool) -> list[Any]:
    """The column, or its values as JSON text if a table cannot hold them."""
    table = pd.DataFrame({"column": column})
    try:
        table.to_parquet(BytesIO())
        if for_wandb:  # it accepts no messages with different keys
            import wandb

            wandb.Table(dataframe=table)
    except Exception:  # pyarrow raises different errors, also UnicodeEncodeError and OverflowError
        return [json.dumps(value, default=str) for value in column]
    return column
