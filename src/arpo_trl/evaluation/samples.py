"""`samples.jsonl`: one line per sample, written when the sample finishes, readable after any crash.

A sample that the judge scores later has a second line, which replaces the first.

A line is a dict: benchmark, number (index of the question), sample, id, level, question, prompt_hash (of all messages
of the prompt), golds, task, prediction, scores, fault, stop, trajectory, tokens, seconds, error. A failed sample has
an error and no field after `golds`.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator, Mapping
from itertools import accumulate
from pathlib import Path
from typing import Any

from arpo_trl.common.files import whole_file
from arpo_trl.common.full_disk import naming
from arpo_trl.common.user_files import expect, json_lines, parse_json, user_path
from arpo_trl.errors import DataError
from arpo_trl.evaluation.scoring import JUDGE
from arpo_trl.rollout.tree import NodeKind, RolloutTree

Record = dict[str, Any]
Key = tuple[str, int, int]


def key_of(record: Mapping[str, Any]) -> Key:
    """Return the unique key of a sample in its run: benchmark, index of the question, index of the sample."""
    return record["benchmark"], record["number"], record["sample"]


def lacks_verdict(record: Mapping[str, Any]) -> bool:
    """Return whether the judge was asked about a sample and gave no verdict."""
    return record["error"] is None and record["scores"].get(JUDGE, 0.0) is None


class SampleLog:
    """Appends records to the file. Thread-safe."""

    def __init__(self, path: Path):
        self._path = path
        self._file = path.open("a", encoding="utf-8", errors="replace", newline="\n")  # for lone surrogates
        self._lock = threading.Lock()

    def write(self, record: Record) -> None:
        line = json.dumps(record, ensure_ascii=False) + "\n"
        with self._lock, naming(self._path):
            self._file.write(line)
            self._file.flush()

    def close(self) -> None:
        self._file.close()


class Records(Mapping[Key, Record]):
    """The records of a log by key, in the order of the log. A record is read from the file each time that it is used.

    Of several lines of the same sample, the last counts: it has the later verdict.

    Raises:
        DataError: There is no log, or a line is not a complete record.
    """

    def __init__(self, path: str | Path):
        self._path = path = user_path(path, "path")
        if not path.exists():
            raise DataError(f"There is no {path}. Pass the output folder of `arpo-trl eval`.")
        last: dict[Key, int] = {}
        for number, record in json_lines(path):
            try:
                _check(record)
            except DataError as error:
                raise DataError(
                    f"{path}, line {number}: not a sample of an evaluation: {error} Resume the run to repair it."
                ) from error
            last[key_of(record)] = number
        with path.open("rb") as lines:
            starts = list(accumulate(map(len, lines), initial=0))  # the first byte of each line
        self._starts = {key: starts[number - 1] for key, number in sorted(last.items(), key=lambda item: item[1])}

    def __getitem__(self, key: Key) -> Record:
        with self._path.open("rb") as lines:
            lines.seek(self._starts[key])
            return dict(parse_json(lines.readline().decode("utf-8-sig"), str(self._path)))

    def __iter__(self) -> Iterator[Key]:
        return iter(self._starts)

    def __len__(self) -> int:
        return len(self._starts)


def repair(path: Path) -> tuple[set[Key], list[Record]]:
    """Rewrite the log so that it contains each finished sample exactly once, by its last line.

    It removes incomplete lines and failed samples, which the resumed run samples again, and duplicates. Samples
    without the judge's verdict stay. The resumed run judges them again and appends a line that replaces the first.

    Returns:
        The keys of the samples that need nothing more, and the records to judge again.
    """
    last: dict[Key, int] = {}
    unjudged: dict[Key, Record] = {}
    if not path.exists():
        return set(), []
    with path.open(encoding="utf-8", errors="replace", newline="\n") as lines:
        for number, line in enumerate(lines):
            record = _record(line) if line.endswith("\n") else None
            if record is None or record["error"] is not None:
                continue
            last[key_of(record)] = number
            unjudged.pop(key_of(record), None)
            if lacks_verdict(record):
                unjudged[key_of(record)] = record
    counting = set(last.values())
    with (
        whole_file(path) as partial,
        path.open(encoding="utf-8", errors="replace", newline="\n") as lines,
        partial.open("w", encoding="utf-8") as kept,
    ):
        kept.writelines(line for number, line in enumerate(lines) if number in counting)
        kept.flush()
        os.fsync(kept.fileno())
    return last.keys() - unjudged.keys(), list(unjudged.values())


_HEAD = {
    "benchmark": str, "number": int, "sample": int, "level": str | None, "question": str, "prompt_hash?": str,
    "golds": [str], "error": str | None,
}  # fmt: skip
_CALL = {"name": str, "text": str, "failure": str | None, "seconds": float, "source": str}
_SCORED = {
    "task": str, "prediction": str | None, "scores": dict, "fault": str | None, "stop": str, "seconds": float,
    "tokens": {"prompt": int, "generated": int, "observed": int},
    "trajectory": [{"role": str, "text": str | None, "calls?": [_CALL]}],
}  # fmt: skip


def _check(record: Any) -> None:
    """Raises `DataError` if `record` lacks a field that a summary, a report or a comparison reads."""
    expect(record, _HEAD, "the line")
    if record["error"] is None:
        expect(record, _SCORED, "the line")
        for name, value in record["scores"].items():
            expect(value, float | None, f"scores.{name}")
        for number, step in enumerate(record["trajectory"]):
            if step["role"] == "tool":
                expect(step, {"calls": list}, f"trajectory[{number}]")


def _record(line: str) -> Record | None:
    try:
        record = parse_json(line, "a line")
        _check(record)
    except DataError:
        return None
    return dict(record)


def trajectory(tree: RolloutTree) -> list[dict[str, Any]]:
    """Return the single path of a tree as a list of turns and of the results of their calls.

    The last turn has its own `calls` if there was no room for their results.
    """
    (leaf,) = tree.leaves()
    steps: list[dict[str, Any]] = []
    for node in leaf.nodes:
        if node.kind is NodeKind.TURN:
            steps.append({"role": "assistant", "text": node.text, "tokens": len(node.ids)})
            if node.unread:
                steps[-1]["calls"] = [call.as_row() for call in node.unread]
        else:
            calls = [call.as_row() for call in node.calls]
            steps.append(
                {"role": "tool", "text": None if calls else node.text, "calls": calls, "tokens": len(node.ids)}
            )
    return steps


def counted(record: Record) -> Record:
    """Return the record without its texts. Summaries do not need them, and thousands of trajectories take
    gigabytes."""
    steps = [
        {"role": step["role"], "calls": [{**call, "text": "", "arguments": {}} for call in step.get("calls", ())]}
        for step in record.get("trajectory", ())
    ]
    return {**record, "trajectory": steps, "question": ""}
