"""Samples per minute of an evaluation on vLLM in this process, by the number of concurrent answers.

    VLLM_CPU_KVCACHE_SPACE=1 python benchmarks/evaluation.py --model runs/quickstart/rl --data runs/quickstart/data

"Engine idle" is the share of the time in which the engine ran no step, because of scoring, tools or the sampler.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from arpo_trl.evaluation.benchmarks import load_dataset_questions
from arpo_trl.evaluation.engines import load_tokenizer, make_sampler
from arpo_trl.evaluation.runner import Evaluator
from arpo_trl.evaluation.samples import Record
from arpo_trl.evaluation.settings import EvalSettings
from arpo_trl.tools.builtin import ToolArguments, build_tools
from arpo_trl.tools.toolbox import ToolBox


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--limit", type=int, default=128)
    arguments = parser.parse_args()
    settings = EvalSettings(
        model=arguments.model, engine="vllm", concurrency=max(arguments.concurrency), max_completion_length=208
    )
    questions = load_dataset_questions(str(arguments.data / "heldout.jsonl"), "train", limit=arguments.limit)
    tools = build_tools(ToolArguments(search_index=str(arguments.data / "corpus.jsonl"), search_top_k=2))
    with ToolBox(tools) as toolbox:
        sampler = make_sampler(settings, toolbox, load_tokenizer(settings))
        print("| answers at once | samples per minute | engine idle |\n|---:|---:|---:|")
        for turn, count in enumerate([max(arguments.concurrency), *arguments.concurrency]):
            evaluator = Evaluator(sampler, samples=1, seed=0, concurrency=count)
            keys = evaluator.keys(questions)[: arguments.limit if count > 1 else arguments.limit // 4]
            records: list[Record] = []
            start, before = time.perf_counter(), sampler.engine.forward_s
            evaluator.run(questions, keys, records.append)
            seconds = time.perf_counter() - start
            idle = 1 - (sampler.engine.forward_s - before) / seconds
            if turn > 0:  # the first requests of an engine are slow
                print(f"| {count} | {60 * len(records) / seconds:,.0f} | {idle:.0%} |", flush=True)


if __name__ == "__main__":
    main()
