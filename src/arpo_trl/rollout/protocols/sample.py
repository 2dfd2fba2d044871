"""A short conversation as a chat template renders it: what the template does is read from it.

Templates differ in every revision and fine-tune, so none is known by its text. The conversation has a question, a tool
call and its result, or a question and its answer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

QUESTION, ANSWER = "[question]", "[answer]"
WORDS = ("some words", "other words")
"""The last argument of the first and the second call. `count` comes before it in the order given and by alphabet."""
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look words up.",
        "parameters": {
            "type": "object",
            "properties": {
                "count": {"type": "integer", "description": "How many results."},
                "text": {"type": "string", "description": "The words."},
            },
            "required": ["count", "text"],
        },
    },
}
"""The sample calls' tool, for parsers that cast arguments by a schema."""
NAME: str = TOOL["function"]["name"]

Message = dict[str, Any]
Arguments = Callable[[Mapping[str, Any]], Any]
"""How a template wants a call's arguments: as they are, or as JSON text."""
ARGUMENT_FORMS: tuple[Arguments, ...] = (dict, json.dumps)


def arguments_of(number: int) -> dict[str, Any]:
    """The arguments of the sample call `number`, 0 or more."""
    return {"count": 3 + number, "text": WORDS[min(number, 1)]}


def user() -> Message:
    return {"role": "user", "content": QUESTION}


def calls(names: Sequence[str], form: Arguments) -> Message:
    """A turn that calls each of `names`. Some templates ask for ids of nine letters or digits."""
    made = [
        {
            "id": f"call{i:05d}",
            "type": "function",
            "function": {"name": name, "arguments": form(arguments_of(i))},
        }
        for i, name in enumerate(names)
    ]
    return {"role": "assistant", "content": "", "tool_calls": made}


def results(names: Sequence[str], texts: Sequence[str]) -> list[Message]:
    """The results of `calls(names, …)`, one message each."""
    return [
        {"role": "tool", "name": name, "tool_call_id": f"call{i:05d}", "content": text}
        for i, (name, text) in enumerate(zip(names, texts, strict=True))
    ]


@dataclass(frozen=True)
class Template:
    """A tokenizer's chat template with what every prompt gives it, and the tokenizer's added tokens."""

    tokenizer: PreTrainedTokenizerBase
    tools: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]

    def render(self, messages: Sequence[Message], *, opens_turn: bool = False) -> str:
        """The text of `messages`, with the opening of the next turn if `opens_turn`. Raises what the template does."""
        return self.tokenizer.apply_chat_template(
            list(messages),
            tools=list(self.tools) or None,
            tokenize=False,
            add_generation_prompt=opens_turn,
            **self.settings,
        )

    def tokens_in(self, text: str) -> list[str]:
        """The added tokens in `text`, in order, each as often as it occurs."""
        return [match.group() for match in self._added.finditer(text)]

    def shared(self, text: str, other: str) -> int:
        """How many characters `text` and `other` share from the start, an added token as a whole or not at all."""
        length = 0
        for piece, counterpart in zip(self._pieces(text), self._pieces(other), strict=False):
            if piece != counterpart:
                break
            length += len(piece)
        return length

    def _pieces(self, text: str) -> list[str]:
        """The added tokens and, between them, the characters."""
        return re.findall(rf"{self._added.pattern}|.", text, re.DOTALL)

    def end_of_answer(self, eos: Sequence[str]) -> str | None:
        """The token that ends an answer: one of `eos`, else the first added one; None where the template has none.

        Some templates end an answer with the next message's opening (GLM), so one with a question after it is looked
        at too. The last message goes first: of earlier answers gpt-oss shows another end.
        """
        for following in ([], [user()]):
            try:
                text = self.render([user(), {"role": "assistant", "content": ANSWER}, *following])
            except Exception:  # a template is a program of the model's authors, and may refuse this conversation
                continue
            tokens = self.tokens_in(text.partition(ANSWER)[2].partition(QUESTION)[0])
            if tokens:
                return next((token for token in tokens if token in eos), tokens[0])
        return None

    def end_of_call(self, after_call: str, between_calls: str, eos: Sequence[str], end_of_answer: str | None) -> str:
        """The token that ends a turn which calls; "" where there is none.

        Args:
            after_call: What the template writes between the last argument and the result.
            between_calls: What it writes between the last arguments of two calls in one turn: tokens that belong to
                the syntax of calls. "" where a turn holds one call.
            eos: The known ends.
        """
        tokens = self.tokens_in(after_call)
        known = [token for token in tokens if token in eos] or [token for token in tokens if token == end_of_answer]
        syntax = self.tokens_in(between_calls)
        return next(iter(known or [token for token in tokens if token not in syntax]), "")

    @cached_property
    def _added(self) -> re.Pattern[str]:
        contents = sorted((token.content for token in self.tokenizer.added_tokens_decoder.values()), key=len)
        return re.compile("|".join(re.escape(content) for content in reversed(contents)) or r"(?!)")
