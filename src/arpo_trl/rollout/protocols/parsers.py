"""The parsers that read tool calls out of a turn, by name, and the one that fits a chat template.

All are others' work: transformers' response parsing with TRL's descriptions of the families, and vLLM's parsers where
vLLM is installed. A parser fits if it reads a call back that the template has rendered, name and arguments.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from arpo_trl.errors import ConfigError
from arpo_trl.rollout.protocols.sample import NAME, TOOL, arguments_of
from arpo_trl.trl_seam import (
    gemma4_template,
    glm4moe_template,
    gptoss_template,
    lfm2_2_5_template,
    llama3_template,
    nemotron_3_template,
    qwen3_5_template,
    qwen3_template,
)

AUTO = "auto"
OWN = "tokenizer"
"""The response template that the tokenizer brings."""
RESPONSE_TEMPLATES: dict[str, dict[str, Any]] = {
    "hermes": qwen3_template,
    "qwen3_xml": qwen3_5_template,
    "nemotron3": nemotron_3_template,
    "llama3_json": llama3_template,
    "gpt_oss": gptoss_template,
    "glm45": glm4moe_template,
    "gemma4": gemma4_template,
    "lfm2": lfm2_2_5_template,
}
"""Named as vLLM names its parsers of the same formats."""
VLLM_FAMILIES = {
    "mistral": "[TOOL_CALLS]",
    "deepseek_v3": "<｜tool▁calls▁begin｜>",
    "deepseek_v31": "<｜tool▁calls▁begin｜>",
    "muse_glimmer": "<atem:function_calls>",
}
"""Families without a response template, and the mark of their calls. vLLM's parsers are tried where a call has it,
since the import takes seconds; its other parsers have to be named."""

Parse = Callable[[str, str, Sequence[Mapping[str, Any]]], Mapping[str, Any]]
"""(turn with its ending token, what the template writes before a turn, the tools' schemas) → the message: `content`,
and `tool_calls` if it has any. Raises whatever others' code raises on text that it cannot read."""


@dataclass(frozen=True, slots=True)
class ToolParser:
    """A parser and its name; `template` is the response template behind it, None for one of vLLM's."""

    name: str
    parse: Parse
    template: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Rendered:
    """A turn with one sample call as the template renders it, with its ending token; `opening` stands before it."""

    turn: str
    opening: str


def fitting_parser(wanted: str, tokenizer: PreTrainedTokenizerBase, sample: Rendered) -> ToolParser:
    """The parser named `wanted`, or for "auto" the first of all that reads the call in `sample`.

    Raises:
        ConfigError: None does, or there is none of that name.
    """
    tried = []
    for parser in _candidates(wanted, tokenizer, sample.turn):
        if (wrong := _why_not(parser.parse, sample)) is None:
            return parser
        tried.append(f"{parser.name}: {wrong}")
    raise ConfigError(
        f"tool_parser is {wanted!r}, and no parser reads the call that the tokenizer's chat template renders, "
        f"{sample.turn[:300]!r} ({'; '.join(tried)}). Name a parser in tool_parser ({', '.join(_names())}, or any of "
        'vLLM\'s where it is installed), set `tokenizer.response_template`, or tool_protocol "tags".'
    )


def _candidates(wanted: str, tokenizer: PreTrainedTokenizerBase, turn: str) -> Iterator[ToolParser]:
    own = getattr(tokenizer, "response_template", None)
    known = ({} if own is None else {OWN: own}) | RESPONSE_TEMPLATES
    has_vllm = importlib.util.find_spec("vllm") is not None
    if wanted != AUTO:
        if wanted in known:
            yield ToolParser(wanted, _by_template(tokenizer, known[wanted]), known[wanted])
            return
        names = _vllm_names() if has_vllm else []
        if wanted not in names:
            others = names or ["with vLLM installed, any of its parsers"]
            raise ConfigError(f"tool_parser is {wanted!r}; expected {AUTO}, {', '.join([*_names(), *others])}.")
        yield ToolParser(wanted, _by_vllm(wanted, tokenizer))
        return
    for name, template in known.items():
        yield ToolParser(name, _by_template(tokenizer, template), template)
    for name, mark in VLLM_FAMILIES.items():
        if has_vllm and mark in turn:
            yield ToolParser(name, _by_vllm(name, tokenizer))


def _names() -> list[str]:
    return [OWN, *RESPONSE_TEMPLATES]


def _why_not(parse: Parse, sample: Rendered) -> str | None:
    """What the parser made of the sample call instead; None if it read it."""
    try:
        message = parse(sample.turn, sample.opening, [TOOL])
    except Exception as error:
        return f"{type(error).__name__}"
    found = [call.get("function") for call in message.get("tool_calls") or ()]
    return None if found == [{"name": NAME, "arguments": arguments_of(0)}] else f"read {found}"


def _by_template(tokenizer: PreTrainedTokenizerBase, template: dict[str, Any]) -> Parse:
    def parse(text: str, opening: str, tools: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        return tokenizer.parse_response(text, template, prefix=opening, tools=list(tools))

    return parse


def _vllm_names() -> list[str]:
    from vllm.tool_parsers import ToolParserManager

    return [name for name in ToolParserManager.list_registered() if name not in RESPONSE_TEMPLATES]


def _by_vllm(name: str, tokenizer: PreTrainedTokenizerBase) -> Parse:
    def parse(text: str, opening: str, tools: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.tool_parsers import ToolParserManager

        request = ChatCompletionRequest(messages=[], tools=list(tools) or None)
        found = ToolParserManager.get_tool_parser(name)(tokenizer, request.tools).extract_tool_calls(text, request)
        functions = [
            {"name": call.function.name, "arguments": json.loads(call.function.arguments)} for call in found.tool_calls
        ]
        made = [{"type": "function", "function": function} for function in functions]
        return {"role": "assistant", "content": found.content or "", "tool_calls": made}

    return parse
