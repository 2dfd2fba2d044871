"""Train a tool-using policy: `accelerate launch train.py --config configs/quickstart.yaml`.

Without a checkout of the project: `accelerate launch -m arpo_trl.scripts.train`.

Every key of the YAML file is a field of one of `TrainArguments`, `ToolArguments`, `arpo_trl.ARPOConfig` or TRL's
`ModelConfig`; an unknown key is an error. Flags win over the file.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from datasets import Dataset
from trl import ModelConfig, get_peft_config, get_quantization_config

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.cli import parse_settings, report_errors
from arpo_trl.common.settings import JudgeArguments, check_fields, described
from arpo_trl.data.layouts import MAPPABLE, TASKS, read_columns
from arpo_trl.data.loading import load_arpo_dataset
from arpo_trl.logs.progress import show_compactly, show_log
from arpo_trl.rewards import HierarchicalReward, LLMJudge
from arpo_trl.runs.interrupts import follow_launcher
from arpo_trl.tools.builtin import ToolArguments, build_tools


@dataclass(kw_only=True)
class TrainArguments(JudgeArguments):
    """What to train on and for."""

    dataset: str = field(metadata={"help": "Hub id, folder, or .jsonl, .json or .parquet file of questions."})
    dataset_split: str = field(default="train", metadata={"help": "Its split."})
    eval_dataset: str | None = field(default=None, metadata={"help": "The same for evaluation while training."})
    eval_split: str = field(default="validation", metadata={"help": "Its split."})
    system_prompt: str | None = field(
        default=None,
        metadata={"help": "A name of arpo_trl.data.prompts.SYSTEM_PROMPTS or a text that replaces the rows' own."},
    )
    task: str | None = field(
        default=None,
        metadata=described("What all rows are, whatever they say. None: as each row says.", choices=list(TASKS)),
    )
    columns: dict[str, str] | str | None = field(
        default=None,
        metadata={"help": f"Fields of the rows that replace the usual ones: {{question: body, answer: meta.gold}}, of "
                  f"{list(MAPPABLE)}; dots reach into nested fields."},
    )  # fmt: skip
    accuracy: str = field(
        default="task",
        metadata=described(
            "How answers are compared: 'task' (math equality or token F1), 'judge' (a language model where that finds "
            "them not wholly right), 'paper_f1' for parity.",
            choices=["task", "judge", "paper_f1"],
        ),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_fields(self)
        self.columns = read_columns(self.columns)


SETTINGS = (TrainArguments, ToolArguments, ARPOConfig, ModelConfig)


@report_errors
def main() -> None:
    follow_launcher()
    show_log()
    arguments, tool_arguments, config, model_config = parse_settings(SETTINGS)
    config.model_init_kwargs = {
        **(config.model_init_kwargs or {}),
        "revision": model_config.model_revision,
        "attn_implementation": model_config.attn_implementation,
        "dtype": model_config.dtype,
    }

    def load(name: str, split: str) -> Dataset:
        return load_arpo_dataset(
            name, split, system_prompt=arguments.system_prompt, task=arguments.task, columns=arguments.columns
        )

    judge = None
    if arguments.judge_url is not None and arguments.judge_model is not None:
        judge = LLMJudge(arguments.judge_url, arguments.judge_model, cache=arguments.judge_cache)
    evaluates = arguments.eval_dataset is not None and config.eval_strategy != "no"
    trainer = ARPOTrainer(
        model=model_config.model_name_or_path,
        reward_funcs=HierarchicalReward(arguments.accuracy, judge=judge),
        args=config,
        train_dataset=load(arguments.dataset, arguments.dataset_split),
        eval_dataset=load(arguments.eval_dataset, arguments.eval_split) if evaluates else None,
        tools=build_tools(tool_arguments, run=config.output_dir),
        quantization_config=get_quantization_config(model_config),
        peft_config=get_peft_config(model_config),
    )
    trainer.other_settings = (model_config, arguments, tool_arguments)
    show_compactly(trainer)
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_state()
    if config.push_to_hub:
        trainer.push_to_hub()  # which saves first
    else:
        trainer.save_model(config.output_dir)
        trainer.create_model_card()


if __name__ == "__main__":
    main()
