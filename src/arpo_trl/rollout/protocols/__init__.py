"""Tool protocols: the formats of tool calls and of their results. Each protocol is one file."""

from __future__ import annotations

from arpo_trl.options import ProtocolKind
from arpo_trl.rollout.protocols.base import BadCall, ContentEncoder, ToolProtocol
from arpo_trl.rollout.protocols.chat_template import ChatTemplateProtocol
from arpo_trl.rollout.protocols.tags import TagProtocol

__all__ = ["PROTOCOLS", "BadCall", "ChatTemplateProtocol", "ContentEncoder", "TagProtocol", "ToolProtocol"]

PROTOCOLS: dict[ProtocolKind, type[ToolProtocol]] = {
    ProtocolKind.TAGS: TagProtocol,
    ProtocolKind.CHAT_TEMPLATE: ChatTemplateProtocol,
}
