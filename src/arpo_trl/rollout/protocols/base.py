"""What every way of calling tools has in common.

A result's wrapper and its content are encoded apart, and the content by an encoder that knows no special or added
token: whatever a page contains, `<|im_end|>` and `</result><answer>` included, stays text.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from arpo_trl.errors import ConfigError
from arpo_trl.rollout.text import decode_exactly
from arpo_trl.tools.calls import ToolCall
from arpo_trl.tools.toolbox import ToolSpec
from arpo_trl.trl_seam import (
    parse_response,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BadCall:
    """Something meant as a tool call that is none: what is wrong with it, and the text that tells the model."""

    fault: str
    text: str


class ContentEncoder:
    """Text → ids that are never a special or added token, whatever the text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None:
            raise ConfigError(
                f"The tokenizer {type(tokenizer).__name__} has no fast backend, so control tokens in tool results "
                "could not be kept apart from text. Use a fast tokenizer."
            )
        state = json.loads(backend.to_str())
        state["added_tokens"] = []
        state["post_processor"] = None
        self._backend = Tokenizer.from_str(json.dumps(state))
        self._backend.no_truncation()
        self._control_ids = frozenset(tokenizer.added_tokens_decoder)

    def __call__(self, text: str) -> list[int]:
        ids = self._encode(text)
        if not self._control_ids.isdisjoint(ids):  # a vocabulary may hold its control tokens as plain words too
            ids = [token for char in text for token in self._encode(char)]
        return ids

    def _encode(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids


class ToolProtocol(ABC):
    """What the sampler needs to know of a way of calling tools.

    Args:
        tokenizer: A fast tokenizer with a chat template (for conversational prompts) and an EOS token.
        tools: The tools by name.
        max_result_tokens: Longer results keep their head and tail, with the cut marked. None: no limit.
        chat_template_kwargs: Passed to the chat template with every prompt.
    """

    stop_strings: tuple[str, ...] = ()
    """What ends a turn besides EOS."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Mapping[str, ToolSpec],
        *,
        max_result_tokens: int | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ):
        if tokenizer.eos_token_id is None:
            raise ConfigError("The tokenizer has no EOS token, so no turn could end. Set `tokenizer.eos_token`.")
        self.tokenizer = tokenizer
        self.tools = tools
        self.max_result_tokens = max_result_tokens
        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self._parser = tokenizer
        self._schemas = [spec.schema for spec in tools.values()]
        self._encode_text = ContentEncoder(tokenizer)
        self._cut_mark = self._encode_text("\n[… cut …]\n")

    @abstractmethod
    def encode_prompt(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids a path starts from."""

    @abstractmethod
    def parse_turn(self, text: str) -> Sequence[ToolCall | BadCall]:
        """What the turn `text` asks for, in order; empty when it asks for nothing."""

    @abstractmethod
    def encode_observation(self, results: Sequence[tuple[str, str]]) -> list[int]:
        """What a model sees after a turn: one (tool name, text) for each thing that `parse_turn` returned of it."""

    def decode_turn(self, ids: Sequence[int], eos_ids: Sequence[int]) -> str:
        """What the model wrote, tags and other special tokens included, without a final EOS."""
        end = len(ids) - (1 if ids and ids[-1] in eos_ids else 0)
        return decode_exactly(self.tokenizer, ids[:end])

    def as_message(self, ids: Sequence[int], before: Sequence[int]) -> dict[str, Any]:
        """A turn as TRL's tool loop gives it to rewards: role, content, and `tool_calls` where it called.

        Special tokens are left out of the content, a final EOS too. `before` is what the model saw before the turn.
        """
        if any(getattr(self._parser, name, None) is not None for name in ("response_template", "response_schema")):
            return parse_response(self._parser, list(ids), prefix=list(before), tools=self._schemas or None)
        return {"role": "assistant", "content": self.tokenizer.decode(ids, skip_special_tokens=True)}

    def limit_notice(self) -> str:
        """The text that tells a path to answer without further calls."""
        return "No tool calls are left. Write the final answer now."

    def tool_limit_notice(self, name: str) -> str:
        """The text that tells a path to go on without the tool `name`."""
        return f"No {name} calls are left. Go on without them."

    def _encode(self, text: str) -> list[int]:
        """Our own text, special tokens on."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def _encode_content(self, text: str) -> list[int]:
        """A tool's text, special tokens off, capped."""
        content = self._encode_text(text)
        if self.max_result_tokens is not None and len(content) > self.max_result_tokens:
            kept = max(self.max_result_tokens - len(self._cut_mark), 2)
            head = (kept + 1) // 2
            content = content[:head] + self._cut_mark + content[len(content) - (kept - head) :]
        return content
