"""The parsers of tool calls, by name, and the choice of the parser that fits a chat template.

The package contains no parser of its own. It uses transformers' response parsing with TRL's templates for model
families, and vLLM's parsers if vLLM is installed. A parser fits if it reads back the name and the arguments of a call
that the chat template rendered.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
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
    r"(?:<\|channel\|>(?:commentary|analysis)\s+)?to=functions\.(?P<name>[^\s<]{1,128}+)"
    r"(?:<\|channel\|>(?:commentary|analysis))?\s*(?:<\|constrain\|>\s*)?json<\|message\|>"
)
"""The start of a gpt-oss call. The chat template puts the recipient before the channel, the models also after it.

The name is bounded and possessive: otherwise a turn that repeats its start would take quadratic time."""


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
_PARAMETER = re.compile(r"<[\w:]*param")
"""The start of an argument in vLLM's formats with tags, even if it is misspelled: `<parameter=`, `<atem:parameter`."""

_NAME_AND_ARGUMENTS = {"type": "function", "function": {"name": "{name}", "arguments": "{content}"}}
"""The transform of a response template for calls whose text contains only the arguments."""

Parse = Callable[[str, str, Sequence[Mapping[str, Any]]], Mapping[str, Any]]
"""(turn with its last token, text that the template puts before a turn, the tools' schemas) → the message: `content`
and, if there are any, `tool_calls`. It is third-party code, and may raise any exception on text that it cannot
read."""

Texts = Callable[[str, str], Sequence[str]]
"""(turn with calls and its last token, text that the template puts before a turn) → the text inside its calls, whether
or not it can be read as arguments. It may raise any exception, as `Parse`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolParser:
    """A parser and its name. `template` is its response template; None for vLLM's parsers.

    ToolParser(name="hermes", parse=parse, texts=texts, template=qwen3_template)
    """

    name: str
    parse: Parse
    texts: Texts
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
    for parser in _candidates(wanted, tokenizer, sample):
        if (wrong := _why_not(parser.parse, sample)) is None:
            return parser
        tried.append(f"{parser.name}: {wrong}")
    raise ConfigError(
        f"tool_parser is {wanted!r}, and no parser reads the call that the tokenizer's chat template renders, "
        f"{sample.turn[:300]!r} ({'; '.join(tried)}). Name a parser in tool_parser ({', '.join(_names())}, or any of "
        'vLLM\'s if it is installed), set `tokenizer.response_template`, or tool_protocol "tags".'
    )


def _candidates(wanted: str, tokenizer: PreTrainedTokenizerBase, sample: Rendered) -> Iterator[ToolParser]:
    own = getattr(tokenizer, "response_template", None)
    known = ({} if own is None else {OWN: own}) | RESPONSE_TEMPLATES
    has_vllm = importlib.util.find_spec("vllm") is not None
    if wanted != AUTO:
        if wanted in known:
            yield _by_template(wanted, tokenizer, known[wanted], sample)
            return
        names = _vllm_names() if has_vllm else []
        if wanted not in names:
            others = names or ["with vLLM installed, any of its parsers"]
            raise ConfigError(f"tool_parser is {wanted!r}; expected {AUTO}, {', '.join([*_names(), *others])}.")
        yield _by_vllm(wanted, tokenizer, sample)
        return
    for name, template in known.items():
        yield _by_template(name, tokenizer, template, sample)
    for name, mark in VLLM_FAMILIES.items():
        if has_vllm and mark in sample.turn:
            yield _by_vllm(name, tokenizer, sample)


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


def _by_template(
    name: str, tokenizer: PreTrainedTokenizerBase, template: dict[str, Any], sample: Rendered
) -> ToolParser:
    calls = template["fields"].get("tool_calls", {})
    finds_arguments = calls.get("content") == "xml-inline" and calls.get("transform") == _NAME_AND_ARGUMENTS
    settings = calls.get("content_args", {})
    marks = {key: value for key, value in calls.items() if key not in ("content_args", "transform_each")}
    as_text = marks | {"content": "text", "transform": "{content}"}
    unread = {**template, "fields": {**template["fields"], "tool_calls": as_text}}
    end = tokenizer.decode(tokenizer.encode(sample.turn, add_special_tokens=False)[-1:])

    def texts(turn: str, opening: str) -> list[str]:
        """Return the text of each call. The turn may end before the call's end."""
        read = tokenizer.parse_response(turn, unread, prefix=opening).get("tool_calls") or []
        return [call.removesuffix(end) for call in ([read] if isinstance(read, str) else read)]

    @cache
    def form() -> _ArgumentForm:
        return _ArgumentForm.of(texts(sample.turn, sample.opening)[0], settings)

    def parse(text: str, opening: str, tools: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        message = tokenizer.parse_response(text, template, prefix=opening, tools=list(tools))
        if finds_arguments and message.get("tool_calls"):
            for call in texts(text, opening):
                form().check(call)
        return message

    return ToolParser(name=name, parse=parse, texts=texts, template=template)


@dataclass(frozen=True, slots=True, kw_only=True)
class _ArgumentForm:
    """How a call is written whose arguments a pattern finds, learned from the sample call.

    The parser ignores all text that the pattern does not match. Without `check`, a call with a misspelled argument, or
    with one that is not closed, would run without that argument.
    """

    pattern: re.Pattern[str]
    quotes: Sequence[Sequence[str]]
    """The marks around a text, if texts have any: [opening, closing]."""
    opening: str
    """The start of an argument, up to its name."""
    before: str
    between: str
    after: str
    """The text before the first argument, between two, and after the last one, without white space around it."""

    @classmethod
    def of(cls, call: str, settings: Mapping[str, Any]) -> _ArgumentForm:
        """Return the form of the sample call `call`, which has two arguments."""
        pattern = re.compile(settings["tag_pattern"], re.DOTALL)
        quotes = settings.get("value_parser", {}).get("args", {}).get("string_delims", [])
        first, second = pattern.finditer(call)
        return cls(
            pattern=pattern,
            quotes=[*quotes, ('"', '"')] if quotes else [],
            opening=call[first.start() : first.start("key")],
            before=call[: first.start()].strip(),
            between=call[first.end() : second.start()].strip(),
            after=call[second.end() :].strip(),
        )

    def check(self, call: str) -> None:
        """Check the text of a call.

        Raises:
            ValueError: It has text that is no part of an argument, or an argument that is not closed.
        """
        rest, start = [], 0
        for argument in self.pattern.finditer(call):
            value = argument["value"].strip()
            cut = any(value.startswith(opens) and not value[1:].endswith(closes) for opens, closes in self.quotes)
            if cut or (self.opening and self.opening in value):
                raise ValueError(f"The argument {argument['key'][:40]!r} is not closed. Close each argument.")
            rest.append(call[start : argument.start()].strip())
            start = argument.end()
        rest.append(call[start:].strip())
        count = len(rest) - 1
        expected = [self.before, *[self.between] * (count - 1), self.after] if count else [self.before + self.after]
        for found, form in zip(rest, expected, strict=True):
            if found != form:
                raise ValueError(f"It has {found[:60]!r} where its format has {form!r}. Write each argument in full.")


def _vllm_names() -> list[str]:
    from vllm.tool_parsers import ToolParserManager

    return [name for name in ToolParserManager.list_registered() if name not in RESPONSE_TEMPLATES]


def _by_vllm(name: str, tokenizer: PreTrainedTokenizerBase, sample: Rendered) -> ToolParser:
    has_tags = _PARAMETER.search(sample.turn) is not None
    mark = VLLM_FAMILIES.get(name) or sample.turn.partition(NAME)[0].strip()

    def texts(turn: str, opening: str) -> list[str]:
        """Return the text from the first call on, since vLLM's parsers do not tell where each call is."""
        start = turn.find(mark)
        return [] if start < 0 else [turn[start:]]

    def parse(text: str, opening: str, tools: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
        from vllm.tool_parsers import ToolParserManager

        request = ChatCompletionRequest(messages=[], tools=list(tools) or None)
        found = ToolParserManager.get_tool_parser(name)(tokenizer, request.tools).extract_tool_calls(text, request)
        functions = [
            {"name": call.function.name, "arguments": json.loads(call.function.arguments)} for call in found.tool_calls
        ]
        opened = len(_PARAMETER.findall(text)) - len(_PARAMETER.findall(found.content or ""))
        if has_tags and functions and opened > (read := sum(len(function["arguments"]) for function in functions)):
            raise ValueError(f"It opens {opened} arguments, and {read} could be read. Close each argument.")
        made = [{"type": "function", "function": function} for function in functions]
        return {"role": "assistant", "content": found.content or "", "tool_calls": made}

    return ToolParser(name=name, parse=parse, texts=texts)
