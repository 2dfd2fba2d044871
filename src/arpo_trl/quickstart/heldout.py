"""The quickstart's measurement: a model's answers to held-out questions, with the entropy of every token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from arpo_trl.errors import EngineError
from arpo_trl.evaluation.benchmarks import Benchmark, Questions
from arpo_trl.evaluation.runner import Evaluator
from arpo_trl.evaluation.samples import Record
from arpo_trl.evaluation.scoring import main_metric
from arpo_trl.options import RolloutSchedule
from arpo_trl.quickstart.task import Measured
from arpo_trl.rollout.build import build_sampler, local_engine
from arpo_trl.rollout.engines.base import SamplingParams
from arpo_trl.rollout.protocols import TagProtocol
from arpo_trl.rollout.tree import RolloutTree
from arpo_trl.tools.toolbox import ToolBox

BENCHMARK = Benchmark(name="evaluate", title="Held-out questions", suite=None, scorer=None)
"""The name is part of the seed: another name would change the answers, and the numbers in docs/results.md."""


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
) -> Measured:
    """Sample one answer to each of `rows` {prompt, answer, task, id}. Deterministic, bit for bit.

    A temperature of 0 is greedy decoding.

    Raises:
        EngineError: A question has no answer.
    """
    protocol = TagProtocol(tokenizer, toolbox.specs)
    settings = SamplingParams(eos_ids=protocol.eos_ids, stop_strings=protocol.stop_strings, temperature=temperature)
    sampler = build_sampler(
        local_engine(model, tokenizer, settings),
        toolbox,
        protocol,
        context=None,
        max_completion_length=max_completion_length,
        max_tool_calls=max_tool_calls,
        schedule=RolloutSchedule.ROUNDS,
    )
    evaluator = Evaluator(
        sampler, samples=1, seed=seed, concurrency=len(rows), entropy_probe_tokens=max_completion_length
    )
    questions = Questions(benchmark=BENCHMARK, rows=[{"level": None, **row} for row in rows], bad=[])
    trees: list[RolloutTree] = []
    scores: list[float] = []
    for finished in sorted(evaluator.outcomes(questions, evaluator.keys(questions)), key=lambda finished: finished.id):
        record = evaluator.record(questions, finished)
        if finished.tree is None or record["error"] is not None:
            raise EngineError(f"Held-out question {finished.id} got no answer: {record['error']}")
        trees.append(finished.tree)
        scores.append(score_of(record))
    return Measured(trees=trees, scores=scores)


def score_of(record: Record) -> float:
    """The accuracy of an answer in [0, 1]: mathematical equality or token F1, and 0 for a bad format."""
    return 0.0 if record["fault"] is not None else float(record["scores"][main_metric(BENCHMARK, record["scores"])])
