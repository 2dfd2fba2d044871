"""`ChatTemplateProtocol`, for models trained to call tools their own way.

Calls and results are as the tokenizer's chat template has them, several calls in a turn if the model writes so. EOS
ends each turn.
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
    """Tool calls and results as the tokenizer's chat template has them.

    The tools' schemas go into the prompt. Calls are parsed by transformers' response parsing, with TRL's description
    of the template where the tokenizer brings none; where earlier messages change when later ones follow, TRL's
    training variant of the template is used. A tool may take any arguments that its schema can describe.

    Raises:
        ConfigError: The tokenizer has no chat template, or one that nobody can parse, or that does not show results.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: Mapping[str, ToolSpec], **settings: Any):
        super().__init__(tokenizer, tools, **settings)
        if tokenizer.chat_template is None:
            raise ConfigError(
                'tool_protocol is "chat_template" but the tokenizer has no chat template. Set '
                '`tokenizer.chat_template`, or tool_protocol "tags".'
            )
        self._parser = copy.copy(tokenizer)  # TRL changes how it decodes where the trainer's own has a template
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
        except Exception as error:  # a template is a program of the model's authors
            raise ConfigError(
                f"The tokenizer's chat template does not work for tool calls ({type(error).__name__}: {error}). Set "
                '`tokenizer.response_template` for it, or tool_protocol "tags".'
            ) from error

    def encode_prompt(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """The messages through the chat template, the tools' schemas included."""
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
        except Exception as error:  # a parser that others wrote meets text that a model made up
            reason = str(error).partition("\n")[0][:200]
            return (BadCall("malformed", f"Error: the tool call could not be read: {reason}"),)
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
            return BadCall("malformed", "Error: a tool call needs a name and arguments.")
        name, arguments = function["name"], function.get("arguments", {})
        if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
            return BadCall("malformed", f"Error: the arguments of {name[:40]!r} have to be an object.")
        return ToolCall(name=name, arguments=arguments)

    def _generation_prompt(self) -> str:
        """What the template writes before a turn, for parsers that must see an opening `<think>`."""
        messages = [{"role": "user", "content": "…"}]
        return self._render(messages, True)[len(self._render(messages, False)) :]

    def _render_suffix(self, names: tuple[str, ...]) -> tuple[list[list[int]], bool]:
        """The wrappers around the results of the calls `names`, and whether the template shows results as JSON.

        All that follows the EOS of the calling turn, up to and with the opening of the next turn.
        """
        marks = [f'[result "{i}"]' for i in range(len(names))]  # the quotes tell whether it is escaped
        call = {"type": "function", "function": {"name": names[0], "arguments": {}}}
        messages: list[dict[str, Any]] = [
            {"role": "user", "content": "…"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
        ]
        results = [{"role": "tool", "name": name, "content": mark} for name, mark in zip(names, marks, strict=True)]
        before, after = self._render(messages, False), self._render(messages + results, True)
        # A template may close a message with more than the EOS that ends a turn: "<|im_end|>\n".
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
    """The text as it stands between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
