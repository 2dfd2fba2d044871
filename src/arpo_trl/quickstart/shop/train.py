"""Train in the shop: `accelerate launch -m arpo_trl.quickstart.shop.train --config configs/quickstart_shop.yaml`.

The pattern for your own environment: rows, a class, and `environment_factory`.
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass
from functools import partial

from datasets import Dataset
from trl import ModelConfig

from arpo_trl import ARPOConfig, ARPOTrainer
from arpo_trl.command_line import parse_settings, report_errors
from arpo_trl.common.settings import check_fields, setting
from arpo_trl.logs.progress import show_compactly, show_log
from arpo_trl.quickstart.shop.environment import Shop
from arpo_trl.quickstart.task import read_lines
from arpo_trl.runs.interrupts import follow_launcher
from arpo_trl.scripts.start import final_save, finished_first, required_model, start_errors, until_first_step


@dataclass(kw_only=True)
class ShopArguments:
    """The orders, and the shop."""

    dataset: str = setting(MISSING, "Training orders: a .jsonl file of rows {kinds, budget, seed}.")
    eval_dataset: str | None = setting(None, "Orders for evaluation during training.")
    reset_seconds: float = setting(0.0, "Duration of each reset of a shop.", at_least=0, unit="seconds")

    def __post_init__(self) -> None:
        check_fields(self)


SETTINGS = (ShopArguments, ARPOConfig, ModelConfig)


@report_errors
def main() -> None:
    follow_launcher()
    show_log()
    arguments, config, model_config = parse_settings(SETTINGS)
    evaluates = arguments.eval_dataset is not None and config.eval_strategy != "no"
    with start_errors():
        trainer = ARPOTrainer(
            model=required_model(model_config),
            args=config,
            train_dataset=Dataset.from_list(read_lines(arguments.dataset)),
            eval_dataset=Dataset.from_list(read_lines(arguments.eval_dataset)) if evaluates else None,
            environment_factory=partial(Shop, arguments.reset_seconds),
        )
    trainer.other_settings = (model_config, arguments)
    show_compactly(trainer)
    with trainer.interrupts.listening():
        with until_first_step(trainer):
            trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        with finished_first(trainer, trainer.interrupts), final_save(config.output_dir):
            trainer.save_state()
            trainer.save_model(config.output_dir)


if __name__ == "__main__":
    main()
