"""`TagProtocol`, the paper's tool protocol, for any model: the tool's name is a tag.

the model writes   <search>melting point of iron</search>          a turn, ended by a stop string
it then sees       <result> … </result>                            an observation
and finally writes <answer>… \\boxed{1811} …</answer> and EOS       the last turn
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from operator import itemgetter
from typing import Any

from transformers import PreTrainedTokenizerBase

from arpo_trl.common.tags import CODE_PARAMETER, plain_spans
from arpo_trl.errors import ConfigError
from arpo_trl.rollout.protocols.base import BadCall, ToolProtocol, filled
from arpo_trl.rollout.protocols.parsers import AUTO
from arpo_trl.rollout.text import decode_exactly
from arpo_trl.tools.calls import ToolCall
from arpo_trl.tools.spec import RESERVED_TAGS, ToolSpec
from arpo_trl.visible import get_logger

logger = get_logger(__name__)
ANSWER, RESULT = "answer", "result"


class TagProtocol(ToolProtocol):
    """Tool calls as tags: the tool's name is the tag, and its one text argument is the text between the tags.

    Raises:
        ToolSpecError: A tool does not have exactly one required text argument.
        ConfigError: `tool_parser` is set, although it applies only to chat templates, or the tokenizer changes text.
    """

    results_open_turns = False  # a result is text in the model's message

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tools: Mapping[str, ToolSpec], **settings: Any):
        self._parameters = {name: spec.tag_parameter for name, spec in tools.items()}
        self._told_of_two_starts = False
        super().__init__(tokenizer, tools, **settings)
        if self._wanted_parser != AUTO:
            raise ConfigError(
                f'tool_parser is {self._wanted_parser!r}, but tool_protocol is "tags". Parsers of chat templates '
                f'do not read its calls. Leave tool_parser at {AUTO!r}, or set tool_protocol "chat_template".'
            )
        self.stop_strings = tuple(f"</{name}>" for name in tools)
        self._result_open = self._encode_exactly(f"\n<{RESULT}>\n")
        self._result_close = self._encode_exactly(f"\n</{RESULT}>\n")
        for name in tools:
            self._encode_exactly(f"<{name}>\na b:\n    c\n</{name}>")
        known = "|".join(map(re.escape, [*tools, *sorted(RESERVED_TAGS)]))
        self._known_tag = re.compile(rf"</?({known})>")
        self._tool_tag = re.compile(rf"<(/?)({'|'.join(map(re.escape, tools))})>" if tools else r"(?!)")
        self._code_tools = {name for name, parameter in self._parameters.items() if parameter == CODE_PARAMETER}
        self._unknown_call = re.compile(rf"<(?!/|(?:{known})>)([A-Za-z_]\w*)>[^<]*</\1>")

    def encode_prompt(self, prompt: str | Sequence[Mapping[str, Any]]) -> list[int]:
        """Return the prompt's ids: messages with the chat template, plain text unchanged."""
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
            if ids[:2] == [self.tokenizer.bos_token_id] * 2 and not self._told_of_two_starts:
                self._told_of_two_starts = True
                logger.warning(
                    f"A text prompt starts with {self.tokenizer.bos_token!r}, as texts of apply_chat_template do, and "
                    "the tokenizer adds it once more, in TRL's GRPOTrainer too. Models are trained with one. Give the "
                    "messages as prompts, or remove the token from the texts."
                )
            return ids
        if self.tokenizer.chat_template is None:
            raise ConfigError(
                "The prompts are messages, but the tokenizer has no chat template. Set `tokenizer.chat_template = …` "
                "and save the tokenizer, or use the instruct version of the model. arpo-trl sft: set "
                "chat_template_path."
            )
        return self.tokenizer.apply_chat_template(
            filled(prompt), add_generation_prompt=True, return_dict=False, **self.chat_template_kwargs
        )

    def encode_turn(self, text: str, *, last: bool) -> list[int]:
        """Return the ids of a demonstration's turn, with special tokens, and with EOS after the last turn."""
        return self._encode(text) + ([self.tokenizer.eos_token_id] if last else [])

    def encode_observation(self, results: Sequence[tuple[str, str]], end: int | None = None) -> list[int]:
        ids: list[int] = []
        for _, text in results:
            ids += self._result_open + self._encode_content(text) + self._result_close
        return ids

    def parse_turn(self, text: str, end: int | None = None) -> Sequence[ToolCall | BadCall]:
        """Return the call at the end of `text`. A turn has at most one, since the closing tag ends the turn."""
        call = self._parse_call(text)
        return () if call is None else (call,)

    def continues_after(self, text: str) -> bool:
        """Whether `text` ends inside code, which only the code tool's own closing tag ends, or at the closing tag of
        a tool that is offered to other prompts only, which is plain text here."""
        if not any(tag.group(1) for tag in self._tool_tag.finditer(text)):
            return True
        spans = plain_spans(text, self.tools, self._code_tools)
        return bool(spans) and spans[-1][1] == len(text)

    def as_message(self, ids: Sequence[int], before: Sequence[int]) -> dict[str, Any]:
        """Return the turn as TRL's tool loop does, but with the tags in the content: they are plain text here."""
        message = super().as_message(ids, before)
        calls = self.parse_turn(decode_exactly(self.tokenizer, ids))
        if made := [call for call in calls if isinstance(call, ToolCall)]:
            functions = [{"name": call.name, "arguments": call.arguments} for call in made]
            message["tool_calls"] = [{"type": "function", "function": function} for function in functions]
        return message

    def limit_notice(self) -> str:
        return f"{super().limit_notice()[:-1]}: <{ANSWER}>…</{ANSWER}>"

    def _parse_call(self, text: str) -> ToolCall | BadCall | None:
        spans = plain_spans(text, self.tools, self._code_tools)
        found = list(self._tool_tag.finditer(text))
        ending = next((tag for tag in reversed(found) if tag.group(1)), None)
        tags = [tag for tag in found if not _within(tag, spans)]
        last = next((i for i in range(len(tags) - 1, -1, -1) if tags[i].group(1)), -1)
        if last < 0 or tags[last] is not ending:
            return self._missing_close(text, tags[last + 1 :], ending)
        close, name = tags[last], tags[last].group(2)
        first = next((i for i in range(last - 1, -1, -1) if tags[i].group(2) == name), None)
        if first is None and last > 0 and not tags[last - 1].group(1):
            return self._missing_close(text, tags[last - 1 : last], close)
        if first is None or tags[first].group(1):
            return BadCall(fault="unopened", text=f"Error: </{name}> came without <{name}>. {self._usage(name)}")
        body = text[tags[first].end() : close.start()]
        open_before = Counter(tag.group(2) for tag in tags[:first] if not tag.group(1))
        open_before.subtract(tag.group(2) for tag in tags[:first] if tag.group(1))
        if outer := next((outer for outer, count in open_before.items() if count > 0), None):
            return BadCall(
                fault="nested",
                text=f"Error: <{name}> stands inside <{outer}>, which was not closed. {self._usage(name)}",
            )
        if name not in self._code_tools and (inner := self._known_tag.search(body)):
            return BadCall(fault="nested", text=f"Error: {inner.group()} stands inside <{name}>. {self._usage(name)}")
        if not body.strip():
            return BadCall(fault="empty", text=f"Error: the {name} call is empty. {self._usage(name)}")
        return ToolCall(name=name, arguments={self._parameters[name]: body.strip()})

    def _missing_close(
        self, text: str, opened: Sequence[re.Match[str]], ending: re.Match[str] | None
    ) -> BadCall | None:
        """Return the fault of a turn whose end closes no call.

        Args:
            text: The turn.
            opened: The opening tags outside code that were not closed.
            ending: The last closing tag of a tool, which is inside code; None if there is none.
        """
        if ending is None and f"</{ANSWER}>" in text:
            return None
        if opened:
            name = opened[0].group(2)
            cause = "" if ending is None else f": {ending.group()} does not close it"
            return BadCall(fault="unclosed", text=f"Error: <{name}> was not closed{cause}. {self._usage(name)}")
        if self.tools and (unknown := self._unknown_call.search(text)) is not None:
            names = ", ".join(self.tools)
            return BadCall(
                fault="unknown_tool", text=f"Error: there is no tool {unknown.group(1)[:40]!r}. Tools: {names}."
            )
        return None

    def _usage(self, name: str) -> str:
        return f"Write <{name}>…</{name}>."


def _within(tag: re.Match[str], spans: Sequence[tuple[int, int]]) -> bool:
    """Whether one of the sorted `spans` contains the tag."""
    place = bisect_right(spans, tag.start(), key=itemgetter(0)) - 1
    return place >= 0 and tag.end() <= spans[place][1]
