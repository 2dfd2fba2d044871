"""A path as reward functions receive it in `completions` when its tools were called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from arpo_trl.rollout.protocols import ToolProtocol
from arpo_trl.rollout.tree import Leaf, NodeKind


def completion_messages(prompt_ids: Sequence[int], leaf: Leaf, protocol: ToolProtocol) -> list[dict[str, Any]]:
    """Assistant and tool messages in turn, as TRL's own tool loop gives them: see `ToolProtocol.as_message`."""
    messages: list[dict[str, Any]] = []
    seen = list(prompt_ids)
    for node in leaf.nodes:
        if node.kind is NodeKind.TURN:
            messages.append(protocol.as_message(node.ids, seen))
        elif node.calls:
            messages += [{"role": "tool", "name": call.name, "content": call.text} for call in node.calls]
        else:  # the notice that no calls are left
            messages.append({"role": "tool", "content": node.text})
        seen += node.ids
    return messages
