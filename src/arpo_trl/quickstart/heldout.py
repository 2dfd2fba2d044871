"""The quickstart's measurement: a model's answers to held-out questions, with every token's entropy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arpo_trl.errors import EngineError
from arpo_trl.evaluation.benchmarks import Benchmark, Questions
from arpo_trl.evaluation.runner import Evaluator
from arpo_trl.evaluation.samples import Record
from arpo_trl.evaluation.scoring import main_metric
from arpo_trl.options import RolloutSchedule
from arpo_trl.rollout.build import LocalModel, build_engine, build_sampler
from arpo_trl.rollout.engines.base import SamplingParams
from arpo_trl.rollout.protocols import TagProtocol
from arpo_trl.rollout.tree import RolloutTree
from arpo_trl.tools.toolbox import ToolBox

BENCHMARK = Benchmark("evaluate", "Held-out questions", None, None)
"""The name is part of the seed: another name would change the answers, and the numbers in docs/results.md."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """For each question, in order: the tree, which is a single path, and its record as `Evaluator` makes it."""

    trees: list[RolloutTree]
    records: list[Record]

    @property
    def accuracy(self) -> float:
        """Mean over the questions, in [0, 1]: equal in mathematics, else token F1; 0 for an answer in a bad format."""
        return sum(map(_accuracy, self.records)) / len(self.records)


def answer_heldout(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[Mapping[str, Any]],
    toolbox: ToolBox,
    *,
    temperature: float,
    max_completion_length: int,
    max_tool_calls: int,
    seed: int = 0,
) -> HeldOut:
    """One answer to each of `rows` {prompt, answer, task, id}; temperature 0 is greedy. Repeats bit for bit.

    Raises:
        EngineError: A question got no answer.
    """
    protocol = TagProtocol(tokenizer, toolbox.specs)
    eos_ids = (int(tokenizer.eos_token_id),)
    settings = SamplingParams(eos_ids=eos_ids, stop_strings=protocol.stop_strings, temperature=temperature)
    sampler = build_sampler(
        build_engine(LocalModel(model=model), tokenizer, settings),
        toolbox,
        protocol,
        eos_ids,
        context=None,
        max_completion_length=max_completion_length,
        max_tool_calls=max_tool_calls,
        schedule=RolloutSchedule.ROUNDS,
    )
    evaluator = Evaluator(
        sampler, samples=1, seed=seed, concurrency=len(rows), entropy_probe_tokens=max_completion_length
    )
    questions = Questions(BENCHMARK, [{"level": None, **row} for row in rows], [])
    trees: list[RolloutTree] = []
    records: list[Record] = []
    for finished in sorted(evaluator.outcomes(questions, evaluator.keys(questions)), key=lambda finished: finished.id):
        record = evaluator.record(questions, finished)
        if finished.tree is None or record["error"] is not None:
            raise EngineError(f"Held-out question {finished.id} got no answer: {record['error']}")
        trees.append(finished.tree)
        records.append(record)
    return HeldOut(trees, records)


def _accuracy(record: Record) -> float:
    return 0.0 if record["fault"] is not None else float(record["scores"][main_metric(BENCHMARK, record["scores"])])
