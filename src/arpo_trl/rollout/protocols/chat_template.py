"""`ChatTemplateProtocol`, for models that were trained to call tools with their chat template.

Calls and results have the format of the tokenizer's chat template. A turn can contain several calls. EOS ends each
turn.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from arpo_trl.errors import ConfigError
from arpo_trl.rollout.protocols.base import BadCall, ToolProtocol
from arpo_trl.tools.calls import ToolCall
from arpo_trl.tools.toolbox import ToolSpec
from arpo_trl.trl_seam import (
    add_response_schema,
    get_training_chat_template,
    is_chat_template_prefix_preserving,
)


class ChatTemplateProtocol(ToolProtocol):
    """Tool calls and results in the format of the tokenizer's chat template.

    The tools' schemas are part of the prompt. transformers' response parsing reads the calls. If the tokenizer has no
    response template, TRL's response schema for its chat template is used. If a template renders earlier messages
    differently once later ones follow, TRL's training variant of the template is used. A tool can take any arguments
    that its schema can describe.

    Raises:
        ConfigError: The tokenizer has no chat template, its calls cannot be parsed, or it does not show tool results.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: Mapping[str, ToolSpec], **settings: Any):
        super().__init__(tokenizer, tools, **settings)
        if tokenizer.chat_template is None:
            raise ConfigError(
                'tool_protocol is "chat_template" but the tokenizer has no chat template. Set '
                '`tokenizer.chat_template`, or tool_protocol "tags".'
            )
        self._parser = copy.copy(tokenizer)  # a response schema on the trainer's tokenizer changes TRL's decoding
        try:
            if getattr(tokenizer, "response_template", None) is None:
                add_response_schema(self._parser)
            self._template = (
                None if is_chat_template_prefix_preserving(tokenizer) else get_training_chat_template(tokenizer)
            )
            self._opening = self._generation_prompt()
            self._suffix = cache(self._render_suffix)
            for name in tools:
                self._suffix((name,))
        except ConfigError:
            raise
        except Exception as error:  # a template is foreign code and can raise anything
            raise ConfigError(
                f"The tokenizer's chat template does not work for tool calls ({type(error).__name__}: {error}). Set "
                '`tokenizer.response_template` for it, or tool_protocol "tags".'
            ) from error

    def encode_prompt(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """Apply the chat template to the messages and the tools' schemas."""
        if isinstance(prompt, str):
            raise ConfigError(
                f'tool_protocol is "chat_template" but a prompt is plain text ({prompt[:40]!r}…). Give prompts as '
                'lists of messages, or set tool_protocol "tags".'
            )
        return self.tokenizer.apply_chat_template(
            list(prompt),
            tools=self._schemas or None,
            add_generation_prompt=True,
            return_dict=False,
            chat_template=self._template,
            **self.chat_template_kwargs,
        )

    def parse_turn(self, text: str) -> Sequence[ToolCall | BadCall]:
        try:
            message = self._parser.parse_response(
                text + self.tokenizer.eos_token, prefix=self._opening, tools=self._schemas
            )
        except Exception as error:  # the parser is foreign code, and the model may write anything
            reason = str(error).partition("\n")[0][:200]
            return (BadCall(fault="malformed", text=f"Error: the tool call could not be read: {reason}"),)
        return tuple(map(self._checked, message.get("tool_calls") or ()))

    def encode_observation(self, results: Sequence[tuple[str, str]]) -> list[int]:
        wrappers, escaped = self._suffix(tuple(name for name, _ in results))
        ids = list(wrappers[0])
        for (_, text), wrapper in zip(results, wrappers[1:], strict=True):
            ids += self._encode_content(_inside_json(text) if escaped else text) + wrapper
        return ids

    def _checked(self, call: Any) -> ToolCall | BadCall:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return BadCall(fault="malformed", text="Error: a tool call needs a name and arguments.")
        name, arguments = function["name"], function.get("arguments", {})
        if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
            return BadCall(fault="malformed", text=f"Error: the arguments of {name[:40]!r} must be an object.")
        return ToolCall(name=name, arguments=arguments)

    def _generation_prompt(self) -> str:
        """The text that the template puts before a turn, for parsers that need its opening `<think>`."""
        messages = [{"role": "user", "content": "…"}]
        return self._render(messages, True)[len(self._render(messages, False)) :]

    def _render_suffix(self, names: tuple[str, ...]) -> tuple[list[list[int]], bool]:
        """The ids around the results of the calls `names`, and whether the template renders results as JSON.

        Together they are everything from after the EOS of the calling turn to the start of the next turn's content.
        """
        marks = [f'[result "{i}"]' for i in range(len(names))]  # the quotes show whether the template escapes it
        call = {"type": "function", "function": {"name": names[0], "arguments": {}}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "…"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        results = [{"role": "tool", "name": name, "content": mark} for name, mark in zip(names, marks, strict=True)]
        before, after = self._render(messages, False), self._render(messages + results, True)
        # A template may end a message with more than the EOS that ends a turn: "<|im_end|>\n".
        end = before.rfind(self.tokenizer.eos_token)
        cut = len(before) if end < 0 else end + len(self.tokenizer.eos_token)
        suffix = after[cut:]
        escaped = marks[0] not in suffix
        parts, rest = [], suffix
        for mark in marks:
            part, found, rest = rest.partition(_inside_json(mark) if escaped else mark)
            if not found or not after.startswith(before[:cut]):
                raise ConfigError(
                    "The tokenizer's chat template does not show tool results after a tool call. Use a model whose "
                    'template does, or set tool_protocol "tags".'
                )
            parts.append(part)
        return [self._encode(part) for part in (*parts, rest)], escaped

    def _render(self, messages: list[dict[str, Any]], add_generation_prompt: bool) -> str:
        return self.tokenizer.apply_chat_template(
            messages,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            chat_template=self._template,
            **self.chat_template_kwargs,
        )


def _inside_json(text: str) -> str:
    """The text as it appears between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
