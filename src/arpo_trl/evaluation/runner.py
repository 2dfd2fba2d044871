"""Evaluation with training's sampler: the same protocol, the same tools, no branching.

    questions ─▶ stream of requests ─▶ TreeSampler ─▶ trees as they finish ─▶ scoring threads ─▶ samples.jsonl
                                                                                           └─▶ running scores

Every sample is one request. Its seed combines the run's seed, the benchmark, the index of the question and the index
of the sample. So a sample does not depend on other samples, and a run can stop at any point and resume.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from arpo_trl.common.files import PARTIAL, write_whole
from arpo_trl.common.full_disk import is_full_disk
from arpo_trl.common.tags import CODE_PARAMETER
from arpo_trl.common.user_files import expect, read_json, user_path
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.evaluation.benchmarks import Questions, hash_of
from arpo_trl.evaluation.samples import Key, Record, SampleLog, key_of, repair, trajectory
from arpo_trl.evaluation.scoring import NOT_ASKED, Judge, predicted, score
from arpo_trl.rewards.hierarchical import BONUS_TOOLS, format_fault
from arpo_trl.rewards.judge import LLMJudge, question_of
from arpo_trl.rollout.batch import Finished, GroupRequest, error_text
from arpo_trl.rollout.sampler import TreeSampler
from arpo_trl.rollout.tree import NodeKind
from arpo_trl.runs.identity import differences_between
from arpo_trl.runs.output_folder import LOCK, sole_run

SCORING_THREADS = 16
MOST_WAITING = 256
"""The maximum number of samples that wait for their scores, with their trees. If the judge is slower than the engine,
sampling waits too."""


class Evaluator:
    """Samples questions and scores the answers.

    Args:
        sampler: Its settings are used without branching.
        samples: Number of answers to each question.
        seed: Seed of the run.
        concurrency: The maximum number of answers that are generated at the same time.
        judge: Adds the scores of a language model.
        entropy_probe_tokens: The tree records the entropies of this many tokens at the start of a turn. If it is above
            0, vLLM interrupts each turn to measure them.
    """

    def __init__(
        self,
        sampler: TreeSampler,
        *,
        samples: int,
        seed: int,
        concurrency: int,
        judge: LLMJudge | None = None,
        entropy_probe_tokens: int = 0,
    ):
        self.sampler, self.judge = sampler, judge
        self.samples, self.seed, self.concurrency = samples, seed, concurrency
        self._settings = replace(sampler.settings.without_branching(1), entropy_probe_tokens=entropy_probe_tokens)

    def keys(self, questions: Questions) -> list[Key]:
        """Return the keys of all samples of a benchmark, in order."""
        name = questions.benchmark.name
        return [(name, i, j) for i in range(len(questions.rows)) for j in range(self.samples)]

    def run(self, questions: Questions, keys: Iterable[Key], sink: Callable[[Record], None]) -> None:
        """Sample and score `keys`. Call `sink`, from any thread, with each record as soon as it is complete.

        After an interrupt or an error, the judge is not asked any more. Samples that wait for it get a record without
        a verdict, which a resumed run asks for.
        """
        done: SimpleQueue[Future[None]] = SimpleQueue()
        waiting = 0
        ended_early = threading.Event()

        def deliver(finished: Finished) -> None:
            sink(self.record(questions, finished, asks=not ended_early.is_set()))

        with ThreadPoolExecutor(SCORING_THREADS, "arpo-scoring") as scoring:
            try:
                for finished in self.outcomes(questions, keys):
                    scoring.submit(deliver, finished).add_done_callback(done.put)
                    waiting += 1
                    while waiting >= MOST_WAITING or not done.empty():
                        done.get().result()  # raises at once if `sink` failed, for example because the disk is full
                        waiting -= 1
            except BaseException:
                ended_early.set()
                raise
        for _ in range(waiting):
            done.get().result()

    def rescore(self, questions: Questions, records: Sequence[Record], sink: Callable[[Record], None]) -> None:
        """Score samples without the judge's verdict again. Call `sink` with each new record as soon as it is complete.

        An interrupt ends it at once: daemon threads wait for the judge, and what they still return is ignored.
        """
        waiting: SimpleQueue[Record] = SimpleQueue()
        scored: SimpleQueue[Record | Exception] = SimpleQueue()
        for record in records:
            waiting.put(record)

        def work() -> None:
            with contextlib.suppress(Empty):
                while not ended.is_set():
                    record = waiting.get_nowait()
                    try:
                        scored.put(self._rescored(questions, record))
                    except Exception as error:  # raised in the thread that waits
                        scored.put(error)

        ended = threading.Event()
        for _ in range(min(SCORING_THREADS, len(records))):
            threading.Thread(target=work, name="arpo-rescoring", daemon=True).start()
        try:
            for _ in records:
                found = scored.get()
                if isinstance(found, Exception):
                    raise found
                sink(found)
        finally:
            ended.set()

    def _rescored(self, questions: Questions, record: Record) -> Record:
        row = questions.rows[record["number"]]
        return {**record, "scores": score(record["prediction"], row, self.judge)}

    def outcomes(self, questions: Questions, keys: Iterable[Key]) -> Iterator[Finished]:
        """Yield the unscored result of each of `keys` as soon as it is complete."""
        not_rendered: list[Finished] = []

        def requests() -> Iterator[GroupRequest]:
            for _, number, sample in keys:
                name = number * self.samples + sample
                try:
                    ids = self.sampler.protocol.encode_prompt(questions.rows[number]["prompt"])
                except Exception as error:  # a chat template can raise anything for a single prompt
                    not_rendered.append(Finished(id=name, group=None, error=error_text(error), seconds=0.0))
                else:
                    yield GroupRequest(id=name, prompt_ids=ids)

        yield from self.sampler.stream(
            requests(),
            seed=(self.seed, questions.benchmark.name),
            groups_at_once=self.concurrency,
            settings=self._settings,
        )
        yield from not_rendered

    def record(self, questions: Questions, finished: Finished, *, asks: bool = True) -> Record:
        """Return the record of a sample: scored, or with its error. Without `asks`, the judge's verdict is open."""
        number, sample = divmod(finished.id, self.samples)
        row = questions.rows[number]
        record: Record = {
            "benchmark": questions.benchmark.name,
            "number": number,
            "sample": sample,
            "id": row["id"],
            "level": row["level"],
            "question": question_of(row["prompt"]),
            "prompt_hash": hash_of(row["prompt"]),
            "golds": row["answer"],
            "error": finished.error,
        }
        if finished.tree is None:
            return record
        try:
            return record | self._scored(row, finished, self.judge if asks or self.judge is None else NOT_ASKED)
        except Exception as error:  # if a scorer fails on one answer, only this sample fails
            return record | {"error": error_text(error)}

    def _scored(self, row: dict[str, Any], finished: Finished, judge: Judge | None) -> Record:
        tree = finished.tree
        assert tree is not None
        (leaf,) = tree.leaves()
        turns = self.sampler.protocol.whole_turns(tree.root.ids, leaf, calls=False)  # as in the reward
        prediction = predicted(turns)
        code_tools = {call.name for call in leaf.calls if CODE_PARAMETER in call.arguments}
        nodes = [(node.kind, len(node.ids)) for node in leaf.nodes]
        return {
            "task": row["task"],
            "prediction": prediction,
            "scores": score(prediction, row, judge),
            "fault": format_fault(turns, leaf.stop, BONUS_TOOLS, code_tools),  # as in the reward's default
            "stop": leaf.stop.value,
            "trajectory": trajectory(tree),
            "tokens": {
                "prompt": len(tree.root.ids),
                "generated": sum(n for kind, n in nodes if kind is NodeKind.TURN),
                "observed": sum(n for kind, n in nodes if kind is NodeKind.OBSERVATION),
            },
            "seconds": round(finished.seconds, 3),
        }


class RunFolder:
    """The output folder of one run: its description and its samples. Until it is closed, no other run can use it.

    Args:
        path: Created if it does not exist.
        identity: The values, serializable as JSON, that must be equal for two invocations to be the same run.
        resume: Whether the folder may already contain this run.

    Raises:
        ConfigError: The folder contains another run, this run without `resume`, or other files, another process uses
            it, or it is not writable.
        DataError: The description of the run in the folder cannot be read.
    """

    def __init__(self, path: str | Path, identity: dict[str, Any], *, resume: bool):
        self.path = path = user_path(path, "path")
        self.samples_file = path / "samples.jsonl"
        with contextlib.ExitStack() as held:
            held.enter_context(sole_run(str(path), "output"))
            self._prepare(json.loads(json.dumps(identity)), resume)
            self.done, self.unjudged = repair(self.samples_file)
            self.log = SampleLog(self.samples_file)
            self._held = held.pop_all()

    def _prepare(self, identity: dict[str, Any], resume: bool) -> None:
        """Check that the folder contains this run, or write the run's description into an empty folder."""
        path, description = self.path, self.path / "run.json"
        if description.exists():
            self._check_same(description, identity, resume)
        elif path.exists() and (
            not path.is_dir() or any(PARTIAL not in file.name and file.name != LOCK for file in path.iterdir())
        ):
            raise ConfigError(f"{path} is not empty and contains no evaluation. Choose another output folder.")
        else:
            try:
                path.mkdir(parents=True, exist_ok=True)
                write_whole(description, json.dumps(identity, indent=2) + "\n", errors="replace")
            except OSError as error:
                if is_full_disk(error):
                    raise
                raise ConfigError(f"The output folder {path} cannot be written: {error}.") from error

    def _check_same(self, description: Path, identity: dict[str, Any], resume: bool) -> None:
        try:
            other = read_json(description)
            expect(other, dict, str(description))
        except DataError as error:
            raise DataError(f"{error} Choose another output folder.") from error
        differences = list(differences_between(other, identity))
        if differences:
            raise ConfigError(
                f"{self.path} contains a different run: {'; '.join(differences[:3])}. Choose another output folder."
            )
        if not resume:
            raise ConfigError(f"{self.path} already contains this run. Pass --resume to continue it.")

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.log.close()
        self._held.close()


def run_benchmark(
    evaluator: Evaluator, questions: Questions, folder: RunFolder, on_record: Callable[[Record], None]
) -> None:
    """Sample the missing samples of a benchmark in the folder. Call `on_record` with each new record, one at a
    time."""
    lock = threading.Lock()

    def sink(record: Record) -> None:
        folder.log.write(record)
        with lock:
            on_record(record)

    unjudged = [record for record in folder.unjudged if record["benchmark"] == questions.benchmark.name]
    evaluator.rescore(questions, unjudged, sink)
    sampled = folder.done | {key_of(record) for record in unjudged}
    evaluator.run(questions, [key for key in evaluator.keys(questions) if key not in sampled], sink)
