"""`ChatTemplateProtocol`, for models that were trained to call tools with their chat template.

Calls and results have the format of the tokenizer's chat template. A turn can contain several calls. The protocol
learns the template from a sample conversation that it renders (`sample.py`), never from the template's source.

    prompt | <tool_call>{…}</tool_call><|im_end|> | \\n<|im_start|>user\\n<tool_response>… | answer <|im_end|>
            a turn with the id that ended it       an observation: all that follows        the last turn
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase

from arpo_trl.common.tags import without
from arpo_trl.common.user_files import is_deeper
from arpo_trl.errors import ConfigError
from arpo_trl.rollout.protocols import sample
from arpo_trl.rollout.protocols.base import ARGUMENT_DEPTH, BadCall, ToolProtocol, filled
from arpo_trl.rollout.protocols.parsers import Rendered, ToolParser, fitting_parser
from arpo_trl.rollout.text import decode_exactly
from arpo_trl.tools.calls import ToolCall
from arpo_trl.tools.spec import ToolSpec
from arpo_trl.tools.texts import for_models
from arpo_trl.visible import with_texts

RESULT = "[result]"
_NESTED_THOUGHTS = 3
"""The depth of thoughts in thoughts that is searched for a call."""
_WAY_OUT = (
    'Set tool_protocol "tags", which works with every template, or give the tokenizer a template with tools, such as '
    "the one in trl/chat_templates for its family."
)


class ChatTemplateProtocol(ToolProtocol):
    """Tool calls and results in the format of the tokenizer's chat template.

    The tools' schemas are part of the prompt. A tool can have any arguments that its schema can describe.

    Raises:
        ConfigError: The tokenizer has no chat template. Or its template does not show calls or results, no parser can
            read its calls, or its ids differ from those of a rollout.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: Mapping[str, ToolSpec], **settings: Any):
        super().__init__(tokenizer, tools, **settings)
        if tokenizer.chat_template is None:
            raise ConfigError(
                'tool_protocol is "chat_template" but the tokenizer has no chat template. Set '
                "`tokenizer.chat_template = …` and save the tokenizer, or use the instruct version of the model."
            )
        try:
            self._prompt = self._template.render([sample.user()], opens_turn=True)
            self._opening = self._prompt[len(self._template.render([sample.user()])) :]
            self._form = self._argument_form()
            self._several = self._shows_several_calls()
            self._call_end = self._end_of_call()
            self.eos_ids = tuple(dict.fromkeys((self._id(self._call_end), *self.eos_ids)))
            turn = self._sample_turn(self._exchange((sample.NAME,), [RESULT], self._form))
            self.tool_parser: ToolParser = fitting_parser(
                self._wanted_parser, tokenizer, Rendered(turn=turn, opening=self._opening)
            )
            self._suffix = lru_cache(maxsize=1000)(self._render_suffix)  # the model may write any names
            for name in tools or (sample.NAME,):
                self._suffix((name,))
                self._compare(name)
        except ConfigError:
            raise
        except Exception as error:  # a template is foreign code and can raise anything
            raise ConfigError(
                f"The tokenizer's chat template does not work for tool calls ({type(error).__name__}: {error}). "
                + self._way_out()
            ) from error
        if self.tool_parser.template is not None:
            # a copy: TRL changes the decoding of a trainer's tokenizer that has a response template
            self._parser = copy.copy(tokenizer)
            self._parser.response_template = self.tool_parser.template

    def encode_prompt(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """Apply the chat template to the messages and the tools' schemas."""
        if isinstance(prompt, str):
            raise ConfigError(
                f'tool_protocol is "chat_template" but a prompt is plain text ({prompt[:40]!r}…). Give prompts as '
                'lists of messages, or set tool_protocol "tags".'
            )
        return self.tokenizer.apply_chat_template(
            filled(prompt),
            tools=self._schemas or None,
            add_generation_prompt=True,
            return_dict=False,
            **self.chat_template_kwargs,
        )

    def parse_turn(self, text: str, end: int | None = None) -> Sequence[ToolCall | BadCall]:
        """Return the calls of a turn, read by `tool_parser`.

        Parsers know only the end tokens that the template writes. Any other id at the end of a turn, such as a base
        model's `<|endoftext|>`, is replaced by the end token of a call.
        """
        ended = text + self._written_end(end)
        try:
            message = self.tool_parser.parse(ended, self._opening, self._schemas)
            calls = message.get("tool_calls") or ()
        except Exception as error:  # the parser is foreign code, and the model may write anything
            reason = str(error).partition("\n")[0][:200]
            return (BadCall(fault="malformed", text=f"Error: the tool call could not be read: {reason}"),)
        if not calls and (thought := self._thought_with_call(message)) is not None:
            is_open = ended.rstrip().endswith(thought.rstrip()) or text.rstrip().endswith(thought.rstrip())
            if is_open or not message.get("content"):
                where = "inside a thought that was not closed" if is_open else "inside a thought"
                problem = f"Error: the tool call was not made, because it stands {where}. "
                return (BadCall(fault="in_thought", text=problem + "Close the thought, then call the tool."),)
        if not calls and self._only_ends_a_call(message, end):
            return (
                BadCall(
                    fault="malformed",
                    text="Error: the turn ended like a tool call, but no call could be read. Write the call in the "
                    "format of the tools, or the final answer.",
                ),
            )
        return tuple(map(self._checked, calls))

    def without_calls(self, text: str, end: int | None = None) -> str:
        if not self.parse_turn(text, end):
            return text
        written_end = self._written_end(end)
        ended = text + written_end
        try:
            calls = self.tool_parser.texts(ended, self._opening)
        except Exception:  # the parser is foreign code, and the model may write anything
            return text
        spans: list[tuple[int, int]] = []
        start = len(ended)
        for call in reversed(calls):  # from the end, since the text before the calls may quote one
            if call and (start := ended.rfind(call, 0, start)) >= 0:
                spans.insert(0, (start, start + len(call)))
        return without(ended, spans).removesuffix(written_end)

    def encode_observation(self, results: Sequence[tuple[str, str]], end: int | None = None) -> list[int]:
        """Return all text that the template writes between the token that ended the turn and the next turn.

        In some families the token that starts the result also ends the call (`<|observation|>`). If another id ended
        the turn, that token comes first.
        """
        wrappers, escaped = self._suffix(tuple(name for name, _ in results))
        opens_result = self._call_end != self._answer_end
        ended_otherwise = end in self.eos_ids and end != self._id(self._call_end)
        ids = [self._id(self._call_end)] if opens_result and ended_otherwise else []
        ids += wrappers[0]
        for (_, text), wrapper in zip(results, wrappers[1:], strict=True):
            ids += self._encode_content(_inside_json(text) if escaped else text) + wrapper
        return ids

    def as_message(self, ids: Sequence[int], before: Sequence[int]) -> dict[str, Any]:
        # JSON's escapes can write half of a surrogate pair.
        message: dict[str, Any] = with_texts(for_models, self._as_parsed(list(ids), before))
        return message

    def _as_parsed(self, ids: list[int], before: Sequence[int]) -> dict[str, Any]:
        if ids and ids[-1] in self.eos_ids:
            ids[-1] = self._id(self._written_end(ids[-1]))
        if self.tool_parser.template is not None:
            return super().as_message(ids, before)
        try:
            message = dict(self.tool_parser.parse(decode_exactly(self.tokenizer, ids), self._opening, self._schemas))
        except Exception:  # the parser is foreign code, and the model may write anything
            return super().as_message(ids, before)
        if is_deeper(message["tool_calls"], ARGUMENT_DEPTH + 3):
            message["tool_calls"] = []
        shown = self.tokenizer.encode(message["content"], add_special_tokens=False)
        message["content"] = self.tokenizer.decode(shown, skip_special_tokens=True)
        if not message["tool_calls"]:
            del message["tool_calls"]
        return message

    def _written_end(self, end: int | None) -> str:
        """Return the token that ended the turn if the template ends answers with it, otherwise the end of a call."""
        written = self._call_end if end is None else str(self.tokenizer.convert_ids_to_tokens(end))
        return written if written == self._answer_end else self._call_end

    def _only_ends_a_call(self, message: Mapping[str, Any], end: int | None) -> bool:
        """Whether the turn ended with a token that ends calls only, and has no text."""
        if self._call_end == self._answer_end or end != self._id(self._call_end):
            return False
        return not str(message.get("content") or "").replace(self._call_end, "").strip()

    def _thought_with_call(self, message: Mapping[str, Any]) -> str | None:
        """Return the thought of the turn if it contains a call, otherwise None.

        A model may open another thought inside a thought that the prompt opened.
        """
        thought = inner = _thought_in(message)
        for _ in range(_NESTED_THOUGHTS):
            if inner is None:
                break
            try:
                message = self.tool_parser.parse(inner, "", self._schemas)
            except Exception:  # no call
                break
            if message.get("tool_calls"):
                return thought
            inner = _thought_in(message)
        return None

    def _checked(self, call: Any) -> ToolCall | BadCall:
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            return BadCall(fault="malformed", text="Error: a tool call needs a name and arguments.")
        name = for_models(function["name"])
        spec = self.tools.get(name)
        needs_none = spec is None or not spec.parameters  # the text for an unknown tool names the others
        if set(function) != {"name", "arguments"} and not (needs_none and set(function) == {"name"}):
            keys = ", ".join(map(str, function))[:80]
            return BadCall(
                fault="malformed",
                text=f"Error: the call of {name[:40]!r} has {keys!r}; a call has exactly a name and arguments.",
            )
        arguments = function.get("arguments", {})
        if is_deeper(arguments, ARGUMENT_DEPTH):
            return BadCall(
                fault="malformed",
                text=f"Error: the arguments of {name[:40]!r} are nested more than {ARGUMENT_DEPTH} deep.",
            )
        arguments = with_texts(for_models, arguments)
        if not isinstance(arguments, dict) or not all(isinstance(key, str) for key in arguments):
            return BadCall(fault="malformed", text=f"Error: the arguments of {name[:40]!r} must be an object.")
        return ToolCall(name=name, arguments=arguments)

    # What the template does ------------------------------------------------------------------------------------------

    def _way_out(self) -> str:
        """Return why a template cannot render calls, if it has no tools, and the remedy."""
        prompt = getattr(self, "_prompt", "")
        has_none = self.tools and not any(name in prompt for name in self.tools)
        return ("It has no tools: the prompt that it renders names none of them. " if has_none else "") + _WAY_OUT

    def _argument_form(self) -> sample.Arguments:
        """Return the form in which the template takes arguments: unchanged, or as JSON text (DeepSeek)."""
        shown, error = False, None
        for form in sample.ARGUMENT_FORMS:
            try:
                text = self._exchange((sample.NAME,), [RESULT], form)
            except TypeError as reason:
                error = reason
                continue
            if sample.NAME in text and sample.WORDS[0] in text:
                shown = True
                if RESULT in text.rpartition(sample.WORDS[0])[2]:
                    return form
        if error is not None and not shown:
            raise error
        missing = "tool results after a tool call" if shown else "tool calls"
        raise ConfigError(f"The tokenizer's chat template does not show {missing}. {self._way_out()}")

    def _shows_several_calls(self) -> bool:
        names = (sample.NAME, sample.NAME)
        try:
            text = self._exchange(names, [RESULT, RESULT], self._form)
        except Exception:  # Llama's: "only single tool-calls at once"
            return False
        return all(words in text for words in sample.WORDS)

    def _end_of_call(self) -> str:
        after_call = self._exchange((sample.NAME,), [RESULT], self._form).rpartition(sample.WORDS[0])[2]
        after_call = after_call.partition(RESULT)[0]
        between = ""
        if self._several:
            text = self._exchange((sample.NAME, sample.NAME), [RESULT, RESULT], self._form)
            between = text.partition(sample.WORDS[0])[2].partition(sample.WORDS[1])[0]
        end = self._template.end_of_call(after_call, between, self._known_ends, self._answer_end)
        if not end:
            raise ConfigError(
                f"The tokenizer's chat template writes {after_call!r} between a call's last argument and its result. "
                "It contains no token of the tokenizer that could end the turn. Give the tokenizer the model's "
                'special tokens, or set tool_protocol "tags".'
            )
        return end

    def _exchange(self, names: Sequence[str], texts: Sequence[str], form: sample.Arguments) -> str:
        messages = [sample.user(), sample.calls(names, form), *sample.results(names, texts)]
        return self._template.render(messages, opens_turn=True)

    def _sample_turn(self, text: str) -> str:
        """Return the turn in the exchange `text`: its part after the common prefix with the prompt."""
        return text[self._template.shared(text, self._prompt) : self._cut(text)]

    def _cut(self, text: str) -> int:
        """Return the end of the last turn with calls in `text`."""
        last = max(text.rfind(words) for words in sample.WORDS)
        return text.index(self._call_end, last) + len(self._call_end)

    def _render_suffix(self, names: tuple[str, ...]) -> tuple[list[list[int]], bool]:
        """Return the ids around the results of the calls `names`, and whether the template renders results as JSON."""
        marks = [f'[result "{i}"]' for i in range(len(names))]  # the quotes show whether the template escapes it
        # The end of the calls is found by their words, and some templates repeat a call's name in its result.
        names = tuple(sample.NAME if any(words in name for words in sample.WORDS) else name for name in names)
        calling = names if self._several else names[:1]
        messages = [sample.user(), sample.calls(calling, self._form), *sample.results(names, marks)]
        text = self._template.render(messages, opens_turn=True)
        rest = text[self._cut(text) :]
        escaped = marks[0] not in rest
        parts = []
        for mark in marks:
            part, found, rest = rest.partition(_inside_json(mark) if escaped else mark)
            if not found:
                raise ConfigError(
                    "The tokenizer's chat template does not show all results of a turn's tool calls. Use a model "
                    'whose template does, or set tool_protocol "tags".'
                )
            parts.append(part)
        return [self._encode(part) for part in (*parts, rest)], escaped

    def _compare(self, name: str) -> None:
        """Check that a call of `name` and its result have the same ids in a rollout and in the template's text.

        The text is encoded in parts, as in a rollout: the model's turn, the result's content, and the text around it.

        Raises:
            ConfigError: The ids differ.
        """
        text = self._exchange((name,), [RESULT], self._form)
        turn = self._sample_turn(text)
        text = text[self._cut(text) - len(turn) :]
        before, _, after = text.partition(RESULT)
        expected = self._encode(before) + self._encode_text(RESULT) + self._encode(after)
        written = self._encode(turn)
        made = written + self.encode_observation([(name, RESULT)], written[-1])
        read = decode_exactly(self.tokenizer, made)
        if made != expected or read != text:
            raise ConfigError(
                f"A call of {name!r} and its result have different ids in a rollout and in the chat template's text. "
                f"The template: {text!r}, the ids {_shown(self.tokenizer, expected)}. The rollout: {read!r}, the ids "
                f"{_shown(self.tokenizer, made)}. Use the tokenizer that the model was trained with, or set "
                'tool_protocol "tags".'
            )

    def _id(self, token: str) -> int:
        return int(self.tokenizer.convert_tokens_to_ids(token))


def _thought_in(message: Mapping[str, Any]) -> str | None:
    thought = message.get("reasoning_content") or message.get("thinking")
    return thought if isinstance(thought, str) else None


def _shown(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return " ".join(map(repr, tokenizer.convert_ids_to_tokens(list(ids))))


def _inside_json(text: str) -> str:
    """The text as it appears between the quotes of a JSON string."""
    return json.dumps(text, ensure_ascii=False)[1:-1]
