"""Train a tool-using policy: `accelerate launch train.py --config configs/quickstart.yaml`.

Without a checkout of the project: `arpo-trl train --config quickstart`.

Every key of the YAML file is a field of `TrainArguments`, `ToolArguments`, `arpo_trl.ARPOConfig` or TRL's
`ModelConfig`; an unknown key is an error. Flags override the file.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import MISSING, dataclass
from functools import cache, partial
from typing import Any

from datasets import Dataset
from trl import ModelConfig, get_peft_config, get_quantization_config

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.command_line import parse_settings, report_errors
from arpo_trl.common.imports import load_callable
from arpo_trl.common.settings import JudgeArguments, check_fields, setting
from arpo_trl.data.layouts import MAPPABLE, read_columns
from arpo_trl.data.loading import load_arpo_dataset
from arpo_trl.data.prompts import default_system_prompt
from arpo_trl.errors import ConfigError
from arpo_trl.logs.progress import closed_bars, show_compactly, show_log
from arpo_trl.options import ProtocolKind
from arpo_trl.rewards import HierarchicalReward, LLMJudge
from arpo_trl.rewards.answers import TASKS
from arpo_trl.runs.interrupts import follow_launcher
from arpo_trl.runs.output_folder import check_output, sole_run
from arpo_trl.scripts.start import (
    final_save,
    finished_first,
    loading_arguments,
    overwrite,
    required_model,
    start_errors,
    until_first_step,
)
from arpo_trl.tools.builtin import ToolArguments, build_tools
from arpo_trl.visible import get_logger

logger = get_logger(__name__)


@dataclass(kw_only=True)
class TrainArguments(JudgeArguments):
    """The training data, and the scoring of answers."""

    dataset: str = setting(MISSING, "Questions: Hub id, folder, or .jsonl, .json, .parquet or .csv file.")
    dataset_split: str = setting("train", "Split of dataset.")
    eval_dataset: str | None = setting(None, "Questions for evaluation during training, in the same forms as dataset.")
    eval_split: str = setting("validation", "Split of eval_dataset.")
    system_prompt: str | None = setting(
        None,
        "Replaces the rows' system messages: 'reasoning', 'deepsearch', 'tools' or a text; '' for "
        "none. None: messages stay as they are, and plain questions get one that describes the tools.",
    )
    task: str | None = setting(None, "Overrides the task of all rows. None: each row's own task.", choices=list(TASKS))
    columns: dict[str, str] | str | None = setting(
        None,
        "Names of fields that replace the usual ones, such as {question: body, answer: meta.gold}. "
        f"Keys: {list(MAPPABLE)}. Dots select nested fields.",
    )
    reward: list[str] = setting(
        list,
        "Import paths of your own reward functions, such as my_rewards:exact, instead of the "
        "hierarchical reward, to which accuracy and the judge belong. They get the rows' other "
        "fields, and rows need no answer.",
    )
    accuracy: str = setting(
        "task",
        "Comparison of answers: 'task' (math equality or token F1), 'judge' (by a language model if 'task' does "
        "not score them as fully right), 'paper_f1' (as in the paper's code).",
        choices=["task", "judge", "paper_f1"],
    )

    overwrite_output_dir: bool = setting(
        False,
        "Remove the model, the checkpoints and the trajectories of an earlier run from output_dir. "
        "Without it, such a folder is an error.",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        given: Any = self.reward
        self.reward = [given] if isinstance(given, str) else given  # in YAML possibly a single text
        check_fields(self)
        if self.reward and (self.judge_url is not None or self.accuracy != "task"):
            raise ConfigError("reward is set, so accuracy and the judge are not used. Unset them, or unset reward.")
        self.columns = read_columns(self.columns)


def make_rewards(arguments: TrainArguments) -> list[Any]:
    """The reward functions that the settings name, or the hierarchical reward.

    Raises:
        ConfigError: A function cannot be imported, or is a class.
    """
    if arguments.reward:
        return [_reward_at(path) for path in arguments.reward]
    judge = None
    if arguments.judge_url is not None and arguments.judge_model is not None:
        judge = LLMJudge(arguments.judge_url, arguments.judge_model, cache=arguments.judge_cache)
    accuracy: Any = arguments.accuracy  # one of its choices
    return [HierarchicalReward(accuracy, judge=judge)]


def _reward_at(path: str) -> Any:
    found = load_callable(path, "reward")
    if inspect.isclass(found):
        module, _, name = path.partition(":")
        raise ConfigError(
            f"reward contains {path!r}, which is a class; expected a function or an instance. Add "
            f"`reward = {name}()` to {module}, and set reward: {module}:reward."
        )
    return found


SETTINGS = (TrainArguments, ToolArguments, ARPOConfig, ModelConfig)


def _settings_of_sft() -> tuple[str, Sequence[type[Any]]]:
    from arpo_trl.scripts import sft

    return "sft", sft.SETTINGS


@report_errors
def main() -> None:
    follow_launcher()
    show_log()
    with start_errors():  # transformers reads the files that some settings name
        settings = parse_settings(SETTINGS, elsewhere=_settings_of_sft)
    with sole_run(settings[2].output_dir):
        _train(*settings)


def _train(
    arguments: TrainArguments, tool_arguments: ToolArguments, config: ARPOConfig, model_config: ModelConfig
) -> None:
    name = required_model(model_config)
    check_output(
        config.output_dir,
        resume=config.resume_from_checkpoint,
        overwrite=arguments.overwrite_output_dir,
        model=name,
    )
    config.model_init_kwargs = loading_arguments(config, model_config)

    tags = config.tool_protocol == ProtocolKind.TAGS
    tools = cache(partial(build_tools, tool_arguments, run=config.output_dir))

    def load(name: str, split: str) -> Dataset:
        return load_arpo_dataset(
            name,
            split,
            system_prompt=arguments.system_prompt,
            task=arguments.task,
            columns=read_columns(arguments.columns),
            own_reward=bool(arguments.reward),
            default_system_prompt=default_system_prompt(tool_arguments.offered, tools, tags=tags),
        )

    watched = arguments.eval_dataset if config.eval_strategy != "no" else None
    if arguments.eval_dataset is not None and watched is None:
        logger.warning(
            "eval_dataset is set, but eval_strategy is 'no': nothing is evaluated. Set it to steps or epoch."
        )
    with start_errors():
        trainer = ARPOTrainer(
            model=name,
            reward_funcs=make_rewards(arguments),
            args=config,
            train_dataset=load(arguments.dataset, arguments.dataset_split),
            eval_dataset=None if watched is None else load(watched, arguments.eval_split),
            tools=tools(),
            quantization_config=get_quantization_config(model_config),
            peft_config=get_peft_config(model_config),
        )
    if arguments.overwrite_output_dir:
        overwrite(config)
    trainer.other_settings = (model_config, arguments, tool_arguments)
    show_compactly(trainer)
    later = f"Push it with: {trainer.command_to_push()}" if config.push_to_hub else ""
    with trainer.interrupts.listening():
        with closed_bars(trainer), until_first_step(trainer):
            trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        with finished_first(trainer, trainer.interrupts, later):
            with final_save(config.output_dir):
                trainer.save_state()
                trainer.save_model(config.output_dir, _internal_call=True)  # else it pushes
            trainer.create_model_card()
        if config.push_to_hub:
            trainer.push_saved()


if __name__ == "__main__":
    main()
