"""The trajectory log: a sample of the trees as JSON lines, from which each tree can be rebuilt.

There is one file per rollout and rank, such as `<output_dir>/trajectories/step-000012-rank0.jsonl`, with one tree per
line. A resumed run that repeats a step replaces its file, so no tree is logged twice. The run's seed determines which
trees are logged.
"""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from arpo_trl.common.files import final_name, write_whole
from arpo_trl.common.full_disk import full_disk_message, is_full_disk
from arpo_trl.common.run_files import TRAJECTORIES
from arpo_trl.common.user_files import expect, json_lines, user_path
from arpo_trl.errors import DataError, EngineError
from arpo_trl.rollout.rules.base import BranchRule
from arpo_trl.rollout.tree import BranchDecision, ExecutedCall, Leaf, Node, NodeKind, RolloutTree, Span, StopReason
from arpo_trl.tools.calls import CallSource, ToolFailure
from arpo_trl.visible import get_logger

logger = get_logger(__name__)

_FILE = re.compile(r"(?P<kind>step|eval)-(?P<step>\d+)(\.(?P<part>\d+))?-rank(?P<rank>\d+)\.jsonl")


@dataclass(frozen=True, slots=True, order=True, kw_only=True)
class LogFile:
    """A file of the trajectory log. Files sort by step; the evaluation of a step comes before its training rollout.

    LogFile.of(Path("runs/my/trajectories/step-000012-rank0.jsonl")).step  # 12
    """

    step: int
    kind: str
    """`eval` or `step`."""
    part: int
    rank: int
    path: Path

    @classmethod
    def of(cls, path: Path) -> LogFile | None:
        """The file at `path`; None if its name is not a log file's name."""
        match = _FILE.fullmatch(path.name)
        if match is None:
            return None
        return cls(
            step=int(match["step"]),
            kind=match["kind"],
            part=int(match["part"] or 0),
            rank=int(match["rank"]),
            path=path,
        )

    @property
    def rollout(self) -> str:
        """The name without the rank: `step-000012`, or `eval-000012`."""
        return self.path.stem.rpartition("-rank")[0]


def log_files(run: Path) -> list[LogFile]:
    """The files of the trajectory log in `run`, a run's output_dir or its folder `trajectories`.

    Raises:
        DataError: `run` is not a folder.
    """
    if not run.is_dir():
        raise DataError(f"{run} is not a folder. Pass the output_dir of a run.")
    folder = run / TRAJECTORIES if (run / TRAJECTORIES).is_dir() else run
    return sorted(file for path in folder.glob("*.jsonl") if (file := LogFile.of(path)) is not None)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedTree:
    """A tree with its step, group and prompt text, and `rewards` and `advantages`, one per leaf in leaf order.

        LoggedTree(step=12, group=0, prompt="Who …?", tree=tree, rewards=[1.0, None], advantages=[0.7, -0.7])

    A reward is None if no reward function applies. `rule` contains the name and the settings of the branch rule.
    `answers` are the expected answers of the row. `spans` contains, for each node except the root, the times at which
    it was requested and complete, in seconds since the start of the group. All three are empty in logs that lack them.
    """

    step: int
    group: int
    prompt: str
    tree: RolloutTree
    rewards: list[float | None]
    advantages: list[float]
    rule: Mapping[str, Any] = field(default_factory=dict)
    answers: list[str] = field(default_factory=list)
    spans: Mapping[int, Span] = field(default_factory=dict)

    def scored_leaves(self) -> Iterator[tuple[Leaf, float | None, float]]:
        """Yields each leaf with its reward and its advantage."""
        return zip(self.tree.leaves(), self.rewards, self.advantages, strict=True)


def logged_trees(
    trees: Sequence[RolloutTree],
    rewards: Sequence[float],
    advantages: Sequence[float],
    *,
    step: int,
    first_group: int,
    decode: Callable[[list[int]], str],
    rule: BranchRule | None = None,
    answers: Sequence[Any] = (),
    spans: Sequence[Mapping[int, Span]] = (),
) -> list[LoggedTree]:
    """The trees of a rollout in the format of the log.

    Args:
        rewards: One per leaf, tree by tree in leaf order; NaN (no reward function applies) becomes None.
        advantages: One per leaf, in the same order.
        step: The optimizer step.
        first_group: The group number of the first tree. The other trees have the following numbers.
        decode: Token ids → text, with special tokens.
        rule: The branch rule that grew the trees.
        answers: The expected answer of each tree: a text, a list of texts, or None.
        spans: The times of each tree's nodes, as in `RolloutBatch.spans`.
    """
    described = {} if rule is None else {"name": rule.name, **dataclasses.asdict(rule)}
    logged, start = [], 0
    for number, tree in enumerate(trees):
        rows = slice(start, start + len(tree.leaves()))
        earned = [None if math.isnan(reward) else reward for reward in rewards[rows]]
        logged.append(
            LoggedTree(
                step=step,
                group=first_group + number,
                prompt=decode(tree.root.ids),
                tree=tree,
                rewards=earned,
                advantages=list(advantages[rows]),
                rule=described,
                answers=_texts(answers[number]) if answers else [],
                spans=spans[number] if spans else {},
            )
        )
        start = rows.stop
    return logged


class TrajectoryLog:
    """Writes a random sample of the trees to `folder`: each with probability `rate`, drawn from `seed`."""

    def __init__(self, folder: Path, rate: float, seed: int, rank: int):
        self.folder, self.rate, self.seed, self.rank = folder, rate, seed, rank
        self._has_warned = False
        self._written: set[str] = set()
        """The names of this run's rollouts, of which other ranks may have logged trees."""

    def sample(self, name: str, trees: Sequence[LoggedTree]) -> list[LoggedTree]:
        """The trees of this rollout that are logged."""
        draw = random.Random(f"{self.seed} {name} {self.rank}")
        return [tree for tree in trees if draw.random() < self.rate]

    def write(self, name: str, trees: Sequence[LoggedTree]) -> Path | None:
        """Writes this rollout's sample. Returns the file; None if no tree was drawn.

        If the disk is full it also returns None, and warns the first time: training does not need the log.
        """
        self._written.add(name)
        kept = self.sample(name, trees)
        if not kept:
            return None
        path = self.folder / f"{name}-rank{self.rank}.jsonl"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            rows = "".join(json.dumps(_tree_row(tree), ensure_ascii=False) + "\n" for tree in kept)
            write_whole(path, rows, errors="replace")  # for lone surrogates, which a JSON escape can contain
        except OSError as error:
            if not is_full_disk(error):
                raise
            if not self._has_warned:
                logger.warning(f"{full_disk_message(error)} Until then no trees are logged. Training continues.")
            self._has_warned = True
            return None
        return path

    def warn_of_earlier_run(self) -> None:
        """Warns that the folder has files of others, which a new run replaces only in part."""
        files = [path for path in self.folder.glob("*.jsonl") if LogFile.of(path)]
        if any(path.name.rpartition("-rank")[0] not in self._written for path in files):
            logger.warning(
                f"{self.folder} contains trees of an earlier run. The new run replaces those of the same steps only, "
                "so `arpo-trl tree` and `view` show both runs. Remove the folder, or choose another output_dir."
            )

    def forget_from(self, step: int, *, evaluated: bool) -> None:
        """Removes all ranks' files of the steps that a run resumed at `step` repeats: this step and later ones.

        This includes the evaluation at `step`, unless it is complete (`evaluated`). The run would replace most of
        these files anyway, but not the files of ranks or steps that it no longer has.
        """
        for path in self.folder.glob("*-rank*"):
            file = LogFile.of(path.with_name(final_name(path)))
            if file is None or file.step < step or (file.kind == "eval" and evaluated and file.step == step):
                continue
            path.unlink(missing_ok=True)


def read_trees(path: str | Path) -> Iterator[LoggedTree]:
    """Rebuilds the trees of a log file.

    Raises:
        DataError: A line is not a logged tree; the message names file, line and the part of it.
    """
    for number, row in json_lines(user_path(path, "path")):
        try:
            yield _tree_from(row)
        except (DataError, EngineError, ValueError) as error:
            raise DataError(f"{path}, line {number}: not a logged tree: {error}") from error


def _texts(answer: Any) -> list[str]:
    if answer is None:
        return []
    return [str(text) for text in answer] if isinstance(answer, list | tuple) else [str(answer)]


def _tree_row(logged: LoggedTree) -> dict[str, Any]:
    row = {
        "step": logged.step,
        "group": logged.group,
        "prompt": logged.prompt,
        "nodes": [_node_row(node) for node in logged.tree.nodes],
        "leaves": [
            {"address": leaf.address, "node": leaf.nodes[-1].index, "reward": reward, "advantage": advantage}
            for leaf, reward, advantage in logged.scored_leaves()
        ],
    }
    if logged.rule:
        row["rule"] = {name: value if isinstance(value, _PLAIN) else str(value) for name, value in logged.rule.items()}
    if logged.answers:
        row["answers"] = logged.answers
    if logged.spans:
        row["spans"] = [
            {"node": node, "start_s": round(start, 4), "end_s": round(end, 4)}
            for node, (start, end) in sorted(logged.spans.items())
        ]
    return row


_PLAIN = str | int | float | bool | None
"""Types that JSON supports directly. Other settings of a rule are logged as text."""


def _node_row(node: Node) -> dict[str, Any]:
    row = {part.name: getattr(node, part.name) for part in dataclasses.fields(node)}  # without copies of long lists
    row.pop("children")
    for name in ("calls", "unread"):
        row[name] = [dataclasses.asdict(call) for call in row[name]]
        for call in row[name]:
            if call["changed"] is None:
                del call["changed"]
    if node.decision is not None:
        row["decision"] = dataclasses.asdict(node.decision)
    return {key: value for key, value in row.items() if value not in (None, [])} | {"parent": node.parent}


_CALL = {
    "name": str, "arguments": dict, "text": str, "failure": str | None, "seconds": float, "source": str,
    "changed?": str | None,
}  # fmt: skip
_KNOWN = float | None
_DECISION = {
    "entropy_nats?": _KNOWN, "delta?": _KNOWN, "probability?": _KNOWN, "fires": bool | None, "granted": int,
    "reason?": str,
}  # fmt: skip
_NODE = {
    "kind": str, "parent": int, "ids": [int], "text": str, "entropies?": [float], "stop?": str, "calls?": [_CALL],
    "unread?": [_CALL], "decision?": _DECISION, "versions?": [int],
}  # fmt: skip
_LEAF = {"address": [int], "node": int, "reward": float | None, "advantage": float}
_SPAN = {"node": int, "start_s": float, "end_s": float}
_TREE = {
    "step": int, "group": int, "prompt": str, "nodes": [{"ids?": [int]}], "leaves": [_LEAF], "rule?": {"name": str},
    "answers?": [str], "spans?": [_SPAN],
}  # fmt: skip


def _tree_from(row: Any) -> LoggedTree:
    expect(row, _TREE, "the line")
    if not row["nodes"]:
        raise DataError("nodes is empty; expected at least a root.")
    tree = RolloutTree(row["nodes"][0].get("ids", []))
    for number, node in enumerate(row["nodes"][1:], 1):
        expect(node, _NODE, f"nodes[{number}]")
        if not 0 <= node["parent"] < number:
            raise DataError(f"nodes[{number}].parent is {node['parent']}; expected an earlier node.")
        if NodeKind(node["kind"]) is NodeKind.TURN:
            expect(node, {"logprobs": [float]}, f"nodes[{number}]")
            grown = tree.add_turn(
                node["parent"],
                node["ids"],
                node["text"],
                node["logprobs"],
                node.get("entropies", []),
                node.get("versions", []),
            )
            grown.stop = StopReason(node["stop"]) if "stop" in node else None
            grown.unread = [_call_from(call) for call in node.get("unread", [])]
        else:
            calls = [_call_from(call) for call in node.get("calls", [])]
            grown = tree.add_observation(node["parent"], node["ids"], calls, node["text"])
            grown.decision = BranchDecision(**node["decision"]) if "decision" in node else None
    for leaf in row["leaves"]:
        end = tree.nodes[leaf["node"]] if 0 <= leaf["node"] < len(tree.nodes) else None
        if end is None or end.stop is None:
            raise DataError(f"leaf {leaf['address']} ends at node {leaf['node']}, which has no stop reason.")
        tree.end(leaf["node"], tuple(leaf["address"]), end.stop, end.unread)
    tree.check(len(row["leaves"]))
    if lost := {node.index for node in tree.nodes[1:]} - tree.writers().keys():
        raise DataError(f"leaves lacks the end of a path: no leaf is at or below node {min(lost)}.")
    rewards = [leaf["reward"] for leaf in row["leaves"]]
    return LoggedTree(
        step=row["step"],
        group=row["group"],
        prompt=row["prompt"],
        tree=tree,
        rewards=rewards,
        advantages=[leaf["advantage"] for leaf in row["leaves"]],
        rule=row.get("rule", {}),
        answers=row.get("answers", []),
        spans={span["node"]: (span["start_s"], span["end_s"]) for span in row.get("spans", [])},
    )


def _call_from(row: dict[str, Any]) -> ExecutedCall:
    failure = row["failure"]
    typed = {"failure": None if failure is None else ToolFailure(failure), "source": CallSource(row["source"])}
    return ExecutedCall(**(row | typed))
