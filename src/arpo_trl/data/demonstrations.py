"""Trajectories → token ids and labels for supervised training, through the code that parses them in RL.

What is learned is what is parsed: a turn, a tool result and their order are encoded by the same `TagProtocol`, and
only what the model is to write carries loss.

    # ids:     prompt | <search>…</search> | \\n<result>…</result>\\n | <answer>…</answer> EOS
    # labels:   −100  |        ids         |          −100            |         ids
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from datasets import Dataset

from arpo_trl.errors import DataError
from arpo_trl.rollout.protocols.tags import RESULT, TagProtocol

IGNORED = -100
_RESULT = re.compile(rf"\s*<{RESULT}>\n?(.*?)\n?</{RESULT}>\s*", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a trajectory: a turn the model is to write, or a tool result it is shown."""

    text: str
    is_turn: bool


def encode_trajectory(row: Mapping[str, Any], protocol: TagProtocol) -> dict[str, list[int]]:
    """`input_ids` and `labels` (−100 on the prompt and on tool results) of one demonstration.

    A row has `messages` (system and user, then assistant and tool in turn), or `prompt` (messages or text) and
    `text`, the whole trajectory with its `<result>…</result>`. A result inside an assistant message counts as one.

    Raises:
        DataError: The row has neither form, or its trajectory does not end with a turn.
    """
    prompt, segments = _split(row)
    if not segments or not segments[-1].is_turn:
        raise DataError("the trajectory ends without a turn of the model; expected its last answer there.")
    ids = protocol.encode_prompt(prompt)
    labels = [IGNORED] * len(ids)
    for i, segment in enumerate(segments):
        if segment.is_turn:
            new = protocol.encode_turn(segment.text, last=i == len(segments) - 1)
            labels += new
        else:
            new = protocol.encode_observation([("", segment.text)])
            labels += [IGNORED] * len(new)
        ids = ids + new
    return {"input_ids": ids, "labels": labels}


def encode_dataset(rows: Dataset, protocol: TagProtocol, max_length: int | None) -> tuple[Dataset, int]:
    """The encoded rows no longer than `max_length` tokens, and how many longer ones were left out.

    A trajectory is never cut: without its end it would teach not to answer.

    Raises:
        DataError: A row cannot be encoded (its number is in the message), or none is short enough.
    """

    def encode(row: dict[str, Any], number: int) -> dict[str, list[int]]:
        try:
            return encode_trajectory(row, protocol)
        except DataError as error:
            raise DataError(f"Row {number}: {error}") from error

    encoded = rows.map(encode, with_indices=True, remove_columns=rows.column_names, desc="Encoding trajectories")
    if max_length is None:
        return encoded, 0
    lengths = [len(ids) for ids in encoded["input_ids"]]
    kept = [i for i, length in enumerate(lengths) if length <= max_length]
    if not kept:
        raise DataError(f"All {len(lengths)} trajectories are longer than max_length ({max_length} tokens). Raise it.")
    return encoded.select(kept), len(lengths) - len(kept)


def _split(row: Mapping[str, Any]) -> tuple[str | list[Mapping[str, Any]], list[Segment]]:
    if row.get("messages"):
        messages: Sequence[Mapping[str, Any]] = row["messages"]
        if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
            raise DataError("`messages` is no list of messages; expected each with a role and a content, both text.")
        for position, message in enumerate(messages):
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise DataError(f"message {position} is {dict(message)}; expected a role and a content, both text.")
        start = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
        if start == 0:
            raise DataError("the first message is the assistant's; expected a system or user message before it.")
        segments: list[Segment] = []
        for message in messages[start:]:
            if message["role"] == "assistant":
                segments += _turns_and_results(message["content"])
            elif message["role"] == "tool":
                segments.append(Segment(message["content"], is_turn=False))
            else:
                raise DataError(
                    f"a {message['role']!r} message after the first assistant message; expected tool ones."
                )
        return list(messages[:start]), segments
    if row.get("prompt") and isinstance(row.get("text"), str) and row["text"]:
        return row["prompt"], list(_turns_and_results(row["text"]))
    raise DataError(f"it has {sorted(row)}; expected `messages`, or `prompt` and `text`, none of them empty.")


def _turns_and_results(text: str) -> Iterator[Segment]:
    """The text split at its tool results."""
    for i, part in enumerate(_RESULT.split(text)):
        if i % 2 or part.strip():
            yield Segment(part, is_turn=i % 2 == 0)
