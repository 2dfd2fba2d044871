"""Converts sampled leaves to the formats that TRL and the reward functions expect."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from arpo_trl.rollout.protocols import ToolProtocol
from arpo_trl.rollout.protocols.base import message_of
from arpo_trl.rollout.tree import Leaf, NodeKind


def reward_columns(
    prompt_ids: Sequence[list[int]], leaves: Sequence[Leaf], protocol: ToolProtocol
) -> dict[str, list[Any]]:
    """The columns for reward functions, one value per leaf. `prompt_ids`: each leaf's."""
    return {
        "turns": [protocol.whole_turns(before, leaf) for before, leaf in zip(prompt_ids, leaves, strict=True)],
        "turns_without_calls": [
            protocol.whole_turns(before, leaf, calls=False) for before, leaf in zip(prompt_ids, leaves, strict=True)
        ],
        "tool_calls": [[call.as_row() for call in leaf.calls] for leaf in leaves],
        "stop_reason": [leaf.stop.value for leaf in leaves],
    }


def tool_loop_output(
    leaves: Sequence[Leaf],
    completion_ids: list[list[int]],
    completions: list[Any],
    logprobs: list[list[float]] | None,
) -> tuple[Any, ...]:
    """The return value of TRL's `_tool_call_loop`, for leaves whose tools were called during the rollout."""
    calls = [call for leaf in leaves for call in (*leaf.calls, *leaf.nodes[-1].unread)]
    failures = sum(not call.ok for call in calls)
    masks = [leaf.mask for leaf in leaves]
    return masks, completions, completion_ids, logprobs, len(calls), failures, [[] for _ in leaves]


def completions_of(
    prompts: Sequence[Any],
    prompt_ids: Sequence[list[int]],
    leaves: Sequence[Leaf],
    protocols: Sequence[ToolProtocol],
    tokenizer: PreTrainedTokenizerBase,
    *,
    tools: bool,
) -> list[Any]:
    """The completions as TRL passes them to reward functions: texts, or messages if the prompts are messages.

    Args:
        protocols: The protocol of each leaf.
        tools: Whether the trainer has tools.
    """
    ids = [leaf.ids for leaf in leaves]
    if not isinstance(prompts[0], list):
        return list(tokenizer.batch_decode(ids, skip_special_tokens=True))
    if tools:
        return completion_messages(prompt_ids, leaves, protocols)
    return [[message_of(tokenizer, of_leaf, before, [])] for before, of_leaf in zip(prompt_ids, ids, strict=True)]


def completion_messages(
    prompt_ids: Sequence[Sequence[int]], leaves: Sequence[Leaf], protocols: Sequence[ToolProtocol]
) -> list[list[dict[str, Any]]]:
    """Each leaf's path as assistant and tool messages, as TRL's tool loop passes them to reward functions.

    `ToolProtocol.as_message` documents the contents of an assistant message. Paths do not share messages, so a reward
    function may change them.

    Args:
        prompt_ids, protocols: Those of each leaf.
    """
    parsed: dict[int, dict[str, Any]] = {}  # by the identity of the turn's node: paths of a tree share nodes
    completions = []
    for before, leaf, protocol in zip(prompt_ids, leaves, protocols, strict=True):
        messages: list[dict[str, Any]] = []
        for node in leaf.nodes:
            if node.kind is NodeKind.TURN:
                if id(node) not in parsed:
                    parsed[id(node)] = protocol.as_message(node.ids, before)
                messages.append(copy.deepcopy(parsed[id(node)]))
            else:
                messages += node.messages
                before = node.ids if protocol.results_open_turns else []
        completions.append(messages)
    return completions
