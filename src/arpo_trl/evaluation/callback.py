"""Benchmarks during training: every n steps, on the trainer's engine, with the questions split across all ranks.

trainer.add_callback(EvaluationCallback(trainer, [load_questions(BENCHMARKS["gsm8k"], limit=200)], every_steps=50))
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object
from transformers import Trainer, TrainerCallback

from arpo_trl.common.user_files import repeated
from arpo_trl.errors import ConfigError, Interrupted
from arpo_trl.evaluation.benchmarks import Questions
from arpo_trl.evaluation.report import table
from arpo_trl.evaluation.results import summarise
from arpo_trl.evaluation.runner import Evaluator
from arpo_trl.evaluation.samples import Record, counted
from arpo_trl.rewards.judge import LLMJudge
from arpo_trl.training.trainer import ARPOTrainer
from arpo_trl.visible import get_rank_logger

logger = get_rank_logger(__name__)


class EvaluationCallback(TrainerCallback):
    """Evaluates the policy every `every_steps` optimizer steps.

    It logs `eval/<benchmark>/<score>` and, with several `samples`, `eval/<benchmark>/pass@<k>`. The model card
    contains the last table. Temperature, lengths and tool limits are the trainer's. Evaluation does not branch.

    Raises:
        ConfigError: `every_steps` is less than 1, two benchmarks have the same name, or the trainer has an
            `environment_factory`: a question of a benchmark is no row from which an environment can start.
    """

    def __init__(
        self,
        trainer: ARPOTrainer,
        benchmarks: Sequence[Questions],
        *,
        every_steps: int,
        samples: int = 1,
        concurrency: int = 32,
        judge: LLMJudge | None = None,
    ):
        if every_steps < 1:
            raise ConfigError(f"every_steps is {every_steps}; expected at least 1.")
        if trainer.has_environments:
            raise ConfigError(
                "EvaluationCallback asks the questions of benchmarks, but the trainer has an environment_factory, and "
                "its environments start from rows of a dataset. Evaluate with eval_dataset and eval_strategy instead."
            )
        if twice := repeated(questions.benchmark.name for questions in benchmarks):
            raise ConfigError(
                f"Two benchmarks are named {twice[0]!r}, and would be logged under the same names. Give each its own."
            )
        self._trainer = trainer
        self._benchmarks = list(benchmarks)
        self._every_steps = every_steps
        self._samples = samples
        self._evaluator = Evaluator(
            trainer.tree_sampler, samples=samples, seed=trainer.args.seed, concurrency=concurrency, judge=judge
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step % self._every_steps == 0:
            try:
                self.evaluate()
            except Interrupted:  # all ranks raise it; it is raised again before the next step, after this step's log
                logger.warning(f"An interrupt stopped the evaluation after step {state.global_step}.")

    def evaluate(self) -> dict[str, Any]:
        """Evaluate, log, and return the summary of each benchmark. A collective: all ranks must call it."""
        trainer = self._trainer
        rank, ranks = trainer.accelerator.process_index, trainer.accelerator.num_processes
        summaries: dict[str, Any] = {}
        with trainer.from_this_moment():
            trainer.pause_rollouts()
            for questions in self._benchmarks:
                mine: list[Record] = []
                with trainer.interruptible():
                    self._evaluator.run(questions, self._evaluator.keys(questions)[rank::ranks], mine.append)
                summaries[questions.benchmark.name] = summarise(
                    questions.benchmark,
                    gather_object([counted(record) for record in mine]),
                    questions=len(questions.rows),
                    samples=self._samples,
                    seed=trainer.args.seed,
                )
        logs: dict[str, float] = {}
        for name, summary in summaries.items():
            values = {metric: value["mean"] for metric, value in summary["metrics"].items()}
            values |= {f"pass@{k}": value for k, value in summary.get("pass_at_k", {}).items()}
            values["failed"] = summary["failed"] + summary["unjudged"]
            logs |= {f"eval/{name}/{key}": value for key, value in values.items() if value is not None}
        step_is_logged = trainer.control.should_log
        # GRPOTrainer.log would add the metrics of the current training step, and clear them.
        Trainer.log(trainer, logs)
        trainer.control.should_log = step_is_logged  # after any log, transformers considers the step logged
        trainer.evaluation = "\n".join(
            [f"At step {trainer.state.global_step}:", "", *table({"benchmarks": summaries})]
        )
        return summaries
