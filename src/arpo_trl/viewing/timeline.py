"""`arpo-trl timeline`: the times at which each path decoded, ran tools and waited, for https://ui.perfetto.dev.

The file is in the Trace Event Format for Perfetto and chrome://tracing. A tree is a process, and a path is a thread.
Processes and threads are numbered from 1, since readers interpret 0 as the idle process. Perfetto drops an event that
overlaps another event of its thread without being nested in it. So both ends of an event are rounded, and not its
length.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from arpo_trl.common.files import write_whole
from arpo_trl.errors import DataError
from arpo_trl.logs.trajectories import LoggedTree
from arpo_trl.rollout.tree import Node, NodeKind, address_text
from arpo_trl.viewing.run import KINDS, listed, required_log_files, trees_of
from arpo_trl.visible import visible_data

SHORTEST_S = 0.0005
"""Waits up to this many seconds are omitted."""
TEXT_CHARS = 300


def write_timeline(run: Path, step: int | None, output: Path | None = None) -> Path:
    """Writes the timeline of a training rollout and returns the file's path. If `step` is None, uses the newest
    rollout.

    Args:
        output: The file. Default: `timeline-<rollout>.json` in the folder of the log, which is no part of the model.

    Raises:
        DataError: The run has no logged trees of that step, or none with times.
    """
    logged = [file for file in required_log_files(run) if file.kind == "step"]
    files = [file for file in logged if step in (None, file.step)]
    if not files:
        steps = listed(sorted({file.step for file in logged}))
        raise DataError(
            f"{run} has no logged {KINDS['step']} rollout of step {step}; it has rollouts of the steps {steps}."
        )
    for rollout in reversed(dict.fromkeys(file.rollout for file in files)):
        chosen = [(file.rank, tree) for file in files if file.rollout == rollout for tree in trees_of(file) or []]
        if chosen:
            break
    else:
        raise DataError(f"{run} has no readable trees of step {listed(sorted({file.step for file in files}))}.")
    if not any(tree.spans for _, tree in chosen):
        raise DataError(f"The trees of {rollout} in {run} have no times: an older version of arpo-trl logged them.")
    output = output or files[0].path.with_name(f"timeline-{rollout}.json")
    events = [event for pid, (rank, tree) in enumerate(chosen, 1) for event in tree_events(tree, rank, pid)]
    write_whole(output, json.dumps({"displayTimeUnit": "ms", "traceEvents": visible_data(events)}))
    return output


def tree_events(logged: LoggedTree, rank: int, pid: int) -> Iterator[dict[str, Any]]:
    """The events of a tree: its decoding, tool calls and waits, and the names of its paths. Times in microseconds."""
    process = {"pid": pid}
    name = f"group {logged.group}, rank {rank}"
    yield {**process, "ph": "M", "tid": 1, "name": "process_name", "args": {"name": name}}
    writers = logged.tree.writers()
    threads = {address: number for number, address in enumerate(sorted(set(writers.values())), 1)}
    for address, number in threads.items():
        name = f"path {address_text(address)}"
        yield {**process, "ph": "M", "tid": number, "name": "thread_name", "args": {"name": name}}
    for node in logged.tree.nodes[1:]:
        if node.index in logged.spans and node.index in writers:
            for name, start, end, details in _phases(node, *logged.spans[node.index]):
                begin = round(start * 1e6)
                yield {
                    **process,
                    **{"tid": threads[writers[node.index]], "ph": "X", "name": name, "cat": name.partition(" ")[0]},
                    **{"ts": begin, "dur": round(end * 1e6) - begin, "args": details},
                }


def _phases(node: Node, start: float, end: float) -> Sequence[tuple[str, float, float, dict[str, Any]]]:
    """Name, start, end and details of the events in a node's span, in seconds.

    Calls of one turn run concurrently, so the tools' part ends with the longest one. The rest of the span is waiting:
    for a free slot of the tools, or for the rollout to process the results.
    """
    details = {"tokens": len(node.ids), "text": node.text[:TEXT_CHARS]}
    if node.kind is NodeKind.TURN:
        return [("decode", start, end, details)]
    longest = max(node.calls, key=lambda call: call.seconds, default=None)
    ran = min(end, start + longest.seconds) if longest is not None else start
    phases = [(f"tool {longest.name}", start, ran, details)] if longest is not None and ran > start else []
    return [*phases, ("wait", ran, end, {})] if end - ran > SHORTEST_S else phases
