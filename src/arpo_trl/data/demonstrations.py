"""Converts demonstrations to token ids and labels for supervised training, with the tool protocol of RL.

`TagProtocol` encodes turns and tool results exactly as RL parses them. Only tokens of the model contribute to the
loss.

    # ids:     prompt | <search>…</search> | \\n<result>…</result>\\n | <answer>…</answer> EOS
    # labels:   −100  |        ids         |          −100            |         ids
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from datasets import Dataset

from arpo_trl.common.user_files import shown
from arpo_trl.data.layouts import check_prompt, check_role, why_rejected
from arpo_trl.errors import ConfigError, DataError
from arpo_trl.rollout.protocols.base import THOUGHT
from arpo_trl.rollout.protocols.tags import RESULT, TagProtocol

IGNORED = -100
_CODE_OR_RESULT = re.compile(
    rf"<python>(?:(?!<python>).)*?</python>|\s*<{RESULT}>\n?(?P<result>.*?)\n?</{RESULT}>\s*", re.DOTALL
)
_OPENED = re.compile(rf"^\s*{THOUGHT}\s*")
_DROPPED = ("tool_calls", "function_call", "reasoning_content", "thinking")
"""Fields of messages with text of the model that the tag protocol does not write."""
_TEMPLATES_CALL = re.compile(r"<tool_call>.*?</tool_call>", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A part of a trajectory: a turn of the model, or a tool result."""

    text: str
    is_turn: bool


def encode_trajectory(row: Mapping[str, Any], protocol: TagProtocol) -> dict[str, list[int]]:
    """`input_ids` and `labels` (−100 on the prompt and on tool results) of one demonstration.

    A row has either `messages` (system and user, then assistant and tool), or `prompt` (messages or text) and `text`,
    the whole trajectory with its `<result>…</result>`. A `<result>` inside an assistant message is also a tool result,
    except in the code of `<python>`. If the prompt ends with an open `<think>`, that of the first turn is left out.

    Raises:
        DataError: The row has neither format, a message has calls or thoughts outside its content, the calls or tools
            are those of a chat template, the trajectory does not end with a turn, it does not close the thought that
            the prompt opens, or the chat template rejects the prompt.
    """
    prompt, segments = _split(row)
    _check_calls_by_tags(row, segments)
    if not segments or not segments[-1].is_turn:
        raise DataError("the trajectory does not end with a turn of the model; expected its answer at the end.")
    ids = _encode_prompt(prompt, protocol)
    if protocol.opens_thought(ids):
        segments = _within_thought(segments)
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


def encode_dataset(rows: Dataset, protocol: TagProtocol, max_length: int | None, source: str) -> tuple[Dataset, int]:
    """The encoded rows of at most `max_length` tokens, and the number of longer rows, which are excluded.

    Trajectories are never truncated: from a truncated trajectory the model would learn not to answer.

    Args:
        source: The file or the Hub id of the rows, for messages.

    Raises:
        DataError: A row cannot be encoded (the message contains its source and number), or all rows are too long.
    """

    tried = set()

    def encode(row: dict[str, Any], number: int) -> dict[str, list[int]]:
        try:
            encoded = encode_trajectory(row, protocol)
            messages = row.get("messages") or row["prompt"]
            roles = () if isinstance(messages, str) else tuple(message["role"] for message in messages)
            if roles not in tried:
                tried.add(roles)
                protocol.check_shown(_split(row)[0])
            return encoded
        except DataError as error:
            raise DataError(f"{source}, row {number}: {error}") from error

    encoded = rows.map(encode, with_indices=True, remove_columns=rows.column_names, desc="Encoding trajectories")
    if max_length is None:
        return encoded, 0
    lengths = [len(ids) for ids in encoded["input_ids"]]
    kept = [i for i, length in enumerate(lengths) if length <= max_length]
    if not kept:
        raise DataError(
            f"All {len(lengths)} trajectories of {source} are longer than max_length ({max_length} tokens). Raise it."
        )
    return encoded.select(kept), len(lengths) - len(kept)


def has_text_prompts(rows: Dataset) -> bool:
    """Whether the prompt of some row is text."""
    return "prompt" in rows.column_names and any(
        isinstance(row["prompt"], str) and not row.get("messages") for row in rows
    )


def _split(row: Mapping[str, Any]) -> tuple[str | list[Mapping[str, Any]], list[Segment]]:
    if row.get("messages"):
        messages: Sequence[Mapping[str, Any]] = row["messages"]
        if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
            raise DataError(
                "`messages` is not a list of messages; expected each with a role and a content, both text."
            )
        for position, message in enumerate(messages):
            if dropped := next((name for name in _DROPPED if message.get(name)), None):
                raise DataError(
                    f"message {position} has {dropped}, which would be dropped; expected all text of the model in its "
                    "content, calls by tags: <think>a thought</think><search>a query</search>. Convert the messages."
                )
            if not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
                raise DataError(f"message {position} is {dict(message)}; expected role and content, both text.")
            check_role(message["role"], f"message {position}")
        start = next((i for i, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
        if start == 0:
            raise DataError("the first message is an assistant message; expected a system or user message before it.")
        segments: list[Segment] = []
        for message in messages[start:]:
            if message["role"] == "assistant":
                segments += _turns_and_results(message["content"])
            elif message["role"] == "tool":
                segments.append(Segment(text=message["content"], is_turn=False))
            else:
                raise DataError(
                    f"a {message['role']!r} message follows the first assistant message; expected assistant or tool "
                    "messages."
                )
        return list(messages[:start]), segments
    if (prompt := row.get("prompt")) and isinstance(row.get("text"), str) and row["text"]:
        if not isinstance(prompt, str):
            check_prompt(prompt)
        return prompt, list(_turns_and_results(row["text"]))
    raise DataError(f"the row has {sorted(row)}; expected `messages`, or `prompt` and `text`, none of them empty.")


def _check_calls_by_tags(row: Mapping[str, Any], segments: Sequence[Segment]) -> None:
    way_out = (
        "Write calls as <search>a query</search> and describe the tools in the system message, as "
        "arpo_trl.tags_system_prompt(tools) does. A model that knows its template's calls needs no cold start: train "
        "it with tool_protocol: chat_template."
    )
    for segment in segments:
        if segment.is_turn and (call := _TEMPLATES_CALL.search(segment.text)):
            raise DataError(
                f"a turn has {shown(call.group())}, a call in the form of a chat template; expected calls by tags. "
                + way_out
            )
    if "{" in str(row.get("tools")):  # schemas, not only names
        raise DataError(f"the row has `tools`, which no prompt of the tag protocol contains. {way_out}")


def _encode_prompt(prompt: str | list[Mapping[str, Any]], protocol: TagProtocol) -> list[int]:
    try:
        return protocol.encode_prompt(prompt)
    except ConfigError:
        raise
    except Exception as error:  # a template can raise anything
        raise DataError(why_rejected(prompt, error)) from error


def _within_thought(segments: Sequence[Segment]) -> list[Segment]:
    """The segments after a prompt that has opened the first thought."""
    first = replace(segments[0], text=_OPENED.sub("", segments[0].text)) if segments[0].is_turn else segments[0]
    continued = [first, *segments[1:]]
    thought, closing, _ = "".join(segment.text for segment in continued if segment.is_turn).partition("</think>")
    if not closing or THOUGHT in thought:
        raise DataError(
            f"the prompt ends with an open {THOUGHT}, which the chat template adds, but the first turn is "
            f"{shown(segments[0].text)}; expected a thought first: {THOUGHT}…</think>. Add it, or use a template that "
            "opens none, for many models with chat_template_kwargs: {enable_thinking: false}."
        )
    return continued


def _turns_and_results(text: str) -> Iterator[Segment]:
    """Splits the text at its tool results."""
    start = 0
    for part in _CODE_OR_RESULT.finditer(text):
        if part["result"] is None:
            continue
        if (turn := text[start : part.start()]).strip():
            yield Segment(text=turn, is_turn=True)
        yield Segment(text=part["result"], is_turn=False)
        start = part.end()
    if (turn := text[start:]).strip():
        yield Segment(text=turn, is_turn=True)
