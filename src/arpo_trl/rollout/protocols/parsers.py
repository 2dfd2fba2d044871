"""The parsers of tool calls, by name, and the choice of the parser that fits a chat template.

The package contains no parser of its own. It uses transformers' response parsing with TRL's templates for model
families, and vLLM's parsers if vLLM is installed. A parser fits if it reads back the name and the arguments of a call
that the chat template rendered.
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
"""The tokenizer's own response template."""
_GPT_OSS_HEADER = (
    r"(?:<\|channel\|>(?:commentary|analysis)\s+)?to=functions\.(?P<name>[^\s<]+)"
    r"(?:<\|channel\|>(?:commentary|analysis))?\s*(?:<\|constrain\|>\s*)?json<\|message\|>"
)
"""The start of a gpt-oss call. The chat template puts the recipient before the channel, the models also after it."""


def _with_all_headers(template: dict[str, Any]) -> dict[str, Any]:
    calls = {**template["fields"]["tool_calls"], "open_pattern": _GPT_OSS_HEADER}
    return {**template, "fields": {**template["fields"], "tool_calls": calls}}


RESPONSE_TEMPLATES: dict[str, dict[str, Any]] = {
    "hermes": qwen3_template,
    "qwen3_xml": qwen3_5_template,
    "nemotron3": nemotron_3_template,
    "llama3_json": llama3_template,
    "gpt_oss": _with_all_headers(gptoss_template),
    "glm45": glm4moe_template,
    "gemma4": gemma4_template,
    "lfm2": lfm2_2_5_template,
}
"""The names equal those of vLLM's parsers for the same formats."""
VLLM_FAMILIES = {
    "mistral": "[TOOL_CALLS]",
    "deepseek_v3": "<｜tool▁calls▁begin｜>",
    "deepseek_v31": "<｜tool▁calls▁begin｜>",
    "muse_glimmer": "<atem:function_calls>",
}
"""Families without a response template, and the text that marks their calls. Importing vLLM's parsers takes seconds,
so they are tried only if a call contains the mark. vLLM's other parsers are used only by name."""

Parse = Callable[[str, str, Sequence[Mapping[str, Any]]], Mapping[str, Any]]
"""(turn with its last token, text that the template puts before a turn, the tools' schemas) → the message: `content`
and, if there are any, `tool_calls`. It is third-party code, and may raise any exception on text that it cannot
read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolParser:
    """A parser and its name. `template` is its response template; None for vLLM's parsers.

    ToolParser(name="hermes", parse=parse, template=qwen3_template)
    """

    name: str
    parse: Parse
    template: dict[str, Any] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Rendered:
    """A turn with one sample call as the template renders it, with its last token, and the text before the turn.

    Rendered(turn="<tool_call>…</tool_call><|im_end|>", opening="<|im_start|>assistant\\n")
    """

    turn: str
    opening: str


def fitting_parser(wanted: str, tokenizer: PreTrainedTokenizerBase, sample: Rendered) -> ToolParser:
    """Return the parser `wanted`, or for "auto" the first parser that reads the call in `sample`.

    Raises:
        ConfigError: No parser reads it, or none has that name.
    """
    tried = []
    for parser in _candidates(wanted, tokenizer, sample.turn):
        if (wrong := _why_not(parser.parse, sample)) is None:
            return parser
        tried.append(f"{parser.name}: {wrong}")
    raise ConfigError(
        f"tool_parser is {wanted!r}, and no parser reads the call that the tokenizer's chat template renders, "
        f"{sample.turn[:300]!r} ({'; '.join(tried)}). Name a parser in tool_parser ({', '.join(_names())}, or any of "
        'vLLM\'s if it is installed), set `tokenizer.response_template`, or tool_protocol "tags".'
    )


def _candidates(wanted: str, tokenizer: PreTrainedTokenizerBase, turn: str) -> Iterator[ToolParser]:
    own = getattr(tokenizer, "response_template", None)
    known = ({} if own is None else {OWN: own}) | RESPONSE_TEMPLATES
    has_vllm = importlib.util.find_spec("vllm") is not None
    if wanted != AUTO:
        if wanted in known:
            yield ToolParser(name=wanted, parse=_by_template(tokenizer, known[wanted]), template=known[wanted])
            return
        names = _vllm_names() if has_vllm else []
        if wanted not in names:
            others = names or ["with vLLM installed, any of its parsers"]
            raise ConfigError(f"tool_parser is {wanted!r}; expected {AUTO}, {', '.join([*_names(), *others])}.")
        yield ToolParser(name=wanted, parse=_by_vllm(wanted, tokenizer))
        return
    for name, template in known.items():
        yield ToolParser(name=name, parse=_by_template(tokenizer, template), template=template)
    for name, mark in VLLM_FAMILIES.items():
        if has_vllm and mark in turn:
            yield ToolParser(name=name, parse=_by_vllm(name, tokenizer))


def _names() -> list[str]:
    return [OWN, *RESPONSE_TEMPLATES]


def _why_not(parse: Parse, sample: Rendered) -> str | None:
    """Return the parser's wrong result for the sample call; None if the parser read the call correctly."""
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
