"""Helpers of the evaluation tests: records, questions, a scripted evaluator, a completions server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arpo_trl.evaluation.benchmarks import BENCHMARKS, Benchmark, Questions, Scorer
from arpo_trl.evaluation.runner import Evaluator
from loopback import Asked, Reply
from support import Scripted, tokenizer

MATH_MARK = "what is "


def questions(*golds: str, scorer: Scorer = Scorer.MATH, name: str = "sums", level: str | None = None) -> Questions:
    """`what is 0`, `what is 1`, … with these golds."""
    rows = [
        {
            "prompt": [{"role": "user", "content": f"{MATH_MARK}{i}"}],
            "answer": [gold],
            "task": scorer.task,
            "id": str(i),
            "level": level,
        }
        for i, gold in enumerate(golds)
    ]
    benchmark = Benchmark(name=name, title=name, suite=None, scorer=scorer)
    return Questions(benchmark=benchmark, rows=rows, bad=[])


def boxed(answer: Any) -> str:
    return f"<answer>\\boxed{{{answer}}}</answer>"


def asked_number(context: str) -> str:
    """The number of the question in a context."""
    return context.rpartition(MATH_MARK)[2][0]


class Evaluating:
    """An evaluator on a scripted engine. Called with questions, it returns their records in order."""

    def __init__(
        self,
        script: Callable[..., Any],
        *,
        samples: int = 1,
        concurrency: int = 4,
        judge: Any = None,
        **settings: Any,
    ):
        self.scripted = Scripted(script, leaves=1, at_root=1, **settings)
        self.evaluator = Evaluator(
            self.scripted.sampler, samples=samples, seed=0, concurrency=concurrency, judge=judge
        )

    def __call__(self, asked: Questions) -> list[dict[str, Any]]:
        records: list[dict[str, Any]] = []
        with self.scripted.toolbox:
            self.evaluator.run(asked, self.evaluator.keys(asked), records.append)
        return sorted(records, key=lambda record: (record["number"], record["sample"]))


def record(number: int, value: float | None, sample: int = 0, **other: Any) -> dict[str, Any]:
    """A sample of the benchmark gsm8k that scored `value`; None failed."""
    head = {"benchmark": "gsm8k", "number": number, "sample": sample, "id": str(number), "level": None}
    head |= {"question": f"q{number}", "golds": ["1"], "error": "EngineError: died" if value is None else None}
    if value is None:
        return head | other
    prediction = "1" if value == 1 else "2"
    return {
        **head,
        "task": "math",
        "prediction": prediction,
        "scores": {"math": value, "em": value},
        "fault": None,
        "stop": "eos",
        "trajectory": [{"role": "assistant", "text": boxed(prediction), "tokens": 5}],
        "tokens": {"prompt": 10, "generated": 5, "observed": 0},
        "seconds": 1.0,
        **other,
    }


def called(name: str, text: str = "found", failure: str | None = None, seconds: float = 0.5) -> dict[str, Any]:
    """A step of a trajectory: one call's result."""
    call = {"name": name, "arguments": {"x": "y"}, "text": text, "ok": failure is None, "failure": failure}
    return {"role": "tool", "text": None, "calls": [{**call, "seconds": seconds, "source": "executed"}], "tokens": 3}


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return path


def completions(writes: Callable[[str], str]) -> Callable[[Asked], Reply]:
    """A plain completions server: text in, one streamed chunk of text out."""

    def answer(asked: Asked) -> Reply:
        if asked.path == "/v1/models":
            return Reply({"data": [{"id": "tiny"}]})
        if asked.path != "/v1/completions":
            return Reply("nothing here", status=404)
        body = asked.json
        if not isinstance(body["prompt"], str):
            return Reply({"error": "text, please"}, status=400)
        chunk = {"choices": [{"text": writes(body["prompt"]), "finish_reason": "stop"}]}
        return Reply(f"data: {json.dumps(chunk)}\n\ndata: [DONE]\n\n")

    return answer


def save_tokenizer(folder: Path) -> str:
    tokenizer().save_pretrained(folder)
    return str(folder)


GSM8K = BENCHMARKS["gsm8k"]
