"""A short conversation that a chat template renders, to find out the template's behaviour.

Templates differ between revisions and fine-tunes, so the source does not identify a template. The conversation has a
question, a tool call and its result, or a question and its answer.
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
"""The last argument of the first and of the second call. `count` precedes it, in the given and in alphabetical
order."""
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
"""The tool of the sample calls, for parsers that convert arguments by their schema."""
NAME: str = TOOL["function"]["name"]

Message = dict[str, Any]
Arguments = Callable[[Mapping[str, Any]], Any]
"""The form in which a template expects a call's arguments: unchanged, or as JSON text."""
ARGUMENT_FORMS: tuple[Arguments, ...] = (dict, json.dumps)


def arguments_of(number: int) -> dict[str, Any]:
    """Return the arguments of the sample call `number`, counted from 0."""
    return {"count": 3 + number, "text": WORDS[min(number, 1)]}


def user() -> Message:
    return {"role": "user", "content": QUESTION}


def calls(names: Sequence[str], form: Arguments) -> Message:
    """Return a turn that calls each of `names`. Some templates require ids of nine letters or digits."""
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
    """Return the results of `calls(names, …)`, one message each."""
    return [
        {"role": "tool", "name": name, "tool_call_id": f"call{i:05d}", "content": text}
        for i, (name, text) in enumerate(zip(names, texts, strict=True))
    ]


@dataclass(frozen=True, kw_only=True)
class Template:
    """A tokenizer's chat template, with the tools and settings of every prompt, and the tokenizer's added tokens."""

    tokenizer: PreTrainedTokenizerBase
    tools: Sequence[Mapping[str, Any]]
    settings: Mapping[str, Any]

    def render(self, messages: Sequence[Message], *, opens_turn: bool = False) -> str:
        """Render `messages`, with the start of the next turn if `opens_turn`. The template can raise any exception."""
        return self.tokenizer.apply_chat_template(
            list(messages),
            tools=list(self.tools) or None,
            tokenize=False,
            add_generation_prompt=opens_turn,
            **self.settings,
        )

    def tokens_in(self, text: str) -> list[str]:
        """Return the added tokens in `text`, in order, with repetitions."""
        return [match.group() for match in self._added.finditer(text)]

    def shared(self, text: str, other: str) -> int:
        """Return the length of the common prefix of `text` and `other`. It never ends inside an added token."""
        end = min(len(text), len(other))
        length = next((i for i in range(end) if text[i] != other[i]), end)
        tokens = (token for whole in (text, other) for token in self._added.finditer(whole))
        return min((token.start() for token in tokens if token.start() < length < token.end()), default=length)

    def end_of_answer(self, eos: Sequence[str]) -> str | None:
        """Return the token that ends an answer: one of `eos`, otherwise the first added token; None if there is none.

        Some templates end an answer only with the start of the next message (GLM), so an answer followed by a question
        is tried too. The final answer is tried first, because gpt-oss ends earlier answers differently.
        """
        for following in ([], [user()]):
            try:
                text = self.render([user(), {"role": "assistant", "content": ANSWER}, *following])
            except Exception:  # the template is third-party code and may reject this conversation
                continue
            tokens = self.tokens_in(text.partition(ANSWER)[2].partition(QUESTION)[0])
            if tokens:
                return next((token for token in tokens if token in eos), tokens[0])
        return None

    def end_of_call(self, after_call: str, between_calls: str, eos: Sequence[str], end_of_answer: str | None) -> str:
        """Return the token that ends a turn with calls; "" if there is none.

        Args:
            after_call: The text between the last argument and the result.
            between_calls: The text between the last arguments of two calls in one turn. Its tokens belong to the
                syntax of calls. "" if a turn has only one call.
            eos: The tokens that are known to end turns.
        """
        tokens = self.tokens_in(after_call)
        known = [token for token in tokens if token in eos] or [token for token in tokens if token == end_of_answer]
        syntax = self.tokens_in(between_calls)
        return next(iter(known or [token for token in tokens if token not in syntax]), "")

    @cached_property
    def _added(self) -> re.Pattern[str]:
        contents = sorted((token.content for token in self.tokenizer.added_tokens_decoder.values()), key=len)
        return re.compile("|".join(re.escape(content) for content in reversed(contents)) or r"(?!)")
