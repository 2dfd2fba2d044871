"""How a model calls tools and how it sees their results.

`TagProtocol`, the paper's, for any model: the tool's name is a tag.

    the model writes   <search>melting point of iron</search>          a turn, ended by a stop string
    it then sees       <result> … </result>                            an observation
    and in the end     <answer>… \\boxed{1811} …</answer> and EOS       the last turn

`ChatTemplateProtocol`, for models trained to call tools their own way: calls and results as the tokenizer's chat
template has them, several calls in a turn if the model writes so, each turn ended by EOS.

A result's wrapper and its content are encoded apart, and the content by an encoder that knows no special or added
token: whatever a page contains, `<|im_end|>` and `</result><answer>` included, stays text.
"""

from __future__ import annotations

import copy
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from arpo_trl.errors import ConfigError, ToolSpecError
from arpo_trl.options import ProtocolKind
from arpo_trl.rollout.text import decode_exactly
from arpo_trl.tools.calls import ToolCall
from arpo_trl.tools.toolbox import RESERVED_TAGS, ToolSpec
from arpo_trl.trl_seam import (
    add_response_schema,
    get_training_chat_template,
    is_chat_template_prefix_preserving,
    parse_response,
)

ANSWER, RESULT = "answer", "result"


@dataclass(frozen=True, slots=True)
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


class TagProtocol(ToolProtocol):
    """Tool calls as tags: the tool's name is the tag, its one text argument stands between them.

    Raises:
        ToolSpecError: A tool does not have exactly one required text argument.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: Mapping[str, ToolSpec], **settings: Any):
        for name, spec in tools.items():
            if spec.single_text_parameter is None:
                raise ToolSpecError(
                    f"The tool {name!r} takes {list(spec.parameters)}; between two tags there is room for exactly one "
                    "required `str` argument. Give it one."
                )
        super().__init__(tokenizer, tools, **settings)
        self.stop_strings = tuple(f"</{name}>" for name in tools)
        self._result_open = self._encode(f"\n<{RESULT}>\n")
        self._result_close = self._encode(f"\n</{RESULT}>\n")
        known = "|".join(map(re.escape, [*tools, *sorted(RESERVED_TAGS)]))
        self._known_tag = re.compile(rf"</?({known})>")
        self._tool_open = re.compile("|".join(f"<{re.escape(name)}>" for name in tools) or r"(?!)")
        self._tool_close = re.compile("|".join(f"</{re.escape(name)}>" for name in tools) or r"(?!)")
        self._unknown_call = re.compile(rf"<(?!/|(?:{known})>)([A-Za-z_]\w*)>[^<]*</\1>")

    def encode_prompt(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """The ids a path starts from: messages through the chat template, plain text as it is."""
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        if self.tokenizer.chat_template is None:
            raise ConfigError(
                "The dataset's prompts are messages but the tokenizer has no chat template. Set "
                "`tokenizer.chat_template`, or give the prompts as text."
            )
        return self.tokenizer.apply_chat_template(
            list(prompt), add_generation_prompt=True, return_dict=False, **self.chat_template_kwargs
        )

    def encode_turn(self, text: str, *, last: bool) -> list[int]:
        """A demonstration's turn as the model should write it: special tokens on, EOS after the last turn."""
        return self._encode(text) + ([self.tokenizer.eos_token_id] if last else [])

    def encode_observation(self, results: Sequence[tuple[str, str]]) -> list[int]:
        ids: list[int] = []
        for _, text in results:
            ids += self._result_open + self._encode_content(text) + self._result_close
        return ids

    def parse_turn(self, text: str) -> Sequence[ToolCall | BadCall]:
        """The call that `text` ends in: a turn holds one at most, since its closing tag stops it."""
        call = self._parse_call(text)
        return () if call is None else (call,)

    def as_message(self, ids: Sequence[int], before: Sequence[int]) -> dict[str, Any]:
        """As a tokenizer's own calls are given, except that the content keeps the tags; they are text to it."""
        message = super().as_message(ids, before)
        calls = self.parse_turn(decode_exactly(self.tokenizer, ids))
        if made := [call for call in calls if isinstance(call, ToolCall)]:
            functions = [{"name": call.name, "arguments": call.arguments} for call in made]
            message["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        return message

    def limit_notice(self) -> str:
        return f"{super().limit_notice()[:-1]}: <{ANSWER}>…</{ANSWER}>"

    def _parse_call(self, text: str) -> ToolCall | BadCall | None:
        if not (closes := list(self._tool_close.finditer(text))):
            return self._missing_close(text)
        close = closes[-1]
        name = close.group()[2:-1]
        before, opened, body = text[: close.start()].rpartition(f"<{name}>")
        if not opened:
            return BadCall("unopened", f"Error: </{name}> came without <{name}>. {self._usage(name)}")
        if self._known_tag.search(body) or self._is_open(before):
            return BadCall("nested", f"Error: tags must not be nested. {self._usage(name)}")
        if not body.strip():
            return BadCall("empty", f"Error: the {name} call is empty. {self._usage(name)}")
        return ToolCall(name, {str(self.tools[name].single_text_parameter): body.strip()})

    def _missing_close(self, text: str) -> BadCall | None:
        if f"</{ANSWER}>" in text:
            return None
        if (opened := self._tool_open.search(text)) is not None:
            name = opened.group()[1:-1]
            return BadCall("unclosed", f"Error: <{name}> was not closed. {self._usage(name)}")
        if self.tools and (unknown := self._unknown_call.search(text)) is not None:
            names = ", ".join(self.tools)
            return BadCall("unknown_tool", f"Error: there is no tool {unknown.group(1)[:40]!r}. Tools: {names}.")
        return None

    def _is_open(self, text: str) -> bool:
        """Whether a tool's tag is still open at the end of `text`."""
        return any(text.count(f"<{name}>") > text.count(f"</{name}>") for name in self.tools)

    def _usage(self, name: str) -> str:
        return f"Write <{name}>…</{name}>."


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
        return ToolCall(name, arguments)

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


PROTOCOLS: dict[ProtocolKind, type[ToolProtocol]] = {
    ProtocolKind.TAGS: TagProtocol,
    ProtocolKind.CHAT_TEMPLATE: ChatTemplateProtocol,
}
