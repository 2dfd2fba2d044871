r"""The paper's reward (Eq 8). It scores the format, then the answer, then the use of several tools.

    −1                 the format is bad
     0                 the format is good, the answer is wrong
    accuracy           the format is good, the answer is fully or partly right
    accuracy + bonus   the same, and every bonus tool ran successfully on this path

The reward reads only the trainer's records: the text of the model's own turns, and the success of calls. It never
reads the text of a tool result, so a page that contains `</result><answer>\boxed{…}</answer>` has no effect. (The
released code searches the whole text, tool results included, for `</search>` and `</python>`.)
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, get_args

from arpo_trl.common.columns import shown_columns
from arpo_trl.common.tags import CODE_PARAMETER, plain_spans, without
from arpo_trl.errors import ConfigError, DataError, RewardError
from arpo_trl.rewards.answers import TASKS, extract_answer, paper_f1, task_accuracy
from arpo_trl.rewards.judge import Judgement, LLMJudge, question_of
from arpo_trl.rollout.tree import StopReason

if TYPE_CHECKING:
    from datasets import Dataset

Accuracy = Literal["task", "paper_f1", "judge"]

BONUS_TOOLS = ("search", "python")
"""The bonus tools of the paper."""

_RESULT_TAG = re.compile(r"</?(result|tool_response)>")  # tags of the tag protocol and of most chat templates


class FormatFault(StrEnum):
    """The fault in a path's format. If several apply, the first one in this order is returned."""

    TRUNCATED = "truncated"
    """The path reached the token limit before its last turn ended."""
    CALL_LIMIT = "call_limit"
    """The model called a tool again after the notice that no calls were left."""
    WROTE_RESULT = "wrote_result"
    """The model wrote a `<result>` or `<tool_response>` tag itself: it invented a tool result."""
    NO_ANSWER = "no_answer"
    """There is no `<answer>`."""
    SEVERAL_ANSWERS = "several_answers"
    """There is more than one `<answer>`."""
    UNBALANCED_TAGS = "unbalanced_tags"
    """A tag is opened but not closed, or closed but not opened."""
    NESTED_TAGS = "nested_tags"
    """A tag is inside another tag. Only a tool call inside `<think>` is allowed."""
    EARLY_ANSWER = "early_answer"
    """The answer is not in the last turn: the model called a tool after it."""
    TEXT_AFTER_ANSWER = "text_after_answer"
    """Text other than white space follows `</answer>`."""
    NO_BOXED = "no_boxed"
    r"""The answer has no `\boxed{…}` with balanced braces."""
    EMPTY_ANSWER = "empty_answer"
    r"""The last `\boxed{}` is empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HierarchicalScore:
    """The reward of one path and its parts.

    Example: `HierarchicalScore(reward=1.1, accuracy=1.0, fault=None)`, a right answer with the multi-tool bonus.

    Attributes:
        reward: In [−1, 1 + bonus].
        accuracy: In [0, 1]; None if the format is bad, because the answer is not compared then.
        fault: None if the format is good.
        judged: Whether the judge returned a verdict. False if it returned none, so that the rule decided. None if
            there was no request.
    """

    reward: float
    accuracy: float | None
    fault: FormatFault | None
    judged: bool | None = None


def format_fault(
    turns: Sequence[str], stop_reason: str, tool_names: Sequence[str], code_tools: Collection[str] = ()
) -> FormatFault | None:
    """Return the first format fault of a path, or None.

    Tags inside code, and tool tags in prose, count as text, as in `TagProtocol`.

    Args:
        turns: The model's own text, turn by turn, without tool results and without the final EOS. Code in calls of a
            chat template does not have the tags of `code_tools`, so pass turns without the text of such calls.
        stop_reason: A `StopReason`.
        tool_names: The tools whose tags are checked, in addition to `think` and `answer`.
        code_tools: The tools that take code.

    Raises:
        RewardError: `stop_reason` is unknown.
    """
    match stop_reason:
        case StopReason.LENGTH:
            return FormatFault.TRUNCATED
        case StopReason.CALL_LIMIT:
            return FormatFault.CALL_LIMIT
        case StopReason.EOS:
            pass
        case _:
            known = [str(reason) for reason in StopReason]
            raise RewardError(
                f"stop_reason is {stop_reason!r}; expected one of {known}. Pass the value that the trainer's rollout "
                "recorded."
            )
    tools = {*tool_names, *code_tools}
    turns = [without(turn, plain_spans(turn, tools, code_tools)) for turn in turns]
    text = "\n".join(turns)  # separated, so that the end of one turn and the start of the next never form a tag
    if _RESULT_TAG.search(text):
        return FormatFault.WROTE_RESULT
    if (answers := text.count("<answer>")) != 1:
        return FormatFault.SEVERAL_ANSWERS if answers else FormatFault.NO_ANSWER
    if (fault := _tag_fault(text, tool_names)) is not None:
        return fault
    if "<answer>" not in turns[-1]:
        return FormatFault.EARLY_ANSWER
    if turns[-1].rpartition("</answer>")[2].strip():
        return FormatFault.TEXT_AFTER_ANSWER
    answer = extract_answer(turns[-1])
    if answer is None:
        return FormatFault.NO_BOXED
    return None if answer else FormatFault.EMPTY_ANSWER


def _tag_fault(text: str, tool_names: Sequence[str]) -> FormatFault | None:
    names = "|".join(map(re.escape, ["think", "answer", *tool_names]))
    tags = [match.groups() for match in re.finditer(rf"<(/?)({names})>", text)]
    depth: Counter[str] = Counter()
    for closing, tag in tags:
        depth[tag] += -1 if closing else 1
        if depth[tag] < 0:
            return FormatFault.UNBALANCED_TAGS
    if any(depth.values()):
        return FormatFault.UNBALANCED_TAGS

    inside: list[str] = []
    for closing, tag in tags:
        if closing:
            if inside.pop() != tag:  # crossed: <think><search></think></search>
                return FormatFault.NESTED_TAGS
        elif inside and not (inside == ["think"] and tag in tool_names):
            return FormatFault.NESTED_TAGS
        else:
            inside.append(tag)
    return None


def _golds(answer: Any, task: Any) -> tuple[str, ...]:
    """Return a row's accepted answers. Raises RewardError if they or the task are not usable."""
    golds = (answer,) if isinstance(answer, str) else tuple(answer) if isinstance(answer, Sequence) else ()
    if not golds or not all(isinstance(gold, str) and gold.strip() for gold in golds):
        raise RewardError(f"answer is {answer!r}; expected non-empty text, or a list of accepted non-empty texts.")
    if task not in TASKS:
        raise RewardError(f"task is {task!r}; expected one of {TASKS}. Fix the dataset's `task` column.")
    return golds


@dataclass(frozen=True, slots=True)
class _Path:
    """The parsed path: its format fault, or its answer with the accuracy by the rule."""

    fault: FormatFault | None
    prediction: str
    golds: tuple[str, ...]
    accuracy: float | None
    used_all_tools: bool


class HierarchicalReward:
    """A TRL reward function: the paper's Eq 8, one value in [−1, 1 + bonus] per completion.

    It reads the columns that `ARPOTrainer` adds (`turns_without_calls`, `tool_calls`, `stop_reason`) and the dataset's
    `answer` and `task`. Without the trainer, `turns` replaces `turns_without_calls`. It logs the share of each
    `FormatFault` under `arpo/format/`, the fault of each completion as the column `format`, and the mean accuracy as
    `arpo/accuracy`. In this mean a bad format counts as wrong.

    Args:
        accuracy: "task" compares by the row's task, with mathematical equality or token F1. "paper_f1" uses the
            released reward's token F1 for every task, mathematics included, for parity. "judge" calls `judge` for each
            answer that the task's comparison does not score as fully right. If the judge returns no verdict, the
            comparison's result is kept.
        multi_tool_bonus: Added if the answer is fully or partly right and the path executed every bonus tool.
        bonus_tools: Names of the bonus tools, at least one. Their tags are part of the format. None: `BONUS_TOOLS`,
            with which a run that lacks one of them pays no bonus. Other names must be tools of the run.
        judge: Required for `accuracy="judge"`, not allowed otherwise.

    Raises:
        ConfigError: An argument is out of its range.
    """

    __name__ = "hierarchical"  # the name that TRL logs

    def __init__(
        self,
        accuracy: Accuracy = "task",
        multi_tool_bonus: float = 0.1,
        bonus_tools: Sequence[str] | None = None,
        judge: LLMJudge | None = None,
    ):
        if accuracy not in get_args(Accuracy):
            raise ConfigError(f"accuracy is {accuracy!r}; expected one of {get_args(Accuracy)}.")
        if not (math.isfinite(multi_tool_bonus) and multi_tool_bonus >= 0):
            raise ConfigError(f"multi_tool_bonus is {multi_tool_bonus}; expected a number ≥ 0, where 0 is no bonus.")
        if bonus_tools is not None and (isinstance(bonus_tools, str) or not bonus_tools):
            raise ConfigError(
                f"bonus_tools is {bonus_tools!r}; expected a list of tool names. For no bonus set multi_tool_bonus to "
                f"0."
            )
        if (judge is not None) != (accuracy == "judge"):
            raise ConfigError(
                f"accuracy is {accuracy!r} with {'no' if judge is None else 'a'} judge; expected a judge for "
                '"judge" and none otherwise. Set accuracy, judge_url and judge_model together.'
            )
        self.judge = judge
        self.accuracy = accuracy
        self.multi_tool_bonus = multi_tool_bonus
        self.bonus_tools = BONUS_TOOLS if bonus_tools is None else tuple(bonus_tools)
        self._needed_tools = () if bonus_tools is None else self.bonus_tools

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that affect the rewards, as JSON values. The judge's server may change, its model may not."""
        return {
            "accuracy": self.accuracy,
            "multi_tool_bonus": self.multi_tool_bonus,
            "bonus_tools": list(self.bonus_tools),
            "judge_model": getattr(self.judge, "model", None),
        }

    def check_tools(self, names: Collection[str]) -> None:
        """Check that the `bonus_tools` passed to the constructor are among `names`, the tools of a run.

        Raises:
            ConfigError: One is not, so that the bonus would never be paid.
        """
        if missing := [name for name in self._needed_tools if name not in names]:
            raise ConfigError(
                f"bonus_tools of the hierarchical reward has {missing}, but the run has the tools {list(names)}, so "
                "the bonus would never be paid. Correct the names, or remove bonus_tools."
            )

    def check_dataset(self, dataset: Dataset) -> None:
        """Check that every row has the gold answers and the task that this reward needs, before the model is loaded.

        Raises:
            DataError: A row lacks one of them. The message names the row (from 0) and the column.
        """
        for name in ("answer", "task"):
            if name not in dataset.column_names:
                raise DataError(
                    f"The hierarchical reward needs the column {name!r}, but the dataset has "
                    f"{shown_columns(dataset)}. Rename your column, or load the data with load_arpo_dataset, which "
                    "supports the common layouts."
                )
        for number, (answer, task) in enumerate(zip(dataset["answer"], dataset["task"], strict=True)):
            try:
                _golds(answer, task)
            except RewardError as error:
                raise DataError(f"Dataset row {number}, for the hierarchical reward: {error}") from error

    def scores(
        self,
        *,
        turns: Sequence[Sequence[str]],
        tool_calls: Sequence[Sequence[Mapping[str, Any]]],
        stop_reason: Sequence[str],
        answer: Sequence[str | Sequence[str]],
        task: Sequence[str],
        prompts: Sequence[Any] = (),
    ) -> list[HierarchicalScore]:
        """Return the reward of each path and its parts. The arguments are the columns of `__call__`.

        Raises:
            RewardError: A row's `task` or `stop_reason` is unknown, or it has no gold answer. The message names the
                row. Or there is a judge, and `prompts` are missing.
        """
        if self.judge is not None and len(prompts) != len(turns):
            raise RewardError(
                f"Hierarchical reward with a judge: there are {len(prompts)} prompts and {len(turns)} paths. Pass the "
                "column prompts."
            )
        paths: list[_Path] = []
        for row, columns in enumerate(zip(turns, tool_calls, stop_reason, answer, task, strict=True)):
            try:
                paths.append(self._read(*columns))
            except RewardError as error:
                raise RewardError(f"Hierarchical reward, row {row}: {error}") from error
        asked = [row for row, path in enumerate(paths) if self.judge is not None and path.accuracy not in (None, 1.0)]
        judged: dict[int, bool | None] = {}
        if self.judge is not None and asked:
            judgements = [
                Judgement(question=question_of(prompts[row]), golds=paths[row].golds, prediction=paths[row].prediction)
                for row in asked
            ]
            judged = dict(zip(asked, self.judge.verdicts(judgements), strict=True))
        return [self._score(path, row in judged, judged.get(row)) for row, path in enumerate(paths)]

    def _read(
        self,
        turns: Sequence[str],
        tool_calls: Sequence[Mapping[str, Any]],
        stop_reason: str,
        answer: str | Sequence[str],
        task: str,
    ) -> _Path:
        golds = _golds(answer, task)
        used_all = {call["name"] for call in tool_calls if call["ok"]}.issuperset(self.bonus_tools)
        code_tools = {call["name"] for call in tool_calls if CODE_PARAMETER in call.get("arguments", ())}
        fault = format_fault(turns, stop_reason, self.bonus_tools, code_tools)
        if fault is not None:
            return _Path(fault, "", golds, None, used_all)
        prediction = extract_answer(turns[-1]) or ""
        compare = paper_f1 if self.accuracy == "paper_f1" else partial(task_accuracy, task=task)
        return _Path(None, prediction, golds, compare(prediction, golds), used_all)

    def _score(self, path: _Path, was_asked: bool, verdict: bool | None) -> HierarchicalScore:
        if path.accuracy is None:
            return HierarchicalScore(reward=-1.0, accuracy=None, fault=path.fault)
        accuracy = path.accuracy if verdict is None else float(verdict)
        bonus = self.multi_tool_bonus if accuracy > 0 and path.used_all_tools else 0.0
        judged = verdict is not None if was_asked else None
        return HierarchicalScore(reward=accuracy + bonus, accuracy=accuracy, fault=None, judged=judged)

    def __call__(
        self,
        completions: Sequence[Any],
        answer: Sequence[str | Sequence[str]] | None = None,
        task: Sequence[str] | None = None,
        turns: Sequence[Sequence[str]] | None = None,
        tool_calls: Sequence[Sequence[Mapping[str, Any]]] | None = None,
        stop_reason: Sequence[str] | None = None,
        turns_without_calls: Sequence[Sequence[str]] | None = None,
        prompts: Sequence[Any] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        log_extra: Callable[[str, list[Any]], None] | None = None,
        **columns: Any,
    ) -> list[float | None]:
        """Return the reward of each completion.

        Args:
            completions: Only their number is used. The text is read from the turns.
            answer: The accepted answers of each row, a list or one string.
            task: "math" or "qa".
            turns: The model's own text, turn by turn, without tool results and without the final EOS. It is only used
                without `turns_without_calls`.
            tool_calls: The calls along the path in order, dicts with at least `name` and `ok`.
            stop_reason: Why the path ended, a `StopReason`.
            turns_without_calls: `turns` without the text inside calls of a chat template, whose code may contain any
                tags.
            prompts: The rows' prompts, messages or text. Only a judge needs them.
            log_metric: TRL's logger of scalars.
            log_extra: TRL's logger of columns.

        Raises:
            RewardError: A column is missing, or a value in it does not have the documented form.
        """
        given: dict[str, Sequence[Any] | None] = {
            "answer": answer,
            "task": task,
            "turns": turns if turns_without_calls is None else turns_without_calls,
            "tool_calls": tool_calls,
            "stop_reason": stop_reason,
        }
        for name, column in given.items():
            if column is None or len(column) != len(completions):
                got = "missing" if column is None else f"{len(column)} long"
                source = "the dataset (see load_arpo_dataset)" if name in ("answer", "task") else "ARPOTrainer"
                raise RewardError(
                    f"The hierarchical reward's column {name!r} is {got}; expected one value for each of the "
                    f"{len(completions)} completions. It comes from {source}."
                )
        columns_given = {name: column for name, column in given.items() if column is not None}
        scores = self.scores(prompts=prompts or (), **columns_given)
        outcomes = [score.fault or "ok" for score in scores]
        if log_metric is not None and scores:
            counts = Counter(outcomes)
            for outcome in ("ok", *FormatFault):  # including zeros: TRL averages over the batches that logged a metric
                log_metric(f"arpo/format/{outcome}", counts[outcome] / len(scores))
            log_metric("arpo/accuracy", sum(score.accuracy or 0.0 for score in scores) / len(scores))
            asked = [score.judged for score in scores if score.judged is not None]
            if asked:
                log_metric("arpo/judge/asked", len(asked) / len(scores))
                log_metric("arpo/judge/away", 1 - sum(asked) / len(asked))
        if log_extra is not None:
            log_extra("format", [str(outcome) for outcome in outcomes])
        return [score.reward for score in scores]
